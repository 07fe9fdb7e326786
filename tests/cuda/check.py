"""Compiles the CUDA kernels for Hopper, without a GPU, and prints what each takes. Run by `make cuda-check`.

PYTHONPATH=. python tests/cuda/check.py [--watchdog] [--json]

A line a kernel: registers and threads, spilled bytes, shared memory, barriers; and of its instructions the matrix
products, the box copies, those on local memory. Exit status 1 where a kernel of the table is missing, or spills, or has
no products or boxes that should, or traps without being asked, or where the assembler says that it made products wait
for each other or left the registers as they were. 2 where there is no nvcc, or nothing that reads what it wrote.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Distribution

import setup

MODES = ("nearest", "statistics", "keep1", "keep2", "keep4", "weights", "keys", "mean")  # csrc/cuda/params.h
NOISES = ("quiet", "one-field", "any-noise")  # csrc/cuda/rows.h
TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16"}
NOISES_OF = {"nearest": NOISES[:1], "statistics": NOISES, "weights": NOISES}  # csrc/cuda/score.cu
WANTED = [
    f"score {dtype} {mode} {noise}"
    for dtype in TYPES.values() for mode in MODES[:-1] for noise in NOISES_OF.get(mode, NOISES[2:])
]  # fmt: skip
WANTED += [f"{kernel} {dtype}" for kernel in ("narrow", "stream") for dtype in TYPES.values()]

INSTRUCTIONS = {"products": "HGMMA", "boxes": "UTMALDG", "local": "LDL|STL", "traps": "BPT"}
REGISTERS = 65536  # of a multiprocessor; a warp takes multiples of 256
SHARED = 227 << 10  # bytes of a block, static and dynamic
# That a fence was put in (C7519) costs nothing; that a wait was (C7517) does.
COSTLY = re.compile(r"\(C75\d\d\) Potential Performance Loss|\(C7517\)|serialized")


class CannotCheck(Exception):
    """Why nothing can be compiled or read here."""


# --- what is compiled: the objects of the library itself


def compile_kernels(watchdog: bool) -> list[Path]:
    """Where `make build` leaves them: nothing is compiled twice."""
    command = Distribution().get_command_obj("build")
    command.ensure_finalized()
    name = "cuda_watchdog" if watchdog else "cuda"
    folder, flags = setup.ROOT / command.build_temp / name, [setup.WATCHDOG_FLAG] * watchdog
    objects = [folder / f"{Path(source).stem}.o" for source in setup.cuda_sources()]
    text = setup.cuda_ninja_file(folder / setup.LIBRARIES[name].file, *flags)
    setup.run_ninja(folder, text, [path.name for path in objects])
    return objects


def find_cuobjdump() -> str:
    """The toolkit's, or that which comes with Triton."""
    folders = [setup.find_toolkit(setup.find_nvcc()) / "bin"]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    found = next(filter(None, (shutil.which("cuobjdump", path=str(folder)) for folder in folders)), None)
    found = found or shutil.which("cuobjdump")
    if not found:
        raise CannotCheck("no cuobjdump found: it comes with the CUDA toolkit, and with triton")
    return found


# --- what the tools say, by the mangled names of kernels


def read_log(text: str) -> dict[str, dict[str, int]]:
    """Of `ptxas -v`."""
    kernels = {}
    for part in text.split("Compiling entry function '")[1:]:
        numbers = {
            "registers": r"Used (\d+) registers",
            "barriers": r"used (\d+) barriers",
            "static": r"(\d+) bytes smem",
        }
        numbers |= {"stores": r"(\d+) bytes spill stores", "loads": r"(\d+) bytes spill loads"}
        read = {name: re.search(pattern, part) for name, pattern in numbers.items()}
        if not (read["registers"] and read["stores"] and read["loads"]):
            raise CannotCheck(f"ptxas does not say as usual what a kernel takes: {part[:400]}")
        row = {name: int(found[1]) if found else 0 for name, found in read.items()}
        row["spilled"] = row.pop("stores") + row.pop("loads")
        kernels[part.partition("'")[0]] = row
    return kernels


def costly_messages(text: str) -> list[str]:
    return [line.partition(" : ")[2].strip() for line in text.splitlines() if COSTLY.search(line)]


def count_instructions(text: str) -> dict[str, dict[str, int]]:
    """Of `cuobjdump -sass`."""
    parts = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]
    return {
        part.split(maxsplit=1)[0]: {
            kind: len(re.findall(rf"\b(?:{name})\b", part)) for kind, name in INSTRUCTIONS.items()
        }
        for part in parts
    }


def read_threads(text: str) -> dict[str, int]:
    """Of `cuobjdump -elf`: the threads of a block, where the kernel names its launch bounds."""
    kernels = {}
    for part in re.split(r"^\.nv\.info\.", text, flags=re.MULTILINE)[1:]:
        found = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", part)
        if found:
            x, y, z = (int(number, 16) for number in found.groups())
            kernels[part.split(maxsplit=1)[0]] = x * y * z
    return kernels


def short_name(demangled: str) -> str:
    """score fp16 weights quiet: of score_kernel<__half, (smoothie::cuda::Mode)5, (smoothie::cuda::Noise)0>(...)"""
    found = re.search(r"(\w+?)(?:_kernel)?(?:<(.*?)>)?\(", demangled.replace("(anonymous namespace)", ""))
    if not found:
        return demangled
    words = [found[1]]
    for argument in found[2].split(", ") if found[2] else []:
        number = re.fullmatch(r"\(smoothie::cuda::(Mode|Noise)\)(\d+)", argument)
        names = MODES if number and number[1] == "Mode" else NOISES
        words.append(names[int(number[2])] if number else TYPES.get(argument, argument))
    return " ".join(words)


def demangle(names: list[str]) -> list[str]:
    if not shutil.which("c++filt"):
        raise CannotCheck("no c++filt found: it comes with the linker, in binutils")
    return _output(["c++filt"], input="\n".join(names)).splitlines()


# --- the table


def rows_of(log: str, code: str, attributes: str) -> list[dict[str, Any]]:
    """Of one object."""
    usage, counts, threads = read_log(log), count_instructions(code), read_threads(attributes)
    if usage.keys() != counts.keys():
        raise CannotCheck(f"the log and the object have other kernels: {sorted(usage.keys() ^ counts.keys())}")
    rows = []
    for name, demangled in zip(usage, demangle(list(usage)), strict=True):
        row = {"kernel": short_name(demangled), **usage[name], "threads": threads.get(name, 0), **counts[name]}
        rows.append({**row, "faults": faults(row)})
    return sorted(rows, key=lambda row: str(row["kernel"]))


def is_product(kernel: str) -> bool:
    return kernel.split()[0] in ("score", "narrow", "stream")


def faults(row: dict[str, Any]) -> list[str]:
    found = []
    if row["spilled"]:
        found.append(f"spills {row['spilled']} bytes")
    if row["local"]:
        found.append(f"{row['local']} instructions on local memory")
    threads = row["threads"] or 1024
    if -(-row["registers"] // 8) * 8 * threads > REGISTERS:
        bounds = "" if row["threads"] else " that it may be launched with: it has no launch bounds"
        found.append(f"has not {row['registers']} registers for each of {threads} threads{bounds}")
    if is_product(row["kernel"]):
        found += [f"has no {what} (no {INSTRUCTIONS[what]})" for what in ("products", "boxes") if not row[what]]
    if row["static"] + (dynamic_bytes() if is_product(row["kernel"]) else 0) > SHARED:
        found.append("takes more shared memory than a block has")
    return found


def missing(rows: list[dict[str, Any]]) -> list[str]:
    """Arguments after those of the table make no other kernel."""
    names = [row["kernel"] + " " for row in rows]
    return [wanted for wanted in WANTED if not any(name.startswith(wanted + " ") for name in names)]


def dynamic_bytes() -> int:
    """kSharedBytes of params.h, what the kernels that multiply are launched with; 0 where there is no such constant."""
    found = re.search(r"\bkSharedBytes = (\d+);", (setup.ROOT / "csrc/cuda/params.h").read_text())
    return int(found[1]) if found else 0


def check(watchdog: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """The kernels, each with its faults, and the faults that are of no kernel."""
    cuobjdump, rows, general = find_cuobjdump(), [], []
    for path in compile_kernels(watchdog):
        log = Path(f"{path}.log").read_text()
        rows += rows_of(log, *(_output([cuobjdump, option, str(path)]) for option in ("-sass", "-elf")))
        general += [f"{path.stem}.cu: {message}" for message in costly_messages(log)]
    for row in rows:
        if bool(row["traps"]) != (watchdog and is_product(row["kernel"])):
            row["faults"].append("has a watchdog" if row["traps"] else "has no watchdog")
    return rows, [*(f"{name} is not there" for name in missing(rows)), *general]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watchdog", action="store_true", help="of the library that SMOOTHIE_WATCHDOG=1 builds")
    parser.add_argument("--json", action="store_true", help="the table as JSON")
    arguments = parser.parse_args()
    try:
        rows, general = check(arguments.watchdog)
    except (CannotCheck, setup.LeftOut) as reason:
        print(f"cannot check the CUDA kernels: {reason}", file=sys.stderr)
        return 2
    except setup.CannotBuild as reason:
        print(f"cannot compile the CUDA kernels: {reason}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"kernels": rows, "faults": general}))
    else:
        print("\n".join([*map(_line, rows), *general]))
    return int(bool(general) or any(row["faults"] for row in rows))


def _line(row: dict[str, Any]) -> str:
    shared = f"{row['static']:>5}"
    if is_product(row["kernel"]) and dynamic_bytes():
        shared += f" + {dynamic_bytes()}"
    numbers = f"{row['registers']:>4} registers x {row['threads'] or '?':>4} threads {row['spilled']:>4} spilled"
    numbers += f" {shared:<14} bytes shared {row['barriers']:>2} barriers"
    counts = f"{row['products']:>4} products {row['boxes']:>2} boxes {row['local']:>3} local"
    return f"{row['kernel']:<32} {numbers} {counts}  {'; '.join(row['faults'])}".rstrip()


def _output(command: list[str], input: str = "") -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, input=input).stdout


if __name__ == "__main__":
    sys.exit(main())

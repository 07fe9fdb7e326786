"""Calls for a machine with a GPU. Each ends within --seconds, is useful without the others, and loses nothing when
something fails: every probe and case runs in a process of its own, and every result is written at once.

    pack       before: what the machine will need, gathered in build/device
    probe      are the kernels right? `smoothie-kernels check`, then the tests
    measure    the step against what people use instead
    models     whole training steps and calls of the sampler

The results of a call are one archive in the folder --out. `--rehearse` makes the call on a machine without a GPU: small
cases, Triton's interpreter, the emulator of Hopper.
"""

import argparse
import json
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common import machine
from benchmarks.common.embeddings import Material, load_material, synthetic
from benchmarks.common.machine import ROOT, Machine
from benchmarks.common.report import WRONG, Report, Row
from benchmarks.hopper import bars, rates, rehearsal, worker
from benchmarks.step import cases
from smoothie_kernels.backends import cuda
from smoothie_kernels.check.isolate import run_command

SECONDS = 240.0
REHEARSAL = "benchmarks.hopper.rehearsal"  # a module with a function `prepare`
PACKED = ROOT / "build" / "device"  # git-ignored: to be taken along, with LIBRARIES
RUNS = ROOT / "build" / "device-runs"  # of every call a folder, before it is an archive
MATERIAL, GOLDEN, COMMIT = PACKED / "material.pt", PACKED / "golden", machine.STAMP
SHARED_GOLDEN = ROOT.parent / "shared" / "golden"
LIBRARIES = (cuda.LIBRARY.with_name("libsmoothie_kernels_cpu.so"), cuda.LIBRARY, cuda.WATCHDOG_LIBRARY)
MOST_PACKED = 64 * 2**20  # bytes, with all files of the project

CHECK_SECONDS, LEAST_SECONDS = 100.0, 15.0  # for the probes; what must be left for another thing to begin
TESTS = tuple(
    f"tests/kernels/test_{name}.py"
    for name in ("cuda", "cuda_edges", "cuda_topk", "cuda_gpu", "triton", "triton_chunked", "triton_topk", "noise",
                 "nearest", "forward", "backward", "topk", "vocabulary", "library")
)  # fmt: skip
TEST_SECONDS, ALONE_AT_ONCE = 60, 8  # for one test; tests that are tried again at the same time, each alone
CASES_AT_ONCE = 8  # that are checked
CASE_BYTES = 16 * 2**30  # of the GPU, for one: ten tensors of N x V in float32
MODELS = (  # command, case, seconds: the paper's model first
    ("training", "train-12x768", 100.0), ("sampling", "sample-12x768", 80.0), ("training", "train-4x384", 60.0),
    ("sampling", "sample-4x384", 60.0),
)  # fmt: skip
SMALL_MODELS = (("training", "train-4x384-small", 100.0), ("sampling", "sample-4x384-one", 100.0))  # in a rehearsal


@dataclass
class Call:
    """One of the calls, and what all of its parts need."""

    machine: Machine
    device: str
    folder: Path  # for everything that is written
    begin: float
    end: float
    rehearsed: str = ""  # the module that stands in for a GPU
    patterns: tuple[str, ...] = ("*",)
    failed: list[str] = field(default_factory=list)

    @property
    def env(self) -> Mapping[str, str]:
        common = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "SMOOTHIE_GOLDEN": str(GOLDEN)}
        return common | ({"TRITON_INTERPRET": "1"} if self.rehearsed else {})

    def wants(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.patterns)

    def left(self) -> float:
        return self.end - time.monotonic()

    def says(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begin:5.0f} s] {text}", flush=True)

    def run(self, name: str, command: list[str], seconds: float, fine: tuple[int, ...] = (0,), **env: str) -> None:
        """A command with its output in a file, where there is time for it. `fine`: exit codes."""
        seconds = min(seconds, self.left())
        if seconds < LEAST_SECONDS:
            self.says(f"{name}: left out, no time")
            self.failed.append(f"{name}: left out")
            return
        self.says(f"{name}: at most {seconds:.0f} s")
        ended = run_command([sys.executable, *command], seconds, self.folder / f"{name}.txt", {**self.env, **env}, ROOT)
        self.says(f"{name}: {ended}\n{ended.tail}")
        if ended.code not in fine:
            self.failed.append(f"{name}: {ended}")


# --- before


def pack() -> int:
    """What the calls read, and the libraries, are here: says what has to be taken along."""
    shutil.rmtree(PACKED, ignore_errors=True)
    PACKED.mkdir(parents=True)
    material = load_material(None)
    note = f"{material.note}; rounded to bfloat16"
    Material(material.table.bfloat16(), material.tokens, note).save(MATERIAL)
    if SHARED_GOLDEN.is_dir():
        shutil.copytree(SHARED_GOLDEN, GOLDEN, dirs_exist_ok=True)
    COMMIT.write_text(machine.commit() + "\n", encoding="utf-8")
    missing = [path for path in (*LIBRARIES, GOLDEN) if not path.exists()]
    for path in missing:
        print(f"missing: {path.relative_to(ROOT)} (SMOOTHIE_WATCHDOG=1 make build makes the libraries)")
    taken = [path for path in (PACKED, *LIBRARIES) if path.exists()]
    size = sum(file.stat().st_size for path in taken for file in ([path] if path.is_file() else path.rglob("*")))
    print(f"take along: {' '.join(str(path.relative_to(ROOT)) for path in taken)} ({size / 2**20:.1f} MiB)")
    return int(bool(missing) or size > MOST_PACKED)


# --- are the kernels right?


def probe(call: Call) -> None:
    check = ["-m", "smoothie_kernels.cli", "check"]
    if call.rehearsed:
        emulator = str(rehearsal.emulator())
        for name, more in (("cpu", []), ("triton", []), ("cuda", ["--emulated", emulator])):
            rows = str(call.folder / f"check-{name}.jsonl")
            call.run(f"check-{name}", [*check, "--quick", "--backend", name, *more, "--out", rows], CHECK_SECONDS)
    else:
        call.run("check", [*check, "--out", str(call.folder / "check.jsonl")], CHECK_SECONDS)
    tests(call)


def tests(call: Call) -> None:
    """All at once on several workers; then those that failed, or took their worker down, each in a process of its own:
    an error of CUDA stays with its process, and fails all tests behind it."""
    files = [name for name in TESTS if call.wants(name)]
    if not files:
        call.says("tests: none is wanted")
        return
    lines, workers = call.folder / "tests.jsonl", min(12, os.cpu_count() or 1)
    pytest = [
        "-m", "pytest", "-c", "pyproject.toml", "--rootdir", str(ROOT), "-p", "benchmarks.hopper.pytest_lines",
        "--tb=short", f"--timeout={TEST_SECONDS}", "--timeout-method=thread",
    ]  # fmt: skip
    several = ["-n", str(workers), "--dist=worksteal", f"--max-worker-restart={len(files) * 10}"]
    call.run("tests", [*pytest, *several, *files], call.left() * 0.8, fine=(0, 1), SMOOTHIE_TEST_LINES=str(lines))
    outcomes = read_tests(lines)
    again = [name for name, outcome in outcomes.items() if outcome == "failed"]

    def alone(i: int) -> tuple[str, str]:
        log, mine = call.folder / f"test-{i}.txt", call.folder / f"test-{i}.jsonl"
        if call.left() < LEAST_SECONDS:
            return again[i], "failed, not tried alone"
        run_command(
            [sys.executable, *pytest, again[i]], min(TEST_SECONDS, call.left()), log,
            {**call.env, "SMOOTHIE_TEST_LINES": str(mine)}, ROOT,
        )  # fmt: skip
        return again[i], read_tests(mine).get(again[i], "failed")

    with ThreadPoolExecutor(ALONE_AT_ONCE) as pool:
        outcomes |= dict(pool.map(alone, range(len(again))))
    counts = {outcome: sum(each == outcome for each in outcomes.values()) for outcome in sorted(set(outcomes.values()))}
    call.says(f"tests: {counts}; {len(again)} were tried again, each alone")
    for name, outcome in outcomes.items():
        if outcome.startswith("failed"):
            call.failed.append(f"{name}: {outcome}")


def read_tests(lines: Path) -> dict[str, str]:
    if not lines.exists():
        return {}
    found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return {each["test"]: each["outcome"] for each in found}


# --- how fast is the step?


def measure(call: Call) -> None:
    names = [rates.CASE, *(case.name for case in cases.CASES.values() if case.groups == cases.HOPPER)]
    report, ends, material = Report(call.machine), dict[str, str](), packed_material(call)

    def on_case(case: str, table: str, rows: list[Row], how: str) -> None:
        report.tables[case], ends[case] = table, how
        report.rows[:] = [*(row for row in report.rows if row.case != case), *rows]
        report.save(call.folder)
        call.says(f"{case}: {how or 'measured'}")

    given = (call.folder, material, call.device, call.end, call.rehearsed, 1 if call.rehearsed else None, worker.SILENT)
    works = [worker.Work(name, *given) for name in names if call.wants(name)]
    at_once = CASES_AT_ONCE
    if call.device == "cuda":
        at_once = max(1, min(at_once, torch.cuda.get_device_properties(0).total_memory // CASE_BYTES))
    left_out = worker.measure(works, at_once, call.env, on_case)
    call.failed += [f"{name}: {how}" for name, how in ends.items() if how]
    call.failed += [f"{name}: left out, no time" for name in left_out]
    call.failed += [f"{row.case}, {row.contestant}: {row.note}" for row in report.rows if row.note.startswith(WRONG)]
    console = Console(width=150, highlight=False)
    report.show(console)
    bars.section(report).show(console)


def packed_material(call: Call) -> Path:
    """The table that was packed; else a synthetic one, and the results say so."""
    if MATERIAL.exists():
        return MATERIAL
    path = call.folder / "material.pt"
    try:
        load_material(None).save(path)
    except ValueError as reason:
        call.says(f"synthetic tables: {reason}")
        synthetic(30_522, 384).save(path)
    return path


# --- how fast are whole models?


def models(call: Call) -> None:
    material = packed_material(call)
    for command, case, seconds in SMALL_MODELS if call.rehearsed else MODELS:
        if not call.wants(case):
            continue
        how = ["--device", call.device, "--cases", case, "--keep-going", "--embeddings", str(material)]
        out = call.folder / case
        call.run(case, ["-m", "benchmarks", command, *how, "--out", str(out)], seconds)


CALLS = {"probe": probe, "measure": measure, "models": models}


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hopper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", choices=("pack", *CALLS))
    parser.add_argument("--out", type=Path, help="folder for the archive; $OUT or benchmarks/results without it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit")
    parser.add_argument("--only", default="*", help="patterns of cases, or of test files, separated by commas")
    parser.add_argument("--rehearse", nargs="?", const=REHEARSAL, default="", help=argparse.SUPPRESS)
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.call == "pack":
        return pack()
    if not options.rehearse and not torch.cuda.is_available():
        print("benchmarks.hopper: PyTorch sees no GPU on this machine; nothing was run", file=sys.stderr)
        return 2
    if options.rehearse:
        rehearsal.emulator()  # the compiler's minute is not the call's
    device = "cpu" if options.rehearse else "cuda"
    here = machine.describe(device)
    name = f"{options.call}-{here.stem}"
    out: Path = (options.out or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")).resolve()
    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)
    for each in (out, folder):
        each.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    end, patterns = begin + options.seconds, tuple(options.only.split(","))
    call = Call(here, device, folder, begin, end, options.rehearse, patterns)
    try:
        CALLS[options.call](call)
    finally:
        (folder / "failed.txt").write_text("".join(f"{each}\n" for each in call.failed), encoding="utf-8")
        with tarfile.open(out / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(folder, arcname=name)
        call.says(f"{len(call.failed)} things failed; all results: {out / name}.tar.gz")
        for failure in call.failed:
            print(f"failed: {failure}")
    return int(bool(call.failed))

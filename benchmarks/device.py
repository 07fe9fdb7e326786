"""One command for a machine with a CUDA GPU: python -m benchmarks.device. Builds, tests, measures, within a time limit.

Needs no network and no package beyond those of the `bench` and `test` extras; where the package with the embedding
table is missing, the tables are synthetic, and the results say so. Every file is written as soon as its part is done:
those of `roofline` and `benchmark` after every case. All parts together take three times the limit, so there are three
calls, what is wanted first in the first, and two more for whole models:

    python -m benchmarks.device                                     build, tests, roofline
    python -m benchmarks.device --parts build checkers offline      bad memory accesses, races; registers
    python -m benchmarks.device --parts build benchmark             the gpu-* cases, all contestants
    python -m benchmarks.device --parts build training
    python -m benchmarks.device --parts build sampling
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.compare import RESULTS, ROOFLINE
from benchmarks.embeddings import NoEmbeddings, pinned_package
from benchmarks.machine import ROOT, describe

SECONDS = 530  # for everything
BUILD_SECONDS, TESTS_SHARE = 180, 0.35  # nvcc takes about a minute; of what is left when the tests begin
LAST_CASE_SECONDS = 35  # no case begins later than this before the end of its part
MOST_PER_CHECKER, LEAST_PER_CHECKER = 100, 40  # starting under a checker is slow
OFFLINE_SECONDS = 60
MEASURING = {  # part: command of benchmarks
    "roofline": ("roofline",),
    "benchmark": ("run", "--device", "cuda", "--cases", "gpu-*"),
}
MODEL_SECONDS = {"training": 240, "sampling": 300}
USUAL_PARTS = ("build", "tests", "roofline")
PARTS = (*USUAL_PARTS, "benchmark", "checkers", "offline", *MODEL_SECONDS)
# Backends, and what looks at them; kernels that nobody has run come first.
CHECKERS = {"cuda": ("memcheck", "racecheck", "synccheck"), "triton": ("memcheck", "racecheck", "initcheck")}
TOOLKITS = ("/usr/local", "/opt/nvidia", "/opt")  # where CUDA toolkits are, in folders named cuda*
TAIL = 30  # lines of a part's output that are shown


class Parts:
    """Runs commands one after the other, each within what is left of the time."""

    def __init__(self, seconds: float, log_stem: Path) -> None:
        self.end = time.monotonic() + seconds
        self.log_stem = log_stem
        self.failed: list[str] = []

    def left(self) -> float:
        return max(self.end - time.monotonic(), 1.0)

    def run(self, name: str, command: list[str], seconds: float, **environment: str) -> None:
        log = self.log_stem.with_name(f"{self.log_stem.name}-{name}.txt")
        print(f"== {name}: {' '.join(command)} (at most {seconds:.0f} s)", flush=True)
        with log.open("w", encoding="utf-8") as output:
            part = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                ended = f"exit code {part.wait(seconds)}"
            except subprocess.TimeoutExpired:
                os.killpg(part.pid, signal.SIGKILL)  # with the processes that it started
                part.wait()
                ended = f"stopped after {seconds:.0f} s"
            output.write(f"{ended}\n")
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]), flush=True)
        if ended != "exit code 0":
            self.failed.append(f"{name}: {ended}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--out", type=Path, help="output folder; $OUT or benchmarks/results without it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit for everything")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=USUAL_PARTS, help=f"without it: {', '.join(USUAL_PARTS)}"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.device: PyTorch sees no CUDA GPU on this machine; nothing was run", file=sys.stderr)
        return 2
    out = (arguments.out or Path(os.environ.get("OUT") or RESULTS)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = Parts(arguments.seconds, out / describe("cuda").stem)
    python = sys.executable
    wanted = arguments.parts
    if "build" in wanted:
        parts.run("build", [python, "setup.py", "build_ext", "--inplace"], min(BUILD_SECONDS, parts.left()))
    if "tests" in wanted:
        # A new process describes and uses what was just built.
        parts.run("tests", [python, "-m", "pytest", *tests_in_order()], TESTS_SHARE * parts.left())
    for i, (part, command) in enumerate(MEASURING.items()):
        if part in wanted:  # each gets its share of what is left
            others = sum(other in wanted for other in (*list(MEASURING)[i + 1 :], "checkers"))
            seconds = max(parts.left() / (1 + others), LAST_CASE_SECONDS)
            measure = [python, "-m", "benchmarks", *command, "--keep-going", "--out", str(out)]
            measure += ["--deadline", str(int(seconds - LAST_CASE_SECONDS)), *embeddings()]
            earlier = RESULTS / f"{ROOFLINE}{parts.log_stem.name}.json"
            if part == "roofline" and earlier.exists():  # goes on where that ended
                measure += ["--add-to", str(earlier)]
            parts.run(part, measure, seconds)
    if "checkers" in wanted:
        sanitize(parts, python)
    if "offline" in wanted:
        offline(parts, python)
    for part, seconds in MODEL_SECONDS.items():
        if part in wanted:
            measure = [python, "-m", "benchmarks", part, "--device", "cuda", "--keep-going"]
            parts.run(part, [*measure, "--out", str(out), *embeddings()], min(seconds, parts.left()))
    if out != RESULTS.resolve():
        RESULTS.mkdir(exist_ok=True)
        for path in out.glob(f"*{parts.log_stem.name}*"):
            shutil.copy(path, RESULTS)
    for failure in parts.failed:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if parts.failed else 0


def tests_in_order() -> list[str]:
    """Those that a GPU decides first, and of these those of backend "cuda". What a build does needs no GPU."""
    found = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_*.py"))]
    on_gpu = [name for start in ("tests/test_cuda", "tests/test_triton") for name in found if name.startswith(start)]
    return [*(name for name in on_gpu if "build" not in name), "tests"]


def sanitize(parts: Parts, python: str) -> None:
    """As many checkers as there is time for; the first finds the most."""
    checker = find_compute_sanitizer()
    if checker is None:
        print(
            "== no compute-sanitizer, neither on PATH nor in a CUDA toolkit: memory accesses are not checked",
            flush=True,
        )
        return
    for backend, tools in CHECKERS.items():
        for tool in tools:
            seconds = min(parts.left(), MOST_PER_CHECKER)
            if seconds < LEAST_PER_CHECKER:
                print(f"== {tool} of {backend}: left out, there is no time", flush=True)
                continue
            command = [checker, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
            command += [python, "-m", "smoothie_kernels.cli", "check", "--in-process", "--quick", "--backend", backend]
            # A cached block is larger than its tensor: what goes beyond the tensor would not be seen.
            parts.run(f"{tool}-{backend}", command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def find_compute_sanitizer() -> str | None:
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += [home for folder in TOOLKITS for home in sorted(Path(folder).glob("cuda*"), reverse=True)]
    folders = [home / inner for home in homes for inner in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next(
        (found for folder in folders if (found := shutil.which("compute-sanitizer", path=str(folder)))), None
    )  # fmt: skip


def offline(parts: Parts, python: str) -> None:
    """What the kernels' compilation for all GPUs says, with the Triton that is here."""
    command = [python, "-m", "smoothie_kernels.backends.triton.offline", "--json"]
    parts.run("offline", command, min(OFFLINE_SECONDS, parts.left()))


def embeddings() -> list[str]:
    try:
        pinned_package()
    except NoEmbeddings as reason:
        print(f"synthetic tables: {reason}", flush=True)
        return ["--embeddings", "synthetic"]
    return []


if __name__ == "__main__":
    sys.exit(main())

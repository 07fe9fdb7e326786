"""One command for a machine with a CUDA GPU: python -m benchmarks.device. Builds, tests, measures, looks for bad memory
accesses, within a time limit.

Needs no network and no package beyond those of the `bench` and `test` extras; where the package with the embedding
table is missing, the tables are synthetic, and the results say so. Every file is written as soon as its part is done:
the benchmark's after every case. On request it measures training steps and sampling:
`--parts build training sampling`.
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

from benchmarks.compare import RESULTS
from benchmarks.embeddings import NoEmbeddings, pinned_package
from benchmarks.machine import ROOT, describe

SECONDS = 530  # for everything
BUILD_SECONDS, TESTS_SHARE = 150, 0.35  # of what is left when they begin
CHECKERS_SECONDS = 120  # are kept for what comes after the benchmark
LAST_CASE_SECONDS = 35  # no case of the benchmark begins later than this before its end
MOST_PER_CHECKER, LEAST_PER_CHECKER, LAST_CALL_SECONDS = 60, 40, 25  # starting under a checker is slow
OFFLINE_SECONDS = 60
MODEL_SECONDS = {"training": 240, "sampling": 300}
USUAL_PARTS = ("build", "tests", "benchmark", "checkers", "offline")
PARTS = (*USUAL_PARTS, *MODEL_SECONDS)
CHECKERS = ("memcheck", "racecheck", "initcheck")
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
        # A new process describes and uses what was just built. The tests that a GPU decides come first.
        tests = [*sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_triton*.py")), "tests"]
        parts.run("tests", [python, "-m", "pytest", *tests], TESTS_SHARE * parts.left())
    if "benchmark" in wanted:
        measure = [python, "-m", "benchmarks", "run", "--device", "cuda", "--cases", "gpu-*", "--keep-going"]
        seconds = max(parts.left() - CHECKERS_SECONDS, LAST_CASE_SECONDS)
        measure += ["--out", str(out), "--deadline", str(int(seconds - LAST_CASE_SECONDS)), *embeddings()]
        parts.run("benchmark", measure, seconds)
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


def sanitize(parts: Parts, python: str) -> None:
    """As many checkers as there is time for; the first finds the most."""
    checker = find_compute_sanitizer()
    if checker is None:
        print(
            "== no compute-sanitizer, neither on PATH nor in a CUDA toolkit: memory accesses are not checked",
            flush=True,
        )
        return
    for tool in CHECKERS:
        seconds = min(parts.left(), MOST_PER_CHECKER)
        if seconds < LEAST_PER_CHECKER:
            print(f"== {tool}: left out, there is no time", flush=True)
            continue
        command = [checker, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
        command += [python, "-m", "benchmarks.sanitize", "--seconds", str(int(seconds - LAST_CALL_SECONDS))]
        # A cached block is larger than its tensor: what goes beyond the tensor would not be seen.
        parts.run(tool, command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


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

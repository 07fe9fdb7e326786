"""One command for a machine with a CUDA GPU: python -m benchmarks.device. Builds, tests, measures, within a time limit.

Needs no network and no package beyond those of the `bench` and `test` extras; where the package with the embedding
table is missing, the tables are synthetic, and the results say so. Every file is written as soon as its part is done:
the benchmark's after every case.
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
BUILD_SECONDS, TESTS_SHARE = 150, 0.4  # of what is left when they begin
LAST_CASE_SECONDS = 60  # no case of the benchmark begins later than this before the end
TAIL = 30  # lines of a part's output that are shown


class Parts:
    """Runs commands one after the other, each within what is left of the time."""

    def __init__(self, seconds: float, log_stem: Path) -> None:
        self.end = time.monotonic() + seconds
        self.log_stem = log_stem
        self.failed: list[str] = []

    def left(self) -> float:
        return max(self.end - time.monotonic(), 1.0)

    def run(self, name: str, command: list[str], seconds: float) -> None:
        log = self.log_stem.with_name(f"{self.log_stem.name}-{name}.txt")
        print(f"== {name}: {' '.join(command)} (at most {seconds:.0f} s)", flush=True)
        with log.open("w", encoding="utf-8") as output:
            part = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
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
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.device: PyTorch sees no CUDA GPU on this machine; nothing was run", file=sys.stderr)
        return 2
    out = (arguments.out or Path(os.environ.get("OUT") or RESULTS)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = Parts(arguments.seconds, out / describe("cuda").stem)
    python = sys.executable
    parts.run("build", [python, "setup.py", "build_ext", "--inplace"], min(BUILD_SECONDS, parts.left()))
    # A new process describes and uses what was just built.
    parts.run("tests", [python, "-m", "pytest", "tests"], TESTS_SHARE * parts.left())
    measure = [python, "-m", "benchmarks", "run", "--device", "cuda", "--cases", "gpu-*", "--keep-going"]
    measure += ["--out", str(out), "--deadline", str(int(parts.left() - LAST_CASE_SECONDS)), *embeddings()]
    parts.run("benchmark", measure, parts.left())
    if out != RESULTS.resolve():
        RESULTS.mkdir(exist_ok=True)
        for path in out.glob(f"{parts.log_stem.name}*"):
            shutil.copy(path, RESULTS)
    for failure in parts.failed:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if parts.failed else 0


def embeddings() -> list[str]:
    try:
        pinned_package()
    except NoEmbeddings as reason:
        print(f"synthetic tables: {reason}", flush=True)
        return ["--embeddings", "synthetic"]
    return []


if __name__ == "__main__":
    sys.exit(main())

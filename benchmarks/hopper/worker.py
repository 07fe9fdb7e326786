"""One case in its own process, for `benchmarks.hopper`: python -m benchmarks.hopper.worker CASE --rows FILE ...

It waits twice, for a line on its standard input each time: before it checks, so that everything is loaded and several
workers check at once, and before it times, so that nothing else runs then. Whatever it finds goes into FILE at once, a
JSON line for each row and each change of what it does: if the process dies, the rows it had are there, and so is the
name of the contestant that ran last.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import signal
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import torch._dynamo  # noqa: F401  the first call of any custom operator would import it

from benchmarks.common import machine
from benchmarks.common.embeddings import Material
from benchmarks.common.race import Suite
from benchmarks.hopper import rates
from benchmarks.step import cases
from benchmarks.step.contestants import CONTESTANTS
from benchmarks.step.race import Race

LOADED, CHECKED, DONE = "loaded", "checked", "done"  # states of a worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hopper.worker", description=__doc__)
    parser.add_argument("case")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--material", type=Path, required=True, help="a saved Material")
    parser.add_argument("--rows", type=Path, required=True, help="file for the JSON lines")
    parser.add_argument("--repeats", type=int, help="timed runs of every contestant")
    parser.add_argument("--without", action="append", default=[], metavar="CONTESTANT=REASON")
    parser.add_argument("--only", help="this contestant alone, its call once: for a profiler")
    parser.add_argument("--rehearsal", help="module that prepares a machine without a GPU: see rehearsal.py")
    arguments = parser.parse_args()
    faulthandler.register(signal.SIGUSR1)
    if arguments.rehearsal:
        import_module(arguments.rehearsal).prepare()
    material = Material.load(arguments.material)
    with arguments.rows.open("a", encoding="utf-8") as file:
        lines = Lines(file)
        suite = Suite(
            material, machine.describe(arguments.device), arguments.rows.parent, arguments.device, arguments.repeats,
            keep_going=True, without=dict(each.split("=", 1) for each in arguments.without),
            on_row=lambda row: lines.write(row=asdict(row)), on_turn=lambda name: lines.write(turn=name),
        )  # fmt: skip
        if arguments.case == rates.CASE:
            lines.wait(LOADED)
            lines.wait(CHECKED)
            rates.measure(suite)
        else:
            run(suite, cases.CASES[arguments.case], lines, arguments.only)
        lines.write(state=DONE)
    return 0


def run(suite: Suite, case: cases.Case, lines: Lines, only: str | None) -> None:
    race = Race(suite, case)
    with race.mode():
        if only:
            CONTESTANTS[only].prepare[case.op](race.given)()
            return
        lines.write(table=race.material.note)
        lines.wait(LOADED)
        race.check()
        lines.wait(CHECKED)
        race.time()
        if suite.device == "cuda":  # in a rehearsal, another process would not have the stand-ins
            race.measure_memory()


class Lines:
    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, **content: Any) -> None:
        self.file.write(json.dumps(content) + "\n")
        self.file.flush()

    def wait(self, state: str) -> None:
        self.write(state=state)
        if not sys.stdin.readline():
            sys.exit("nobody is there to say when to go on")


if __name__ == "__main__":
    sys.exit(main())

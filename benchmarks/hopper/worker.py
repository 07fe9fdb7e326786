"""Each case of `benchmarks.hopper measure` in a process of its own: several check at once, one alone is timed.

Whatever a process finds goes into a file at once, a JSON line for each row and each change of what it does: if it dies,
the rows it had are there, and so is the name of the contestant that ran last. That one is blamed, and the case runs
again without it.
"""

import faulthandler
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from benchmarks.common import machine
from benchmarks.common.embeddings import Material
from benchmarks.common.race import Suite
from benchmarks.common.report import WRONG, Row, row_of
from benchmarks.hopper import rates
from benchmarks.step import cases
from benchmarks.step.race import Race
from smoothie_kernels.check.isolate import Call, Ended, run_calls, signal_name

SILENT = {"load": 60.0, "check": 45.0, "time": 20.0}  # seconds without a line in a state: then it hangs
TRIES = 3  # of a case whose contestants take its process down


@dataclass(frozen=True)
class Work:
    """One case, as a process is given it."""

    case: str
    folder: Path
    material: Path
    device: str
    end: float  # of the call, by time.monotonic
    rehearsal: str = ""  # the module that prepares a machine without a GPU
    repeats: int | None = None
    silent: Mapping[str, float] = field(default_factory=lambda: SILENT)
    without: tuple[tuple[str, str], ...] = ()  # contestants that took an earlier process down, and how

    def path(self, ending: str) -> Path:
        return self.folder / f"{self.case}-{len(self.without)}.{ending}"


def measure(
    works: Sequence[Work], at_once: int, env: Mapping[str, str], on_case: Callable[[str, str, list[Row], str], None]
) -> list[str]:
    """`on_case` gets each case at its end, its table, its rows, and how it ended. The cases that time left out."""
    left_out, waiting = list[str](), list(works)
    while waiting:
        by_log = {work.path("txt"): work for work in waiting}
        calls = [Call(do, (work,), max(1.0, work.end - time.monotonic()), log) for log, work in by_log.items()]
        start = "spawn" if waiting[0].rehearsal else "forkserver"  # Triton reads TRITON_INTERPRET as it is imported
        waiting = []
        with mock.patch.dict(os.environ, env):
            for call, ended in run_calls(calls, at_once, start):
                work = by_log[call.log]
                if not work.path("jsonl").exists():
                    left_out.append(work.case)
                    continue
                table, rows, turn = read(work)
                how, to_blame = how_it_ended(work, ended, turn)
                if how and turn in rows:
                    note = f"{WRONG if rows[turn].ours else 'absent: '}{how}"
                    rows[turn] = replace(rows[turn], seconds=None, quartiles=None, note=note)
                on_case(work.case, table, [*rows.values()], how)
                if to_blame and turn not in dict(work.without) and len(work.without) + 1 < TRIES:
                    waiting.append(replace(work, without=(*work.without, (turn, how))))
    return left_out


def read(work: Work) -> tuple[str, dict[str, Row], str]:
    """What a process wrote: table, rows, and the contestant that ran last."""
    table, rows, turn = "none", dict[str, Row](), ""
    for line in work.path("jsonl").read_bytes().split(b"\n")[:-1]:
        content = json.loads(line)
        table, turn = content.get("table", table), content.get("turn", turn)
        if row := content.get("row"):
            rows[row["contestant"]] = row_of(row)
    return table, rows, turn


def how_it_ended(work: Work, ended: Ended, turn: str) -> tuple[str, bool]:
    """Nothing where all is well; and whether a contestant is to blame."""
    if ended.code == 0:
        return "", False
    if ended.code is None or time.monotonic() >= work.end:
        return "stopped at the end of the call's time", False
    if ended.code < 0:
        return f"crash: {signal_name(-ended.code)}", bool(turn)
    if "Timeout (" in work.path("txt").read_text(encoding="utf-8", errors="replace"):
        return f"hang: {turn or 'before the first contestant'}", bool(turn)
    return f"error: {ended.tail.rpartition(chr(10))[2][:100]}", bool(turn)


# In the process of a case


def do(work: Work) -> None:
    if time.monotonic() >= work.end:
        return
    if work.rehearsal:
        import_module(work.rehearsal).prepare()
    with work.path("jsonl").open("w", encoding="utf-8") as file:
        lines = Lines(work, file)
        suite = Suite(
            Material.load(work.material), machine.describe(work.device), work.folder, work.device, work.repeats,
            keep_going=True, without=dict(work.without), on_row=lambda row: lines.write(row=asdict(row)),
            on_turn=lambda name: lines.write(turn=name),
        )  # fmt: skip
        if work.case == rates.CASE:
            with lines.locked("time"):
                rates.measure(suite)
            return
        race = Race(suite, cases.CASES[work.case])
        lines.write(table=race.material.note)
        with race.mode():
            with lines.locked("check"):
                race.check()
            with lines.locked("time"):
                race.time()
                if suite.device == "cuda":  # in a rehearsal, another process would not have the stand-ins
                    race.measure_memory()
        faulthandler.cancel_dump_traceback_later()


class Lines:
    """Writes lines; ends the process, with the stacks of its threads in its log, where it writes none for too long."""

    def __init__(self, work: Work, file: TextIO) -> None:
        self.work, self.file, self.state = work, file, "load"
        self._watch(work.silent["load"])

    def write(self, **content: Any) -> None:
        self.file.write(json.dumps(content) + "\n")
        self.file.flush()
        self._watch(self.work.silent[self.state])

    @contextmanager
    def locked(self, state: str) -> Iterator[None]:
        """Many processes check at once; while one is timed, no other checks or is timed. Who waits to be timed keeps
        the gate, so that no new check begins before."""
        self._watch(self.work.end - time.monotonic())
        with (self.work.folder / "gate").open("w") as gate, (self.work.folder / "lock").open("w") as lock:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(lock, fcntl.LOCK_EX if state == "time" else fcntl.LOCK_SH)
            if state == "check":
                fcntl.flock(gate, fcntl.LOCK_UN)
            self.state = state
            self.write(state=state)
            yield

    def _watch(self, seconds: float) -> None:
        seconds = min(seconds, self.work.end - time.monotonic())
        faulthandler.dump_traceback_later(max(seconds, 0.1), exit=True)

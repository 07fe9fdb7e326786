"""Workers of `benchmarks.hopper measure`: each case in its own process, checked several at once, timed one by one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.common.machine import ROOT
from benchmarks.common.report import WRONG, Report, Row, row_of
from benchmarks.hopper.worker import CHECKED, DONE, LOADED
from smoothie_kernels.check.isolate import signal_name, tail_of

SILENT = {LOADED: 60.0, CHECKED: 45.0, DONE: 20.0}  # seconds without a line on the way to a state: then it hangs
LOOK = 0.05  # seconds between looks at what workers have written
GRACE = 5.0  # seconds from the last line to the end
STACKS = 0.5  # seconds that a worker has to write where it stands
TRIES = 3  # of a case whose contestants take its process down


@dataclass
class Worker:
    """One case, and what is known of it."""

    case: str
    command: Sequence[str]
    folder: Path
    without: dict[str, str] = field(default_factory=dict)  # contestants that took an earlier process down, and how
    rows: dict[str, Row] = field(default_factory=dict)
    table: str = ""
    state: str = ""
    turn: str = ""  # the contestant that ran last

    def start(self, env: Mapping[str, str]) -> None:
        stem = f"{self.case}-{len(self.without)}"
        self.lines, self.log = self.folder / f"{stem}.jsonl", self.folder / f"{stem}.txt"
        self.lines.touch()
        leave_out = [part for name, how in self.without.items() for part in ("--without", f"{name}={how}")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.command, self.case, "--rows", str(self.lines), *leave_out], cwd=ROOT, env=os.environ | env,
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.heard, self.read, self.hung, self.stopped = time.monotonic(), 0, False, False

    def tell(self) -> None:
        """To go on."""
        assert self.process.stdin is not None
        self.heard = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def look(self) -> None:
        """Reads what it has written."""
        with self.lines.open("rb") as file:
            file.seek(self.read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.splitlines():
            self.heard, content = time.monotonic(), json.loads(line)
            self.state, self.turn = content.get("state", self.state), content.get("turn", self.turn)
            self.table = content.get("table", self.table)
            if row := content.get("row"):
                self.rows[row["contestant"]] = row_of(row)

    def is_at(self, state: str) -> bool:
        """At this state, or at its end; stopped where it has been silent for too long."""
        ended = self.process.poll() is not None
        self.look()
        if self.state == state or ended:
            return True
        if time.monotonic() - self.heard > SILENT[state]:
            self.hung = True
            self.stop()
        return self.hung

    def stop(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE if self.state == DONE else 0)
        self.stopped = self.process.poll() is None
        if self.stopped:
            os.kill(self.process.pid, signal.SIGUSR1)  # faulthandler writes all stacks
            time.sleep(STACKS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.look()

    def how_it_ended(self) -> str:
        """Nothing where all is well."""
        if self.state == DONE:
            return ""
        if self.hung:
            return f"hang: {self.turn or 'before the first contestant'}"
        if self.stopped:
            return f"stopped at the end of the call's time, {self.state or 'loading'}"
        code = self.process.returncode
        if code and code < 0:
            return f"crash: {signal_name(-code)}"
        last = tail_of(self.log).rpartition("\n")[2]
        return f"error: {last[:100]}"


def run(
    workers: Iterable[Worker], env: Mapping[str, str], end: float, on_case: Callable[[Worker, str], None],
    at_once: int,
) -> list[str]:  # fmt: skip
    """Brings every case to its end: `on_case` gets each, and how it ended, at once. The cases that time left out.
    `at_once` workers check at the same time."""
    waiting, running = list(workers), list[Worker]()

    def start() -> list[Worker]:
        batch = [waiting.pop(0) for _ in range(min(at_once, len(waiting)))]
        for worker in batch:
            worker.start(env)
        return batch

    def wait(batch: list[Worker], state: str) -> None:
        while not all([worker.is_at(state) for worker in batch]) and time.monotonic() < end:
            time.sleep(LOOK)

    try:
        coming = start()
        while coming:
            batch, coming = coming, []
            running += batch
            for state in (LOADED, CHECKED):
                wait(batch, state)
                if state == LOADED:
                    for worker in batch:
                        worker.tell()
            if time.monotonic() < end:
                coming = start()  # they load while the others are timed
                running += coming
            for worker in batch:
                if worker.state == CHECKED and time.monotonic() < end:
                    worker.tell()
                    wait([worker], DONE)
                worker.stop()
                how = worker.how_it_ended()
                culprit = worker.turn if how and not (worker.stopped and not worker.hung) else ""
                if culprit and culprit not in worker.without and len(worker.without) + 1 < TRIES:
                    without = worker.without | {culprit: how}
                    waiting.insert(0, Worker(worker.case, worker.command, worker.folder, without))
                on_case(worker, how)
            coming = coming or (start() if time.monotonic() < end else [])
        return [worker.case for worker in waiting]
    finally:
        for worker in running:
            worker.stop()


def collect(report: Report, worker: Worker, how: str) -> None:
    """The rows of a case, those of an earlier try replaced; the contestant that took its process down says so."""
    kept = [row for row in report.rows if row.case != worker.case]
    rows = dict(worker.rows)
    if how and worker.turn in rows:
        row = rows[worker.turn]
        note = f"{WRONG if row.ours else 'absent: '}{how}"
        rows[worker.turn] = replace(row, seconds=None, quartiles=None, note=note)
    report.rows[:] = [*kept, *rows.values()]
    report.tables[worker.case] = worker.table or "none"


def command(device: str, material: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.hopper.worker", "--device", device, "--material",
            str(material), *more]  # fmt: skip

"""Runs cases: inputs, check, race, memory, rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import memory, timing
from benchmarks.common.embeddings import Material
from benchmarks.common.machine import Machine
from benchmarks.common.report import Row
from benchmarks.step import inputs
from benchmarks.step.cases import Case
from benchmarks.step.check import CheckFailed, Referee
from benchmarks.step.contestants import CONTESTANTS, FLOAT_FLOOR, FLOOR, Contestant
from benchmarks.step.inputs import Call, Prepare

PATIENCE = {"sweep": 0.7, "gpu": 0.3}  # seconds of timed runs for each contestant of a case, by group
USUAL_PATIENCE = 1.5
USABLE = 0.8  # of the free memory
ROTATED = 2**28  # bytes of tables that a graph reads in turn: several times any L2, so that no table is found there
WRONG = "wrong: "  # begins the note of a row without time whose results were wrong
STAGES = 3  # of every contestant in every case, for the progress bar: check, race, memory

Progress = Callable[[str, float], None]  # what is being done, and how many stages are done since last time


def ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Suite:
    """What all cases of one run share."""

    material: Material
    saved_material: Path
    machine: Machine
    device: str
    repeats: int | None = None
    keep_going: bool = False  # where a result of ours is wrong, that row says so, instead of CheckFailed
    without: Mapping[str, str] = field(default_factory=dict)  # contestants that do not run, and why
    on_row: Callable[[Row], None] = ignore  # every row, each time that something is added to it
    on_turn: Callable[[str], None] = ignore  # the contestant that runs next

    def run(self, case: Case, progress: Progress = ignore) -> tuple[str, list[Row]]:
        """What the table was, and one row per contestant. CheckFailed where a result is wrong."""
        with inputs.grad_mode(case):
            running = Running(self, case, progress)
            running.check()
            running.time()
            running.measure_memory()
        return running.given.note, list(running.rows.values())


class Running:
    """One case, to be used under `inputs.grad_mode`: `check`, then `time`, then `measure_memory`."""

    def __init__(self, suite: Suite, case: Case, progress: Progress = ignore) -> None:
        torch.compiler.reset()  # beyond eight shapes of one function it would quietly run the function as it is
        self.suite, self.case, self.progress = suite, case, progress
        self.given = inputs.build(case, suite.material, suite.device)
        self.rows: dict[str, Row] = {}
        self.calls: dict[str, Call] = {}  # of those who can take part, and were found right
        self.per_run = 1  # calls in one run of a graph

    def check(self) -> None:
        referee = Referee(self.given)
        for name in self.case.contestants:
            self._begin(f"checking {name}", name, 1)
            contestant = CONTESTANTS[name]
            self._set(name, **self._new_row(contestant))
            reason = contestant.absent(self.given) or self._does_not_fit(contestant)
            if how := self.suite.without.get(name):
                reason = f"{WRONG}{how}" if contestant.ours else how
            try:
                if not reason:
                    call = contestant.prepare[self.case.op](self.given)
                    self._set(name, error=referee.check(contestant, call))
                    self.calls[name] = call
            except CheckFailed as error:
                if contestant.ours and not self.suite.keep_going:
                    raise
                reason = f"{WRONG}{error.what}"  # a competitor's mistake is not ours to time, nor to die of
            except Exception as error:
                reason = one_line(error)
                if contestant.ours and not self.suite.keep_going:
                    raise CheckFailed(f"case {self.case.name!r}, contestant {name!r} raised {reason}") from error
                reason = f"{WRONG}{reason}" if contestant.ours else reason
            if self.suite.device == "cuda":
                torch.cuda.empty_cache()  # for the other workers that check now
            if reason:
                self._set(name, note=reason if reason.startswith(WRONG) else f"absent: {reason}")

    def time(self) -> None:
        """All in turn; the floor's rows join the others."""
        case, given = self.case, self.given
        floors = [FLOOR] if self.suite.device == "cuda" or case.dtype == torch.float32 else [FLOOR, FLOAT_FLOOR]
        floors = [floor for floor in floors if not self._does_not_fit(floor)]
        prepare = {name: CONTESTANTS[name].prepare[case.op] for name in self.calls}
        prepare |= {floor.name: floor.prepare[case.op] for floor in floors}
        calls = self.calls | {floor.name: floor.prepare[case.op](given) for floor in floors}
        for floor in floors:
            self._set(floor.name, **self._new_row(floor))
        times = timing.race(
            self._captured(prepare) if case.captured and self.suite.device == "cuda" else calls,
            timing.clock_of(self.suite.device),
            patience=PATIENCE.get(case.group, USUAL_PATIENCE),
            repeats=self.suite.repeats,
            progress=lambda part: self.progress(f"{case.name}: timing", part * len(case.contestants)),
            on_turn=self.suite.on_turn,
        )
        seconds = {name: time.median / self.per_run for name, time in times.items()}
        fastest_floor = min((seconds[floor.name] for floor in floors if floor.name in seconds), default=None)
        competitors = [name for name in seconds if name in self.calls and not CONTESTANTS[name].ours]
        for name, median in seconds.items():
            low, high = times[name].quartiles
            self._set(
                name,
                seconds=median,
                quartiles=(low / self.per_run, high / self.per_run),
                runs=times[name].runs,
                floor_seconds=fastest_floor,
                efficiency=fastest_floor and fastest_floor / median,
                ratios={other: seconds[other] / median for other in competitors if self.rows[name].ours},
                gflop_per_s=given.flop / median / 1e9,
                gb_per_s=given.bytes / median / 1e9,
            )

    def measure_memory(self) -> None:
        for name in self.case.contestants:
            self._begin(f"memory of {name}", name, 1)
            if name not in self.calls:
                continue
            if self.suite.device == "cuda":
                peak: memory.Peak | str = memory.peak_on_cuda(self.calls[name])
            elif CONTESTANTS[name].compiles:
                peak = memory.peak_of(self.calls[name])
            else:
                saved, threads = self.suite.saved_material, self.suite.machine.threads
                peak = memory.peak_in_new_process(self.case, name, saved, threads)
            if isinstance(peak, str):
                self._set(name, note=f"memory: {peak}")
            else:
                self._set(name, peak_extra_bytes=peak.extra, peak_process_bytes=peak.process)

    def _captured(self, prepare: Mapping[str, Prepare]) -> dict[str, Callable[[], object]]:
        """One CUDA graph for each contestant, with one call for each of several tables."""
        given = self.given
        self.per_run = max(2, -(-ROTATED // given.table.nbytes))
        copies = [replace(given, x=given.x.clone(), table=given.table.clone()) for _ in range(self.per_run)]
        graphs: dict[str, Callable[[], object]] = {}
        for name, make in prepare.items():
            self._begin(f"capturing {name}", name, 0)
            try:
                graphs[name] = timing.capture([make(copy) for copy in copies])
            except Exception as error:
                self._set(name, note=f"absent: no CUDA graph holds it: {one_line(error)}")
        return graphs

    def _begin(self, what: str, name: str, stages: float) -> None:
        self.suite.on_turn(name)
        self.progress(f"{self.case.name}: {what}", stages)

    def _set(self, name: str, **changes: Any) -> None:
        self.rows[name] = replace(self.rows[name], **changes) if name in self.rows else Row(**changes)
        self.suite.on_row(self.rows[name])

    def _does_not_fit(self, contestant: Contestant) -> str | None:
        n, v, _ = self.given.sizes
        needed, free = 4 * n * v * contestant.tensors_of_n_v, memory.available(self.suite.device)
        if free is None or needed <= USABLE * free:
            return None
        return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"

    def _new_row(self, contestant: Contestant) -> dict[str, Any]:
        case, (n, v, d), machine = self.case, self.given.sizes, self.suite.machine
        return {
            "case": case.name,
            "contestant": contestant.name,
            "op": case.op,
            "n": n,
            "v": v,
            "d": d,
            "dtype": str(case.dtype).removeprefix("torch."),
            "noise": self.given.noisy,
            "k": self.given.k if case.op == "topk" else None,
            "ours": contestant.ours,
            "commit": machine.commit,
            "machine": machine.processor,
            "versions": machine.versions_line,
        }


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]

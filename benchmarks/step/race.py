"""The race of one case of the step: everybody against float64, then times with the floor, then memory."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import race, timing
from benchmarks.common.embeddings import Material
from benchmarks.common.pictures import BLUE, BROWN, MEMORY, TIME, draw_bars
from benchmarks.common.race import Absent, Suite, one_line
from benchmarks.common.report import Report, Row
from benchmarks.step import cases, inputs
from benchmarks.step.cases import Case
from benchmarks.step.check import Referee
from benchmarks.step.contestants import CONTESTANTS, FLOAT_FLOOR, FLOOR, Contestant
from benchmarks.step.inputs import Call, Prepare

ROTATED = 2**28  # bytes of tables that a graph reads in turn: several times any L2, so that no table is found there

TITLE, PREFIX, PAGE, CASES = "Benchmark", "", "", cases.CASES
COLOURS = {"eager": BROWN, "fused": BLUE, "products": "#a0a0a0"}


def alone(case: Case, name: str, material: Material) -> Callable[[], object]:
    """Making and running a call, for a process that measures its memory."""
    prepare = CONTESTANTS[name].prepare[case.op]
    with inputs.grad_mode(case):
        given = inputs.build(case, material)
        prepare(given.cut(2, 64))()

    def call() -> object:
        with inputs.grad_mode(case):
            return prepare(given)()

    return call


class Race(race.Race[Case]):
    contestants = CONTESTANTS
    alone = alone

    def __init__(self, suite: Suite, case: Case) -> None:
        super().__init__(suite, case)
        with self.mode():
            self.given = inputs.build(case, self.material, suite.device)
        self.referee = Referee(self.given)
        self.per_run = 1  # calls in one run of a graph

    def mode(self) -> AbstractContextManager[Any]:
        return inputs.grad_mode(self.case)

    def new_row(self) -> Row:
        case, (n, v, d) = self.case, self.given.sizes
        dtype, k = str(case.dtype).removeprefix("torch."), self.given.k if case.op == "topk" else None
        return Row(case.name, "", case.op, n, v, d, dtype, self.given.noisy, k)

    def admit(self, contestant: Contestant) -> Call:
        if reason := contestant.absent(self.given) or self.lacks(contestant.tensors_of_n_v, self.case.n):
            raise Absent(reason)
        call = contestant.prepare[self.case.op](self.given)
        self.set(contestant.name, error=self.referee.check(contestant, call))
        return call

    def time(self) -> None:
        """All in turn; the floor's rows join the others."""
        case, given, on_gpu = self.case, self.given, self.suite.device == "cuda"
        floors = {
            floor.name: floor
            for floor in ([FLOOR] if on_gpu or case.dtype == torch.float32 else [FLOOR, FLOAT_FLOOR])
            if not self.lacks(floor.tensors_of_n_v, case.n)
        }
        for floor in floors.values():
            self.join(floor)
        prepare = {name: CONTESTANTS[name].prepare[case.op] for name in self.calls}
        prepare |= {name: floor.prepare[case.op] for name, floor in floors.items()}
        calls = self.calls | {name: prepare[name](given) for name in floors}
        self.suite.progress(f"{case.name}: timing")
        times = timing.race(
            self._captured(prepare) if case.captured and on_gpu else calls,
            timing.clock_of(self.suite.device),
            patience=case.patience,
            repeats=self.suite.repeats,
            on_turn=self.suite.on_turn,
        )
        times = {name: time.scaled(1 / self.per_run) for name, time in times.items()}
        self.set_times(times, min((times[name].median for name in floors if name in times), default=None))
        flop, moved = given.op.flop(*given.sizes), given.op.bytes(*given.sizes, given.x.element_size())
        for name, time in times.items():
            self.set(name, gflop_per_s=flop / time.median / 1e9, gb_per_s=moved / time.median / 1e9)

    def _captured(self, prepare: Mapping[str, Prepare]) -> dict[str, Callable[[], object]]:
        """One CUDA graph for each contestant, with one call for each of several tables."""
        given = self.given
        self.per_run = max(2, -(-ROTATED // given.table.nbytes))
        copies = [replace(given, x=given.x.clone(), table=given.table.clone()) for _ in range(self.per_run)]
        graphs: dict[str, Callable[[], object]] = {}
        for name, make in prepare.items():
            self.begin("capturing", name)
            try:
                graphs[name] = timing.capture([make(copy) for copy in copies])
            except Exception as error:
                self.set(name, note=f"absent: no CUDA graph holds it: {one_line(error)}")
        return graphs


def conclude(suite: Suite, report: Report, cases: Iterable[Case]) -> None:
    """Nothing comes after all cases."""


def draw(report: Report, stem: Path) -> list[Path]:
    """Of the sweep over V, where it was run."""
    sweep = Report(report.machine, rows=[row for row in report.rows if row.case.startswith("sweep-")])
    return draw_bars(sweep, stem, COLOURS, time=TIME, memory=MEMORY)

"""The step on Hopper against the machine's own rates: stages, each with one thing more than the one before; variants of
the plan; competitors. All of a case in turn, in one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch

from benchmarks import inputs as of_inputs
from benchmarks import memory, timing
from benchmarks.check import CheckFailed, Referee
from benchmarks.contestants import CONTESTANTS, FLOOR, Contestant, fused, statistics
from benchmarks.embeddings import Material
from benchmarks.inputs import Call, Inputs
from benchmarks.machine import Machine
from benchmarks.registry import CASES
from benchmarks.roofline_report import (
    BOTH,
    COMPETITORS,
    COPY,
    COPY_L2,
    EAGER,
    GATHER,
    GRAPH,
    KEEP,
    NEAREST,
    ONE_PASS,
    QUIET,
    QUIET_STEP,
    QUIET_WEIGHTS,
    SCORES,
    SQUARE,
    STATISTICS,
    STEP,
    TRITON_STATISTICS,
    TWO_PASSES,
    WEIGHTS,
    Plan,
    Result,
    Row,
    Shape,
    variant_names,
)
from benchmarks.roofline_stages import Stages, first_line, graph, patched, patched_prepare, top_k, variant
from benchmarks.suite import USABLE, WRONG
from smoothie_kernels.backends import cuda
from smoothie_kernels.backends.blocks import cdiv

PLAN = Plan()
SMALL_COPIES = 50  # in one graph

Progress = Callable[[str, float], None]
Calls = Mapping[str, Callable[[], object]]


def cannot(emulated: Path | None) -> str | None:
    """Why nothing can be measured here; with a library for the emulator, the backend is pointed there."""
    if emulated:
        if torch.cuda.is_available():
            return "--emulated is for machines without a GPU: both libraries name their operators alike"
        cuda.LIBRARY, cuda.DEVICE = emulated.resolve(), "cpu"
    if not emulated and not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU on this machine; nothing was measured"
    reason = cuda.supports(cuda.DEVICE, torch.bfloat16)
    return reason and f"backend 'cuda' cannot run: {reason}"


def select(plan: Plan, patterns: Iterable[str]) -> list[tuple[str, Shape | None]]:
    """The cases whose names match any of the shell patterns; without patterns all."""
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name, _ in plan.cases):
            raise ValueError(f"no case is named {pattern!r}; there are {', '.join(name for name, _ in plan.cases)}")
    return [
        (name, shape) for name, shape in plan.cases if not patterns or any(fnmatch(name, each) for each in patterns)
    ]


def missing(result: Result, cases: list[tuple[str, Shape | None]], here: Machine) -> list[tuple[str, Shape | None]]:
    """Those that an earlier run has not measured."""
    there = result.machine
    if there is None or (there.processor, there.commit, result.plan) != (here.processor, here.commit, PLAN):
        raise ValueError(f"--add-to: its results are not of {here.processor}, commit {here.commit}, and of these cases")
    return [(name, shape) for name, shape in cases if not result.of(name)]


@dataclass
class Bench:
    """What all cases of one run share."""

    result: Result
    material: Material | None
    device: str
    repeats: int | None = None
    keep_going: bool = False
    progress: Progress = field(default=lambda what, parts: None)

    def measure(self, case: str, shape: Shape | None) -> None:
        """Adds the rows of a case. CheckFailed where a result of ours is wrong."""
        torch.compiler.reset()
        with torch.inference_mode():
            if shape is None:
                self._machine(case)
                return
            kind = case.partition("-")[0]
            given = self.build(case, shape)
            self.result.tables[case] = given.note
            {"many": self._many, "few": self._few, "crossing": self._crossing, "variants": self._variants}[kind](
                case, given
            )

    @property
    def plan(self) -> Plan:
        return self.result.plan

    def build(self, name: str, shape: Shape) -> Inputs:
        case = replace(
            CASES["step"], name=name, n=shape.n, v=shape.v, d=shape.d, dtype=getattr(torch, shape.dtype), group="gpu",
        )  # fmt: skip
        assert self.material is not None
        return of_inputs.build(case, self.material, self.device)

    # --- cases

    def _machine(self, case: str) -> None:
        plan = self.plan
        calls: dict[str, Callable[[], object]] = {}
        a, b = (torch.randn(2, plan.square, plan.square, device=self.device)).bfloat16()
        square = torch.empty_like(a)
        calls[SQUARE] = partial(torch.mm, a, b, out=square)
        large, small = (torch.ones(2, count // 2, dtype=torch.int8, device=self.device) for count in plan.copied)
        calls[COPY] = partial(large[1].copy_, large[0])
        copies, note = graph([partial(small[1].copy_, small[0])] * SMALL_COPIES, self.device)
        if copies:
            calls[COPY_L2] = copies
        for call in calls.values():
            call()
        times = self._race(case, calls)
        flop, moved = 2 * plan.square**3, {COPY: plan.copied[0], COPY_L2: plan.copied[1] * SMALL_COPIES}
        for what, time in times.items():
            row = self._timed(Row(case, what), time)
            if what == SQUARE:
                row = replace(row, flop_per_s=flop / time.median)
            else:
                row = replace(row, bytes_per_s=moved[what] / time.median)
            if what == COPY_L2:
                row = replace(row, seconds=time.median / SMALL_COPIES, quartiles=_over(time.quartiles, SMALL_COPIES))
            self.result.rows.append(row)
        if not copies:
            self._absent(Row(case, COPY_L2), note)

    def _many(self, case: str, given: Inputs) -> None:
        """Floor, stages and competitors."""
        calls, errors = self._checked(case, given, (STEP, *COMPETITORS, TRITON_STATISTICS))
        stages = Stages(given)
        if STEP in calls:
            calls |= stages.calls()
            captured, note = graph([calls[STEP]], self.device)
            if captured:
                calls[GRAPH] = captured
            else:
                self._absent(self._row(case, GRAPH, given), note)
        times = self._race(case, calls | stages.floor() | {BOTH: FLOOR.prepare["step"](given)})
        floors = floors_of(times)
        for what, time in times.items():
            row = self._with_floor(self._timed(self._row(case, what, given), time), given, floors)
            theirs = COMPETITORS if what in (STEP, GRAPH) else (TRITON_STATISTICS,) if what == STATISTICS else ()
            ratios = {other: times[other].median / time.median for other in theirs if other in times}
            row = replace(row, ratios=ratios, error=errors.get(what))
            self.result.rows.append(self._with_memory(row, calls.get(what)))

    def _variants(self, case: str, given: Inputs) -> None:
        calls: dict[str, Callable[[], object]] = {}
        for what in variant_names(self.plan):
            self.progress(f"{case}: checking {what}", 0)
            prepared = variant(what, given)
            if self._is_right(case, what, given, *prepared, may_refuse=True):
                calls[what] = prepared[1]
        for what, time in self._race(case, calls).items():
            self.result.rows.append(self._timed(self._row(case, what, given), time))

    def _few(self, case: str, given: Inputs) -> None:
        """Launched as they are, and in graphs that go through several tables, so that none is found in L2."""
        calls, errors = self._checked(case, given, (STEP, *COMPETITORS))
        calls[BOTH] = FLOOR.prepare["step"](given)
        prepare = {name: CONTESTANTS[name].prepare["step"] for name in calls if name != BOTH}
        prepare[BOTH] = FLOOR.prepare["step"]
        graphs, turns = self._graphs(case, given, prepare)
        launched, times = self._race(case, calls), self._race(case, graphs)
        floor = times[BOTH].median / turns if BOTH in times else launched[BOTH].median
        for what in calls:
            row = self._timed(self._row(case, what, given), launched[what])
            row = replace(row, launched_seconds=row.seconds, error=errors.get(what))
            if what in times:
                of_graph = timing.Timing(
                    times[what].median / turns, _over(times[what].quartiles, turns), times[what].runs
                )
                row = self._timed(row, of_graph)
            assert row.seconds
            row = replace(
                row, floor_seconds=floor, efficiency=floor / row.seconds, bytes_per_s=given.bytes / row.seconds,
                flop_per_s=given.flop / row.seconds,
            )  # fmt: skip
            self.result.rows.append(self._with_memory(row, calls[what]))
        ours = self.result.find(case, STEP)
        for name in COMPETITORS if ours else ():
            alike = times if {name, STEP} <= times.keys() else launched  # both in graphs, or neither
            if ours and name in alike:
                ours.ratios[name] = alike[name].median / alike[STEP].median

    def _crossing(self, case: str, given: Inputs) -> None:
        """Both products in one pass, as few rows have them or narrow ones, and in two."""
        contestant, prepare, calls = CONTESTANTS[STEP], {}, {}
        n, _, d = given.sizes
        limit, size = ("NARROWEST", d) if d <= cuda.NARROWEST else ("FEW_ROWS", n)
        for what, most in ((ONE_PASS, size), (TWO_PASSES, 0)):
            call = patched({limit: most}, contestant.prepare["step"](given))
            if self._is_right(case, what, given, contestant, call):
                prepare[what] = partial(patched_prepare, {limit: most}, contestant.prepare["step"])
                calls[what] = call
        graphs, turns = self._graphs(case, given, prepare)
        timed = {what: graphs.get(what, call) for what, call in calls.items()}
        for what, time in self._race(case, timed).items():
            share = turns if what in graphs else 1
            shared = timing.Timing(time.median / share, _over(time.quartiles, share), time.runs)
            self.result.rows.append(self._timed(self._row(case, what, given), shared))

    # --- parts of them

    def _checked(
        self, case: str, given: Inputs, names: tuple[str, ...]
    ) -> tuple[dict[str, Callable[[], object]], dict[str, float | None]]:
        """Those who can take part and were found right; rows for the others."""
        referee, calls, errors = Referee(given), {}, {}
        if STEP in names:  # what the stages are made of
            quiet = replace(given, case=replace(given.case, std=0.0))
            nearest = replace(given, case=replace(given.case, op="nearest"))
            for other, name, prepare in (
                (given, "statistics[cuda]", statistics("cuda")["topk"]),
                (quiet, QUIET_STEP, fused("cuda")["step"]),
                (nearest, NEAREST, fused("cuda")["nearest"]),
                (given, KEEP, top_k),
            ):
                contestant = Contestant(name, {}, "", ours=True)
                self.progress(f"{case}: checking {name}", 0)
                if not self._is_right(case, name, other, contestant, prepare(other)):
                    return {}, {}
        for name in names:
            self.progress(f"{case}: checking {name}", 0)
            contestant, row = CONTESTANTS[name], self._row(case, name, given)
            reason = contestant.absent(given) or self._does_not_fit(contestant, given)
            if reason:
                self._absent(row, f"absent: {reason}")
                continue
            try:
                calls[name] = contestant.prepare.get("step", contestant.prepare.get("topk"))(given)  # type: ignore[misc]
                errors[name] = referee.check(contestant, calls[name])
            except CheckFailed as error:
                if contestant.ours and not self.keep_going:
                    raise
                calls.pop(name)
                self._absent(row, f"{WRONG}{error.what}")
            except Exception as error:
                calls.pop(name, None)
                self._absent(row, f"absent: {first_line(error)}")
        return calls, errors

    def _is_right(
        self, case: str, what: str, given: Inputs, contestant: Contestant, call: Call, *, may_refuse: bool = False
    ) -> bool:  # fmt: skip
        try:
            Referee(given).check(contestant, call)
        except CheckFailed as error:
            if not self.keep_going:
                raise
            self._absent(self._row(case, what, given), f"{WRONG}{error.what}")
            return False
        except RuntimeError as error:  # a launch that the backend refuses
            if may_refuse:
                self._absent(self._row(case, what, given), f"absent: {first_line(error)}")
                return False
            if not self.keep_going:
                raise CheckFailed(f"case {case!r}, {what!r} raised {first_line(error)}") from error
            self._absent(self._row(case, what, given), f"{WRONG}{first_line(error)}")
            return False
        return True

    def _graphs(
        self, case: str, given: Inputs, prepare: Mapping[str, Callable[[Inputs], Call]]
    ) -> tuple[dict[str, Callable[[], object]], int]:
        """Of every contestant one graph, with one call for each of so many tables."""
        turns = max(2, cdiv(self.plan.rotated, given.table.nbytes)) if self.device == "cuda" else 1
        copies = [replace(given, x=given.x.clone(), table=given.table.clone()) for _ in range(turns)]
        found: dict[str, Callable[[], object]] = {}
        for name, make in prepare.items():
            self.progress(f"{case}: capturing {name}", 0)
            if name == EAGER:  # so many tensors of rows x vocabulary in every call
                continue
            captured, _ = graph([make(copy) for copy in copies], self.device)
            if captured:
                found[name] = captured
        return found, turns

    def _race(self, case: str, calls: Calls) -> dict[str, timing.Timing]:
        self.progress(f"{case}: timing", 0)
        if not calls:
            return {}
        clock = timing.clock_of(self.device)
        return timing.race(dict(calls), clock, patience=self.plan.patience, repeats=self.repeats)

    def _row(self, case: str, what: str, given: Inputs) -> Row:
        n, v, d = given.sizes
        return Row(case, what, n, v, d, str(given.case.dtype).removeprefix("torch."))

    def _signed(self, row: Row) -> Row:
        machine: Machine | None = self.result.machine
        assert machine is not None
        versions = " ".join(f"{name}={number}" for name, number in machine.versions.items())
        return replace(row, commit=machine.commit, machine=machine.processor, versions=versions)

    def _absent(self, row: Row, note: str) -> None:
        self.result.rows.append(self._signed(replace(row, note=note)))

    def _timed(self, row: Row, time: timing.Timing) -> Row:
        return self._signed(replace(row, seconds=time.median, quartiles=time.quartiles, runs=time.runs))

    def _with_floor(self, row: Row, given: Inputs, floors: dict[int, float]) -> Row:
        products = PRODUCTS.get(row.what, 2)
        n, v, d = given.sizes
        assert row.seconds
        flop_per_s = 2 * products * n * v * d / row.seconds
        if row.what in (SCORES, GATHER, BOTH):
            return replace(row, flop_per_s=flop_per_s)
        floor = floors[products]
        return replace(row, flop_per_s=flop_per_s, floor_seconds=floor, efficiency=floor / row.seconds)

    def _with_memory(self, row: Row, call: Callable[[], object] | None) -> Row:
        if call is None or self.device != "cuda":
            return row
        return replace(row, peak_extra_bytes=memory.peak_on_cuda(call).extra)  # type: ignore[arg-type]

    def _does_not_fit(self, contestant: Contestant, given: Inputs) -> str | None:
        n, v, _ = given.sizes
        needed, free = 4 * n * v * contestant.tensors_of_n_v, memory.available(self.device)
        return None if free is None or needed <= USABLE * free else f"needs about {needed / 2**30:.1f} GiB"


PRODUCTS = dict.fromkeys(
    (SCORES, GATHER, NEAREST, QUIET, STATISTICS, QUIET_WEIGHTS, WEIGHTS, KEEP, TRITON_STATISTICS), 1
)  # of what makes one; all others make two


def floors_of(times: Mapping[str, timing.Timing]) -> dict[int, float]:
    """Of one and of two products: in blocks or at once, whichever is faster."""
    scores, gather, both = (times[what].median for what in (SCORES, GATHER, BOTH))
    return {1: min(scores, both / 2), 2: min(scores + gather, both)}


def _over(numbers: tuple[float, float], by: int) -> tuple[float, float]:
    return numbers[0] / by, numbers[1] / by

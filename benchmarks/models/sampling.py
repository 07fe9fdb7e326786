"""Sampling, fused and eager: the same tokens, then time, memory, and what they are spent on.

Nothing here imports transformers before something is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import memory, timing
from benchmarks.common.embeddings import Material
from benchmarks.models import whole
from benchmarks.models.authors import Authors
from benchmarks.models.model_report import OURS, Products, with_times
from benchmarks.models.sampling_cases import CONTESTANTS, SamplingCase
from benchmarks.models.sampling_report import OURS_ALL, Result, Row
from benchmarks.models.whole import SEED, Race, counted, flush_denormals, make_model, run_case, stretches
from benchmarks.step.check import CheckFailed, frobenius
from benchmarks.step.suite import WRONG, one_line
from smoothie_kernels.diffusion import sampling as sampler
from smoothie_kernels.diffusion.live import before
from smoothie_kernels.diffusion.states import make_state

if TYPE_CHECKING:
    from smoothie_kernels.diffusion.sampling import Samples

CHECK_STEPS = 5  # over the whole schedule: noise and distances both count
SHARE = 0.995  # of tokens that must be those of the eager sampler; random weights have few, so answers are compared too
MARGIN = 5e-5  # relative, Frobenius, of the last answers; 8e-7 was found, 7e-3 with other noise, 2e-4 with 4 % more
PEAK_STEPS = 3  # none holds more than its third


class Watch:
    """Seconds that calls take inside of others: on a GPU by events, which nobody waits for before they are asked."""

    def __init__(self, device: str) -> None:
        self.clock = None if device == "cpu" else torch.cuda.Event
        self.runs: list[list[Any]] = []

    def begin(self) -> None:
        self.runs.append([])

    def time(self, call: Callable[..., Any], *given: Any) -> Any:
        if self.clock is None:
            found = []
            self.runs[-1].append(timing.wall_clock(lambda: found.append(call(*given))))
            return found[0]
        make: Any = self.clock
        start, end = make(enable_timing=True), make(enable_timing=True)
        start.record()
        result = call(*given)
        end.record()
        self.runs[-1].append((start, end))
        return result

    def median(self) -> float:
        """Of the runs, the seconds of one."""
        if self.clock is not None:
            torch.cuda.synchronize()
        return statistics.median(
            sum(part if isinstance(part, float) else part[0].elapsed_time(part[1]) / 1e3 for part in run)
            for run in self.runs
        )


class Watched:
    """A state of the sampler whose calls are timed."""

    def __init__(self, state: Any, watch: Watch) -> None:
        self.state, self.watch, self.knows_tokens = state, watch, state.knows_tokens

    def begin(self, *given: Any) -> Any:
        return self.watch.time(self.state.begin, *given)

    def smooth(self, *given: Any) -> Any:
        return self.watch.time(self.state.smooth, *given)

    def update(self, *given: Any) -> Any:
        return self.watch.time(self.state.update, *given)


class Session:
    """One contestant's calls of a model's `generate`; the same case gives the same weights and sources to everybody."""

    def __init__(
        self, case: SamplingCase, name: str, material: Material, device: str = "cpu", model: Any = None
    ) -> None:
        self.case, self.contestant, self.watch = case, CONTESTANTS[name], Watch(device)
        self.model = make_model(case, material.table, device) if model is None else model
        self.source = stretches(material.tokens, case.batch, case.source).to(device)
        self.lengths = lengths_of(case) if case.ragged and not self.contestant.whole else None
        self.steps = case.dense_steps if self.contestant.dense else case.steps

    def run(
        self, steps: int | None = None, times: list[float] | None = None, samples: int | None = None, **options: Any
    ) -> Samples:
        """The first steps of a call, or all that the contestant's time is taken of; options are those of `generate`."""
        first = self.steps if steps is None else steps
        times = times_of(self.case.steps)[: first + 1] if times is None else times
        options = {"solver": self.case.solver, "bf16": self.case.bf16, **self.contestant.options, **options}
        self.watch.begin()
        with self._watched():
            found: Samples = self.model.generate(
                self.source[:samples], times=times, lengths=None if self.lengths is None else self.lengths[:samples],
                **options,
            )  # fmt: skip
        return found

    @contextmanager
    def _watched(self) -> Iterator[None]:
        def make(step: str, *given: Any) -> Watched:
            return Watched(Authors(*given) if self.contestant.unread else make_state(step, *given), self.watch)

        with mock.patch.object(sampler, "make_state", make):
            yield


def times_of(steps: int) -> list[float]:
    times: list[float] = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    return times


def lengths_of(case: SamplingCase) -> Tensor:
    """From 1 to the case's length, evenly spread."""
    return torch.linspace(1, case.length, case.batch).round().long()


def measure(result: Result, case: SamplingCase, *given: Any, **options: Any) -> None:
    """`run_case` of this kind."""
    run_case(_Race, Row, result, case, *given, **options)


class _Race(Race[SamplingCase, Row]):
    ours = OURS_ALL

    def __init__(self, case: SamplingCase, material: Material, device: str, rows: dict[str, Row]) -> None:
        super().__init__(case, material, device, rows)
        self.model = make_model(case, material.table, device)
        self.flop, self.vocabulary_flop = 0, 0

    @property
    def dense_tensors(self) -> int:
        return 6

    def check(self, *, keep_going: bool) -> None:
        """Counts the products, and compares tokens and answers with the eager step's, of the same noise."""
        self.checked = self.samples_that_fit()
        references: dict[bool, Samples] = {}  # by whether padding takes part
        try:
            self._count()
        except Exception as error:
            self.failed(OURS, f"has nothing to be compared with: {one_line(error)}", keep_going)
            return
        for name in self.rows:
            contestant, session = CONTESTANTS[name], self._session(name)
            try:
                if contestant.dense:
                    self.expect_room()
                if name != "eager":
                    # With the network in float32: what its own rounding decides is not the step's.
                    how: dict[str, Any] = {
                        "times": times_of(CHECK_STEPS),
                        "samples": self.checked,
                        "accumulate": "sum",
                        "bf16": False,
                    }
                    if contestant.whole not in references:
                        references[contestant.whole] = self._session("eager", session.lengths).run(**how, seed=SEED)
                    found = compare(session.run(**how, seed=SEED), references[contestant.whole])
                    self.rows[name] = replace(self.rows[name], same_tokens=found[0], error=found[1])
                session.run(2)
                session.watch.runs.clear()
                self.sessions[name] = session
            except CheckFailed as error:
                self.failed(name, error.what, keep_going)
            except Exception as error:
                self.failed(name, one_line(error), keep_going, WRONG if name in self.ours else "absent: ")
        if OURS not in self.sessions:
            self.sessions.clear()

    def time(self, repeats: int) -> Products:
        """Calls in turn; where a contestant makes fewer steps, all times are those of as many as the case has."""
        case, clock = self.case, timing.clock_of(self.device)
        short = timing.race(
            {name: session.run for name, session in self.sessions.items()}, clock, patience=0, repeats=repeats
        )
        _, rates = self.race_parts({}, clock)
        share = case.batch / self.checked
        products = Products(round(share * self.flop), round(share * self.vocabulary_flop), *rates, self.checked)
        more = {name: case.steps / session.steps for name, session in self.sessions.items()}
        times = {name: scaled(time, more[name]) for name, time in short.items()}
        for name, session in self.sessions.items():
            seconds = more[name] * session.watch.median()
            row = with_times(self.rows[name], name, times, seconds, products.seconds)
            self.rows[name] = replace(row, steps=case.steps, timed_steps=session.steps)
        return products

    def peak(self, name: str, saved: Path, threads: int) -> memory.Peak | str:
        if self.device == "cuda":
            return memory.peak_on_cuda(lambda: self.sessions[name].run(PEAK_STEPS))
        return peak_in_new_process(self.case, name, saved, threads)

    def _session(self, name: str, *lengths: Tensor | None) -> Session:
        session = Session(self.case, name, self.material, self.device, self.model)
        if lengths:
            (session.lengths,) = lengths
        return session

    def _count(self) -> None:
        """Of a call of all steps, each of which has the products of the second. The last search for tokens is a product
        that `counted` does not see, and the eager sampler moves no logits after its last answer."""
        session, case = self._session("eager"), self.case
        first, _ = counted(lambda: session.run(1, samples=self.checked))
        both, _ = counted(lambda: session.run(2, samples=self.checked))
        rows = int(lengths_of(case)[: self.checked].sum()) if case.ragged else self.checked * case.length
        product = 2 * rows * self.material.table.numel()
        last = 2 * self.checked * case.length * self.material.table.numel()
        self.flop = first + (case.steps - 1) * (both - first) + last
        self.vocabulary_flop = (2 * case.steps - 1) * product + last


def compare(found: Samples, wanted: Samples) -> tuple[float, float]:
    """The share of equal tokens, and how far the last answers are off, relatively. CheckFailed beyond the bounds."""
    there = before(wanted.lengths, wanted.tokens.shape[1])
    share = float((found.tokens == wanted.tokens)[there].double().mean())
    off = frobenius(found.embeddings, wanted.embeddings)
    if not share >= SHARE:
        raise CheckFailed(f"{share:.2%} of the tokens are those of the eager sampler, {SHARE:.1%} must be")
    if not off <= MARGIN:
        raise CheckFailed(f"the last answers are off by {off:.3g} relative, {MARGIN:.3g} is allowed")
    return share, off


def scaled(time: timing.Timing, factor: float) -> timing.Timing:
    first, third = time.quartiles
    return timing.Timing(factor * time.median, (factor * first, factor * third), time.runs)


def peak_in_new_process(case: SamplingCase, name: str, material: Path, threads: int) -> memory.Peak | str:
    """The peak of a call, or why it was not measured. `material` is a saved Material of the case's size."""
    preload = ("smoothie_kernels.diffusion.model",)
    return whole.peak_in_new_process(_peak_here, case, name, material, threads, preload=preload)


def _peak_here(case: SamplingCase, name: str, material: Path, threads: int) -> memory.Peak | str:
    flush_denormals()
    torch.set_num_threads(threads)
    session = Session(case, name, Material.load(material))
    session.run(2, samples=1)  # makes the Vocabulary, and loads what a first call loads
    call: Any = session.run
    return memory.peak_of(lambda: call(PEAK_STEPS))

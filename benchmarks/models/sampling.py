"""Sampling, fused and eager: the same tokens, then time, memory, and what they are spent on.

Nothing here imports transformers before something is measured.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import smoothie_kernels as sk
from benchmarks.common import timing
from benchmarks.common.embeddings import Material
from benchmarks.common.pictures import BLUE, BROWN, MEMORY, Bars, draw_bars
from benchmarks.common.race import CheckFailed, Suite
from benchmarks.common.report import Report, Section, duration, significant, size
from benchmarks.common.timing import Call, Timing
from benchmarks.models import cases
from benchmarks.models.authors import Authors
from benchmarks.models.cases import OURS, PAPER, SEED, SUM, WHOLE, Contestant, SamplingCase
from benchmarks.models.whole import ModelRace, counted, make_model, stretches
from smoothie_kernels.diffusion import sampling as sampler
from smoothie_kernels.diffusion.live import before
from smoothie_kernels.diffusion.schedules import make_schedule
from smoothie_kernels.diffusion.solvers import ACCUMULATE, make_route
from smoothie_kernels.diffusion.states import as_noise, make_state
from smoothie_kernels.testing import relative_error

TITLE, PREFIX, PAGE, CASES, CONTESTANTS = "Sampling", "sampling-", "sampling.md", cases.SAMPLING_CASES, cases.SAMPLING
COLOURS = {OURS: BLUE, SUM: "#08306b", WHOLE: "#6baed6", "eager": "#d99a6c", "authors": BROWN}
CHECK_STEPS = 5  # over the whole schedule: noise and distances both count
SHARE = 0.995  # of tokens that must be those of the eager sampler; random weights have few, so answers are compared too
MARGIN = 5e-5  # relative, Frobenius, of the last answers; 8e-7 was found, 7e-3 with other noise, 2e-4 with 4 % more
PEAK_STEPS = 3  # none holds more than its third


class Watch:
    """Seconds that calls take inside of others: on a GPU by events, read after the call."""

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
        self.knows_tokens = state.knows_tokens
        self.begin, self.smooth, self.update = (
            partial(watch.time, call) for call in (state.begin, state.smooth, state.update)
        )


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
    ) -> Any:
        """The first steps of a call, or all that the contestant's time is taken of; options are those of `generate`."""
        first = self.steps if steps is None else steps
        times = times_of(self.case.steps)[: first + 1] if times is None else times
        options = {"solver": self.case.solver, "bf16": self.case.bf16, **self.contestant.options, **options}
        self.watch.begin()

        def make(step: str, *given: Any) -> Watched:
            return Watched(Authors(*given) if self.contestant.unread else make_state(step, *given), self.watch)

        with mock.patch.object(sampler, "make_state", make):
            return self.model.generate(
                self.source[:samples], times=times, lengths=None if self.lengths is None else self.lengths[:samples],
                **options,
            )  # fmt: skip


def times_of(steps: int) -> list[float]:
    times: list[float] = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    return times


def lengths_of(case: SamplingCase) -> Tensor:
    """From 1 to the case's length, evenly spread."""
    return torch.linspace(1, case.length, case.batch).round().long()


def alone(case: SamplingCase, name: str, material: Material) -> Call:
    """The first steps of a call, for a process that measures their memory."""
    session = Session(case, name, material.of(case))
    session.run(2, samples=1)  # makes the Vocabulary, and loads what a first call loads
    return lambda: session.run(PEAK_STEPS)


class Race(ModelRace[SamplingCase]):
    contestants = CONTESTANTS
    alone = alone

    def __init__(self, suite: Suite, case: SamplingCase) -> None:
        super().__init__(suite, case)
        self.model = make_model(case, self.material.table, suite.device)
        self.sessions: dict[str, Session] = {}
        self.references: dict[bool, Any] = {}  # the eager sampler's, by whether padding takes part

    def count(self) -> None:
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

    def enter(self, contestant: Contestant) -> Call:
        """Tokens and answers are held to those of the eager step with the same noise."""
        name, session = contestant.name, self._session(contestant.name)
        if name != "eager":
            # With the network in float32: what its own rounding decides is not the step's.
            how: dict[str, Any] = {
                "times": times_of(CHECK_STEPS), "samples": self.checked, "accumulate": "sum", "bf16": False,
                "seed": SEED,
            }  # fmt: skip
            if contestant.whole not in self.references:
                eager = self._session("eager")
                eager.lengths = session.lengths
                self.references[contestant.whole] = eager.run(**how)
            same_tokens, error = compare(session.run(**how), self.references[contestant.whole])
            self.set(name, same_tokens=same_tokens, error=error)
        session.run(2)
        session.watch.runs.clear()
        self.set(name, steps=self.case.steps, timed_steps=session.steps)
        self.sessions[name] = session
        return session.run

    def longer(self, name: str) -> float:
        return self.case.steps / self.sessions[name].steps

    def spent(self, name: str, parts: Mapping[str, Timing]) -> float:
        return self.sessions[name].watch.median()

    def memory_call(self, name: str) -> Call:
        return lambda: self.sessions[name].run(PEAK_STEPS)

    def _session(self, name: str) -> Session:
        return Session(self.case, name, self.material, self.suite.device, self.model)


def compare(found: Any, wanted: Any) -> tuple[float, float]:
    """The share of equal tokens, and how far the last answers are off, relatively. CheckFailed beyond the bounds."""
    there = before(wanted.lengths, wanted.tokens.shape[1])
    share = float((found.tokens == wanted.tokens)[there].double().mean())
    off = relative_error(found.embeddings, wanted.embeddings)
    if not share >= SHARE:
        raise CheckFailed(f"{share:.2%} of the tokens are those of the eager sampler, {SHARE:.1%} must be")
    if not off <= MARGIN:
        raise CheckFailed(f"the last answers are off by {off:.3g} relative, {MARGIN:.3g} is allowed")
    return share, off


# After all cases


def conclude(suite: Suite, report: Report, cases: Iterable[SamplingCase]) -> None:
    """After all cases."""
    if (sizes := size_section(report, cases)).cells:
        report.more["sizes"] = sizes
    suite.progress("noise that is gathered")
    measure_noise(suite, report)


def size_section(report: Report, cases: Iterable[SamplingCase]) -> Section:
    """Of cases that differ in V alone, one line per V: fused, then eager. None where there is one alone."""
    series = {case.name: case for case in cases if case.over_v and report.of(case.name)}
    cells = []
    for name in sorted(series, key=lambda name: report.of(name)[0].v) if len(series) > 1 else ():
        rows = {row.contestant: row for row in report.of(name)}
        ours, eager = rows[OURS], rows["eager"]
        times = ["" if row.seconds is None else duration(row.seconds / series[name].steps) for row in (ours, eager)]
        ratio = f"{eager.seconds / ours.seconds:.2f}" if eager.seconds and ours.seconds else ""
        cells.append((f"{ours.v:,}", *times, ratio, size(ours.peak_extra_bytes), size(eager.peak_extra_bytes)))
    header = ("V", f"{OURS}, a step", "eager, a step", f"x {OURS}", f"{OURS}, memory", "eager, memory")
    note = next((f"{case.describe()}." for case in series.values()), "")
    return Section("Over V", note, header, cells)


def draw(report: Report, stem: Path) -> list[Path]:
    """The files drawn."""
    speed = Bars("Tokens per second, padding included", lambda row: row.tokens_per_s, significant)
    return draw_bars(report, stem, COLOURS, speed=speed, memory=MEMORY)


# The noise that ddpm has gathered: few fields drawn again, all of them drawn again, one that is stored

NOISE_STEPS = (50, 200)  # of a call
NOISE_SIZES = {"cpu": (512, 384, 5), "cuda": (PAPER["batch"] * PAPER["length"], PAPER["d"], 10)}  # N, D, timed runs
DELTA, MU, STD = 0.25, 0.05, 0.25  # of the sampler; of the step in the middle of its schedule, about
KEPT, FRESH = 0.9, 0.1  # of a stored field; they cost the same whatever they are
NO_NOISE = "no noise"


def measure_noise(suite: Suite, report: Report) -> None:
    """All in turn. What is stored adds to the step without noise: reading it there is not in its time."""
    device, (n, width, repeats) = suite.device, NOISE_SIZES[suite.device]
    material = suite.material.sized(len(suite.material.table), width)
    vocabulary, (v, d) = sk.Vocabulary(material.table.to(device)), material.table.shape
    x = material.table[stretches(material.tokens, n)].to(device)
    counts = {NO_NOISE: 0.0, "one field": 1.0}  # of fields, on average over the steps of a call
    for steps in NOISE_STEPS:
        for how in ACCUMULATE:
            fields = make_route(make_schedule("arctan", delta=DELTA), times_of(steps), "ddpm", how).fields
            counts[f"{how}, {steps} steps"] = statistics.fmean(map(len, fields))

    def step(fields: int) -> Call:
        noise: Mapping[str, Any] = as_noise({offset: STD / fields**0.5 for offset in range(fields)})
        return lambda: sk.fused_smoothie_step(x, vocabulary, MU, seed=SEED, **noise)

    stored, fresh = (torch.randn(n, v, device=device).bfloat16() for _ in range(2))
    updates: dict[str, Call] = {
        "stored in bfloat16": lambda: stored.mul_(KEPT).add_(fresh, alpha=FRESH),
        "stored in bfloat16, torch.randn": lambda: stored.mul_(KEPT).add_(fresh.normal_(), alpha=FRESH),
    }
    calls = {way: step(round(count)) for way, count in counts.items()} | updates
    with torch.inference_mode():
        for call in calls.values():
            call()
        times = timing.race(calls, timing.clock_of(device), patience=0, repeats=repeats)
    quiet, found = times[NO_NOISE].median, list[dict[str, Any]]()
    for way, time in times.items():
        seconds = time.median + (quiet if way in updates else 0.0)
        found.append({
            "way": way, "fields": counts.get(way, 1.0), "n": n, "v": v, "d": d, "seconds": seconds,
            "over_no_noise": seconds / quiet, "stored_bytes": 2 * n * v if way in updates else 0,
        })  # fmt: skip
    report.content["noise"] = found
    cells = [
        (each["way"], f"{each['fields']:.3g}", duration(each["seconds"]), f"{each['over_no_noise']:.2f}",
         size(each["stored_bytes"]) if each["stored_bytes"] else "0")
        for each in found
    ]  # fmt: skip
    note = (
        f"One step of the vocabulary, N = {n:,}, V = {v:,}, D = {d}, with the mean number of fields of ddpm. Stored: "
        "the step without noise and the update of the field; the fresh field is there, or is drawn."
    )
    header = ("noise", "fields", "step", "x no noise", "stored")
    report.more["noise"] = Section("Noise that is gathered", note, header, cells)

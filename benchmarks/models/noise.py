"""The noise that ddpm has gathered, three ways: few fields made again, all of them made again, one that is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

import smoothie_kernels as sk
from benchmarks.common import timing
from benchmarks.common.race import Suite
from benchmarks.common.report import Report, Section, duration, size
from benchmarks.models.cases import PAPER, SEED
from benchmarks.models.whole import stretches
from smoothie_kernels.diffusion.schedules import make_schedule
from smoothie_kernels.diffusion.solvers import ACCUMULATE, make_route
from smoothie_kernels.diffusion.states import as_noise

STEPS = (50, 200)  # of a call
SIZES = {"cpu": (512, 384, 5), "cuda": (PAPER["batch"] * PAPER["length"], PAPER["d"], 10)}  # N, D, timed runs
DELTA, MU, STD = 0.25, 0.05, 0.25  # of the sampler; of the step in the middle of its schedule, about
KEPT, FRESH = 0.9, 0.1  # of a stored field; they cost the same whatever they are
NO_NOISE, ONE = "no noise", "one field"
STORED, DRAWN = "stored in bfloat16", "stored in bfloat16, torch.randn"


@dataclass(frozen=True)
class NoiseCost:
    """A step of the vocabulary with noise made in one way."""

    way: str
    fields: float  # on average over the steps of a call
    n: int
    v: int
    d: int
    seconds: float
    over_no_noise: float  # its time over that of the step without noise
    stored_bytes: int = 0  # between steps


def mean_fields(steps: int, accumulate: str) -> float:
    """Of all steps of a call with ddpm."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    fields = make_route(make_schedule("arctan", delta=DELTA), times, "ddpm", accumulate).fields
    return sum(map(len, fields)) / len(fields)


def measure(suite: Suite, report: Report) -> None:
    """All in turn. What is stored adds to the step without noise: reading it there is not in its time."""
    device, (n, width, repeats) = suite.device, SIZES[suite.device]
    material = suite.material.sized(len(suite.material.table), width)
    vocabulary = sk.Vocabulary(material.table.to(device))
    x = material.table[stretches(material.tokens, n)].to(device)
    v, d = material.table.shape
    counts = {NO_NOISE: 0.0, ONE: 1.0} | {
        f"{accumulate}, {steps} steps": mean_fields(steps, accumulate) for steps in STEPS for accumulate in ACCUMULATE
    }

    def step(fields: int) -> Callable[[], object]:
        noise: Mapping[str, Any] = as_noise({offset: STD / fields**0.5 for offset in range(fields)})
        return lambda: sk.fused_smoothie_step(x, vocabulary, MU, seed=SEED, **noise)

    stored, fresh = (torch.randn(n, v, device=device).bfloat16() for _ in range(2))
    calls = {way: step(round(count)) for way, count in counts.items()} | {
        STORED: lambda: stored.mul_(KEPT).add_(fresh, alpha=FRESH),
        DRAWN: lambda: stored.mul_(KEPT).add_(fresh.normal_(), alpha=FRESH),
    }
    with torch.inference_mode():
        for call in calls.values():
            call()
        times = timing.race(calls, timing.clock_of(device), patience=0, repeats=repeats)
    seconds = {way: time.median for way, time in times.items()}
    quiet = seconds[NO_NOISE]
    for way in (STORED, DRAWN):
        seconds[way] += quiet
    costs = [
        NoiseCost(way, counts.get(way, 1.0), n, v, d, time, time / quiet, 0 if way in counts else 2 * n * v)
        for way, time in seconds.items()
    ]
    report.content["noise"] = [asdict(cost) for cost in costs]
    report.more["noise"] = section(costs)


def section(costs: list[NoiseCost]) -> Section:
    cells: list[tuple[str, ...]] = [
        (cost.way, f"{cost.fields:.3g}", duration(cost.seconds), f"{cost.over_no_noise:.2f}",
         size(cost.stored_bytes) if cost.stored_bytes else "0")
        for cost in costs
    ]  # fmt: skip
    n, v, d = costs[0].n, costs[0].v, costs[0].d
    note = (
        f"One step of the vocabulary, N = {n:,}, V = {v:,}, D = {d}, with the mean number of fields of ddpm. Stored: "
        "the step without noise and the update of the field; the fresh field is there, or is drawn."
    )
    return Section("Noise that is gathered", note, ("noise", "fields", "step", "x no noise", "stored"), cells)

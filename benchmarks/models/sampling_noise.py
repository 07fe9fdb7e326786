"""The noise that ddpm has gathered, three ways: few fields made again, all of them made again, one that is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import smoothie_kernels as sk
from benchmarks.common import timing
from benchmarks.common.embeddings import Material
from benchmarks.models.sampling_cases import NoisePlan
from benchmarks.models.whole import SEED, stretches
from smoothie_kernels.diffusion.schedules import make_schedule
from smoothie_kernels.diffusion.solvers import ACCUMULATE, make_route
from smoothie_kernels.diffusion.states import as_noise

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


def measure(material: Material, plan: NoisePlan, device: str) -> list[NoiseCost]:
    """All in turn. What is stored adds to the step without noise: reading it there is not in its time."""
    material = material.sized(len(material.table), plan.d)
    vocabulary = sk.Vocabulary(material.table.to(device))
    x = material.table[stretches(material.tokens, plan.n)].to(device)
    n, (v, d) = plan.n, material.table.shape
    counts = {NO_NOISE: 0.0, ONE: 1.0} | {
        f"{accumulate}, {steps} steps": mean_fields(steps, accumulate)
        for steps in plan.steps
        for accumulate in ACCUMULATE
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
        times = timing.race(calls, timing.clock_of(device), patience=0, repeats=plan.repeats)
    seconds = {way: time.median for way, time in times.items()}
    quiet = seconds[NO_NOISE]
    for way in (STORED, DRAWN):
        seconds[way] += quiet
    return [
        NoiseCost(way, counts.get(way, 1.0), n, v, d, time, time / quiet, 0 if way in counts else 2 * n * v)
        for way, time in seconds.items()
    ]

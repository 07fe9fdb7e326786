"""Who samples what: the cases and the contestants of the benchmark of sampling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.models.model_report import OURS
from benchmarks.models.whole import ModelCase, select

SUM, WHOLE = "fused, sum", "fused, whole"


@dataclass(frozen=True)
class Contestant:
    name: str
    what: str
    options: Mapping[str, Any] = field(default_factory=dict)  # of `SampleOptions`
    unread: bool = False  # with the tensors that the authors' loop makes and never reads
    whole: bool = False  # all positions take part, whatever the case says

    @property
    def dense(self) -> bool:
        return bool(self.options["step"] == "eager")


FUSED, EAGER = {"step": "fused"}, {"step": "eager", "seed": None}
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(OURS, "one embedding a position is carried", FUSED),
        Contestant(SUM, "the same; the noise of all steps so far is added up", FUSED | {"accumulate": "sum"}),
        Contestant(WHOLE, "the same; padding takes part", FUSED, whole=True),
        Contestant("eager", "the authors' arithmetic and torch.randn: the logits are carried", EAGER),
        Contestant("authors", "eager, and what their loop makes without reading it", EAGER, unread=True),
    )
}


@dataclass(frozen=True)
class SamplingCase(ModelCase):
    solver: str = "re-noise"
    steps: int = 50
    dense_steps: int = 10  # the first of them, after which the eager contestants' time is taken
    ragged: bool = False  # lengths from 1 to `length`, evenly spread; the rest is padding
    over_v: bool = False  # belongs to the series over V


SMALL = SamplingCase("", "", batch=16, source=64, contestants=(OURS, "eager"), repeats=2)
PAPER = SamplingCase(
    "sample-12x768", "the paper's model and solver, 200 steps", batch=256, length=64, source=64, d=768, layers=12,
    hidden=768, condition_layers=6, self_condition_layers=3, bf16=True, steps=200, dense_steps=20,
    contestants=(OURS, "eager", "authors"), groups=("cuda",),
)  # fmt: skip
CASES = {
    case.name: case
    for case in (
        PAPER,
        replace(PAPER, name="sample-12x768-ddim", why="the paper's model, ddim", solver="ddim"),
        replace(
            SMALL, name="sample-4x384", why="4 layers of width 384, the paper's solver", dense_steps=50, over_v=True,
            contestants=(OURS, "eager", "authors"), repeats=3,
        ),
        replace(
            SMALL, name="sample-4x384-ddim", why="ddim", solver="ddim", dense_steps=50,
            contestants=(OURS, "eager", "authors"), repeats=3,
        ),
        replace(
            SMALL, name="sample-4x384-ddpm", why="ddpm: noise that is gathered", solver="ddpm",
            contestants=(OURS, SUM, "eager", "authors"),
        ),
        replace(SMALL, name="sample-4x384-sde", why="the reverse SDE", solver="sde", contestants=(OURS, SUM, "eager")),
        replace(SMALL, name="sample-4x384-8k", why="a small vocabulary", v=8_000, over_v=True),
        replace(SMALL, name="sample-4x384-128k", why="a large vocabulary", v=128_000, over_v=True),
        replace(
            SMALL, name="sample-4x384-ragged", why="half the positions are padding, and take no part", ragged=True,
            contestants=(OURS, WHOLE, "eager"),
        ),
        replace(SMALL, name="sample-4x384-one", why="one sample", batch=1, dense_steps=50),
        replace(
            SMALL, name="sample-4x384-large", why="a large batch", batch=64, steps=20, dense_steps=5,
            groups=("cpu full",),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class NoisePlan:
    """A single step of the vocabulary, with the noise that ddpm has gathered."""

    n: int = 512
    d: int = 384
    steps: tuple[int, ...] = (50, 200)
    repeats: int = 5


CUDA_NOISE = NoisePlan(n=PAPER.n, d=PAPER.d, repeats=10)


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    cases: tuple[SamplingCase, ...]
    noise: NoisePlan
    repeats: int | None = None  # None: each case's own

    @property
    def parts(self) -> int:
        return 3 * len(self.cases) + 1


def plan(device: str, *, full: bool = False, patterns: Iterable[str] = (), repeats: int | None = None) -> Plan:
    """The cases of a device, or those of all that match a pattern. ValueError where a pattern fits none."""
    cases = select("sampling", CASES, device, full=full, patterns=patterns)
    return Plan(cases, CUDA_NOISE if device == "cuda" else NoisePlan(), repeats)

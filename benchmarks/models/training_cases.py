"""Who trains what: the cases and the contestants of the benchmark of training steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.models.model_report import OURS
from benchmarks.models.training_report import REFERENCE
from benchmarks.models.whole import SEED, ModelCase, select
from smoothie_kernels.diffusion.options import LossOptions


@dataclass(frozen=True)
class Contestant:
    name: str
    what: str
    options: Mapping[str, Any]  # of the loss
    compiles: bool = False


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("eager", "the authors' arithmetic and torch.randn", {"step": "eager", "torch_noise": True}),
        Contestant(REFERENCE, "the same with the package's noise field: the truth of the check", {"step": "eager"}),
        Contestant(OURS, "fused_smoothie_step", {"step": "fused"}),
        Contestant("fused + compile", "the same, every layer under torch.compile", {"step": "fused"}, compiles=True),
    )
}


@dataclass(frozen=True)
class TrainingCase(ModelCase):
    self_conditioning: float = 0.0
    trainable_embeddings: bool = False
    skip_padding: bool = False

    def options(self, contestant: Contestant) -> LossOptions:
        chosen = {name: getattr(self, name) for name in ("self_conditioning", "skip_padding", "bf16")}
        return LossOptions(seed=SEED, **chosen, **contestant.options)


ALL = tuple(CONTESTANTS)
BASE = TrainingCase("train-4x384", "4 layers of width 384", contestants=ALL, repeats=5, groups=("cpu", "cuda"))
CASES = {
    case.name: case
    for case in (
        TrainingCase(
            "train-12x768", "the paper's model and batch", batch=256, length=64, source=64, d=768, layers=12,
            hidden=768, condition_layers=6, self_condition_layers=3, bf16=True, contestants=ALL, repeats=10,
            groups=("cuda",),
        ),
        BASE,
        replace(
            BASE, name="train-4x384-self", why="self-conditioning in every step: two predictions, one of them trained",
            self_conditioning=1.0, contestants=("eager", OURS), repeats=3, groups=("cpu", "cuda full"),
        ),
        replace(
            BASE, name="train-4x384-table", why="trainable embeddings: three times the vocabulary, with gradients",
            trainable_embeddings=True, contestants=("eager", OURS), repeats=3, groups=("cpu", "cuda full"),
        ),
        TrainingCase("train-4x384-small", "a small batch", batch=8, repeats=5),
        TrainingCase("train-8x384", "a larger network", layers=8),
        TrainingCase("train-4x384-8k", "a small vocabulary", v=8_000),
        TrainingCase(
            "train-4x384-ragged", "half the positions are padding, and skipped", skip_padding=True,
            groups=("cpu", "cuda full"),
        ),
        TrainingCase("train-4x384-large", "a large batch", batch=64, length=64, groups=("cpu full", "cuda full")),
        TrainingCase("train-4x384-128k", "a large vocabulary", v=128_000, groups=("cpu full", "cuda full")),
    )
}  # fmt: skip
CURVE = TrainingCase(
    "curves", "2 layers of width 384", batch=8, length=24, source=24, layers=2, condition_layers=1,
    self_conditioning=0.5,
)  # fmt: skip
CUDA_CURVE = replace(CURVE, why="4 layers of width 384", batch=64, length=64, source=64, layers=4, condition_layers=2)


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    cases: tuple[TrainingCase, ...]
    curve: TrainingCase
    curve_steps: int = 120
    repeats: int | None = None  # None: each case's own

    @property
    def parts(self) -> int:
        return 3 * len(self.cases) + 1


def plan(device: str, *, full: bool = False, patterns: Iterable[str] = (), repeats: int | None = None) -> Plan:
    """The cases of a device, or those of all that match a pattern. ValueError where a pattern fits none."""
    cases = select("training", CASES, device, full=full, patterns=patterns)
    return Plan(cases, CUDA_CURVE if device == "cuda" else CURVE, repeats=repeats)

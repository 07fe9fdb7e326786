"""Who trains and samples what: the cases and the contestants of the benchmarks of whole models."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch

from benchmarks.common import case
from benchmarks.common.case import by_name
from smoothie_kernels.diffusion.options import LossOptions

SEED = 0
OURS, REFERENCE = "fused", "eager, our noise"
SUM, WHOLE = "fused, sum", "fused, whole"
UNTOLD = {"name", "why", "contestants", "groups", "repeats", "v", "d", "dense_steps", "over_v"}  # of a case


@dataclass(frozen=True)
class Contestant(case.Contestant):
    options: Mapping[str, Any] = field(default_factory=dict)  # of the loss, or of `generate`
    unread: bool = False  # with the tensors that the authors' loop makes and never reads
    whole: bool = False  # all positions take part, whatever the case says

    @property
    def dense(self) -> bool:
        return bool(self.options["step"] == "eager")


FUSED, EAGER, TORCH_NOISE = {"step": "fused"}, {"step": "eager"}, {"step": "eager", "seed": None}
TRAINING = by_name(
    Contestant("eager", "the authors' arithmetic and torch.randn", options=EAGER | {"torch_noise": True}),
    Contestant(REFERENCE, "the same with the package's noise field: the truth of the check", options=EAGER),
    Contestant(OURS, "fused_smoothie_step", ours=True, options=FUSED),
    Contestant("fused + compile", "the same, every layer under torch.compile", compiles=True, options=FUSED),
)
SAMPLING = by_name(
    Contestant(OURS, "one embedding a position is carried", ours=True, options=FUSED),
    Contestant(SUM, "the same; the noise of all steps is added up", ours=True, options=FUSED | {"accumulate": "sum"}),
    Contestant(WHOLE, "the same; padding takes part", ours=True, options=FUSED, whole=True),
    Contestant("eager", "the authors' arithmetic and torch.randn: the logits are carried", options=TORCH_NOISE),
    Contestant("authors", "eager, and what their loop makes without reading it", options=TORCH_NOISE, unread=True),
)


@dataclass(frozen=True)
class ModelCase(case.Case):
    contestants: tuple[str, ...] = ("eager", OURS)
    d: int | None = 384
    repeats: int | None = 3
    batch: int = 32
    length: int = 32  # of a target
    source: int = 32  # of a source
    layers: int = 4
    hidden: int = 384
    heads: int = 12
    condition_layers: int = 2
    self_condition_layers: int = 1
    bf16: bool = False

    @property
    def n(self) -> int:
        return self.batch * self.length

    @property
    def network_type(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def describe(self) -> str:
        """What is not zero, false or none of its numbers and options."""
        told = {name: value for name, value in asdict(self).items() if value and name not in UNTOLD}
        return ", ".join(name if value is True else f"{name} {value}" for name, value in told.items())


SomeModelCase = TypeVar("SomeModelCase", bound=ModelCase)


@dataclass(frozen=True)
class TrainingCase(ModelCase):
    self_conditioning: float = 0.0
    trainable_embeddings: bool = False
    skip_padding: bool = False

    def options(self, contestant: Contestant) -> LossOptions:
        chosen = {name: getattr(self, name) for name in ("self_conditioning", "skip_padding", "bf16")}
        return LossOptions(seed=SEED, **chosen, **contestant.options)


@dataclass(frozen=True)
class SamplingCase(ModelCase):
    solver: str = "re-noise"
    steps: int = 50
    dense_steps: int = 10  # the first of them, after which the eager contestants' time is taken
    ragged: bool = False  # lengths from 1 to `length`, evenly spread; the rest is padding
    over_v: bool = False  # belongs to the series over V


PAPER: dict[str, Any] = {
    "batch": 256, "length": 64, "source": 64, "d": 768, "layers": 12, "hidden": 768, "condition_layers": 6,
    "self_condition_layers": 3, "bf16": True, "groups": ("cuda",),
}  # fmt: skip
BOTH, LATER, FULL = ("cpu", "cuda"), ("cpu", "cuda full"), ("cpu full", "cuda full")
ALL, TWO, THREE = tuple(TRAINING), ("eager", OURS), (OURS, "eager", "authors")
_TRAIN = TrainingCase("train-4x384", "4 layers of width 384", ALL, repeats=5, groups=BOTH)
_RARELY = replace(_TRAIN, contestants=TWO, repeats=3, groups=LATER)
_SELF = "self-conditioning in every step: two predictions, one of them trained"
_TABLE = "trainable embeddings: three times the vocabulary, with gradients"
_RAGGED = "half the positions are padding, and skipped"
TRAINING_CASES = by_name(
    TrainingCase("train-12x768", "the paper's model and batch", ALL, repeats=10, **PAPER),
    _TRAIN,
    replace(_RARELY, name="train-4x384-self", why=_SELF, self_conditioning=1.0),
    replace(_RARELY, name="train-4x384-table", why=_TABLE, trainable_embeddings=True),
    TrainingCase("train-4x384-small", "a small batch", batch=8, repeats=5),
    TrainingCase("train-8x384", "a larger network", layers=8),
    TrainingCase("train-4x384-8k", "a small vocabulary", v=8_000),
    replace(_RARELY, name="train-4x384-ragged", why=_RAGGED, skip_padding=True),
    TrainingCase("train-4x384-large", "a large batch", batch=64, length=64, groups=FULL),
    TrainingCase("train-4x384-128k", "a large vocabulary", v=128_000, groups=FULL),
)
_CURVE = TrainingCase(
    "curves", "the losses of a small model", batch=8, length=24, source=24, layers=2, condition_layers=1,
    self_conditioning=0.5,
)  # fmt: skip
CURVES = {"cpu": _CURVE, "cuda": replace(_CURVE, batch=64, length=64, source=64, layers=4, condition_layers=2)}

_PAPER = SamplingCase("sample-12x768", "the paper's model and solver", THREE, steps=200, dense_steps=20, **PAPER)
_SMALL = SamplingCase("", "", (OURS, "eager"), batch=16, source=64, repeats=2)
_LONG = replace(_SMALL, contestants=THREE, dense_steps=50, repeats=3)
_DDPM = replace(_SMALL, why="noise that is gathered", contestants=(OURS, SUM, "eager", "authors"), solver="ddpm")
_SDE = replace(_SMALL, why="the reverse SDE", contestants=(OURS, SUM, "eager"), solver="sde")
_RAGGED = "half the positions are padding, and take no part"
SAMPLING_CASES = by_name(
    _PAPER,
    replace(_PAPER, name="sample-12x768-ddim", why="the paper's model, ddim", solver="ddim"),
    replace(_LONG, name="sample-4x384", why="4 layers of width 384, the paper's solver", over_v=True),
    replace(_LONG, name="sample-4x384-ddim", why="ddim", solver="ddim"),
    replace(_DDPM, name="sample-4x384-ddpm"),
    replace(_SDE, name="sample-4x384-sde"),
    replace(_SMALL, name="sample-4x384-8k", why="a small vocabulary", v=8_000, over_v=True),
    replace(_SMALL, name="sample-4x384-128k", why="a large vocabulary", v=128_000, over_v=True),
    replace(_SMALL, name="sample-4x384-ragged", why=_RAGGED, ragged=True, contestants=(OURS, WHOLE, "eager")),
    replace(_SMALL, name="sample-4x384-one", why="one sample", batch=1, dense_steps=50),
    replace(
        _SMALL, name="sample-4x384-large", why="a large batch", batch=64, steps=20, dense_steps=5, groups=("cpu full",)
    ),
)

"""What a training run may choose. One field is one flag of `smoothie-kernels train`; defaults are the paper's."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from smoothie_kernels.diffusion.noising import STEPS
from smoothie_kernels.diffusion.solvers import ACCUMULATE, SOLVERS

MAX_SEED = 2**63 - 1


def option(default: Any, text: str) -> Any:
    """A field with the help text of its flag."""
    return field(default=default, metadata={"help": text})


def required(text: str) -> Any:
    return field(metadata={"help": text})


def check_range(options: object, low: float, high: float, *names: str) -> None:
    """Options that are given must be finite numbers in [low, high]."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (low <= value <= high and abs(value) < math.inf):
            upper = f" and at most {high}" if high < math.inf else ""
            lower = f"at least {low}{upper}" if low > -math.inf else "finite"
            raise ValueError(f"{name} must be {lower}, got {value}")


def check_not_empty(options: object, *names: str) -> None:
    """ "" is what a variable of the shell leaves that is not set, and as a path the folder we are in."""
    for name in names:
        if getattr(options, name) == "":
            raise ValueError(f"{name} must not be empty, got ''")


# Most tokens of source and target, as for the paper's data set of the same task.
PAPER_LENGTHS = {"question-generation": (100, 50), "paraphrase": (50, 50), "unconditional": (64, 80)}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which text."""

    _argument_group_name = "data"

    data: str = required(
        "a shipped sample (question-generation, paraphrase, simplification, translation-de-en, unconditional), a "
        "folder of train and validation files (.jsonl, .parquet, .csv), one such file, or a Hugging Face name"
    )
    source_column: str | None = option(None, "column of the source text; default: looked for by the usual names")
    target_column: str | None = option(None, "column of the text to learn; default: looked for by the usual names")
    unconditional: bool = option(False, "there is no source text")
    source_length: int | None = option(None, "most tokens of a source; default: the paper's for the task, else 64")
    target_length: int | None = option(None, "most tokens of a target; default: the paper's for the task, else 64")

    def __post_init__(self) -> None:
        check_range(self, 1, float("inf"), "source_length", "target_length")
        check_not_empty(self, "data", "source_column", "target_column")

    @property
    def without_source(self) -> bool:
        return self.unconditional or self.data == "unconditional"

    @property
    def lengths(self) -> tuple[int, int]:
        """Of source and target."""
        source, target = PAPER_LENGTHS.get(self.data, (64, 80 if self.without_source else 64))
        given = self.source_length, self.target_length
        return source if given[0] is None else given[0], target if given[1] is None else given[1]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model; the defaults are the paper's."""

    _argument_group_name = "model"

    embeddings: str = option(
        "bert-base-uncased",
        "where the token embeddings are from: a Hugging Face name, a model's folder, a .safetensors file, a text file "
        "of word vectors, or random:WIDTH",
    )
    tokenizer: str | None = option(None, "Hugging Face name or folder; default: that of --embeddings")
    normalisation: Literal["total", "feature", "none"] = option(
        "total", "mean 0 and standard deviation 1 over all entries of the table together, or per feature"
    )
    hidden_size: int | None = option(None, "of the transformer; default: the table's width")
    layers: int = option(12, "of the transformer")
    heads: int = option(12, "of attention")
    condition_layers: int = option(6, "of the encoder of the source; none where there is no source")
    self_condition_layers: int = option(3, "of the encoder of the model's last answer; 0 where it shall see none")
    dropout: float = option(0.0, "in all layers")
    trainable_embeddings: bool = option(False, "train the table too, with the two losses that this needs")
    metric: Literal["euclidean", "cosine", "learned"] = option(
        "euclidean", "of the distances to all tokens; learned: a matrix of the table's width squared, trained as well"
    )
    token_head: bool = option(False, "predict tokens by cross-entropy instead of embeddings by squared error")
    noise_schedule: Literal["arctan", "cosine", "sd", "sqrt", "tess"] = option("arctan", "of the forward process")
    noise_options: str = option("{}", 'options of the schedule as JSON, such as \'{"sharpness": 9, "delta": 1}\'')
    sigma_min: float = option(1.5, "width of the distances' kernel at time 0")

    def __post_init__(self) -> None:
        check_range(self, 1, float("inf"), "layers", "heads", "hidden_size")
        check_not_empty(self, "embeddings", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What is learnt, and how the step is computed."""

    _argument_group_name = "loss"

    step: Literal["fused", "eager"] = option(
        "fused", "the package's kernels, or the authors' dense arithmetic with the same noise"
    )
    torch_noise: bool = option(
        False, "for the eager step alone: draw noise with torch.randn as the authors do, not from the noise field"
    )
    self_conditioning: float = option(
        0.5, "probability that a training step predicts twice, the second time with the first answer in view"
    )
    x_0_variance: float = option(0.0, "variance of noise on the target's embeddings, before distances are taken")
    guidance_dropout: float = option(0.0, "probability that a sample's source is dropped, for guidance when sampling")
    skip_padding: bool = option(False, "leave padding out of the step, the attention and the loss")
    bf16: bool = option(False, "run the network in bfloat16; the step and the loss stay in float32")
    seed: int = option(0, "of all randomness: data order, times, noise, dropout, initial weights")

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise ValueError(f"step must be one of {', '.join(map(repr, STEPS))}, got {self.step!r}")
        if self.torch_noise and self.step != "eager":
            raise ValueError(f"torch_noise must be False with step {self.step!r}, got True")
        check_range(self, 0, 1, "self_conditioning", "guidance_dropout")
        check_range(self, 0, float("inf"), "x_0_variance")
        check_range(self, 0, MAX_SEED, "seed")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How long, how fast, and what is written."""

    _argument_group_name = "training"

    steps: int = option(100_000, "training steps in all; with --resume more than before trains on")
    batch_size: int = option(256, "samples per step, over all processes; the run is the same however they are split")
    micro_batch_size: int | None = option(None, "samples per process that are computed at once; default: its share")
    learning_rate: float = option(2e-4, "of AdamW, constant after warm-up")
    warmup_steps: int = option(5_000, "over which the learning rate grows from 0")
    weight_decay: float = option(0.01, "of AdamW, on all matrices but the embedding table and the metric's")
    clip: float = option(1.0, "largest norm of the gradient")
    ema: float = option(0.9999, "decay of the moving average of the weights, warmed up; 0 is none")
    eval_every: int = option(1_000, "steps between validations, and one at the end")
    eval_samples: int = option(1_024, "the first samples of the validation set that are used")
    save_every: int = option(1_000, "steps between checkpoints, and one at the end")
    keep_checkpoints: int = option(2, "how many of the newest stay")
    log_every: int = option(50, "steps between lines of metrics.csv")
    workers: int = option(0, "processes that load data")
    compile: bool = option(False, "torch.compile the network")
    cpu: bool = option(False, "train on the CPU although there is a GPU")
    report_to: str | None = option(None, "a tracker that accelerate knows (tensorboard, wandb, ...); default: none")

    def __post_init__(self) -> None:
        infinity = float("inf")
        counts = (
            "steps", "batch_size", "micro_batch_size", "eval_every", "eval_samples", "save_every", "keep_checkpoints",
            "log_every",
        )  # fmt: skip
        check_range(self, 1, infinity, *counts)
        check_range(self, 0, infinity, "warmup_steps", "learning_rate", "weight_decay", "workers")
        check_range(self, 0, 1, "ema")
        if not self.clip > 0:  # infinity clips nothing
            raise ValueError(f"clip must be positive, got {self.clip}")


# Of the sampler's noise, as the paper found best: with a source, and without.
DELTAS = {True: 0.25, False: 1.05}


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How text is sampled; the defaults are the paper's."""

    _argument_group_name = "sampling"

    solver: Literal["re-noise", "ddim", "ddpm", "sde"] = option("re-noise", "rule from one step to the next")
    steps: int = option(200, "how often the model is called")
    delta: float | None = option(None, "loudness of the noise; default: 0.25 with a source, 1.05 without")
    seed: int = option(0, "of all noise; with the sample's number it decides on a sample")
    guidance: float = option(0.0, "classifier-free: how far beyond the answer, away from that without the source")
    clamp: bool = option(False, "replace every answer by its nearest token's embedding")
    self_conditioning: bool = option(True, "show the model its last answer, where it can look at one")
    stop_after: int | None = option(
        None, "a sample is done when its text was the same for so many steps; default: never"
    )
    shrink_after: int | None = option(
        None, "positions behind the end leave when the end was where it is for so many steps; default: never"
    )
    accumulate: Literal["bridge", "sum"] = option(
        "bridge", "noise of ddpm and sde: the field of every step in a sum, or a few fields with the law of that sum"
    )
    keep_special: bool = option(False, "let texts have special tokens that no training text had, such as [MASK]")
    step: Literal["fused", "eager"] = option("fused", "the package's kernels, or the authors' dense arithmetic")
    bf16: bool = option(False, "run the network in bfloat16; the step stays in float32")

    def __post_init__(self) -> None:
        for name, choices in (("solver", SOLVERS), ("accumulate", ACCUMULATE), ("step", STEPS)):
            if getattr(self, name) not in choices:
                wanted = ", ".join(map(repr, choices))
                raise ValueError(f"{name} must be one of {wanted}, got {getattr(self, name)!r}")
        check_range(self, 1, float("inf"), "steps", "stop_after", "shrink_after")
        check_range(self, 0, float("inf"), "delta")
        check_range(self, -MAX_SEED - 1, MAX_SEED, "seed")
        check_range(self, -float("inf"), float("inf"), "guidance")

    def loudness(self, has_source: bool) -> float:
        return DELTAS[has_source] if self.delta is None else self.delta


# What may differ between a checkpoint and the run that goes on from it. Data and tokenizer are known by fingerprints,
# not by the folder they are in.
FREE = {
    "data", "tokenizer", "step", "steps", "micro_batch_size", "eval_every", "eval_samples", "save_every",
    "keep_checkpoints", "log_every", "workers", "compile", "cpu", "report_to",
}  # fmt: skip


def as_record(*groups: Any) -> dict[str, Any]:
    """All options of a run by name."""
    record: dict[str, Any] = {}
    for group in groups:
        record |= asdict(group)
    return record

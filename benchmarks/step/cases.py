"""What is measured: the operators with their cost models, and one entry per case. A new case is one more entry."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.common import case
from benchmarks.hopper import plans


@dataclass(frozen=True)
class Op:
    """What an operator must do at least, however it is written."""

    products: int  # of N x V x D, each 2 N V D flop: what the floor is made of
    arrays_of_rows: int  # of shape (N, D), read or written; those of shape (N,) do not count
    tables: int  # of shape (V, D), likewise
    noise: bool = True
    trains: tuple[str, ...] = ()  # whose gradients it gives

    @property
    def trains_table(self) -> bool:
        return "embeddings" in self.trains

    def flop(self, n: int, v: int, d: int) -> int:
        return 2 * self.products * n * v * d

    def bytes(self, n: int, v: int, d: int, itemsize: int) -> int:
        """Inputs read once, outputs written once."""
        return itemsize * d * (v * self.tables + n * self.arrays_of_rows)


OPS = {
    "step": Op(products=2, arrays_of_rows=2, tables=1),
    "nearest": Op(products=1, arrays_of_rows=1, tables=1, noise=False),
    # The largest logits and a mean of their tokens. Who takes the mean over all tokens makes two products.
    "topk": Op(products=1, arrays_of_rows=2, tables=1),
    # Forward and backward. More than the step's products: the gradient times the table, and what makes that of x ...
    "train-x": Op(products=4, arrays_of_rows=4, tables=1, trains=("x",)),
    # ... and two that make the table's.
    "train": Op(products=6, arrays_of_rows=4, tables=2, trains=("x", "embeddings")),
}

DEFAULT, FULL, HOPPER = ("cpu", "cuda"), ("cpu full", "cuda full"), ("hopper",)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


@dataclass(frozen=True)
class Case(case.Case):
    """K of the top-k."""

    groups: tuple[str, ...] = DEFAULT
    n: int = 512
    dtype: torch.dtype = FP32
    op: str = "step"
    k: int = 64  # of "topk" alone
    mu: float = 0.05
    std: float = 0.99  # 0: no noise
    fields: int = 1  # whose sum the noise is; "step" alone takes more than one
    t: float | None = None  # time in the paper's schedule, instead of mu and std
    captured: bool = False  # on a GPU: replayed from a CUDA graph, so that launches from Python do not count
    patience: float = 1.5  # seconds of timed runs for each contestant


OURS = ("fused", "fused, raw table")
DENSE = ("eager", "compiled", "chunked")
THREE = ("fused", "eager", "chunked")
TOP = ("top-k, 0.95", "top-k, exact")
TOP_AND_MEAN = "top-k and mean"
NO_NOISE = ("sdpa", "flex", "keops")
EPILOGUE = "chunked, compiled epilogue"
V_SWEEP = (1024, 4096, 16384, 30522, 65536, 262144)
LARGE: dict[str, Any] = {"v": 256_000, "d": 768}

_STEP = Case("step", "the training step: real table, float32, noise", (*OURS, *DENSE))
_QUIET = Case("step-quiet", "the same without noise", ("fused", *DENSE, *NO_NOISE), std=0)
_NEAREST = Case("nearest", "the nearest token alone: one product", ("fused", *DENSE), op="nearest")
_TOPK = Case(
    "topk", "the 64 largest logits and their mean: one product",
    (*TOP, TOP_AND_MEAN, "fused", "statistics", "eager", "compiled"), op="topk",
)  # fmt: skip
_TRAIN = Case("train", "forward, and backward for x and table", ("fused", *DENSE), op="train")
_TRAIN_X = Case("train-x", "forward, and backward for x alone", THREE, op="train-x")


def _default() -> Iterable[Case]:
    yield from (_STEP, _QUIET, _NEAREST, _TOPK, _TRAIN, _TRAIN_X)
    yield replace(_STEP, name="step-n1", why="one row: the table must be read, and nothing else matters", n=1)
    yield replace(_STEP, name="step-n8", why="a few rows", n=8)
    yield Case("step-bf16", "bfloat16 rows and table", THREE, dtype=BF16)
    yield Case("step-n4096", "many rows: memory must not grow with N x V", ("fused", "eager"), n=4096)
    yield Case("step-v256000", "a large model's vocabulary", THREE, n=64, **LARGE)
    who = (*TOP, "fused", "statistics", "eager")
    yield replace(_TOPK, name="topk-v256000", why="a large model's vocabulary", contestants=who, n=64, **LARGE)
    for v in V_SWEEP:
        yield Case(f"sweep-v{v}", "for the pictures", THREE, n=64, v=v, patience=0.7)


def _full() -> Iterable[Case]:
    def full(of: Case, name: str, why: str, *who: str, **changes: Any) -> Case:
        return replace(of, name=name, why=why, contestants=who or of.contestants, groups=FULL, **changes)

    for n in (32, 128, 2048):
        yield full(_STEP, f"step-n{n}", "rows", n=n)
    for d in (768, 1024):
        for dtype in (FP32, BF16):
            yield full(_STEP, f"step-d{d}-{SHORT[dtype]}", "width and type", d=d, dtype=dtype)
    yield full(_STEP, "step-bf16-compiled", "everybody on bfloat16", dtype=BF16)
    yield full(_STEP, "step-fp16", "float16 rows and table", dtype=FP16)
    yield full(_QUIET, "step-quiet-bf16", "bfloat16 without noise", dtype=BF16)
    yield full(_STEP, "step-epilogue", "what is hard to beat on a GPU", "fused", "chunked", EPILOGUE)
    for t in (5e-4, 0.05, 0.5, 0.9995):
        yield full(_STEP, f"step-t{t}", "another time of the paper's schedule", t=t)
    yield full(_NEAREST, "nearest-n1", "one row", n=1)
    yield full(_NEAREST, "nearest-bf16", "bfloat16", dtype=BF16)
    yield full(_STEP, "step-fields8", "the sum of 8 noise fields, as a sampler has it", "fused", "eager", fields=8)
    for k in (8, 256):
        yield full(_TOPK, f"topk-k{k}", "few and many", k=k)
    for n in (1, 8):
        yield full(_TOPK, f"topk-n{n}", "one row, a few rows", n=n)
    yield full(_TOPK, "topk-bf16", "bfloat16 rows and table", dtype=BF16)
    yield full(_TRAIN, "train-everybody", "every backend", *OURS, "fused[reference]", "chunked", EPILOGUE)
    for of in (_TRAIN, _TRAIN_X):
        yield full(of, f"{of.name}-n8", "a few rows", n=8)
        yield full(of, f"{of.name}-bf16", "bfloat16", *THREE, dtype=BF16)
        yield full(of, f"{of.name}-d768", "BERT's cased vocabulary and width", v=28_996, d=768)


def by_backend(name: str) -> tuple[str, ...]:
    return f"{name}[cuda]", f"{name}[triton]"


ONE_KERNEL, ONE_PASS, TWO_PASSES = plans.named(plans.ONE_KERNEL | plans.FEW_ROWS)


def _hopper() -> Iterable[Case]:
    """In the order in which `benchmarks.hopper measure` takes them."""

    def gpu(
        of: Case, who: tuple[str, ...], n: int, v: int, d: int, dtype: torch.dtype = BF16, *, name: str = "",
        why: str = "", captured: bool = False,
    ) -> Case:  # fmt: skip
        full = f"gpu-{name or of.name}-n{n}-v{v}-d{d}-{SHORT[dtype]}"
        return replace(
            of, name=full, why=why or of.why.partition(":")[0], contestants=who, groups=HOPPER, n=n, v=v, d=d,
            dtype=dtype, captured=captured, patience=0.3,
        )  # fmt: skip

    fused, statistics = by_backend("fused"), by_backend("statistics")
    everybody = (*fused, ONE_KERNEL, EPILOGUE, "eager", "eager, float32", "compiled")
    in_float32 = ("fused[triton]", ONE_KERNEL, EPILOGUE, "eager")
    few = (*fused, ONE_PASS, TWO_PASSES, ONE_KERNEL, EPILOGUE, "eager, float32")
    of_float32 = (*fused, EPILOGUE, "eager, float32")
    pass_only = replace(_TOPK, why="tokens, noisy tokens and lse alone: one product")
    tiles = ("fused[triton]", *plans.named(plans.FORWARD))
    other_plans, other_tiles = "backend cuda with other numbers in its plan", "backend triton with other tiles"
    many, bert, uncased, minilm, large = 16_384, (28_996, 768), (30_522, 1024), (30_522, 384), (256_000, 768)
    graph: dict[str, Any] = {"name": "graph", "why": "few rows, replayed from a CUDA graph", "captured": True}

    yield gpu(_STEP, everybody, many, *bert)
    yield gpu(_QUIET, (*fused, "eager", "sdpa"), many, *bert)
    yield gpu(pass_only, statistics, many, *bert, name="statistics")
    quiet = replace(pass_only, std=0.0)
    yield gpu(quiet, statistics, many, *bert, name="statistics-quiet", why="the same without noise")
    yield gpu(_TRAIN, everybody, many, *bert)
    yield gpu(_STEP, everybody, many, *minilm)
    yield gpu(_STEP, in_float32, many, *bert, FP32, why="float32 products by three tf32 products")
    for n in (1, 8, 64):
        yield gpu(_STEP, few, n, *bert, **graph)
    yield gpu(_TOPK, (*by_backend(TOP[0]), *by_backend(TOP[1]), "eager", "compiled"), many, *bert)
    yield gpu(_STEP, of_float32, many, *uncased)
    yield gpu(_NEAREST, fused, many, *bert)
    yield gpu(_STEP, (*fused, ONE_KERNEL), many, *bert, FP16, why="float16 rows and table")
    yield gpu(_STEP, ("fused[cuda]", *plans.named(plans.CUDA)), many, *bert, name="plans", why=other_plans)
    yield gpu(_STEP, tiles, many, *bert, name="tiles", why=other_tiles)
    yield gpu(_STEP, tiles, many, *minilm, name="tiles", why="the same for a narrow table")
    yield gpu(_STEP, of_float32, 2048, *large, why="a large model's vocabulary")
    yield gpu(_TRAIN, ("fused[triton]", *plans.named(plans.BACKWARD), EPILOGUE, "compiled"), many, *minilm)
    yield gpu(_STEP, few, 512, *bert, **graph)
    yield gpu(_STEP, few, 64, *bert, why="few rows, launched from Python")
    yield gpu(pass_only, statistics, 2048, *large, name="statistics")
    yield gpu(_TRAIN, in_float32, 4096, *bert, FP32, why="gradients in float32")
    yield gpu(_TRAIN_X, ("fused[triton]", "eager"), many, *bert)
    yield gpu(_STEP, ("fused[triton]", ONE_KERNEL, "eager"), 4096, *minilm, FP32, why="float32, a narrow table")


CASES = {each.name: each for each in (*_default(), *_full(), *_hopper())}

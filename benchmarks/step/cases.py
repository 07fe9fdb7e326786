"""What is measured: the operators with their cost models, and one entry per case. A new case is one more entry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch

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
    # Forward and backward. Beside the step's products: the gradient times the table, and what makes that of x ...
    "train-x": Op(products=4, arrays_of_rows=4, tables=1, trains=("x",)),
    # ... and two that make the table's.
    "train": Op(products=6, arrays_of_rows=4, tables=2, trains=("x", "embeddings")),
}


@dataclass(frozen=True)
class Case:
    """One set of inputs, and who runs on it. N rows, V vocabulary, D width, K of the top-k."""

    name: str
    why: str
    contestants: tuple[str, ...]  # names in contestants.CONTESTANTS; the floor runs in every case
    n: int
    v: int | None = None  # None: as many as the embedding table has
    d: int | None = None  # None: the table's; any other width means a synthetic table
    dtype: torch.dtype = torch.float32
    op: str = "step"
    k: int = 64  # of "topk" alone
    mu: float = 0.05
    std: float = 0.99  # 0: no noise
    fields: int = 1  # whose sum the noise is; "step" alone takes more than one
    t: float | None = None  # time in the paper's schedule, instead of mu and std
    captured: bool = False  # on a GPU: replayed from a CUDA graph, so that launches from Python do not count
    group: str = "default"  # "default", "sweep" (in the default run too), "full", "gpu"


OURS = ("fused", "fused, raw table")
DENSE = ("eager", "compiled", "chunked")
TOP = ("top-k, 0.95", "top-k, exact")
TOP_AND_MEAN = "top-k and mean"
NO_NOISE = ("sdpa", "flex", "keops")
EPILOGUE = "chunked, compiled epilogue"
V_SWEEP = (1024, 4096, 16384, 30522, 65536, 262144)

_STEP = Case("step", "the training step: real table, float32, noise", (*OURS, *DENSE), n=512)
_QUIET = Case("step-quiet", "the same without noise", ("fused", *DENSE, *NO_NOISE), n=512, std=0)
_NEAREST = Case("nearest", "the nearest token alone: one product", ("fused", *DENSE), n=512, op="nearest")
_TOPK = Case(
    "topk",
    "the 64 largest logits and their mean: one product",
    (*TOP, TOP_AND_MEAN, "fused", "statistics", "eager", "compiled"),
    n=512,
    op="topk",
)
_TRAIN = Case("train", "forward, and backward for x and table", ("fused", *DENSE), n=512, op="train")
_TRAIN_X = Case("train-x", "forward, and backward for x alone", ("fused", "eager", "chunked"), n=512, op="train-x")

_DEFAULT = (
    _STEP,
    _QUIET,
    _NEAREST,
    _TOPK,
    _TRAIN,
    _TRAIN_X,
    replace(_STEP, name="step-n1", why="one row: the table must be read, and nothing else matters", n=1),
    replace(_STEP, name="step-n8", why="a few rows", n=8),
    Case("step-bf16", "bfloat16 rows and table", ("fused", "eager", "chunked"), n=512, dtype=torch.bfloat16),
    Case("step-n4096", "many rows: memory must not grow with N x V", ("fused", "eager"), n=4096),
    Case("step-v256000", "a large model's vocabulary", ("fused", "eager", "chunked"), n=64, v=256_000, d=768),
    replace(
        _TOPK,
        name="topk-v256000",
        why="a large model's vocabulary",
        contestants=(*TOP, "fused", "statistics", "eager"),
        n=64,
        v=256_000,
        d=768,
    ),
)
_SWEEP = tuple(
    Case(f"sweep-v{v}", "for the pictures", ("fused", "eager", "chunked"), n=64, v=v, group="sweep") for v in V_SWEEP
)
_FULL = (
    *(replace(_STEP, name=f"step-n{n}", why="rows", n=n, group="full") for n in (32, 128, 2048)),
    *(
        replace(_STEP, name=f"step-d{d}-{name}", why="width and type", d=d, dtype=dtype, group="full")
        for d in (768, 1024)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ),
    replace(_STEP, name="step-bf16-compiled", why="everybody on bfloat16", dtype=torch.bfloat16, group="full"),
    replace(_STEP, name="step-fp16", why="float16 rows and table", dtype=torch.float16, group="full"),
    replace(_QUIET, name="step-quiet-bf16", why="bfloat16 without noise", dtype=torch.bfloat16, group="full"),
    replace(
        _STEP,
        name="step-epilogue",
        why="what is hard to beat on a GPU",
        contestants=("fused", "chunked", EPILOGUE),
        group="full",
    ),
    *(
        replace(_STEP, name=f"step-t{t}", why="another time of the paper's schedule", t=t, group="full")
        for t in (5e-4, 0.05, 0.5, 0.9995)
    ),
    replace(_NEAREST, name="nearest-n1", why="one row", n=1, group="full"),
    replace(_NEAREST, name="nearest-bf16", why="bfloat16", dtype=torch.bfloat16, group="full"),
    replace(
        _STEP,
        name="step-fields8",
        why="the sum of 8 noise fields, as a sampler has it",
        contestants=("fused", "eager"),
        fields=8,
        group="full",
    ),
    *(replace(_TOPK, name=f"topk-k{k}", why="few and many", k=k, group="full") for k in (8, 256)),
    *(replace(_TOPK, name=f"topk-n{n}", why="one row, a few rows", n=n, group="full") for n in (1, 8)),
    replace(_TOPK, name="topk-bf16", why="bfloat16 rows and table", dtype=torch.bfloat16, group="full"),
    replace(
        _TRAIN,
        name="train-everybody",
        why="every backend",
        contestants=(*OURS, "fused[reference]", "chunked", EPILOGUE),
        group="full",
    ),
    *(
        replace(case, name=f"{case.name}-{name}", why=why, group="full", **changes)
        for case in (_TRAIN, _TRAIN_X)
        for name, why, changes in (
            ("n8", "a few rows", {"n": 8}),
            ("bf16", "bfloat16", {"dtype": torch.bfloat16, "contestants": ("fused", "eager", "chunked")}),
            ("d768", "BERT's cased vocabulary and width", {"v": 28_996, "d": 768}),
        )
    ),
)


# --- a GPU: in the order in which `benchmarks.hopper measure` takes them

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


def _gpu(
    of: Case, who: tuple[str, ...], n: int, v: int, d: int, dtype: torch.dtype = BF16, *, name: str = "", why: str = "",
    captured: bool = False,
) -> Case:  # fmt: skip
    full = f"gpu-{name or of.name}-n{n}-v{v}-d{d}-{SHORT[dtype]}"
    why = why or of.why.partition(":")[0]
    return replace(
        of, name=full, why=why, contestants=who, n=n, v=v, d=d, dtype=dtype, group="gpu", captured=captured
    )  # fmt: skip


def by_backend(name: str) -> tuple[str, ...]:
    return f"{name}[cuda]", f"{name}[triton]"


(ONE_KERNEL,) = plans.named(plans.ONE_KERNEL)
_ONE_PASS, _TWO_PASSES = plans.named(plans.FEW_ROWS)
_FUSED, _PASS = by_backend("fused"), by_backend("statistics")
_ALL = (*_FUSED, ONE_KERNEL, EPILOGUE, "eager", "eager, float32", "compiled")
_IN_FLOAT32 = ("fused[triton]", ONE_KERNEL, EPILOGUE, "eager")
_FEW = (*_FUSED, _ONE_PASS, _TWO_PASSES, ONE_KERNEL, EPILOGUE, "eager, float32")
_PASS_ONLY = replace(_TOPK, why="tokens, noisy tokens and lse alone: one product")
_MANY, _BERT, _UNCASED, _MINILM = 16_384, (28_996, 768), (30_522, 1024), (30_522, 384)
_LARGE = (256_000, 768)

_GPU = (
    _gpu(_STEP, _ALL, _MANY, *_BERT),
    _gpu(_QUIET, (*_FUSED, "eager", "sdpa"), _MANY, *_BERT),
    _gpu(_PASS_ONLY, _PASS, _MANY, *_BERT, name="statistics"),
    _gpu(replace(_PASS_ONLY, std=0.0), _PASS, _MANY, *_BERT, name="statistics-quiet", why="the same without noise"),
    _gpu(_TRAIN, _ALL, _MANY, *_BERT),
    _gpu(_STEP, _ALL, _MANY, *_MINILM),
    _gpu(_STEP, _IN_FLOAT32, _MANY, *_BERT, FP32, why="float32 products by three tf32 products"),
    *(
        _gpu(_STEP, _FEW, n, *_BERT, name="graph", why="few rows, replayed from a CUDA graph", captured=True)
        for n in (1, 8, 64)
    ),
    _gpu(_TOPK, (*by_backend("top-k, 0.95"), *by_backend("top-k, exact"), "eager", "compiled"), _MANY, *_BERT),
    _gpu(_STEP, (*_FUSED, EPILOGUE, "eager, float32"), _MANY, *_UNCASED),
    _gpu(_NEAREST, _FUSED, _MANY, *_BERT),
    _gpu(_STEP, (*_FUSED, ONE_KERNEL), _MANY, *_BERT, FP16, why="float16 rows and table"),
    _gpu(
        _STEP,
        ("fused[cuda]", *plans.named(plans.CUDA)),
        _MANY,
        *_BERT,
        name="plans",
        why="backend cuda with other numbers in its plan",
    ),
    _gpu(
        _STEP,
        ("fused[triton]", *plans.named(plans.FORWARD)),
        _MANY,
        *_BERT,
        name="tiles",
        why="backend triton with other tiles",
    ),
    _gpu(
        _STEP,
        ("fused[triton]", *plans.named(plans.FORWARD)),
        _MANY,
        *_MINILM,
        name="tiles",
        why="the same for a narrow table",
    ),
    _gpu(_STEP, (*_FUSED, EPILOGUE, "eager, float32"), 2048, *_LARGE, why="a large model's vocabulary"),
    _gpu(_TRAIN, ("fused[triton]", *plans.named(plans.BACKWARD), EPILOGUE, "compiled"), _MANY, *_MINILM),
    _gpu(_STEP, _FEW, 512, *_BERT, name="graph", why="some rows, replayed from a CUDA graph", captured=True),
    _gpu(_STEP, _FEW, 64, *_BERT, why="few rows, launched from Python"),
    _gpu(_PASS_ONLY, _PASS, 2048, *_LARGE, name="statistics"),
    _gpu(_TRAIN, _IN_FLOAT32, 4096, *_BERT, FP32, why="gradients in float32"),
    _gpu(_TRAIN_X, ("fused[triton]", "eager"), _MANY, *_BERT),
    _gpu(_STEP, ("fused[triton]", ONE_KERNEL, "eager"), 4096, *_MINILM, FP32, why="float32, a narrow table"),
)

CASES = {case.name: case for case in (*_DEFAULT, *_SWEEP, *_FULL, *_GPU)}


def select(patterns: Iterable[str] = (), *, full: bool = False) -> list[Case]:
    """The cases whose names match any of the shell patterns; without patterns the default run, or the full one."""
    patterns = list(patterns)
    if not patterns:
        groups = {"default", "sweep", "full"} if full else {"default", "sweep"}
        return [case for case in CASES.values() if case.group in groups]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in CASES):
            raise ValueError(f"no case is named {pattern!r}; `python -m benchmarks list` shows their names")
    return [case for case in CASES.values() if any(fnmatch(case.name, pattern) for pattern in patterns)]

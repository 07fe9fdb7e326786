"""Who runs: this package, what people use instead, and the two matrix products alone.

Every contestant makes, from the inputs of a case, a call without arguments: the thing that is timed. What can be done
once per table (column norms, padded copies, compilation) may be done while making it, for all contestants alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

import smoothie_kernels as sk
from benchmarks import competitors
from benchmarks.inputs import SIGMA_MIN, Call, Inputs, Outputs, Prepare
from smoothie_kernels import dispatch

SEED = 20_250_518


def never(inputs: Inputs) -> str | None:
    return None


@dataclass(frozen=True)
class Contestant:
    name: str
    prepare: Mapping[str, Prepare]  # by operator
    what: str
    ours: bool = False
    compiles: bool = False  # its first call compiles a program, whose memory is not the step's
    tensors_of_n_v: int = 0  # of four-byte elements that it holds at once, so that it can be left out where memory ends
    absent: Callable[[Inputs], str | None] = field(default=never)  # why it cannot take part, or None


# This package


def fused(backend: str = "auto", *, raw: bool = False) -> Mapping[str, Prepare]:
    def step(inputs: Inputs) -> Call:
        table = inputs.table if raw else sk.Vocabulary(inputs.table, backend=backend)
        std = inputs.std if inputs.noisy else 0

        def call() -> Outputs:
            y = sk.fused_smoothie_step(
                inputs.x, table, inputs.mu, std, sigma_min=SIGMA_MIN, seed=SEED, backend=backend
            )  # fmt: skip
            return Outputs(y.smoothed, y.tokens, y.noisy_tokens, y.lse)

        return call

    def nearest(inputs: Inputs) -> Call:
        table = inputs.table if raw else sk.Vocabulary(inputs.table, backend=backend)

        def call() -> Outputs:
            tokens, distance = sk.nearest_token(inputs.x, table, backend=backend)
            return Outputs(tokens=tokens, distance=distance)

        return call

    return {"step": step, "nearest": nearest}


def backend_cannot(name: str) -> Callable[[Inputs], str | None]:
    def reason(inputs: Inputs) -> str | None:
        answer: str | None = dispatch.load(name).supports(inputs.x.device.type, inputs.x.dtype)
        return answer

    return reason


# The floor: the products of the step at the rate of the machine's GEMM library


def products(dtype: torch.dtype | None = None) -> Mapping[str, Prepare]:
    """The products alone, into tensors that exist already; in the inputs' type or a given one."""

    def prepare(inputs: Inputs, count: int) -> Call:
        x, table = inputs.x.to(dtype or inputs.x.dtype), inputs.table.to(dtype or inputs.x.dtype)
        scores, smoothed = x.new_empty(len(x), len(table)), torch.empty_like(x)

        def call() -> Outputs:
            torch.mm(x, table.T, out=scores)
            if count == 2:
                torch.mm(scores, table, out=smoothed)
            return Outputs()

        return call

    return {"step": lambda inputs: prepare(inputs, 2), "nearest": lambda inputs: prepare(inputs, 1)}


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("fused", fused(), "this package, with a Vocabulary made beforehand", ours=True),
        Contestant("fused, raw table", fused(raw=True), "this package, given the table as a tensor", ours=True),
        *(
            Contestant(f"fused[{name}]", fused(name), f"its {name} backend", ours=True, absent=backend_cannot(name))
            for name in dispatch.BACKENDS
        ),
        Contestant("eager", competitors.dense(False), "PyTorch as the authors of Smoothie write it", tensors_of_n_v=5),
        Contestant(
            "compiled", competitors.dense(True), "the same under torch.compile", compiles=True, tensors_of_n_v=3
        ),
        Contestant(
            "chunked",
            {"step": competitors.chunked_step, "nearest": competitors.chunked_nearest},
            "PyTorch, the vocabulary in chunks",
        ),
        Contestant("sdpa", {"step": competitors.sdpa}, "scaled_dot_product_attention with the bias as one more column"),
        Contestant("flex", {"step": competitors.flex}, "FlexAttention with the bias in score_mod", compiles=True),
        Contestant(
            "keops", {"step": competitors.keops}, "KeOps LazyTensor", compiles=True, absent=competitors.no_keops
        ),
    )
}
FLOOR = Contestant("products", products(), "the two matrix products alone (the floor)", tensors_of_n_v=1)
FLOAT_FLOOR = Contestant("products, float32", products(torch.float32), "the same in float32", tensors_of_n_v=1)

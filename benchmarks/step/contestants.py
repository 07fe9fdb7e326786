"""Who runs: this package, what people use instead, and the two matrix products alone.

Every contestant makes, from the inputs of a case, a call without arguments: the thing that is timed. What can be done
once per table (column norms, padded copies, compilation) may be done while making it, for all contestants alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import smoothie_kernels as sk
from benchmarks.hopper import plans
from benchmarks.hopper.plans import Plan
from benchmarks.step import chunked, competitors, epilogue
from benchmarks.step.cases import OPS
from benchmarks.step.inputs import SIGMA_MIN, Call, Inputs, Outputs, Prepare, aligned, training
from smoothie_kernels import dispatch, library
from smoothie_kernels.backends import StepOutputs

SEED = 20_250_518
ALL_BACKENDS = (*dispatch.BACKENDS, *dispatch.BY_NAME)


def never(inputs: Inputs) -> str | None:
    return None


@dataclass(frozen=True)
class Contestant:
    name: str
    prepare: Mapping[str, Prepare]  # by operator
    what: str
    ours: bool = False
    recall_target: float = 1.0  # of the top-k that it gives
    smooth: str = "topk"  # what its mean embedding is of where it gives a top-k, as fused_smoothie_step calls it
    compiles: bool = False  # its first call compiles a program, whose memory is not the step's
    tensors_of_n_v: int = 0  # of four-byte elements that it holds at once, so that it can be left out where memory ends
    absent: Callable[[Inputs], str | None] = field(default=never)  # why it cannot take part, or None


# This package


def fused(backend: str = "auto", *, raw: bool = False, workspace: int = 2**28) -> Mapping[str, Prepare]:
    def run(inputs: Inputs, x: Tensor, table: Tensor | sk.Vocabulary) -> sk.SmoothieStep:
        std = inputs.std if inputs.noisy else 0
        return sk.fused_smoothie_step(
            x, table, inputs.mu, std, sigma_min=SIGMA_MIN, seed=SEED, workspace=workspace, backend=backend,
            **inputs.fields,
        )  # fmt: skip

    def prepared(table: Tensor) -> Tensor | sk.Vocabulary:
        return table if raw else sk.Vocabulary(table, backend=backend)

    def step(inputs: Inputs) -> Call:
        table = prepared(inputs.table)

        def call() -> Outputs:
            y = run(inputs, inputs.x, table)
            return Outputs(y.smoothed, y.tokens, y.noisy_tokens, y.lse)

        return call

    def smoothed(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
        if inputs.op.trains_table:  # it is another one in every step of an optimiser
            return lambda x, table: run(inputs, x, prepared(table)).smoothed
        frozen = prepared(inputs.table)
        return lambda x, table: run(inputs, x, frozen).smoothed

    def nearest(inputs: Inputs) -> Call:
        table = prepared(inputs.table)

        def call() -> Outputs:
            tokens, distance = sk.nearest_token(inputs.x, table, backend=backend)
            return Outputs(tokens=tokens, distance=distance)

        return call

    return {"step": step, "nearest": nearest, "topk": step, **training(smoothed)}


def top_k(recall_target: float, smooth: str = "topk", backend: str = "auto") -> Mapping[str, Prepare]:
    def prepare(inputs: Inputs) -> Call:
        table, std = sk.Vocabulary(inputs.table, backend=backend), inputs.std if inputs.noisy else 0

        def call() -> Outputs:
            y = sk.fused_smoothie_step(
                inputs.x, table, inputs.mu, std, sigma_min=SIGMA_MIN, seed=SEED, topk=inputs.k,
                recall_target=recall_target, smooth=smooth, backend=backend,
            )  # fmt: skip
            assert y.topk is not None
            return Outputs(
                y.smoothed, y.tokens, y.noisy_tokens, y.lse, top_values=y.topk.values, top_indices=y.topk.indices
            )

        return call

    return {"topk": prepare}


def without_mean(
    inputs: Inputs,
    table: sk.Vocabulary,
    *,
    topk: int = 0,
    recall_target: float = 1.0,
    offset: int = 0,
    backend: str = "auto",
) -> StepOutputs:
    """One pass of the library that gives everything but a mean embedding."""
    *outputs, _ = library.step_fwd(
        inputs.x, table.embeddings, table.bias, inputs.mu, inputs.std if inputs.noisy else None, row_ids=None,
        row_offset=0, seed=torch.tensor(SEED), offset=torch.tensor([offset]), field_weights=None,
        sigma_min=torch.tensor(SIGMA_MIN, dtype=torch.float64), workspace=2**28, mean=False, topk=topk,
        recall_target=recall_target, wide=False, backend=backend,
    )  # fmt: skip
    return StepOutputs(*outputs)


def statistics(backend: str = "auto") -> Mapping[str, Prepare]:
    """The pass that a top-k rides on."""

    def prepare(inputs: Inputs) -> Call:
        table = sk.Vocabulary(inputs.table, backend=backend)

        def call() -> Outputs:
            y = without_mean(inputs, table, backend=backend)
            return Outputs(tokens=y.tokens, noisy_tokens=y.noisy_tokens, lse=y.lse)

        return call

    return {"topk": prepare}


def planned(plan: Plan) -> Mapping[str, Prepare]:
    """fused, with other numbers in its backend's plan."""

    def under(prepare: Prepare) -> Prepare:
        def prepare_planned(inputs: Inputs) -> Call:
            with plan.applied():
                call = prepare(inputs)

            def planned_call() -> Outputs:
                with plan.applied():
                    return call()

            return planned_call

        return prepare_planned

    return {op: under(prepare) for op, prepare in fused(plan.backend, workspace=plan.workspace).items()}


def _top_k(name: str, recall_target: float, what: str, smooth: str = "topk") -> list[Contestant]:
    """By whichever backend auto picks, and by name."""
    of_backend = [("auto", name, never), *((each, f"{name}[{each}]", backend_cannot(each)) for each in ALL_BACKENDS)]
    return [
        Contestant(
            label, top_k(recall_target, smooth, backend), what, ours=True, recall_target=recall_target, smooth=smooth,
            absent=absent,
        )
        for backend, label, absent in of_backend
    ]  # fmt: skip


def backend_cannot(name: str) -> Callable[[Inputs], str | None]:
    def reason(inputs: Inputs) -> str | None:
        answer: str | None = dispatch.load(name).supports(inputs.x.device.type, inputs.x.dtype)
        return answer

    return reason


# The floor: the products of an operator at the rate of the machine's GEMM library


def products(dtype: torch.dtype | None = None) -> Mapping[str, Prepare]:
    """The products alone, of an aligned table, into tensors that exist already; in the inputs' type or a given one."""

    def prepare(inputs: Inputs) -> Call:
        op, inputs = inputs.op, inputs.to(dtype)
        x, table = inputs.x, aligned(inputs.table)
        operands = (x, inputs.grad.to(x.dtype)) if op.trains else (x,)
        scores, of_rows = x.new_empty(len(x), len(table)), torch.empty_like(x)
        of_table = torch.empty_like(table) if op.trains_table else None

        def call() -> Outputs:
            for rows in operands:
                torch.mm(rows, table.T, out=scores)
                if op.products > 1:
                    torch.mm(scores, table, out=of_rows)
                if of_table is not None:
                    torch.mm(scores.T, rows, out=of_table)
            return Outputs()

        return call

    return dict.fromkeys(OPS, prepare)


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("fused", fused(), "this package, with a Vocabulary made beforehand", ours=True),
        Contestant("fused, raw table", fused(raw=True), "this package, given the table as a tensor", ours=True),
        *(
            Contestant(f"fused[{name}]", fused(name), f"its {name} backend", ours=True, absent=backend_cannot(name))
            for name in ALL_BACKENDS
        ),
        *(
            Contestant(name, planned(plan), "another plan of the same", ours=True, absent=backend_cannot(plan.backend))
            for name, plan in plans.ALL.items()
        ),
        *_top_k("top-k, 0.95", 0.95, "this package: the top-k at recall_target 0.95, and their mean"),
        *_top_k("top-k, exact", 1.0, "the same, exact"),
        *_top_k("top-k and mean", 0.95, "the same at 0.95, their mean and the table's for the tail", "topk+mean"),
        Contestant("statistics", statistics(), "its pass alone: tokens, noisy tokens, lse", ours=True),
        *(
            Contestant(
                f"statistics[{name}]",
                statistics(name),
                f"that of its {name} backend",
                ours=True,
                absent=backend_cannot(name),
            )
            for name in ALL_BACKENDS
        ),
        Contestant("eager", competitors.dense(), "PyTorch as the authors of Smoothie write it", tensors_of_n_v=6),
        Contestant(
            "eager, float32", competitors.dense(dtype=torch.float32), "the same on float32 copies", tensors_of_n_v=6
        ),
        Contestant(
            "compiled", competitors.dense(compiled=True), "eager under torch.compile", compiles=True, tensors_of_n_v=4
        ),
        Contestant(
            "chunked",
            {"step": chunked.step, "nearest": chunked.nearest, **training(chunked.smoothed)},
            "PyTorch, the vocabulary in chunks; gradients by hand",
        ),
        Contestant(
            "chunked, compiled epilogue",
            {"step": epilogue.step, **training(epilogue.smoothed)},
            "library products over blocks of rows, all between them one kernel by torch.compile",
            compiles=True,
        ),
        Contestant("sdpa", {"step": competitors.sdpa}, "scaled_dot_product_attention with the bias as one more column"),
        Contestant("flex", {"step": competitors.flex}, "FlexAttention with the bias in score_mod", compiles=True),
        Contestant(
            "keops", {"step": competitors.keops}, "KeOps LazyTensor", compiles=True, absent=competitors.no_keops
        ),
    )
}
FLOOR = Contestant("products", products(), "the matrix products alone (the floor)", tensors_of_n_v=1)
FLOAT_FLOOR = Contestant("products, float32", products(torch.float32), "the same in float32", tensors_of_n_v=1)

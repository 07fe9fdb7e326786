"""Who runs: this package, what people use instead, and the two matrix products alone.

Every contestant makes, from the inputs of a case, a call without arguments: the thing that is timed. What can be done
once per table (column norms, padded copies, compilation) may be done while making it, for all contestants alike.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import smoothie_kernels as sk
from benchmarks.common import case
from benchmarks.hopper import plans
from benchmarks.hopper.plans import Plan
from benchmarks.step import competitors, pieces
from benchmarks.step.cases import OPS
from benchmarks.step.inputs import SIGMA_MIN, Call, Inputs, Outputs, Prepare, aligned, training
from smoothie_kernels import dispatch, library
from smoothie_kernels.backends import StepOutputs

SEED = 20_250_518
ALL_BACKENDS = (*dispatch.BACKENDS, *dispatch.BY_NAME)


@dataclass(frozen=True, kw_only=True)
class Contestant(case.Contestant):
    prepare: Mapping[str, Prepare]  # by operator
    recall_target: float = 1.0  # of the top-k that it gives
    smooth: str = "topk"  # what its mean embedding is of where it gives a top-k, as fused_smoothie_step calls it
    tensors_of_n_v: int = 0  # of four-byte elements that it holds at once, so that it can be left out where memory ends
    absent: Callable[[Inputs], str | None] = lambda inputs: None  # why it cannot take part, or None


# This package


def options_of(inputs: Inputs) -> dict[str, Any]:
    """What all its calls take."""
    return {"std": inputs.std if inputs.noisy else 0, "sigma_min": SIGMA_MIN, "seed": SEED, **inputs.fields}


def fused(
    backend: str = "auto", *, raw: bool = False, workspace: int = 2**28, top: Mapping[str, Any] | None = None
) -> Mapping[str, Prepare]:
    """`top`: how it takes a top-k."""

    def prepared(table: Tensor) -> Tensor | sk.Vocabulary:
        return table if raw else sk.Vocabulary(table, backend=backend)

    def options(inputs: Inputs) -> dict[str, Any]:
        return options_of(inputs) | {"workspace": workspace, "backend": backend}

    def step(inputs: Inputs) -> Call:
        table, given = prepared(inputs.table), options(inputs) | ({"topk": inputs.k, **top} if top else {})

        def call() -> Outputs:
            y = sk.fused_smoothie_step(inputs.x, table, inputs.mu, **given)
            best = {"top_values": y.topk.values, "top_indices": y.topk.indices} if y.topk else {}
            return Outputs(y.smoothed, y.tokens, y.noisy_tokens, y.lse, **best)

        return call

    def smoothed(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
        # A trained table is another one in every step of an optimiser.
        frozen, given = None if inputs.op.trains_table else prepared(inputs.table), options(inputs)
        return lambda x, table: (
            sk.fused_smoothie_step(x, prepared(table) if frozen is None else frozen, inputs.mu, **given).smoothed
        )

    def nearest(inputs: Inputs) -> Call:
        table = prepared(inputs.table)
        return lambda: Outputs(**sk.nearest_token(inputs.x, table, backend=backend)._asdict())

    return {"topk": step} if top else {"step": step, "nearest": nearest, "topk": step, **training(smoothed)}


def without_mean(
    inputs: Inputs, table: sk.Vocabulary, *, topk: int = 0, recall_target: float = 1.0, offset: int = 0,
    backend: str = "auto",
) -> StepOutputs:  # fmt: skip
    """One pass of the library that gives everything but a mean embedding."""
    *outputs, _ = library.step_fwd(
        inputs.x, table.embeddings, table.bias, inputs.mu / SIGMA_MIN**2, inputs.std if inputs.noisy else None,
        row_ids=None, row_offset=0, seed=torch.tensor(SEED), offset=torch.tensor([offset]), field_weights=None,
        workspace=2**28, mean=False, logits=True, topk=topk, recall_target=recall_target, wide=False, backend=backend,
        bound=None, col=None, values=None,
    )  # fmt: skip
    return StepOutputs(*outputs)


def statistics(backend: str) -> Mapping[str, Prepare]:
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


def ours(name: str, what: str, make: Callable[[str], Mapping[str, Prepare]], **more: Any) -> Iterator[Contestant]:
    """By whichever backend auto picks, and by name."""
    yield Contestant(name, what, ours=True, prepare=make("auto"), **more)
    for each in ALL_BACKENDS:
        yield Contestant(
            f"{name}[{each}]", f"its {each} backend", ours=True, prepare=make(each), absent=backend_cannot(each), **more
        )


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


def _everybody() -> Iterator[Contestant]:
    yield from ours("fused", "this package, with a Vocabulary made beforehand", fused)
    yield Contestant("fused, raw table", "the same, given the table as a tensor", ours=True, prepare=fused(raw=True))
    for name, plan in plans.ALL.items():
        cannot = backend_cannot(plan.backend)
        yield Contestant(name, "another plan of the same", ours=True, prepare=planned(plan), absent=cannot)
    for name, target, smooth, what in (
        ("top-k, 0.95", 0.95, "topk", "this package: the top-k at recall_target 0.95, and their mean"),
        ("top-k, exact", 1.0, "topk", "the same, exact"),
        ("top-k and mean", 0.95, "topk+mean", "the same at 0.95, their mean and the table's for the tail"),
    ):
        top = {"recall_target": target, "smooth": smooth}
        yield from ours(name, what, partial(fused, top=top), **top)
    yield from ours("statistics", "its pass alone: tokens, noisy tokens, lse", statistics)

    dense = competitors.dense
    yield Contestant("eager", "PyTorch as the authors of Smoothie write it", prepare=dense(), tensors_of_n_v=6)
    wide = dense(dtype=torch.float32)
    yield Contestant("eager, float32", "the same on float32 copies", prepare=wide, tensors_of_n_v=6)
    compiled = dense(compiled=True)
    yield Contestant("compiled", "eager under torch.compile", compiles=True, prepare=compiled, tensors_of_n_v=4)
    by_op: Mapping[str, Prepare] = {**pieces.contestant(pieces.Chunks), "nearest": pieces.nearest}
    yield Contestant("chunked", "PyTorch, the vocabulary in chunks; gradients by hand", prepare=by_op)
    what = "library products over blocks of rows, all between them one kernel by torch.compile"
    by_op = pieces.contestant(pieces.Blocks)
    yield Contestant("chunked, compiled epilogue", what, compiles=True, prepare=by_op)
    what = "scaled_dot_product_attention with the bias as one more column"
    yield Contestant("sdpa", what, prepare={"step": competitors.sdpa})
    flex = {"step": competitors.flex}
    yield Contestant("flex", "FlexAttention with the bias in score_mod", compiles=True, prepare=flex)
    keops, absent = {"step": competitors.keops}, competitors.no_keops
    yield Contestant("keops", "KeOps LazyTensor", compiles=True, prepare=keops, absent=absent)


CONTESTANTS = {contestant.name: contestant for contestant in _everybody()}
FLOOR, FLOAT_FLOOR = (
    Contestant(f"products{more}", f"the matrix products alone{more}: the floor", prepare=products(of), tensors_of_n_v=1)
    for more, of in (("", None), (", float32", torch.float32))
)

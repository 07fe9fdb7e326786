"""Distances between rows and tokens: what the kernels' scores are made of, and what a score lacks of -distance / 2.

euclidean   ||x - E||^2            score = x . E - ||E||^2 / 2          lacks ||x||^2 / 2: the kernels know
cosine      2 - 2 cos(x, E)        score = x / ||x|| . E / ||E||        lacks 1
factor A    (x - E)' A A' (x - E)  score = A A' x . E - ||A' E||^2 / 2  lacks ||A' x||^2 / 2
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from smoothie_kernels import library
from smoothie_kernels.stream import sum_dtype

Metric = str | Tensor
ROOM = 2**26  # bytes of a block of the table in float64


class Rows(NamedTuple):
    """What a Request takes for rows."""

    x: Tensor  # [N, D]
    lacks: Tensor | None  # [N], None where the kernels know; no score is above it


def rows(metric: Metric, x: Tensor) -> Rows:
    wide = x.to(sum_dtype(x))
    if isinstance(metric, Tensor):
        across, factor = embedded(metric, wide), metric.to(wide.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return Rows(across @ factor.T, across.square().sum(1) / 2)
    return Rows(embedded(metric, wide), torch.ones_like(wide[:, 0])) if metric == "cosine" else Rows(x, None)


def embedded(metric: Metric, matrix: Tensor) -> Tensor:
    """Where distances are Euclidean: ||embedded(x) - embedded(E)||^2, but for the cosine of rows of zeros."""
    if isinstance(metric, Tensor):
        with torch.autocast(matrix.device.type, enabled=False):
            return matrix @ metric.to(matrix.dtype)
    if metric == "cosine":
        wide = matrix.double()
        return (wide * _inverse_norms(wide)[:, None]).to(matrix.dtype)
    return matrix


def _inverse_norms(wide: Tensor) -> Tensor:
    """1 / ||row|| in float64, 0 for a row of zeros, whose cosine is 0 to all."""
    norms = torch.linalg.vector_norm(wide, dim=1)
    return torch.where(norms > 0, 1 / norms.where(norms > 0, 1), 0)


def distance(metric: Metric, x: Tensor, tokens: Tensor, embeddings: Tensor) -> Tensor:
    """Of rows [N, D] and a token each, [N], directly: the difference of scores would cancel."""
    wide, near = x.double(), embeddings[tokens].double()
    apart = (embedded(metric, wide) - embedded(metric, near)).square().sum(1)
    if not isinstance(metric, Tensor) and metric == "cosine":
        zeros = ~(wide.any(1) & near.any(1))
        apart = torch.where(zeros, 2.0, apart)
    return apart.to(sum_dtype(x))


# --- once per table: operators of their own, so that no copy of the table in wide numbers is saved for the backward


def _blocks(embeddings: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Tokens, and their embeddings in float64."""
    size = max(1, ROOM // (8 * embeddings.shape[1]))
    for first in range(0, len(embeddings), size):
        yield slice(first, first + size), embeddings[first : first + size].double()


@custom_op(f"{library.OPERATORS}::factor_bias", mutates_args=())
@library.without_autocast
def factor_bias(embeddings: Tensor, factor: Tensor) -> Tensor:
    """-||A' E_j||^2 / 2, [V]"""
    bias = embeddings.new_empty(len(embeddings), dtype=sum_dtype(embeddings))
    for tokens, table in _blocks(embeddings):
        bias[tokens] = (table.to(bias.dtype) @ factor.to(bias.dtype)).double().square().sum(1) / -2
    return bias


@custom_op(f"{library.OPERATORS}::cosine_col", mutates_args=())
def cosine_col(embeddings: Tensor) -> Tensor:
    """1 / ||E_j||, [V]; 0 for rows of zeros."""
    col = embeddings.new_empty(len(embeddings), dtype=sum_dtype(embeddings))
    for tokens, table in _blocks(embeddings):
        col[tokens] = _inverse_norms(table)
    return col


@factor_bias.register_fake
@cosine_col.register_fake
def _(embeddings: Tensor, factor: Tensor | None = None) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], dtype=sum_dtype(embeddings))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _factor_bias_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Through -||e||^2 / 2 of e = E A: -e A' to E, -E' e to A."""
    embeddings, factor = ctx.saved_tensors
    needs_embeddings, needs_factor = ctx.needs_input_grad
    grad_embeddings, grad_factor = torch.zeros_like(embeddings), torch.zeros_like(factor, dtype=torch.float64)
    with torch.autocast(grad.device.type, enabled=False):
        wide = factor.to(grad.dtype)
        for tokens, table in _blocks(embeddings):
            across = grad[tokens, None] * (table.to(grad.dtype) @ wide)
            if needs_embeddings:
                grad_embeddings[tokens] = (-across @ wide.T).to(embeddings.dtype)
            if needs_factor:
                grad_factor -= table.T @ across.double()
    return grad_embeddings if needs_embeddings else None, grad_factor.to(factor.dtype) if needs_factor else None


def _cosine_col_backward(ctx: Any, grad: Tensor) -> Tensor:
    """-E / ||E||^3"""
    (embeddings,) = ctx.saved_tensors
    found = torch.zeros_like(embeddings)
    for tokens, table in _blocks(embeddings):
        found[tokens] = (table * (-grad[tokens] * _inverse_norms(table) ** 3)[:, None]).to(embeddings.dtype)
    return found


factor_bias.register_autograd(_factor_bias_backward, setup_context=_save)
cosine_col.register_autograd(_cosine_col_backward, setup_context=_save)


def _one_table(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    raise library.one_for_all("embeddings")


factor_bias.register_vmap(_one_table)
cosine_col.register_vmap(_one_table)

"""Distances between rows and tokens: what the kernels' scores are made of, and what a score lacks of -distance / 2.

euclidean   ||x - E||^2            score = x . E - ||E||^2 / 2          lacks ||x||^2 / 2: the kernels know
cosine      2 - 2 cos(x, E)        score = x / ||x|| . E / ||E||        lacks 1
factor A    (x - E)' A A' (x - E)  score = A A' x . E - ||A' E||^2 / 2  lacks ||A' x||^2 / 2
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from smoothie_kernels.stream import sum_dtype

Metric = str | Tensor
ROOM = 2**26  # bytes of a block of the table in float64


class Rows(NamedTuple):
    """What a Request takes for rows."""

    x: Tensor  # [N, D]
    lacks: Tensor | None  # [N], None where the kernels know; no score is above it


def rows(metric: Metric, x: Tensor) -> Rows:
    if isinstance(metric, Tensor):
        with torch.autocast(x.device.type, enabled=False):
            across = x.to(metric.dtype) @ metric
            return Rows(across @ metric.T, across.square().sum(1) / 2)
    if metric == "cosine":
        wide = x.to(sum_dtype(x))
        return Rows(wide * inverse_norms(x)[:, None], torch.ones_like(wide[:, 0]))
    return Rows(x, None)


def inverse_norms(matrix: Tensor) -> Tensor:
    """1 / ||row||, 0 for a row of zeros, whose cosine is 0 to all."""
    norms = torch.linalg.vector_norm(matrix, dim=1, dtype=sum_dtype(matrix))
    return torch.where(norms > 0, 1 / norms.where(norms > 0, 1), 0)


def column_bias(factor: Tensor, embeddings: Tensor) -> Tensor:
    """-||A' E_j||^2 / 2, [V]; its gradient goes to the table and the factor, by blocks of tokens."""

    def of_block(table: Tensor, factor: Tensor) -> Tensor:
        with torch.autocast(table.device.type, enabled=False):
            return ((table.to(factor.dtype) @ factor).double().square().sum(1) / -2).to(factor.dtype)

    blocks = torch.split(embeddings, max(1, ROOM // (8 * embeddings.shape[1])))
    if torch.is_grad_enabled() and (embeddings.requires_grad or factor.requires_grad):
        return torch.cat([checkpoint(of_block, block, factor, use_reentrant=False) for block in blocks])
    return torch.cat([of_block(block, factor) for block in blocks])


def embedded(metric: Metric, matrix: Tensor) -> Tensor:
    """Where distances are Euclidean: ||embedded(x) - embedded(E)||^2, but for the cosine of rows of zeros."""
    if isinstance(metric, Tensor):
        return matrix.to(metric.dtype) @ metric
    return matrix * inverse_norms(matrix)[:, None].to(matrix.dtype) if metric == "cosine" else matrix


def distance(metric: Metric, x: Tensor, tokens: Tensor, embeddings: Tensor) -> Tensor:
    """Of rows [N, D] and a token each, [N], directly: the difference of scores would cancel."""
    wide, near = (each.to(sum_dtype(x)) for each in (x, embeddings[tokens]))
    if isinstance(metric, Tensor):
        with torch.autocast(x.device.type, enabled=False):
            return ((wide - near) @ metric).square().sum(1)
    return 2 - 2 * functional.cosine_similarity(wide, near, dim=1, eps=0)

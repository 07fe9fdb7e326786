"""Moments of a table of embeddings. One operator and no loop in Python that a compiler would unroll: its graph does not
grow with the vocabulary."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from smoothie_kernels import library
from smoothie_kernels.stream import sum_dtype

BLOCK = 1024  # tokens at a time


@custom_op(f"{library.OPERATORS}::moments", mutates_args=())
@library.without_autocast
def moments(embeddings: Tensor) -> Tensor:
    """mean(E), then the covariance of (E, -||E||^2 / 2) with E over all tokens: [D + 2, D] in the type of sums."""
    v = len(embeddings)
    mean = torch.stack([table.sum(0) for table in _blocks(embeddings)]).sum(0) / v
    mean_square = mean.square().sum()
    found = mean.new_zeros(len(mean) + 2, len(mean))
    found[0] = mean
    for table in _blocks(embeddings):
        # The constant mean_square changes no covariance, but keeps the squares small.
        squares = (mean_square - table.square().sum(1, keepdim=True)) / 2
        found[1:] += torch.cat((table - mean, squares), 1).T @ (table - mean) / v
    return found


def _blocks(embeddings: Tensor) -> Iterator[Tensor]:
    for first in range(0, len(embeddings), BLOCK):
        yield embeddings[first : first + BLOCK].to(sum_dtype(embeddings))


@moments.register_fake
def _(embeddings: Tensor) -> Tensor:
    d = embeddings.shape[1]
    return embeddings.new_empty(d + 2, d, dtype=sum_dtype(embeddings))


@custom_op(f"{library.OPERATORS}::moments_bwd", mutates_args=())
@library.without_autocast
def moments_bwd(embeddings: Tensor, found: Tensor, grad: Tensor) -> Tensor:
    """With c_j = E_j - mean, and G_mean, G, g the gradients of the mean, of the D rows and of the last row behind it:

    V grad_j = G_mean + c_j (G + G^T) - (c_j . g) E_j + (mean(||E||^2) - ||E_j||^2) / 2 g

    The gradient through the mean in c_j is left out, because all c_j add up to zero.
    """
    mean, mean_square = found[0], found[0].square().sum() + found[1:-1].diagonal().sum()
    of_mean, of_rows, of_last = grad[0], grad[1:-1] + grad[1:-1].T, grad[-1]
    parts = []
    for table in _blocks(embeddings):
        centred, squares = table - mean, (mean_square - table.square().sum(1, keepdim=True)) / 2
        part = of_mean + centred @ of_rows - (centred @ of_last)[:, None] * table + squares * of_last
        parts.append((part / len(embeddings)).to(embeddings.dtype))
    return torch.cat(parts)


@moments_bwd.register_fake
def _(embeddings: Tensor, found: Tensor, grad: Tensor) -> Tensor:
    return embeddings.new_empty(embeddings.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):  # in which vmap's own stack may fail
        of_table: Tensor = moments_bwd(*ctx.saved_tensors, grad)
    return of_table


moments.register_autograd(_backward, setup_context=_save)
moments_bwd.register_autograd(library.no_second_derivative)


@moments.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    raise library.one_for_all("embeddings")


@moments_bwd.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], embeddings: Tensor, found: Tensor, grad: Tensor) -> Any:
    """Reached where torch.autograd.grad is called under torch.func.vmap, as for a Jacobian."""
    return torch.stack([moments_bwd(embeddings, found, each) for each in grad.movedim(in_dims[2] or 0, 0)]), 0

"""Means of a few tokens a row, as PyTorch knows them."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from smoothie_kernels import library
from smoothie_kernels.backends import gather
from smoothie_kernels.dispatch import pick_backend
from smoothie_kernels.stream import Rows, Tokens


class Mean(NamedTuple):
    weights: Rows  # [N, K]
    tokens: Rows  # [N, K] int64
    embeddings: Tokens  # [V, D], rows contiguous
    dtype: torch.dtype
    backend: str


@library.operator("average_fwd", Mean, returns=Tensor)
@library.without_autocast
def average_fwd(*arguments: Any) -> Tensor:
    weights, tokens, embeddings, dtype, backend = Mean(*arguments)
    if weights.numel() == 0:
        return _empty_average(tokens, embeddings, dtype).zero_()
    mean: Tensor = pick_backend(backend, embeddings.device, embeddings.dtype).average(
        weights.contiguous(), tokens.contiguous(), embeddings, dtype
    )
    return mean


@average_fwd.register_fake
def _(*arguments: Any) -> Tensor:
    _, tokens, embeddings, dtype, _ = Mean(*arguments)
    return _empty_average(tokens, embeddings, dtype)


def _empty_average(tokens: Tensor, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    return embeddings.new_empty(tokens.shape[0], embeddings.shape[1], dtype=dtype)


@custom_op(f"{library.OPERATORS}::average_bwd", mutates_args=())
@library.without_autocast
def average_bwd(
    grad: Tensor, weights: Tensor, tokens: Tensor, embeddings: Tensor, needs_weights: bool, needs_embeddings: bool
) -> tuple[Tensor, Tensor]:
    found, grad = (weights.new_empty(0), embeddings.new_empty(0)), grad.contiguous()
    if needs_weights:
        found = gather.dots(grad, tokens, embeddings, weights.dtype), found[1]
    if needs_embeddings:
        found = found[0], gather.spread(weights, tokens, grad, len(embeddings)).to(embeddings.dtype)
    return found


@average_bwd.register_fake
def _(grad: Tensor, weights: Tensor, tokens: Tensor, embeddings: Tensor, *needs: Any) -> tuple[Tensor, Tensor]:
    needs_weights, needs_embeddings = needs
    return (
        weights.new_empty(weights.shape if needs_weights else 0),
        embeddings.new_empty(embeddings.shape if needs_embeddings else 0),
    )


def _save_average(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, tokens, embeddings, *_ = inputs
    ctx.save_for_backward(weights, tokens, embeddings)


def _average_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_weights, _, needs_embeddings, *_ = ctx.needs_input_grad
    with torch.autocast(grad.device.type, enabled=False):
        grad_weights, grad_embeddings = average_bwd(grad, *ctx.saved_tensors, needs_weights, needs_embeddings)
    return grad_weights if needs_weights else None, None, grad_embeddings if needs_embeddings else None, None, None


average_fwd.register_autograd(_average_backward, setup_context=_save_average)
average_bwd.register_autograd(library.no_second_derivative)


@average_fwd.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    (mean,), (dim,) = library.by_sample((average_fwd(*library.more_rows(Mean, info, in_dims, arguments)),), info)
    return mean, dim


average_bwd.register_vmap(partial(library.one_call_each, average_bwd))

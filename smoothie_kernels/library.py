"""The operators as PyTorch knows them: schema, fake kernels, gradients, vmap, and the one implementation that calls a
backend.

Values of tensors are checked from here, because this code runs on real tensors also under torch.compile.
On a GPU they are not: reading them would make the host wait for the device.

Autocast changes nothing here: a call takes its inputs in the types that they have, and sums in float32.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op

from smoothie_kernels import checks
from smoothie_kernels.backends import Grads, Saved, StepInputs, StepOutputs
from smoothie_kernels.dispatch import pick_backend

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Body = TypeVar("Body", bound=Callable[..., Any])


def _without_autocast(body: Body) -> Body:
    """Else the products inside a backend would be rounded to 16 bits."""

    @wraps(body)
    def call(first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return body(first, *rest)

    return call  # type: ignore[return-value]


# --- once per table


@custom_op("smoothie_kernels::column_bias", mutates_args=())
@_without_autocast
def column_bias(embeddings: Tensor, check_finite: bool, backend: str) -> Tensor:
    bias: Tensor = pick_backend(backend, embeddings.device, embeddings.dtype).column_bias(embeddings)
    if check_finite:
        checks.check_finite_table(bias)
    return bias


@column_bias.register_fake
def _(embeddings: Tensor, check_finite: bool, backend: str) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], dtype=_sum_dtype(embeddings))


# --- the step


@custom_op("smoothie_kernels::step_fwd", mutates_args=())
@_without_autocast
def step_fwd(
    x: Tensor,  # [N, D]
    embeddings: Tensor,  # [V, D], rows contiguous
    bias: Tensor,  # [V]
    mu: Tensor,  # [N]
    std: Tensor,  # [N]
    row_ids: Tensor | None,  # [N], instead of row_offset + i
    seed: Tensor,  # []
    offset: Tensor,  # []
    row_offset: int,
    sigma_min: float,
    has_noise: bool,
    workspace: int,
    backend: str,
) -> Six:
    if x.shape[0] == 0:
        return _empty_step(x)
    if x.device.type == "cpu":
        checks.check_values("mu", mu)
        checks.check_values("std", std)
        if row_ids is not None:
            checks.check_row_id_values(row_ids)
    inputs = _inputs(
        x, embeddings, bias, mu, std, row_ids, seed, offset, row_offset, sigma_min, has_noise, workspace
    )  # fmt: skip
    outputs: StepOutputs = pick_backend(backend, x.device, x.dtype).step_fwd(inputs)
    return outputs


@step_fwd.register_fake
def _(x: Tensor, *_: object) -> Six:
    return _empty_step(x)


def _empty_step(x: Tensor) -> Six:
    n = x.shape[0]
    tokens = [x.new_empty(n, dtype=torch.int64) for _ in range(2)]
    sums = [x.new_empty(n, dtype=_sum_dtype(x)) for _ in range(3)]
    return x.new_empty(x.shape), tokens[0], tokens[1], sums[0], sums[1], sums[2]


def _inputs(
    x: Tensor, embeddings: Tensor, bias: Tensor, mu: Tensor, std: Tensor, row_ids: Tensor | None, seed: Tensor,
    offset: Tensor, row_offset: int, sigma_min: float, has_noise: bool, workspace: int,
) -> StepInputs:  # fmt: skip
    return StepInputs(
        x.contiguous(), embeddings, bias, mu.contiguous(), std.contiguous() if has_noise else None,
        None if row_ids is None else row_ids.contiguous(), row_offset, seed, offset, sigma_min, workspace,
    )  # fmt: skip


# --- its gradients


@custom_op("smoothie_kernels::step_bwd", mutates_args=())
@_without_autocast
def step_bwd(
    x: Tensor,
    embeddings: Tensor,
    bias: Tensor,
    mu: Tensor,
    std: Tensor,
    row_ids: Tensor | None,
    seed: Tensor,
    offset: Tensor,
    row_offset: int,
    sigma_min: float,
    has_noise: bool,
    workspace: int,
    backend: str,
    smoothed: Tensor,
    best_score: Tensor,
    log_sum: Tensor,
    grad_smoothed: Tensor | None,  # [N, D]
    grad_lse: Tensor | None,  # [N]
    needs_x: bool,
    needs_embeddings: bool,
) -> tuple[Tensor, Tensor]:  # of x and embeddings; empty where not needed
    if x.shape[0] == 0 or (grad_smoothed is None and grad_lse is None):
        no_x, no_embeddings = _empty_grads(x, embeddings, needs_x, needs_embeddings)
        return no_x.zero_(), no_embeddings.zero_()
    inputs = _inputs(
        x, embeddings, bias, mu, std, row_ids, seed, offset, row_offset, sigma_min, has_noise, workspace
    )  # fmt: skip
    grads = Grads(
        None if grad_smoothed is None else grad_smoothed.contiguous(),
        None if grad_lse is None else grad_lse.contiguous(),
    )
    chosen = pick_backend(backend, x.device, x.dtype)
    grad_x, grad_embeddings = chosen.step_bwd(
        inputs, Saved(smoothed, best_score, log_sum), grads, needs_x, needs_embeddings
    )
    nothing = _empty_grads(x, embeddings, False, False)
    return nothing[0] if grad_x is None else grad_x, nothing[1] if grad_embeddings is None else grad_embeddings


@step_bwd.register_fake
def _(x: Tensor, embeddings: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_grads(x, embeddings, *rest[-2:])


def _empty_grads(x: Tensor, embeddings: Tensor, needs_x: bool, needs_embeddings: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), embeddings.new_empty(embeddings.shape if needs_embeddings else 0)


STEP_ARGUMENTS = 13  # of step_fwd; step_bwd begins with the same


def _save(ctx: Any, inputs: tuple[Any, ...], output: Six) -> None:
    smoothed, tokens, noisy_tokens, _, best_score, log_sum = output
    ctx.mark_non_differentiable(tokens, noisy_tokens, best_score, log_sum)
    ctx.set_materialize_grads(False)  # None where the loss does not use an output: its products are left out
    ctx.is_tensor = [isinstance(i, Tensor) for i in inputs]
    ctx.numbers = [i for i in inputs if not isinstance(i, Tensor)]
    ctx.save_for_backward(*(i for i in inputs if isinstance(i, Tensor)), smoothed, best_score, log_sum)


def _backward(ctx: Any, grad_smoothed: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors, numbers = iter(ctx.saved_tensors), iter(ctx.numbers)
    inputs = [next(tensors) if is_tensor else next(numbers) for is_tensor in ctx.is_tensor]
    needs_x, needs_embeddings = ctx.needs_input_grad[:2]
    grad_x, grad_embeddings = step_bwd(*inputs, *tensors, grad_smoothed, rest[2], needs_x, needs_embeddings)
    return (
        grad_x if needs_x else None,
        grad_embeddings if needs_embeddings else None,
        *(None for _ in range(STEP_ARGUMENTS - 2)),
    )


step_fwd.register_autograd(_backward, setup_context=_save)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "fused_smoothie_step has first derivatives only: its backward cannot be differentiated again. "
        "smoothie_kernels.testing.dense_step, in plain PyTorch, can"
    )


step_bwd.register_autograd(_no_second_derivative)


# --- torch.func.vmap

_PER_ROW = (0, 3, 4, 5)  # x, mu, std, row_ids: arguments of step_fwd with one entry for every row


def _one_for_all(name: str) -> NotImplementedError:
    return NotImplementedError(f"smoothie_kernels takes one {name} for all samples of torch.func.vmap")


@column_bias.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    raise _one_for_all("embeddings")  # what every use of a table begins with


@step_fwd.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, tuple[int, ...]]:
    """Samples are more rows of one call. Each keeps its row ids, so every sample has the same noise."""
    for position, name in ((6, "seed"), (7, "offset")):
        if in_dims[position] is not None:
            raise _one_for_all(name)
    flat, samples = list(arguments), info.batch_size
    for position in _PER_ROW:
        rows, dim = arguments[position], in_dims[position]
        if rows is not None:
            rows = rows.expand(samples, *rows.shape) if dim is None else rows.movedim(dim, 0)
            flat[position] = rows.flatten(0, 1)
    if flat[5] is None:
        row_offset, n = flat[8], flat[0].shape[0] // samples
        flat[5] = torch.arange(row_offset, row_offset + n, device=flat[0].device).repeat(samples)
        flat[8] = 0
    return tuple(o.unflatten(0, (samples, -1)) for o in step_fwd(*flat)), (0,) * 6


@step_bwd.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, tuple[int, ...]]:
    """Reached where torch.autograd.grad is called under torch.func.vmap, as for a Jacobian: one call each."""
    samples = [
        step_bwd(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(same) for same in zip(*samples, strict=True)), (0, 0)


# --- the nearest token, the noise


@custom_op("smoothie_kernels::nearest_fwd", mutates_args=())
@_without_autocast
def nearest_fwd(x: Tensor, embeddings: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:
        return _empty_nearest(x)
    outputs: tuple[Tensor, Tensor] = pick_backend(backend, x.device, x.dtype).nearest_fwd(
        x.contiguous(), embeddings, bias
    )
    return outputs


@nearest_fwd.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_nearest(x)


@nearest_fwd.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Any, tuple[int, int]]:
    rows = x.movedim(in_dims[0] or 0, 0)
    return tuple(o.unflatten(0, rows.shape[:2]) for o in nearest_fwd(rows.flatten(0, 1), *rest)), (0, 0)


def _empty_nearest(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=_sum_dtype(x))


@custom_op("smoothie_kernels::gaussian", mutates_args=())
def gaussian(
    like: Tensor, cols: int, row_ids: Tensor | None, seed: Tensor, offset: Tensor, row_offset: int, backend: str
) -> Tensor:  # like: [N, 0], for the number of rows and the device
    out = like.new_empty(like.shape[0], cols)
    if out.numel() == 0:
        return out
    if row_ids is not None and like.device.type == "cpu":
        checks.check_row_id_values(row_ids)
    field: Tensor = pick_backend(backend, like.device, torch.float32).gaussian(
        out, None if row_ids is None else row_ids.contiguous(), row_offset, seed, offset
    )
    return field


@gaussian.register_fake
def _(like: Tensor, cols: int, *_: object) -> Tensor:
    return like.new_empty(like.shape[0], cols)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

"""The operators as PyTorch knows them: schema, fake kernels, gradients, vmap, and the one implementation that calls a
backend.

Values of tensors are checked from here, because this code runs on real tensors also under torch.compile.
On a GPU they are not: reading them would make the host wait for the device.

Autocast changes nothing here: a call takes its inputs in the types that they have, and sums in float32.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op

from smoothie_kernels import checks
from smoothie_kernels.backends import Grads, Saved, StepInputs, gather, sum_dtype
from smoothie_kernels.dispatch import pick_backend

# Namespace of the operators. torch.compile's cache on disk knows them by name alone, and would hand the arguments of an
# older version to this one: another schema takes another number.
OPERATORS = "smoothie_kernels_3"

Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Average = Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
Body = TypeVar("Body", bound=Callable[..., Any])


def without_autocast(body: Body) -> Body:
    """Else the products inside a backend would be rounded to 16 bits."""

    @wraps(body)
    def call(first: Tensor, *rest: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return body(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return body(first, *rest)

    return call  # type: ignore[return-value]


# --- once per table


@custom_op(f"{OPERATORS}::column_bias", mutates_args=())
@without_autocast
def column_bias(embeddings: Tensor, check_finite: bool, backend: str) -> Tensor:
    bias: Tensor = pick_backend(backend, embeddings.device, embeddings.dtype).column_bias(embeddings)
    if check_finite:
        checks.check_finite_table(bias)
    return bias


@column_bias.register_fake
def _(embeddings: Tensor, check_finite: bool, backend: str) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], dtype=sum_dtype(embeddings))


# --- the step


@custom_op(f"{OPERATORS}::step_fwd", mutates_args=())
@without_autocast
def step_fwd(
    x: Tensor,  # [N, D]
    embeddings: Tensor,  # [V, D], rows contiguous
    bias: Tensor,  # [V]
    mu: Tensor,  # [N]
    std: Tensor,  # [N]
    row_ids: Tensor | None,  # [N], instead of row_offset + i
    seed: Tensor,  # []
    offsets: Tensor,  # [F]
    field_weights: Tensor | None,  # [F], None for one field as it is
    row_offset: int,
    sigma_min: Tensor,  # [] float64, on the host
    has_noise: bool,
    workspace: int,
    smooth: str,
    topk: int,
    recall_target: float,
    for_backward: bool,  # whether a backward may follow
    backend: str,
) -> Nine:
    """StepOutputs, and smoothed before it is rounded to 16 bits, for the backward; empty where it is not needed."""
    checks.check_row_offset(row_offset, len(x))
    checks.check_sigma_min(float(sigma_min))
    if x.shape[0] == 0:
        return _empty_step(x, smooth, topk, for_backward)
    if x.device.type == "cpu":
        checks.check_logits(mu, float(sigma_min), std, field_weights)
        if row_ids is not None:
            checks.check_row_id_values(row_ids)
    wide = _keeps_wide(x, smooth, for_backward)
    inputs = _inputs(
        x, embeddings, bias, mu, std, row_ids, seed, offsets, field_weights, row_offset, sigma_min, has_noise,
        workspace, smooth, topk, recall_target, wide,
    )  # fmt: skip
    smoothed, *rest = pick_backend(backend, x.device, x.dtype).step_fwd(inputs)
    nothing = x.new_empty(len(x), 0, dtype=sum_dtype(x))
    return (smoothed.to(x.dtype), *rest, smoothed) if wide else (smoothed, *rest, nothing)


@step_fwd.register_fake
def _(x: Tensor, *rest: Any) -> Nine:
    smooth, topk, _, for_backward, _ = rest[-5:]
    return _empty_step(x, smooth, topk, for_backward)


def _keeps_wide(x: Tensor, smooth: str, for_backward: bool) -> bool:
    return for_backward and smooth == "full" and x.dtype != sum_dtype(x)


def _empty_step(x: Tensor, smooth: str, topk: int, for_backward: bool) -> Nine:
    n, d = x.shape
    tokens = [x.new_empty(n, dtype=torch.int64) for _ in range(2)]
    sums = [x.new_empty(n, dtype=sum_dtype(x)) for _ in range(3)]
    return (
        x.new_empty(n, d if smooth == "full" else 0), tokens[0], tokens[1], sums[0], sums[1], sums[2],
        x.new_empty(n, topk, dtype=sum_dtype(x)), x.new_empty(n, topk, dtype=torch.int64),
        x.new_empty(n, d if _keeps_wide(x, smooth, for_backward) else 0, dtype=sum_dtype(x)),
    )  # fmt: skip


def _inputs(
    x: Tensor, embeddings: Tensor, bias: Tensor, mu: Tensor, std: Tensor, row_ids: Tensor | None, seed: Tensor,
    offsets: Tensor, field_weights: Tensor | None, row_offset: int, sigma_min: Tensor, has_noise: bool, workspace: int,
    smooth: str, topk: int, recall_target: float, wide: bool,
) -> StepInputs:  # fmt: skip
    return StepInputs(
        x.contiguous(), embeddings, bias, mu.contiguous(), std.contiguous() if has_noise else None,
        None if row_ids is None else row_ids.contiguous(), row_offset, seed, offsets.contiguous(),
        None if field_weights is None else field_weights.contiguous(), float(sigma_min), workspace, smooth == "full",
        topk, recall_target, wide,
    )  # fmt: skip


# --- its gradients


@custom_op(f"{OPERATORS}::step_bwd", mutates_args=())
@without_autocast
def step_bwd(
    x: Tensor,
    embeddings: Tensor,
    bias: Tensor,
    mu: Tensor,
    std: Tensor,
    row_ids: Tensor | None,
    seed: Tensor,
    offsets: Tensor,
    field_weights: Tensor | None,
    row_offset: int,
    sigma_min: Tensor,  # [] float64, on the host
    has_noise: bool,
    workspace: int,
    smooth: str,
    topk: int,
    recall_target: float,
    for_backward: bool,
    backend: str,
    smoothed: Tensor,  # as step_fwd kept it
    noisy_tokens: Tensor,
    best_score: Tensor,
    log_sum: Tensor,
    top_tokens: Tensor,  # [N, K]
    grad_smoothed: Tensor | None,  # [N, D]
    grad_lse: Tensor | None,  # [N]
    grad_top: Tensor | None,  # [N, K]
    needs_x: bool,
    needs_embeddings: bool,
) -> tuple[Tensor, Tensor]:  # of x and embeddings; empty where not needed
    if x.shape[0] == 0 or (grad_smoothed is None and grad_lse is None and grad_top is None):
        no_x, no_embeddings = _empty_grads(x, embeddings, needs_x, needs_embeddings)
        return no_x.zero_(), no_embeddings.zero_()
    inputs = _inputs(
        x, embeddings, bias, mu, std, row_ids, seed, offsets, field_weights, row_offset, sigma_min, has_noise,
        workspace, smooth, topk, recall_target, wide=grad_top is not None,
    )  # fmt: skip
    chosen = pick_backend(backend, x.device, x.dtype)
    grad_x = grad_embeddings = None
    if grad_smoothed is not None or grad_lse is not None:
        grads = Grads(
            None if grad_smoothed is None else grad_smoothed.contiguous(),
            None if grad_lse is None else grad_lse.contiguous(),
        )
        saved = Saved(None if grad_smoothed is None else smoothed, noisy_tokens, best_score, log_sum)
        grad_x, grad_embeddings = chosen.step_bwd(inputs, saved, grads, needs_x, needs_embeddings)
    if grad_top is not None:
        of_top = _top_grads(inputs, top_tokens, grad_top.contiguous(), chosen.average, needs_x, needs_embeddings)
        grad_x, grad_embeddings = (
            a if b is None else b.to(of.dtype) if a is None else (a + b).to(of.dtype)
            for a, b, of in zip((grad_x, grad_embeddings), of_top, (x, embeddings), strict=True)
        )
    nothing = _empty_grads(x, embeddings, False, False)
    return nothing[0] if grad_x is None else grad_x, nothing[1] if grad_embeddings is None else grad_embeddings


def _top_grads(
    inputs: StepInputs, tokens: Tensor, grad: Tensor, average: Average, needs_x: bool, needs_embeddings: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Through scale (x . E_j - ||E_j||^2 / 2 - ||x||^2 / 2) of some tokens j: scale (E_j - x) and scale (x - E_j)."""
    x, embeddings = inputs.x, inputs.embeddings
    weights = ((inputs.mu / inputs.sigma_min**2)[:, None] * grad).contiguous()  # [N, K]
    grad_x = grad_embeddings = None
    if needs_x:
        grad_x = average(weights, tokens, embeddings, weights.dtype) - weights.sum(1, keepdim=True) * x
    if needs_embeddings:
        total = gather.spread(weights, tokens, torch.ones_like(weights[:, :1]), len(embeddings))
        grad_embeddings = gather.spread(weights, tokens, x, len(embeddings)) - total * embeddings
    return grad_x, grad_embeddings


@step_bwd.register_fake
def _(x: Tensor, embeddings: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_grads(x, embeddings, *rest[-2:])


def _empty_grads(x: Tensor, embeddings: Tensor, needs_x: bool, needs_embeddings: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), embeddings.new_empty(embeddings.shape if needs_embeddings else 0)


STEP_ARGUMENTS = 18  # of step_fwd; step_bwd begins with the same


def _save(ctx: Any, inputs: tuple[Any, ...], output: Nine) -> None:
    smoothed, tokens, noisy_tokens, _, best_score, log_sum, top_logits, top_tokens, wide = output
    absent = [o for o in (smoothed, top_logits) if o.shape[1] == 0]
    ctx.mark_non_differentiable(tokens, noisy_tokens, best_score, log_sum, top_tokens, wide, *absent)
    ctx.set_materialize_grads(False)  # None where the loss does not use an output: its products are left out
    ctx.is_tensor = [isinstance(i, Tensor) for i in inputs]
    ctx.numbers = [i for i in inputs if not isinstance(i, Tensor)]
    saved = wide if wide.shape[1] else smoothed, noisy_tokens, best_score, log_sum, top_tokens
    ctx.save_for_backward(*(i for i in inputs if isinstance(i, Tensor)), *saved)


def _backward(ctx: Any, grad_smoothed: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors, numbers = iter(ctx.saved_tensors), iter(ctx.numbers)
    inputs = [next(tensors) if is_tensor else next(numbers) for is_tensor in ctx.is_tensor]
    needs_x, needs_embeddings = ctx.needs_input_grad[:2]
    with torch.autocast(inputs[0].device.type, enabled=False):  # in which vmap's own stack may fail
        grad_x, grad_embeddings = step_bwd(
            *inputs, *tensors, grad_smoothed, rest[2], rest[5], needs_x, needs_embeddings
        )  # fmt: skip
    return (
        grad_x if needs_x else None,
        grad_embeddings if needs_embeddings else None,
        *(None for _ in range(STEP_ARGUMENTS - 2)),
    )


step_fwd.register_autograd(_backward, setup_context=_save)


def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "fused_smoothie_step has first derivatives only: its backward cannot be differentiated again. "
        "smoothie_kernels.testing.dense_step, in plain PyTorch, can"
    )


step_bwd.register_autograd(no_second_derivative)


# --- torch.func.vmap

_PER_ROW = (0, 3, 4, 5)  # x, mu, std, row_ids: arguments of step_fwd with one entry for every row


def one_for_all(name: str) -> NotImplementedError:
    return NotImplementedError(f"smoothie_kernels takes one {name} for all samples of torch.func.vmap")


@column_bias.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    raise one_for_all("embeddings")  # what every use of a table begins with


@step_fwd.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, tuple[int, ...]]:
    """Samples are more rows of one call. Each keeps its row ids, so every sample has the same noise."""
    for position, name in ((6, "seed"), (7, "offset"), (8, "field_weights")):
        if in_dims[position] is not None:
            raise one_for_all(name)
    flat, samples = list(arguments), info.batch_size
    for position in _PER_ROW:
        if arguments[position] is not None:
            flat[position] = _samples_first(arguments[position], in_dims[position], samples).flatten(0, 1)
    if flat[5] is None:
        row_offset, n = flat[9], flat[0].shape[0] // samples
        flat[5] = torch.arange(row_offset, row_offset + n, dtype=torch.int64, device=flat[0].device).repeat(samples)
        flat[9] = 0
    return tuple(o.unflatten(0, (samples, -1)) for o in step_fwd(*flat)), (0,) * 9


def _samples_first(rows: Tensor, dim: int | None, samples: int) -> Tensor:
    return rows.expand(samples, *rows.shape) if dim is None else rows.movedim(dim, 0)


def _one_call_each(
    backward: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Any, tuple[int, ...]]:
    """Reached where torch.autograd.grad is called under torch.func.vmap, as for a Jacobian."""
    samples = [
        backward(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(same) for same in zip(*samples, strict=True)), (0, 0)


step_bwd.register_vmap(partial(_one_call_each, step_bwd))


# --- means of a few tokens a row


@custom_op(f"{OPERATORS}::average_fwd", mutates_args=())
@without_autocast
def average_fwd(
    weights: Tensor,  # [N, K]
    tokens: Tensor,  # [N, K] int64
    embeddings: Tensor,  # [V, D], rows contiguous
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    if weights.numel() == 0:
        return _empty_average(tokens, embeddings, dtype).zero_()
    mean: Tensor = pick_backend(backend, embeddings.device, embeddings.dtype).average(
        weights.contiguous(), tokens.contiguous(), embeddings, dtype
    )
    return mean


@average_fwd.register_fake
def _(weights: Tensor, tokens: Tensor, embeddings: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return _empty_average(tokens, embeddings, dtype)


def _empty_average(tokens: Tensor, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    return embeddings.new_empty(tokens.shape[0], embeddings.shape[1], dtype=dtype)


@custom_op(f"{OPERATORS}::average_bwd", mutates_args=())
@without_autocast
def average_bwd(
    grad: Tensor, weights: Tensor, tokens: Tensor, embeddings: Tensor, needs_weights: bool, needs_embeddings: bool
) -> tuple[Tensor, Tensor]:
    found, grad = _empty_grads(weights, embeddings, False, False), grad.contiguous()
    if needs_weights:
        found = gather.dots(grad, tokens, embeddings, weights.dtype), found[1]
    if needs_embeddings:
        found = found[0], gather.spread(weights, tokens, grad, len(embeddings)).to(embeddings.dtype)
    return found


@average_bwd.register_fake
def _(grad: Tensor, weights: Tensor, tokens: Tensor, embeddings: Tensor, *needs: Any) -> tuple[Tensor, Tensor]:
    return _empty_grads(weights, embeddings, *needs)


def _save_average(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _average_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_weights, _, needs_embeddings = ctx.needs_input_grad[:3]
    with torch.autocast(grad.device.type, enabled=False):
        grad_weights, grad_embeddings = average_bwd(grad, *ctx.saved_tensors, needs_weights, needs_embeddings)
    return grad_weights if needs_weights else None, None, grad_embeddings if needs_embeddings else None, None, None


average_fwd.register_autograd(_average_backward, setup_context=_save_average)
average_bwd.register_autograd(no_second_derivative)


@average_fwd.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    """As in step_fwd: more rows of one call."""
    if in_dims[2] is not None:
        raise one_for_all("embeddings")
    weights, tokens = (_samples_first(a, dim, info.batch_size) for a, dim in zip(arguments, in_dims[:2], strict=False))
    mean: Tensor = average_fwd(weights.flatten(0, 1), tokens.flatten(0, 1), *arguments[2:])
    return mean.view(info.batch_size, -1, mean.shape[1]), 0


average_bwd.register_vmap(partial(_one_call_each, average_bwd))


# --- the nearest token, the noise


@custom_op(f"{OPERATORS}::nearest_fwd", mutates_args=())
@without_autocast
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


def _no_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "nearest_token has no derivatives: of its distance, (x - embeddings[tokens]).square().sum(-1) has them"
    )


nearest_fwd.register_autograd(_no_derivative)


@nearest_fwd.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Any, tuple[int, int]]:
    rows = x.movedim(in_dims[0] or 0, 0)
    return tuple(o.unflatten(0, rows.shape[:2]) for o in nearest_fwd(rows.flatten(0, 1), *rest)), (0, 0)


def _empty_nearest(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=sum_dtype(x))


@custom_op(f"{OPERATORS}::gaussian", mutates_args=())
def gaussian(
    like: Tensor,  # [N, 0] float32, for the number of rows and the device
    cols: int,
    row_ids: Tensor | None,
    seed: Tensor,
    offsets: Tensor,  # [F]
    field_weights: Tensor | None,  # [F], None for one field as it is
    row_offset: int,
    backend: str,
) -> Tensor:
    checks.check_row_offset(row_offset, len(like))
    out = like.new_empty(like.shape[0], cols)
    if out.numel() == 0:
        return out
    if like.device.type == "cpu":
        if row_ids is not None:
            checks.check_row_id_values(row_ids)
        if field_weights is not None:
            checks.check_values("field_weights", field_weights)
    ids = None if row_ids is None else row_ids.contiguous()
    make = pick_backend(backend, like.device, None).gaussian
    if field_weights is None:
        field: Tensor = make(out, ids, row_offset, seed, offsets[0])
        return field
    room = torch.empty_like(out)
    out.zero_()
    for offset, weight in zip(offsets, field_weights, strict=True):
        out += weight * make(room, ids, row_offset, seed, offset)
    return out


@gaussian.register_fake
def _(like: Tensor, cols: int, *_: object) -> Tensor:
    return like.new_empty(like.shape[0], cols)

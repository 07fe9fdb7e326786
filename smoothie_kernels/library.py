"""The operators as PyTorch knows them: schema, fake kernels, gradients, vmap, and the one implementation that calls a
backend.

Values of tensors are checked from here, because this code runs on real tensors also under torch.compile.
On a GPU they are not: reading them would make the host wait for the device.

Autocast changes nothing here: a call takes its inputs in the types that they have, and sums in float32.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import custom_op

from smoothie_kernels import checks
from smoothie_kernels.backends import NOTHING, Grads, Saved, gather
from smoothie_kernels.dispatch import pick_backend
from smoothie_kernels.stream import Kind, Request, Rows, Tokens, bound, kinds, signature, sum_dtype

# Namespace of the operators. torch.compile's cache on disk knows them by name alone, and would hand the arguments of an
# older version to this one: another schema takes another number.
OPERATORS = "smoothie_kernels_5"

Body = TypeVar("Body", bound=Callable[..., Any])
Part = TypeVar("Part")


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


class Kept(NamedTuple):
    """What the backward takes of the forward."""

    smoothed: Tensor  # not rounded to 16 bits
    noisy_tokens: Tensor
    best_score: Tensor
    log_sum: Tensor
    top_tokens: Tensor  # [N, K]


class Incoming(NamedTuple):
    """Gradients; None where the loss does not use an output: its products are left out."""

    grad_smoothed: Tensor | None  # [N, D]
    grad_lse: Tensor | None  # [N]
    grad_top: Tensor | None  # [N, K]


class Needs(NamedTuple):
    needs_x: bool
    needs_embeddings: bool


class Step(NamedTuple):
    """StepOutputs, and smoothed before it was rounded to 16 bits, [N, 0] where it was not."""

    smoothed: Tensor
    tokens: Tensor
    noisy_tokens: Tensor
    lse: Tensor
    best_score: Tensor
    log_sum: Tensor
    top_logits: Tensor
    top_tokens: Tensor
    wide: Tensor


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # Step: torch takes no names


def operator(name: str, *parts: Any, returns: Any) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """A custom operator whose arguments are the fields of `parts`."""

    def define(body: Callable[..., Any]) -> CustomOpDef:
        body.__signature__ = signature(*parts, returns=returns)  # type: ignore[attr-defined]
        return custom_op(f"{OPERATORS}::{name}", body, mutates_args=())

    return define


@operator("step_fwd", Request, returns=Outputs)
@without_autocast
def step_fwd(*arguments: Any) -> Outputs:
    request = _as_backends_take_it(Request(*arguments))
    x, row_ids = request.x, request.row_ids
    n = x.shape[0]
    checks.check_row_offset(request.row_offset, n)
    if n == 0:
        return _empty_step(request)
    if x.device.type == "cpu":
        if checks.check_logits(request.scale, request.std, request.field_weights) == 0:
            request = request._replace(std=None)
        if row_ids is not None:
            checks.check_row_id_values(row_ids)
    smoothed, *rest, _ = pick_backend(request.backend, x.device, x.dtype).step_fwd(request)
    if smoothed.dtype == x.dtype:
        return smoothed, *rest, x.new_empty(n, 0, dtype=sum_dtype(x))
    return smoothed.to(x.dtype), *rest, smoothed


@step_fwd.register_fake
def _(*arguments: Any) -> Outputs:
    return _empty_step(Request(*arguments))


def _empty_step(request: Request) -> Outputs:
    x, k = request.x, request.topk
    n, d = x.shape[0], x.shape[1] if request.mean else 0
    tokens = [x.new_empty(n, dtype=torch.int64) for _ in range(2)]
    sums = [x.new_empty(n, dtype=sum_dtype(x)) for _ in range(3)]
    top = x.new_empty(n, k, dtype=sum_dtype(x)), x.new_empty(n, k, dtype=torch.int64)
    rounded = request.result_dtype(x) != x.dtype
    wide = x.new_empty(n, d if rounded else 0, dtype=sum_dtype(x))
    return Step._make((x.new_empty(n, d), *tokens, *sums, *top, wide))


KINDS = tuple(kinds(Request).values())
AS_GIVEN = Kind.TOKENS, Kind.FIXED


def _as_taken(value: Any, kind: Kind) -> Any:
    return value if value is None or kind in AS_GIVEN else value.contiguous()


def _as_backends_take_it(request: Request) -> Request:
    """Tensors are contiguous; of the table, its rows."""
    return Request._make(map(_as_taken, request, KINDS))


# --- its gradients


@operator("step_bwd", Request, Kept, Incoming, Needs, returns=tuple[Tensor, Tensor])
@without_autocast
def step_bwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Of x and embeddings; empty where not needed."""
    request, kept, incoming, needs = bound(arguments, Request, Kept, Incoming, Needs)
    if len(request.x) == 0 or all(grad is None for grad in incoming):
        no_x, no_embeddings = _empty_grads(request.x, request.embeddings, *needs)
        return no_x.zero_(), no_embeddings.zero_()
    of_smoothed, of_lse, of_top = (None if grad is None else grad.contiguous() for grad in incoming)
    x, embeddings, *_ = request = _as_backends_take_it(request)._replace(wide=of_top is not None)
    chosen = pick_backend(request.backend, x.device, x.dtype)
    grad_x = grad_embeddings = None
    if of_smoothed is not None or of_lse is not None:
        smoothed = None if of_smoothed is None else kept.smoothed
        saved = Saved(smoothed, kept.noisy_tokens, kept.best_score, kept.log_sum)
        grad_x, grad_embeddings = chosen.step_bwd(request, saved, Grads(of_smoothed, of_lse), *needs)
    if of_top is not None:
        through_top = _top_grads(request, kept.top_tokens, of_top, chosen.average, *needs)
        grad_x, grad_embeddings = (
            a if b is None else b.to(of.dtype) if a is None else (a + b).to(of.dtype)
            for a, b, of in zip((grad_x, grad_embeddings), through_top, (x, embeddings), strict=True)
        )
    nothing = _empty_grads(x, embeddings, False, False)
    return nothing[0] if grad_x is None else grad_x, nothing[1] if grad_embeddings is None else grad_embeddings


def _top_grads(
    request: Request,
    tokens: Tensor,
    grad: Tensor,
    average: Callable[..., Tensor],
    needs_x: bool,
    needs_embeddings: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Through scale (x . E_j - ||E_j||^2 / 2 - ||x||^2 / 2) of some tokens j: scale (E_j - x) and scale (x - E_j)."""
    x, embeddings = request.x, request.embeddings
    weights = (request.scale[:, None] * grad).contiguous()  # [N, K]
    grad_x = grad_embeddings = None
    if needs_x:
        grad_x = average(weights, tokens, embeddings, weights.dtype) - weights.sum(1, keepdim=True) * x
    if needs_embeddings:
        total = gather.spread(weights, tokens, torch.ones_like(weights[:, :1]), len(embeddings))
        grad_embeddings = gather.spread(weights, tokens, x, len(embeddings)) - total * embeddings
    return grad_x, grad_embeddings


@step_bwd.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    request, *_, needs = bound(arguments, Request, Kept, Incoming, Needs)
    return _empty_grads(request.x, request.embeddings, *needs)


def _empty_grads(x: Tensor, embeddings: Tensor, needs_x: bool, needs_embeddings: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), embeddings.new_empty(embeddings.shape if needs_embeddings else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    step = Step(*output)
    kept = {name: getattr(step, name) for name in Kept._fields}
    if step.wide.shape[1]:
        kept["smoothed"] = step.wide
    absent = [o for o in (step.smoothed, step.top_logits) if o.shape[1] == 0]
    ctx.mark_non_differentiable(
        step.tokens, step.noisy_tokens, step.best_score, step.log_sum, step.top_tokens, step.wide, *absent
    )
    ctx.set_materialize_grads(False)
    ctx.others = [None if isinstance(i, Tensor) else i for i in inputs]
    ctx.save_for_backward(*(i if isinstance(i, Tensor) else None for i in inputs), *kept.values())


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    of = Step(*grads)  # type: ignore[arg-type]
    saved = iter(ctx.saved_tensors)  # read once: checkpointing recomputes tensors, and refuses a second time
    given = [other if tensor is None else tensor for other, tensor in zip(ctx.others, saved, strict=False)]
    needed = dict(zip(Request._fields, ctx.needs_input_grad, strict=True))
    needs = Needs(needed["x"], needed["embeddings"])
    with torch.autocast(given[0].device.type, enabled=False):  # in which vmap's own stack may fail
        grad_x, grad_embeddings = step_bwd(*given, *saved, of.smoothed, of.lse, of.top_logits, *needs)
    found = {"x": grad_x if needs.needs_x else None, "embeddings": grad_embeddings if needs.needs_embeddings else None}
    return tuple(found.get(name) for name in Request._fields)


step_fwd.register_autograd(_backward, setup_context=_save)


def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "fused_smoothie_step has first derivatives only: its backward cannot be differentiated again. "
        "smoothie_kernels.testing.dense_step, in plain PyTorch, can"
    )


step_bwd.register_autograd(no_second_derivative)


# --- torch.func.vmap


def one_for_all(name: str) -> NotImplementedError:
    return NotImplementedError(f"smoothie_kernels takes one {name} for all samples of torch.func.vmap")


@column_bias.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    raise one_for_all("embeddings")  # what every use of a table begins with


def more_rows(
    part: Callable[..., Part], info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> Part:
    """Samples are more rows of one call."""

    def flat(name: str, kind: Kind, value: Any, dim: int | None) -> Any:
        if kind == Kind.ROWS and value is not None:
            samples = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            return samples.flatten(0, 1)
        if dim is not None:
            raise one_for_all(name)
        return value

    of_part = kinds(part)
    return part(*map(flat, of_part, of_part.values(), arguments, in_dims))


def by_sample(rows: Any, info: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(o.unflatten(0, (info.batch_size, -1)) for o in rows), (0,) * len(rows)


@step_fwd.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, tuple[int, ...]]:
    """Each sample keeps its row ids, so all have the same noise."""
    request = more_rows(Request, info, in_dims, arguments)
    if request.row_ids is None:
        first, n = request.row_offset, len(request.x) // info.batch_size
        ids = torch.arange(first, first + n, dtype=torch.int64, device=request.x.device)
        request = request._replace(row_ids=ids.repeat(info.batch_size), row_offset=0)
    return by_sample(step_fwd(*request), info)


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


class Mean(NamedTuple):
    weights: Rows  # [N, K]
    tokens: Rows  # [N, K] int64
    embeddings: Tokens  # [V, D], rows contiguous
    dtype: torch.dtype
    backend: str


@operator("average_fwd", Mean, returns=Tensor)
@without_autocast
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
    weights, tokens, embeddings, *_ = inputs
    ctx.save_for_backward(weights, tokens, embeddings)


def _average_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_weights, _, needs_embeddings, *_ = ctx.needs_input_grad
    with torch.autocast(grad.device.type, enabled=False):
        grad_weights, grad_embeddings = average_bwd(grad, *ctx.saved_tensors, needs_weights, needs_embeddings)
    return grad_weights if needs_weights else None, None, grad_embeddings if needs_embeddings else None, None, None


average_fwd.register_autograd(_average_backward, setup_context=_save_average)
average_bwd.register_autograd(no_second_derivative)


@average_fwd.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    (mean,), (dim,) = by_sample((average_fwd(*more_rows(Mean, info, in_dims, arguments)),), info)
    return mean, dim


average_bwd.register_vmap(partial(_one_call_each, average_bwd))


# --- the nearest token, the noise


class Nearest(NamedTuple):
    x: Rows  # [N, D]
    embeddings: Tokens  # [V, D], rows contiguous
    bias: Tokens  # [V]
    backend: str


NO_LOGITS = NOTHING, None, None, 0, NOTHING, NOTHING, None, 0, False, False  # of a Request, behind bias


@operator("nearest_fwd", Nearest, returns=tuple[Tensor, Tensor])
@without_autocast
def nearest_fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, embeddings, bias, backend = Nearest(*arguments)
    if x.shape[0] == 0:
        return _empty_nearest(x)
    request = Request(x.contiguous(), embeddings, bias, *NO_LOGITS)
    found = pick_backend(backend, x.device, x.dtype).step_fwd(request)
    return found.tokens, found.distance


@nearest_fwd.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_nearest(x)


def _save_nearest(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, _ = output
    ctx.mark_non_differentiable(tokens)
    ctx.save_for_backward(*inputs[:2], tokens)


def _nearest_backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of ||x - E_token||^2."""
    x, embeddings, tokens = ctx.saved_tensors
    needs_x, needs_embeddings, *_ = ctx.needs_input_grad
    grad_x = 2 * grad[:, None] * (x.to(grad.dtype) - embeddings[tokens].to(grad.dtype))
    grad_embeddings = None
    if needs_embeddings:
        minus = -torch.ones_like(grad[:, None])
        grad_embeddings = gather.spread(minus, tokens[:, None], grad_x, len(embeddings)).to(embeddings.dtype)
    return grad_x.to(x.dtype) if needs_x else None, grad_embeddings, None, None


nearest_fwd.register_autograd(_nearest_backward, setup_context=_save_nearest)


@nearest_fwd.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, tuple[int, ...]]:
    return by_sample(nearest_fwd(*more_rows(Nearest, info, in_dims, arguments)), info)


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

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
from smoothie_kernels.backends import NOTHING, Gradients, Grads, Saved, Wanted, gather
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
    """Of which gradients are wanted; bias, col and values have none where scores are those of distances."""

    needs_x: bool
    needs_embeddings: bool
    needs_bias: bool
    needs_col: bool
    needs_values: bool


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
    smoothed, *rest, _ = pick_backend(request.backend, x.device, x.dtype, request).step_fwd(request)
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


@operator("step_bwd", Request, Kept, Incoming, Needs, returns=tuple[Tensor, Tensor, Tensor, Tensor, Tensor])
@without_autocast
def step_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    """Of what Needs names; empty where not needed."""
    request, kept, incoming, needs = bound(arguments, Request, Kept, Incoming, Needs)
    if len(request.x) == 0 or all(grad is None for grad in incoming):
        return tuple(nothing.zero_() for nothing in _empty_grads(request, needs))
    of_smoothed, of_lse, of_top = (None if grad is None else grad.contiguous() for grad in incoming)
    request = _as_backends_take_it(request)._replace(wide=of_top is not None)
    chosen = pick_backend(request.backend, request.x.device, request.x.dtype, request)
    # col counts as often as E does in a score: its gradient is made of E's.
    wanted = Wanted(needs.needs_x, needs.needs_embeddings or needs.needs_col, needs.needs_bias, needs.needs_values)
    found = Gradients()
    if of_smoothed is not None or of_lse is not None:
        smoothed = None if of_smoothed is None else kept.smoothed
        saved = Saved(smoothed, kept.noisy_tokens, kept.best_score, kept.log_sum)
        found = chosen.step_bwd(request, saved, Grads(of_smoothed, of_lse), wanted)
    if of_top is not None:
        through_top = _top_grads(request, kept.top_tokens, of_top, chosen.average, wanted)
        both = zip(found, through_top, strict=True)
        found = Gradients(*(a if b is None else b if a is None else a + b for a, b in both))
    return _as_gradients(request, found, needs)


def _as_gradients(request: Request, found: Gradients, needs: Needs) -> tuple[Tensor, ...]:
    of_col = None
    if needs.needs_col and request.col is not None and found.embeddings is not None:
        of_col = (found.embeddings * request.embeddings).sum(1) / request.col.where(request.col != 0, 1)
    grads = found.x, found.embeddings, found.bias, of_col, found.values
    return tuple(
        grad.to(of.dtype) if need and grad is not None and of is not None else _empty_grad(request, of, need).zero_()
        for grad, of, need in zip(grads, _of_grads(request), needs, strict=True)
    )


def _top_grads(
    request: Request, tokens: Tensor, grad: Tensor, average: Callable[..., Tensor], wanted: Wanted
) -> Gradients:
    """Through scale score_j of some tokens j: by x scale col_j E_j, by E_j scale col_j x; of distances, without col,
    less scale x and scale E_j."""
    x, embeddings, distances = request.x, request.embeddings, request.bound is None
    of_scores = (request.scale[:, None] * grad).contiguous()  # [N, K]
    weights = of_scores if request.col is None else of_scores * request.col[tokens]
    grad_x = grad_embeddings = grad_bias = None
    if wanted.x:
        grad_x = average(weights, tokens, embeddings, weights.dtype)
        grad_x = grad_x - weights.sum(1, keepdim=True) * x if distances else grad_x
    if wanted.bias or (wanted.embeddings and distances):
        grad_bias = gather.spread(of_scores, tokens, torch.ones_like(weights[:, :1]), len(embeddings))
    if wanted.embeddings:
        grad_embeddings = gather.spread(weights, tokens, x, len(embeddings))
    if grad_embeddings is not None and grad_bias is not None and distances:
        grad_embeddings = grad_embeddings - grad_bias * embeddings
    return Gradients(grad_x, grad_embeddings, grad_bias[:, 0] if wanted.bias and grad_bias is not None else None)


@step_bwd.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    request, *_, needs = bound(arguments, Request, Kept, Incoming, Needs)
    return _empty_grads(request, needs)


def _empty_grads(request: Request, needs: Needs) -> tuple[Tensor, ...]:
    return tuple(_empty_grad(request, of, need) for of, need in zip(_of_grads(request), needs, strict=True))


def _of_grads(request: Request) -> tuple[Tensor | None, ...]:
    """What Needs is about."""
    return request.x, request.embeddings, request.bias, request.col, request.values


def _empty_grad(request: Request, of: Tensor | None, need: bool) -> Tensor:
    """As large as what it is the gradient of, where that is needed."""
    return request.x.new_empty(0) if of is None else of.new_empty(of.shape if need else 0)


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
    needs = Needs(*(needed[name.removeprefix("needs_")] for name in Needs._fields))
    with torch.autocast(given[0].device.type, enabled=False):  # in which vmap's own stack may fail
        grads = step_bwd(*given, *saved, of.smoothed, of.lse, of.top_logits, *needs)
    found = {name: grad for name, need, grad in zip(Needs._fields, needs, grads, strict=True) if need}
    return tuple(found.get(f"needs_{name}") for name in Request._fields)


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


def one_call_each(
    backward: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Any, tuple[int, ...]]:
    """Reached where torch.autograd.grad is called under torch.func.vmap, as for a Jacobian."""
    samples = [
        backward(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(same) for same in zip(*samples, strict=True)), (0,) * len(samples[0])


step_bwd.register_vmap(partial(one_call_each, step_bwd))


# --- the nearest token, the noise


class Nearest(NamedTuple):
    x: Rows  # [N, D]
    embeddings: Tokens  # [V, D], rows contiguous
    bias: Tokens  # [V]
    col: Tokens | None  # [V]: distance is not of such scores
    backend: str


# Of a Request, behind bias.
NO_LOGITS: tuple[Any, ...] = NOTHING, None, None, 0, NOTHING, NOTHING, None, 0, False, False


@operator("nearest_fwd", Nearest, returns=tuple[Tensor, Tensor])
@without_autocast
def nearest_fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, embeddings, bias, col, backend = Nearest(*arguments)
    if x.shape[0] == 0:
        return _empty_nearest(x)
    request = Request(x.contiguous(), embeddings, bias, *NO_LOGITS)
    request = request if col is None else request._replace(col=col)
    found = pick_backend(backend, x.device, x.dtype, request).step_fwd(request)
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
    return grad_x.to(x.dtype) if needs_x else None, grad_embeddings, None, None, None


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

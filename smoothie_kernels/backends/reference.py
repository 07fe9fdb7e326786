"""Plain PyTorch on any device and in any float type: what every other backend is held against.

It streams over the vocabulary with a running maximum; the dense form, as one reads it in the paper, is in testing.py.
"""

import torch
from torch import Tensor

from smoothie_kernels import noise
from smoothie_kernels.backends import Gradients, Grads, Saved, StepOutputs, Wanted, gather, nearest_alone
from smoothie_kernels.backends.blocks import column_bias
from smoothie_kernels.backends.gather import average
from smoothie_kernels.recall import Buckets, pick_buckets
from smoothie_kernels.stream import Request, sum_dtype

__all__ = ["average", "column_bias", "gaussian", "lacks", "step_bwd", "step_fwd", "supports"]

CHUNK = 4096  # tokens at a time


def supports(device_type: str, dtype: torch.dtype | None) -> str | None:
    return None


def lacks(request: Request) -> str | None:
    return None


def _ids(row_ids: Tensor | None, row_offset: int, x: Tensor) -> Tensor:
    return (
        torch.arange(row_offset, row_offset + x.shape[0], dtype=torch.int64, device=x.device)
        if row_ids is None
        else row_ids
    )


def step_fwd(inputs: Request) -> StepOutputs:
    if not inputs.logits:
        return _nearest(inputs)
    x, embeddings, dtype = inputs.x, inputs.embeddings, sum_dtype(inputs.x)
    rows, scale, ids = _rows(inputs)
    nearest = rows.new_full((len(rows),), -torch.inf)  # running maximum of the scores
    highest = nearest.clone()  # and of the logits, beside that of the nearest token without noise
    total, smoothed = torch.zeros_like(highest), torch.zeros_like(rows if inputs.mean else rows[:, :0])
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
    noisy_tokens = tokens.clone()
    kept = _Kept(inputs, rows)
    for first in range(0, embeddings.shape[0], CHUNK):
        tokens_of_chunk = slice(first, first + CHUNK)
        scores = _scores(inputs, rows, tokens_of_chunk)
        eps = _noise(inputs, ids, first, scores.shape[1])
        before = nearest
        nearest, tokens = _keep_first_max(nearest, tokens, scores, first)
        highest = highest + torch.where(highest > -torch.inf, scale * (before - nearest), 0)
        logits = scale[:, None] * (scores - nearest[:, None]) + eps
        kept.take(scores, eps, nearest, first)
        new_highest, noisy_tokens = _keep_first_max(highest, noisy_tokens, logits, first)
        # An all -inf (or NaN) row must come out as NaN, not fail: subtract the maximum only where it is finite.
        shift = torch.where(new_highest.isfinite(), new_highest, 0)
        rescale, weights = (highest - shift).exp(), (logits - shift[:, None]).exp()
        total = total * rescale + weights.sum(1)
        if inputs.mean:
            smoothed = smoothed * rescale[:, None] + weights @ _values(inputs, tokens_of_chunk)
        highest = new_highest
    log_sum = torch.where(highest.isfinite(), highest, 0) + total.log()
    best = nearest.double()
    if inputs.bound is None:
        # The nearest token's score as it came out, because lse averages the errors of all scores, but for the token's
        # share of the weight (without noise, where that is not known), because its distance has no error.
        came_out = best - rows.double().square().sum(1) / 2
        near = (rows.double() - embeddings[tokens].double()).square().sum(1) / -2
        share = torch.where(tokens == noisy_tokens, highest - log_sum, -log_sum.clamp(min=0)).exp().clamp(max=1)
        best = torch.lerp(came_out, near, share.double())
    lse = (log_sum.double() + scale.double() * best).to(dtype)
    top = kept.largest(nearest, log_sum)
    smoothed = (smoothed / total[:, None]).to(inputs.result_dtype(x))
    return StepOutputs(smoothed, tokens, noisy_tokens, lse, nearest, log_sum, *top)


class _Kept:
    """The largest logits so far of every bucket; exact is one bucket that keeps K."""

    def __init__(self, inputs: Request, rows: Tensor) -> None:
        v, self.k = inputs.embeddings.shape[0], inputs.topk
        self.buckets, self.keep = pick_buckets(v, self.k, inputs.recall_target) or Buckets(1, self.k)
        self.scale = inputs.scale[:, None, None]
        # [N, so many of a bucket, buckets]. Scores and noise apart: logits relative to a moving score would drift.
        self.scores = rows.new_empty(len(rows), 0, self.buckets)
        self.noise, self.tokens = self.scores, self.scores.long()

    def take(self, scores: Tensor, eps: Tensor | float, nearest: Tensor, first: int) -> None:
        if self.k == 0:
            return
        ahead, behind = first % self.buckets, -(first + scores.shape[1]) % self.buckets

        def of_buckets(values: Tensor, padding: float) -> Tensor:
            padded = torch.nn.functional.pad(values, (ahead, behind), value=padding)
            return padded.view(len(values), -1, self.buckets)

        tokens = torch.arange(first, first + scores.shape[1], dtype=torch.int64, device=scores.device).expand(
            scores.shape
        )
        self.scores = torch.cat((self.scores, of_buckets(scores, -torch.inf)), 1)
        self.noise = torch.cat((self.noise, of_buckets(torch.zeros_like(scores) + eps, 0.0)), 1)
        self.tokens = torch.cat((self.tokens, of_buckets(tokens, 0)), 1)  # in order: a stable sort keeps the lowest
        order = self._logits(nearest).argsort(stable=True, dim=1, descending=True)[:, : self.keep]
        self.scores, self.noise, self.tokens = (a.gather(1, order) for a in (self.scores, self.noise, self.tokens))

    def _logits(self, nearest: Tensor) -> Tensor:
        relative = self.scale * (self.scores - nearest[:, None, None]) + self.noise
        return torch.where(self.scores == -torch.inf, -torch.inf, relative)  # padding, whatever the sign of scale

    def largest(self, nearest: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        logits, tokens = self._logits(nearest).flatten(1), self.tokens.flatten(1)
        if self.buckets > 1:
            tokens, order = tokens.sort(1)
            logits = logits.gather(1, order)
        logits, order = logits.sort(stable=True, dim=1, descending=True)
        tokens, unknown = tokens.gather(1, order)[:, : self.k], log_sum.isnan()[:, None]
        lowest = torch.arange(self.k, dtype=torch.int64, device=tokens.device)
        return logits[:, : self.k].masked_fill(unknown, torch.nan), torch.where(unknown, lowest, tokens)


def step_bwd(inputs: Request, saved: Saved, grads: Grads, wanted: Wanted) -> Gradients:
    """With weights P and delta = sum(grad * smoothed): dS = scale P (grad . values - delta + grad_lse).

    Then the chain rule: through a score's two ends, col_j E_j and col_j x_i (of a distance E_j - x_i and x_i - E_j),
    its bias, and the mean, P grad.

    A row's P add up to 1 and its dS to scale grad_lse, but for the rounding of log_sum and delta. Where one token has
    all the weight, its dS is nothing but that rounding: it is subtracted again, by the token's weight.
    """
    embeddings, dtype, distances = inputs.embeddings, sum_dtype(inputs.x), inputs.bound is None
    rows, scale, ids = _rows(inputs)
    smoothed = None if saved.smoothed is None else saved.smoothed.to(dtype)
    grad = torch.zeros_like(rows) if grads.smoothed is None else grads.smoothed.to(dtype)
    grad_lse = torch.zeros_like(saved.log_sum) if grads.lse is None else grads.lse
    shift = grad_lse if smoothed is None else grad_lse - (grad * smoothed).sum(1)
    grad_x, missing, one = torch.zeros_like(rows), scale * grad_lse, torch.zeros_like(scale)
    largest = torch.zeros_like(scale)
    of_tokens = wanted.embeddings or wanted.bias or wanted.values
    through_scores = torch.zeros_like(embeddings, dtype=dtype) if of_tokens else rows[:0]
    through_mean = through_scores if inputs.values is None else torch.zeros_like(through_scores)
    grad_bias = rows.new_zeros(len(embeddings))
    for first in range(0, embeddings.shape[0], CHUNK):
        part = slice(first, first + CHUNK)
        table = embeddings[part].to(dtype)
        scores = _scores(inputs, rows, part)
        logits = scale[:, None] * (scores - saved.best_score[:, None]) + _noise(inputs, ids, first, len(table))
        weights = (logits - saved.log_sum[:, None]).clamp(max=0).exp()
        grad_scores = scale[:, None] * weights * (grad @ _values(inputs, part).T + shift[:, None])
        missing -= grad_scores.sum(1)
        one += weights.sum(1)
        largest = largest.maximum(weights.amax(1))
        grad_products = grad_scores if inputs.col is None else grad_scores * inputs.col[part]
        if wanted.x:
            grad_x += grad_products @ table
        if of_tokens:
            grad_bias[part] = grad_scores.sum(0)
            through_mean[part] += weights.T @ grad
            through_scores[part] += grad_products.T @ rows
            if distances:
                through_scores[part] -= grad_bias[part, None] * table
    tokens, share = saved.noisy_tokens, torch.where(one == 0, 1, largest / one)
    lacking, col = share * missing, torch.ones_like(scale) if inputs.col is None else inputs.col[tokens]
    chosen = embeddings[tokens].to(dtype)
    if of_tokens:  # the same sum where tokens are the same
        ends = col[:, None] * rows - chosen if distances else col[:, None] * rows
        grad_bias[tokens] += gather.sum_by_token(tokens, lacking[:, None])[:, 0]
        through_scores[tokens] += gather.sum_by_token(tokens, lacking[:, None] * ends)
        through_mean[tokens] += gather.sum_by_token(tokens, (share * (1 - one))[:, None] * grad)
    if smoothed is None:
        grad_x /= torch.where(one == 0, 1, one)[:, None]
    else:
        grad_x += missing[:, None] * smoothed if distances else (missing * col)[:, None] * chosen
    if distances:
        grad_x -= (scale * grad_lse)[:, None] * rows
    return Gradients(
        grad_x.to(inputs.result_dtype(inputs.x)) if wanted.x else None,
        through_scores.to(inputs.result_dtype(embeddings)) if wanted.embeddings else None,
        grad_bias if wanted.bias else None,
        through_mean.to(inputs.result_dtype(embeddings)) if wanted.values else None,
    )


def _scores(inputs: Request, rows: Tensor, tokens: slice) -> Tensor:
    """Of some tokens, [N, v]."""
    products = rows @ inputs.embeddings[tokens].to(rows.dtype).T
    return (products if inputs.col is None else products * inputs.col[tokens]) + inputs.bias[tokens]


def _values(inputs: Request, tokens: slice) -> Tensor:
    """What the mean is one of, [v, D]."""
    values = inputs.embeddings if inputs.values is None else inputs.values
    return values[tokens].to(sum_dtype(inputs.x))


def _rows(inputs: Request) -> tuple[Tensor, Tensor, Tensor]:
    """x, its scale and its row ids."""
    x = inputs.x.to(sum_dtype(inputs.x))
    return x, inputs.scale, _ids(inputs.row_ids, inputs.row_offset, x)


def _noise(inputs: Request, ids: Tensor, first: int, count: int) -> Tensor | float:
    if inputs.std is None:
        return 0.0
    eps: Tensor | float = 0.0
    weights = [1.0] if inputs.field_weights is None else inputs.field_weights.tolist()
    for weight, offset in zip(weights, inputs.offset.tolist(), strict=True):
        eps = weight * noise.normals(ids, first, count, int(inputs.seed), offset) + eps
    return inputs.std[:, None] * torch.as_tensor(eps).to(inputs.std.dtype)


def _keep_first_max(best: Tensor, index: Tensor, values: Tensor, first: int) -> tuple[Tensor, Tensor]:
    value, column = values.max(1)
    better = value > best
    return torch.where(better, value, best), torch.where(better, column + first, index)


def _nearest(inputs: Request) -> StepOutputs:
    x, embeddings = inputs.x, inputs.embeddings
    rows = x.to(sum_dtype(x))
    nearest = rows.new_full((len(rows),), -torch.inf)
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
    for first in range(0, embeddings.shape[0], CHUNK):
        scores = _scores(inputs, rows, slice(first, first + CHUNK))
        nearest, tokens = _keep_first_max(nearest, tokens, scores, first)
    distance = (rows.double() - embeddings[tokens].double()).square().sum(1)
    return nearest_alone(tokens, distance.to(rows.dtype))


def gaussian(out: Tensor, row_ids: Tensor | None, row_offset: int, seed: Tensor, offset: Tensor) -> Tensor:
    ids = _ids(row_ids, row_offset, out)
    for first in range(0, out.shape[1], CHUNK):
        part = out[:, first : first + CHUNK]
        part.copy_(noise.normals(ids, first, part.shape[1], int(seed), int(offset)))
    return out

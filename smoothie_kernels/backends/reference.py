"""Plain PyTorch on any device and in any float type: what every other backend is held against.

It streams over the vocabulary with a running maximum; the dense form, as one reads it in the paper, is in testing.py.
"""

import torch
from torch import Tensor

from smoothie_kernels import noise

CHUNK = 4096  # tokens at a time


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    return None


def _accumulate_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _ids(row_ids: Tensor | None, row_offset: int, x: Tensor) -> Tensor:
    return torch.arange(row_offset, row_offset + x.shape[0], device=x.device) if row_ids is None else row_ids


def column_bias(embeddings: Tensor) -> Tensor:
    """-||E_j||^2 / 2, summed in float64: next to it the scores of near tokens cancel."""
    bias = embeddings.new_empty(embeddings.shape[0], dtype=_accumulate_in(embeddings))
    for first in range(0, len(bias), CHUNK):
        bias[first : first + CHUNK] = -embeddings[first : first + CHUNK].double().square().sum(1) / 2
    return bias


def step_fwd(
    x: Tensor,
    embeddings: Tensor,
    bias: Tensor,
    mu: Tensor,
    std: Tensor | None,
    row_ids: Tensor | None,
    row_offset: int,
    seed: Tensor,
    offset: Tensor,
    sigma_min: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = x.to(_accumulate_in(x)), _accumulate_in(x)
    ids = _ids(row_ids, row_offset, x)
    scale = (mu / sigma_min**2)[:, None]
    row_constant = -rows.square().sum(1, keepdim=True) / 2
    highest = rows.new_full((len(rows),), -torch.inf)  # running maximum of the logits
    total, smoothed = torch.zeros_like(highest), torch.zeros_like(rows)
    nearest, tokens = highest.clone(), torch.zeros(len(rows), dtype=torch.int64, device=x.device)
    noisy_tokens = tokens.clone()
    for first in range(0, embeddings.shape[0], CHUNK):
        table = embeddings[first : first + CHUNK].to(dtype)
        scores = rows @ table.T + bias[first : first + CHUNK]
        logits = scale * (scores + row_constant)
        if std is not None:
            eps = noise.normals(ids, first, len(table), int(seed), int(offset))
            logits = logits + std[:, None] * eps.to(dtype)
        nearest, tokens = _keep_first_max(nearest, tokens, scores, first)
        new_highest, noisy_tokens = _keep_first_max(highest, noisy_tokens, logits, first)
        # An all -inf (or NaN) row must come out as NaN, not fail: subtract the maximum only where it is finite.
        shift = torch.where(new_highest.isfinite(), new_highest, 0)
        rescale, weights = (highest - shift).exp(), (logits - shift[:, None]).exp()
        total = total * rescale + weights.sum(1)
        smoothed = smoothed * rescale[:, None] + weights @ table
        highest = new_highest
    shift = torch.where(highest.isfinite(), highest, 0)
    return (smoothed / total[:, None]).to(x.dtype), tokens, noisy_tokens, shift + total.log()


def _keep_first_max(best: Tensor, index: Tensor, values: Tensor, first: int) -> tuple[Tensor, Tensor]:
    value, column = values.max(1)
    better = value > best
    return torch.where(better, value, best), torch.where(better, column + first, index)


def nearest_fwd(x: Tensor, embeddings: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.to(_accumulate_in(x))
    nearest = rows.new_full((len(rows),), -torch.inf)
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
    for first in range(0, embeddings.shape[0], CHUNK):
        scores = rows @ embeddings[first : first + CHUNK].to(rows.dtype).T + bias[first : first + CHUNK]
        nearest, tokens = _keep_first_max(nearest, tokens, scores, first)
    distance = (rows.double() - embeddings[tokens].double()).square().sum(1)
    return tokens, distance.to(rows.dtype)


def gaussian(out: Tensor, row_ids: Tensor | None, row_offset: int, seed: Tensor, offset: Tensor) -> Tensor:
    ids = _ids(row_ids, row_offset, out)
    for first in range(0, out.shape[1], CHUNK):
        part = out[:, first : first + CHUNK]
        part.copy_(noise.normals(ids, first, part.shape[1], int(seed), int(offset)))
    return out

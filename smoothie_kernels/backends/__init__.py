"""One module per backend, each with the same seven functions:

supports(device_type, dtype) -> why not, or None; dtype is None where no input has one
lacks(request) -> what this call asks of it that it has not, or None
column_bias(embeddings) -> [V]
step_fwd(request) -> StepOutputs
step_bwd(request, saved, grads, wanted) -> Gradients
average(weights, tokens, embeddings, dtype)
    -> [N, D] in dtype, the sums of weights [N, K] times the embeddings of tokens [N, K]
gaussian(out, row_ids, row_offset, seed, offset) -> out
"""

from typing import NamedTuple

import torch
from torch import Tensor


class StepOutputs(NamedTuple):
    """What the step gives for every row, and what its backward needs to make the same weights again.

    Far from the origin lse is a large number, so a weight exp(logit - lse) would be rounded as coarsely as lse is. With
    the nearest token's score x.E - ||E||^2 / 2 taken off first, only small numbers are subtracted:

        P_ij = exp(scale_i (score_ij - best_score_i) + std_i eps_ij - log_sum_i)
    """

    smoothed: Tensor  # [N, D], [N, 0] where it is not wanted
    tokens: Tensor  # [N] int64
    noisy_tokens: Tensor  # [N] int64
    lse: Tensor  # [N]
    best_score: Tensor  # [N]
    log_sum: Tensor  # [N]: lse - scale (best_score - ||x||^2 / 2)
    top_logits: Tensor  # [N, K]: scale (score - best_score) + std eps, descending; NaN where lse is
    top_tokens: Tensor  # [N, K] int64: of equal logits the lowest first
    distance: Tensor | None = None  # [N]: ||x - E_token||^2, where no logits are wanted; all but tokens is empty then


NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")


def nearest_alone(tokens: Tensor, distance: Tensor) -> StepOutputs:
    """What the step gives where no logits are wanted."""
    return StepOutputs(NOTHING, tokens, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, distance)


class Statistics(NamedTuple):
    """StepOutputs without the mean and without the largest logits, but for the very largest."""

    tokens: Tensor  # [N] int64
    noisy_tokens: Tensor  # [N] int64
    lse: Tensor  # [N] fp32
    best_score: Tensor  # [N] fp32
    log_sum: Tensor  # [N] fp32
    best_logit: Tensor  # [N] fp32: scale (score - best_score) + std eps of noisy_tokens


class Saved(NamedTuple):
    """Of a call's outputs, what its backward takes."""

    smoothed: Tensor | None  # [N, D] in x's type or the sums'; None where it has no gradient
    noisy_tokens: Tensor  # [N] int64
    best_score: Tensor  # [N]
    log_sum: Tensor  # [N]


class Wanted(NamedTuple):
    """Which gradients are."""

    x: bool
    embeddings: bool
    bias: bool = False
    values: bool = False


class Gradients(NamedTuple):
    """In the types of what they are of, or of the sums; None where not wanted. Where scores are those of distances
    embeddings has all of the table's; with `values`, embeddings has what comes through scores."""

    x: Tensor | None = None  # [N, D]
    embeddings: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]
    values: Tensor | None = None  # [V, D]


class Grads(NamedTuple):
    """Gradients that come in; None where the loss does not use an output."""

    smoothed: Tensor | None  # [N, D] contiguous
    lse: Tensor | None  # [N]

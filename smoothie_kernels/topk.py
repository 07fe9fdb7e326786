"""The largest noisy logits of every row, what they leave out, and mean embeddings made of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from smoothie_kernels import average
from smoothie_kernels.vocabulary import Vocabulary


class TopK(NamedTuple):
    """The K largest noisy logits of every row."""

    values: Tensor  # (..., K) float32, descending
    indices: Tensor  # (..., K) int64: their tokens; ties go to the lowest
    tail_mass: Tensor  # (...) float32: softmax weight of all other tokens, 1 - sum(exp(values - lse))


def largest(lse: Tensor, log_sum: Tensor, logits: Tensor, tokens: Tensor) -> tuple[TopK, Tensor]:
    """TopK and the softmax weights [N, K] of its tokens, from what library.step_fwd gives.

    logits and log_sum are relative to a score of the row: values and lse themselves are large numbers in rows far from
    the origin, and their difference would be rounded coarsely.
    """
    of_lse = lse - lse.detach()  # zero, with lse's gradient
    weights = (logits - (log_sum + of_lse)[:, None]).exp()
    values = logits + (lse - log_sum).detach()[:, None]
    return TopK(values, tokens, (1 - weights.sum(1)).clamp(0, 1)), weights


def smooth_topk(logits: Tensor, tokens: Tensor, vocabulary: Vocabulary, dtype: torch.dtype, backend: str) -> Tensor:
    """softmax(logits) @ embeddings[tokens], [N, D]"""
    smoothed: Tensor = average.average_fwd(logits.softmax(1), tokens, vocabulary.embeddings, dtype, backend)
    return smoothed


def smooth_topk_and_mean(
    top: TopK, weights: Tensor, x: Tensor, scale: Tensor, vocabulary: Vocabulary, backend: str
) -> Tensor:
    """weights @ embeddings[tokens] + tail_mass times what the other tokens' mean is without noise, [N, D].

    That mean is taken under the weights Q_j ~ exp(l_j), l_j = scale (x . E_j - ||E_j||^2 / 2), to first order in the
    logits l, over all tokens:  sum_j Q_j E_j ~ mean(E) + cov(E, l). It takes no product with the table, only with a
    (D + 1) x D matrix of it.
    """
    mean, covariance = vocabulary.moments()
    kept = average.average_fwd(weights, top.indices, vocabulary.embeddings, weights.dtype, backend)
    features = torch.cat((x.to(weights.dtype), torch.ones_like(scale)[:, None]), 1) * scale[:, None]
    with torch.autocast(x.device.type, enabled=False):
        others = mean + features @ covariance
    smoothed: Tensor = kept + top.tail_mass[:, None] * others
    return smoothed.to(x.dtype)

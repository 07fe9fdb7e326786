"""Products of K tokens a row with the table, in plain PyTorch: for any device and type, forward and backward.

What rows of the table they read goes through `ROOM` bytes at a time. Sums have a fixed order: no atomics.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

ROOM = 2**26


def average(weights: Tensor, tokens: Tensor, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_k weights[i, k] embeddings[tokens[i, k]], [N, D] in dtype; summed in the type of weights."""
    out = embeddings.new_empty(len(tokens), embeddings.shape[1], dtype=dtype)
    for rows in _blocks(tokens, embeddings):
        out[rows] = (weights[rows, None] @ embeddings[tokens[rows]].to(weights.dtype))[:, 0].to(dtype)
    return out


def dots(vectors: Tensor, tokens: Tensor, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """vectors[i] . embeddings[tokens[i, k]], [N, K] in dtype."""
    out = embeddings.new_empty(tokens.shape, dtype=dtype)
    for rows in _blocks(tokens, embeddings):
        out[rows] = (embeddings[tokens[rows]].to(dtype) @ vectors[rows, :, None].to(dtype))[..., 0]
    return out


def spread(weights: Tensor, tokens: Tensor, vectors: Tensor, vocabulary: int) -> Tensor:
    """out[j] = sum of weights[i, k] vectors[i] over all tokens[i, k] = j, [V, D] in the type of weights.

    Summed in float64: embedding_bag adds one by one, and thousands of rows may have one token."""
    by_token = tokens.flatten().argsort(stable=True)
    starts = torch.searchsorted(
        tokens.flatten()[by_token], torch.arange(vocabulary, dtype=torch.int64, device=tokens.device)
    )
    rows, of_rows = by_token // max(1, tokens.shape[1]), weights.flatten()[by_token].double()
    out = vectors.new_empty(vocabulary, vectors.shape[1], dtype=weights.dtype)
    at_once = max(1, ROOM // (8 * vocabulary))
    for first in range(0, vectors.shape[1], at_once):
        part = vectors[:, first : first + at_once].double()
        out[:, first : first + at_once] = functional.embedding_bag(
            rows, part, starts, mode="sum", per_sample_weights=of_rows
        )
    return out


def sum_by_token(tokens: Tensor, vectors: Tensor) -> Tensor:
    """For every row the sum of the vectors of all rows with its token, [N, D]; tokens [N]."""
    rank = torch.searchsorted(tokens.sort().values, tokens)  # below N, the same for all rows with a token
    return spread(torch.ones_like(vectors[:, :1]), rank[:, None], vectors, len(tokens))[rank]


def _blocks(tokens: Tensor, embeddings: Tensor) -> Iterator[slice]:
    n, k = tokens.shape
    size = max(1, ROOM // (4 * max(1, k) * embeddings.shape[1]))
    for first in range(0, n, size):
        yield slice(first, min(n, first + size))

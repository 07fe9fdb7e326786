"""From token ids to what the model sees at time t: one fused step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from smoothie_kernels import Vocabulary, fused_smoothie_step
from smoothie_kernels.diffusion.schedules import Schedule
from smoothie_kernels.vocabulary import as_vocabulary


def noise_tokens(
    tokens: Tensor,
    embeddings: Tensor | Vocabulary,
    schedule: Schedule,
    t: float | Tensor,
    *,
    sigma_min: float = 1.5,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    row_offset: int = 0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Smoothed embeddings of noised tokens: the input of Smoothie's model.

    Equal to::

        mu, std = (m[..., None] for m in schedule.marginal(t))
        step = fused_smoothie_step(E[tokens], E, mu, std, seed=seed, offset=offset, row_offset=row_offset)
        step.smoothed.where(mask[..., None], 0)

    Args:
        tokens: (..., L) int64, in [0, V).
        embeddings: (V, D) table or its `Vocabulary`. Gradients flow to it, through distances, weights and means.
        schedule: gives mu and std.
        t: in [0, 1]: a number, or one for every sequence, shape `tokens.shape[:-1]`.
        sigma_min, seed, offset, row_offset, backend: as `fused_smoothie_step` takes them; positions are the rows, in
            order of the flattened tokens.
        mask: bool, tokens' shape: positions that are not in it take no part and come out as zeros. The noise of all
            others is what it is without a mask.

    Returns:
        (..., L, D) in the table's type.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    vocabulary = as_vocabulary(embeddings, backend)
    table = vocabulary.embeddings
    _check_tokens(tokens, len(table))
    mu, std = (_per_sequence(m, tokens) for m in schedule.marginal(t))
    if mask is None:
        x = functional.embedding(tokens, table)
        return fused_smoothie_step(
            x, vocabulary, mu, std, sigma_min=sigma_min, seed=seed, offset=offset, row_offset=row_offset,
            backend=backend,
        ).smoothed  # fmt: skip
    if mask.dtype != torch.bool or mask.shape != tokens.shape:
        wanted, got = f"torch.bool of shape {list(tokens.shape)}", f"{mask.dtype} of shape {list(mask.shape)}"
        raise ValueError(f"mask must be {wanted} as tokens, got {got}")
    rows = mask.flatten().nonzero()[:, 0]
    smoothed = fused_smoothie_step(
        functional.embedding(tokens.flatten()[rows], table), vocabulary,
        *(m.expand(tokens.shape).reshape(-1)[rows] for m in (mu, std)),
        sigma_min=sigma_min, seed=seed, offset=offset, row_ids=rows + row_offset, backend=backend,
    ).smoothed  # fmt: skip
    everywhere = smoothed.new_zeros(tokens.numel(), smoothed.shape[1])
    return everywhere.index_copy(0, rows, smoothed).view(*tokens.shape, -1)


def _check_tokens(tokens: Tensor, vocabulary: int) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be an int64 tensor, got {kind}")
    if tokens.dim() == 0:
        raise ValueError("tokens must have shape [..., L], got []")
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"tokens must be in [0, V) with V = {vocabulary}, got {low if low < 0 else high}")


def _per_sequence(value: Tensor, tokens: Tensor) -> Tensor:
    if value.dim() and value.shape != tokens.shape[:-1]:
        raise ValueError(f"t must be a number or have shape {list(tokens.shape[:-1])}, got {list(value.shape)}")
    return value[..., None].to(tokens.device)

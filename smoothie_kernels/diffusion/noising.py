"""From clean embeddings, or token ids, to what the model sees at time t: one fused step, or the authors' dense one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from smoothie_kernels import Vocabulary, fused_smoothie_step, noise
from smoothie_kernels.checks import per_row
from smoothie_kernels.diffusion.schedules import Schedule
from smoothie_kernels.metric import Metric, embedded
from smoothie_kernels.stream import sum_dtype
from smoothie_kernels.vocabulary import as_vocabulary

STEPS = ("fused", "eager")


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
    step: str = "fused",
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
        mask, step: as `smooth` takes them.

    Returns:
        (..., L, D) in the table's type.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    vocabulary = as_vocabulary(embeddings, backend)
    _check_tokens(tokens, len(vocabulary))
    mu, std = (_per_sequence(m, tokens) for m in schedule.marginal(t))
    x = functional.embedding(tokens, vocabulary.embeddings)
    return smooth(
        x, vocabulary, mu, std, sigma_min=sigma_min, seed=seed, offset=offset, row_offset=row_offset, mask=mask,
        step=step, backend=backend,
    )  # fmt: skip


def smooth(
    x: Tensor,
    embeddings: Tensor | Vocabulary,
    mu: float | Tensor,
    std: float | Tensor,
    *,
    sigma_min: float = 1.5,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    row_offset: int = 0,
    mask: Tensor | None = None,
    step: str = "fused",
    backend: str = "auto",
) -> Tensor:
    """The step's smoothed embeddings, (..., D) in x's type, of some rows of x or all of them.

    Args:
        x, embeddings, mu, std, sigma_min, seed, offset, row_offset, backend: as `fused_smoothie_step` takes them.
        mask: bool, x.shape[:-1]: rows that are not in it take no part and come out as zeros. The noise of all others
            is what it is without a mask.
        step: "fused" is `fused_smoothie_step`; "eager" the authors' dense arithmetic, with every tensor of
            rows x vocabulary that it needs: the same field, or torch's normals where seed is None.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    if not isinstance(step, str) or step not in STEPS:
        raise ValueError(f"step must be one of {', '.join(map(repr, STEPS))}, got {step!r}")
    vocabulary = as_vocabulary(embeddings, backend)

    def run(x: Tensor, mu: float | Tensor, std: float | Tensor, **ids: Any) -> Tensor:
        ids |= {"sigma_min": sigma_min, "seed": seed, "offset": offset, "backend": backend}
        if step == "eager":
            return _eager_step(x, vocabulary, mu, std, **ids)
        return fused_smoothie_step(x, vocabulary, mu, std, **ids).smoothed

    if mask is None:
        return run(x, mu, std, row_offset=row_offset)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
        wanted, got = f"torch.bool of shape {list(x.shape[:-1])}", f"{mask.dtype} of shape {list(mask.shape)}"
        raise ValueError(f"mask must be {wanted} as the rows, got {got}")
    rows = mask.flatten().nonzero()[:, 0]
    mu, std = (per_row(name, m, x)[rows] for name, m in (("mu", mu), ("std", std)))
    smoothed = run(x.flatten(0, -2)[rows], mu, std, row_ids=rows + row_offset)
    with torch.autocast(x.device.type, enabled=False):  # index_copy takes no float16 under bfloat16's autocast
        return smoothed.new_zeros(mask.numel(), smoothed.shape[1]).index_copy(0, rows, smoothed).view(x.shape)


def _eager_step(
    x: Tensor,
    vocabulary: Vocabulary,
    mu: float | Tensor,
    std: float | Tensor,
    *,
    sigma_min: float,
    seed: int | Tensor | None,
    offset: int | Tensor,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    backend: str,
) -> Tensor:
    """The step as Smoothie's authors write it, in float32 (float64 for float64) whatever autocast says."""
    noiseless = isinstance(std, int | float) and std == 0
    mu, std = (per_row(name, m, x)[:, None] for name, m in (("mu", mu), ("std", std)))
    with torch.autocast(x.device.type, enabled=False):
        rows, table = (tensor.to(sum_dtype(x)) for tensor in (x.flatten(0, -2), vocabulary.embeddings))
        logits = mu * eager_distances(rows, table, sigma_min, vocabulary.metric)
        if not noiseless:
            normals = torch.randn_like(logits) if seed is None else noise.gaussian(
                *logits.shape, seed=seed, offset=offset, row_offset=row_offset, row_ids=row_ids, device=x.device,
                backend=backend,
            )  # fmt: skip
            logits = logits + std * normals
        return (logits.softmax(-1) @ table).to(x.dtype).view(x.shape)


def eager_distances(x: Tensor, table: Tensor, sigma_min: float, metric: Metric = "euclidean") -> Tensor:
    """D, (N, V): minus squared distances over 2 sigma_min^2."""
    x, table = embedded(metric, x), embedded(metric, table)
    squares = x.square().sum(1, keepdim=True) - 2 * x @ table.T + table.square().sum(1)
    return -squares / (2 * sigma_min**2)


def _check_tokens(tokens: Tensor, vocabulary: int) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be an int64 tensor, got {kind}")
    if tokens.dim() == 0:
        raise ValueError("tokens must have shape [..., L], got []")
    # Values cannot be looked at in a graph; there torch's own embedding refuses them on a CPU.
    if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"tokens must be in [0, V) with V = {vocabulary}, got {low if low < 0 else high}")


def _per_sequence(value: Tensor, tokens: Tensor) -> Tensor:
    if value.dim() and value.shape != tokens.shape[:-1]:
        raise ValueError(f"t must be a number or have shape {list(tokens.shape[:-1])}, got {list(value.shape)}")
    return value[..., None].to(tokens.device)

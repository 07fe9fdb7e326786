"""Launches the compiled CPU kernels, csrc/cpu: AVX-512, AVX2 or portable vectors, chosen when they run."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent.parent / "libsmoothie_kernels_cpu.so"
TIER_VARIABLE = "SMOOTHIE_KERNELS_CPU_TIER"  # "avx512", "avx2", "scalar"; empty for the best that runs here
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return "it takes CPU tensors"
    if dtype not in DTYPES:
        return "it takes float32, bfloat16 and float16"
    if not LIBRARY.exists():
        return "it was not built: install a C++ compiler and torch >= 2.10, then install smoothie-kernels again"
    if tier() and tier() not in tiers():
        return f"{TIER_VARIABLE}={tier()} is not one of the tiers of this processor: {', '.join(tiers())}"
    return None


@cache
def _ops() -> Any:
    torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    return torch.ops.smoothie_kernels_cpu


def tier() -> str:
    return os.environ.get(TIER_VARIABLE, "")


def tiers() -> list[str]:
    """What this processor runs, best first."""
    return str(_ops().supported_tiers()).split()


def column_bias(embeddings: Tensor) -> Tensor:
    bias = torch.empty(embeddings.shape[0])
    _ops().column_bias(embeddings, tier(), bias)
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
    smoothed, lse = torch.empty_like(x), torch.empty(x.shape[0])
    tokens, noisy_tokens = (torch.empty(x.shape[0], dtype=torch.int64) for _ in range(2))
    if std is not None and not std.any():
        std = None
    _ops().step_fwd(
        x, embeddings, bias, mu, std, row_ids, row_offset, int(seed), int(offset), sigma_min, tier(),
        smoothed, tokens, noisy_tokens, lse,
    )  # fmt: skip
    return smoothed, tokens, noisy_tokens, lse


def nearest_fwd(x: Tensor, embeddings: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    tokens, distance = torch.empty(x.shape[0], dtype=torch.int64), torch.empty(x.shape[0])
    _ops().nearest_fwd(x, embeddings, bias, tier(), tokens, distance)
    return tokens, distance


def gaussian(out: Tensor, row_ids: Tensor | None, row_offset: int, seed: Tensor, offset: Tensor) -> Tensor:
    _ops().gaussian(row_ids, row_offset, int(seed), int(offset), tier(), out)
    return out

"""Launches the compiled CPU kernels, csrc/cpu: AVX-512, AVX2 or portable vectors, chosen when they run."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smoothie_kernels.backends import Gradients, Grads, Saved, StepOutputs, Wanted, nearest_alone
from smoothie_kernels.backends.shared_library import why_not
from smoothie_kernels.stream import Request

LIBRARY = Path(__file__).parent.parent / "libsmoothie_kernels_cpu.so"
BUILD = "install a C++ compiler and torch >= 2.10, then install smoothie-kernels again"
TIER_VARIABLE = "SMOOTHIE_KERNELS_CPU_TIER"  # one of TIERS; empty for the best that runs here
TIERS = ("scalar", "avx2", "avx512")  # in the order of csrc/cpu/tiers.cpp
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(device_type: str, dtype: torch.dtype | None) -> str | None:
    if device_type != "cpu":
        return "it takes CPU tensors"
    if dtype and dtype not in DTYPES:
        return "it takes float32, bfloat16 and float16"
    if reason := why_not(LIBRARY, BUILD):
        return reason
    return _no_tier() if tier() and tier() not in tiers() else None


def _no_tier() -> str:
    return f"{TIER_VARIABLE}={tier()} is not one of the tiers of this processor: {', '.join(tiers())}"


def lacks(request: Request) -> str | None:
    return None


@cache
def _ops() -> Any:
    if reason := why_not(LIBRARY, BUILD):
        raise RuntimeError(reason)
    return torch.ops.smoothie_kernels_cpu


def tier() -> str:
    return os.environ.get(TIER_VARIABLE, "")


def tiers() -> list[str]:
    """What this processor runs, best first."""
    supported = _ops().supported_tiers()
    return [name for i, name in reversed([*enumerate(TIERS)]) if supported >> i & 1]


def _tier() -> int:
    """As the compiled operators take it: its index in TIERS, -1 for the best."""
    name = tier()
    if not name:
        return -1
    if name not in tiers():  # set after "auto" had chosen this backend
        raise RuntimeError(_no_tier())
    return TIERS.index(name)


def column_bias(embeddings: Tensor) -> Tensor:
    bias = embeddings.new_empty(embeddings.shape[0], dtype=torch.float32)
    _ops().column_bias(embeddings, _tier(), bias)
    return bias


def step_fwd(inputs: Request) -> StepOutputs:
    if not inputs.logits:
        return _nearest(inputs)
    x, (n, k) = inputs.x, (len(inputs.x), inputs.topk)
    tokens, noisy_tokens = (x.new_empty(n, dtype=torch.int64) for _ in range(2))
    lse, best_score, log_sum = (x.new_empty(n, dtype=torch.float32) for _ in range(3))
    smoothed = torch.empty_like(x, dtype=inputs.result_dtype(x)) if inputs.mean else None
    top = x.new_empty(n, k, dtype=torch.float32), x.new_empty(n, k, dtype=torch.int64)
    rest = (tokens, noisy_tokens, lse, best_score, log_sum, *top)
    _ops().step_fwd(*_arguments(inputs), smoothed, *rest)
    return StepOutputs(x.new_empty(n, 0) if smoothed is None else smoothed, *rest)


def _nearest(inputs: Request) -> StepOutputs:
    x = inputs.x
    tokens, distance = x.new_empty(len(x), dtype=torch.int64), x.new_empty(len(x), dtype=torch.float32)
    _ops().nearest_fwd(x, inputs.embeddings, inputs.bias, inputs.col, _tier(), tokens, distance)
    return nearest_alone(tokens, distance)


def step_bwd(inputs: Request, saved: Saved, grads: Grads, wanted: Wanted) -> Gradients:
    x, table = inputs.x, inputs.embeddings
    grad_x = torch.empty_like(x, dtype=inputs.result_dtype(x)) if wanted.x else None
    of_tokens = Gradients(
        embeddings=table.new_empty(table.shape, dtype=torch.float32) if wanted.embeddings else None,
        bias=table.new_empty(len(table), dtype=torch.float32) if wanted.bias else None,
        values=table.new_empty(table.shape, dtype=torch.float32) if wanted.values else None,
    )
    if inputs.std is not None and not inputs.std.any():
        inputs = inputs._replace(std=None)
    _ops().step_bwd(*_arguments(inputs), *saved, *grads, grad_x, *of_tokens[1:])
    rounded = inputs.result_dtype(table)
    embeddings, values = (g if g is None else g.to(rounded) for g in (of_tokens.embeddings, of_tokens.values))
    return Gradients(grad_x, embeddings, of_tokens.bias, values)


def _arguments(inputs: Request) -> tuple[object, ...]:
    """As the compiled operators take them."""
    return (
        inputs.x, inputs.embeddings, inputs.bias, inputs.scale, inputs.std, inputs.row_ids, inputs.row_offset,
        int(inputs.seed), inputs.offset.cpu(), inputs.field_weights, inputs.bound, inputs.col, inputs.values, _tier(),
    )  # fmt: skip


def average(weights: Tensor, tokens: Tensor, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    out = embeddings.new_empty(len(tokens), embeddings.shape[1], dtype=dtype)
    _ops().average(weights, tokens, embeddings, _tier(), out)
    return out


def gaussian(out: Tensor, row_ids: Tensor | None, row_offset: int, seed: Tensor, offset: Tensor) -> Tensor:
    _ops().gaussian(row_ids, row_offset, int(seed), int(offset), _tier(), out)
    return out

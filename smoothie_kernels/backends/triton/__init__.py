"""Launches the Triton kernels: NVIDIA and AMD GPUs, or any machine through Triton's interpreter.

Triton is imported with the first call that could run on it. The kernels' module is not called step_fwd: importing it
would replace the function of that name below.
"""

import importlib
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from smoothie_kernels.backends import Gradients, Grads, Saved, StepOutputs, Wanted
from smoothie_kernels.backends.blocks import column_bias
from smoothie_kernels.stream import Request

__all__ = ["average", "column_bias", "gaussian", "lacks", "step_bwd", "step_fwd", "supports"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # bfloat16 products, and the shared memory of the tiles


def supports(device_type: str, dtype: torch.dtype | None) -> str | None:
    if device_type != "cuda" and not (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return "it takes CUDA or HIP tensors (CPU tensors only through TRITON_INTERPRET=1)"
    if dtype and dtype not in DTYPES:
        return "it takes float32, bfloat16 and float16"
    try:
        forward = _forward()
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return f"triton is not installed ({error})" if missing else f"triton cannot be imported ({error})"
    if forward.MIXED or (device_type == "cpu" and not forward.INTERPRETED):
        return "TRITON_INTERPRET was set after triton had been imported: set it before"
    if not forward.INTERPRETED and torch.version.hip is None:
        return _why_no_gpu()
    return None


def lacks(request: Request) -> str | None:
    return None


def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return "it takes GPUs of compute capability 8.0 or newer, this one has {}.{}".format(*capability)
    return None


@cache
def _forward() -> ModuleType:
    return importlib.import_module("smoothie_kernels.backends.triton.forward")


@cache
def _topk() -> ModuleType:
    return importlib.import_module("smoothie_kernels.backends.triton.topk")


@cache
def _chunked() -> ModuleType:
    return importlib.import_module("smoothie_kernels.backends.triton.chunked")


def step_fwd(inputs: Request) -> StepOutputs:
    outputs: StepOutputs = _topk().step_fwd(inputs)
    return outputs


def step_bwd(inputs: Request, saved: Saved, grads: Grads, wanted: Wanted) -> Gradients:
    gradients: Gradients = _chunked().step_bwd(inputs, saved, grads, wanted)
    return gradients


def average(weights: Tensor, tokens: Tensor, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    mean: Tensor = _topk().average(weights, tokens, embeddings, dtype)
    return mean


def gaussian(out: Tensor, row_ids: Tensor | None, row_offset: int, seed: Tensor, offset: Tensor) -> Tensor:
    field: Tensor = _forward().gaussian(out, row_ids, row_offset, seed, offset)
    return field

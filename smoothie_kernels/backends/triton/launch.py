"""What every launcher of Triton kernels needs."""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothie_kernels.backends.triton.parts import load_tile
from smoothie_kernels.stream import Request

# Triton decides where it decorates a function: for its own when it is imported, for ours when this module is.
INTERPRETED = not isinstance(load_tile, triton.JITFunction)
MIXED = isinstance(tl.max, triton.JITFunction) == INTERPRETED

OPTIONS = {"enable_fp_fusion": True}  # Triton 3.10 leaves it out where nobody asks

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def device_of(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device."""
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]


class Gpu(NamedTuple):
    family: str  # of tiles.FAMILIES
    processors: int  # programs of a large tile that run at the same time


@cache
def gpu(device: torch.device) -> Gpu:
    """Call it as launch.gpu, so that offline.py can replace it."""
    if INTERPRETED:
        return Gpu("sm_90", 1)
    processors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    if torch.version.hip is not None:
        return Gpu("gfx942", processors)
    major, _ = torch.cuda.get_device_capability(device)
    return Gpu({9: "sm_90", 10: "sm_100"}.get(major, "sm_80"), processors)


def dot_type(x: Tensor, embeddings: Tensor) -> torch.dtype:
    """What the products read. Triton's interpreter would multiply the bits of bfloat16 as integers."""
    same = x.dtype == embeddings.dtype and not (INTERPRETED and x.dtype == torch.bfloat16)
    return x.dtype if same else torch.float32


def product_types(x: Tensor, embeddings: Tensor) -> dict[str, Any]:
    """DOT and PRECISION of a kernel with products.

    NVIDIA multiplies fp32 numbers as three products of tf32 parts on the tensor cores. Each operand is split into two
    numbers of 11 bits; only the product of the two low parts is left out: 2^-22 relative, where fp32 rounds by 2^-24.
    """
    dot = dot_type(x, embeddings)
    split = dot == torch.float32 and not INTERPRETED and gpu(x.device).family.startswith("sm")
    return {"DOT": _TYPES[dot], "PRECISION": "tf32x3" if split else "ieee"}


def stored_type(dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes where the caller wants dtype: Triton's interpreter rounds to bfloat16 toward zero."""
    return torch.float32 if INTERPRETED else dtype


def noise_arguments(inputs: Request) -> dict[str, Any]:
    """What kernels need for the noise besides std and row ids."""
    return dict(
        seed_ptr=inputs.seed, offsets_ptr=inputs.offset, field_weights_ptr=inputs.field_weights, F=len(inputs.offset)
    )


def values_arguments(inputs: Request, needed: bool, tokens: slice = slice(None)) -> dict[str, Any]:
    """The table that the mean is of, None where it is that of the scores: its tile is then loaded once for both."""
    values, table = inputs.values, inputs.embeddings
    if not needed or values is None or values is table or _same_memory(values, table):
        return dict(values_ptr=None, stride_vv=None)
    return dict(values_ptr=values[tokens], stride_vv=values.stride(0))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    address = a.data_ptr()  # 0 without memory
    return address != 0 and address == b.data_ptr() and a.stride() == b.stride()


def signed(row_offset: int) -> int:
    """The same number mod 2^32 in an int32, so that one compiled kernel takes every offset."""
    return (row_offset + 2**31) % 2**32 - 2**31

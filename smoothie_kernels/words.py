"""64-bit integers as tensors: seeds and offsets."""

import torch
from torch import Tensor
from torch.library import custom_op


def word(bits: int) -> Tensor:
    """[] int64 on the host, in two's complement from 2**63 on."""
    if torch.compiler.is_compiling():  # a compiled graph takes a number that varies for 64 bits with a sign
        halves: Tensor = _of_halves(bits >> 32, bits & 0xFFFFFFFF)
        return halves
    return torch.full((), bits if bits < 2**63 else bits - 2**64, dtype=torch.int64, device="cpu")


@custom_op("smoothie_kernels::word", mutates_args=())
def _of_halves(high: int, low: int) -> Tensor:
    return torch.full((), ((high + 2**31) % 2**32 - 2**31) * 2**32 + low, dtype=torch.int64, device="cpu")


@_of_halves.register_fake
def _(high: int, low: int) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")

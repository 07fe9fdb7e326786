"""Which tile a call gets: one table, by type and width. N never decides: a row's bits do not depend on its batch."""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    n: int  # rows of a program
    v: int  # tokens at a time
    k: int  # columns at a time of the first product
    d: int  # columns of the result of a program; wider tables take several programs, each with scores and noise anew
    warps: int
    stages: int


# (bytes of a number, widest table) -> tile. No tile has been timed: they are the ones that compile without spilling on
# sm_90 (numbers below: registers, shared memory there, with noise, Triton 3.9; test_triton.py compiles them again) and
# within the 99 KiB of shared memory that all NVIDIA GPUs from sm_80 on have.
TILES = (
    # k = d: the table's tile is loaded once, for both products.
    (2, 64, Tile(128, 64, 64, 64, 8, 2)),  # 184, 32 KiB
    (2, 128, Tile(128, 32, 128, 128, 8, 2)),  # 189, 48 KiB; v = 64 spills on sm_80
    (2, 256, Tile(64, 32, 256, 256, 8, 2)),  # 217, 72 KiB; n = 128 spills on sm_80, v = 64 on sm_90
    # x at full width beside 512 columns of the result spills, so both products load their part of the table.
    (2, 2**31, Tile(64, 32, 64, 512, 8, 2)),  # 245, 56 KiB; spills up to 136 bytes a thread on sm_80
    # Exact fp32 products run outside the tensor cores and hold whole rows of k and v in registers: 16 at a time.
    (4, 128, Tile(64, 16, 16, 128, 8, 2)),  # 239, 16 KiB; v = 32 spills 500 bytes
    (4, 256, Tile(32, 16, 16, 256, 8, 2)),  # 250, 16 KiB
    (4, 2**31, Tile(16, 16, 16, 512, 8, 2)),  # 250, 32 KiB; n = 32 or v = 32 spills 700 bytes
)


def pick_tile(dtype: torch.dtype, width: int) -> Tile:
    """dtype: of the products."""
    return next(tile for size, widest, tile in TILES if size == dtype.itemsize and width <= widest)

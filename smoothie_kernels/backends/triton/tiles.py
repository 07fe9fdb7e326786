"""Which tile a call gets, and in how many parts it takes the vocabulary: tables, by kind, GPU, type and width.

No tile has been timed on a GPU yet. Each is one that compiles for its family without spilling at D = 384 and 768, with
Triton 3.6 and 3.9, and within its shared memory. Behind a tile: registers of a thread and KiB of shared memory there,
the most of all widths tried, with noise, Triton 3.9; then what is wrong with its neighbour (bytes of a thread in
memory). `make kernels-check` compiles them again.

Nothing is tuned when a kernel runs: a tuner that finds another tile today would give other bits than yesterday. Between
calls of one shape on one kind of GPU the bits are the same. Between shapes a row may differ in the rounding of its
sums, because few rows take other tiles, and the vocabulary in as many parts as keep all processors busy.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    n: int  # rows of a program
    v: int  # tokens at a time
    k: int  # columns at a time of the first product
    d: int  # columns of the result of a program; wider tables take several programs, each with scores and noise anew
    warps: int
    stages: int


Rows = tuple[tuple[int, int, Tile], ...]  # (bytes of a number, widest table, tile)
ANY = 2**31

# A family is named by its first GPU. sm_80 stands for all with 99 KiB of shared memory for a program, also sm_120.
FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942")

# Up to here a call is bound by reading the table, not by its products.
FEW_ROWS = 32

# Where k = d and D is no wider, the table's tile is loaded once, for both products. fp32 on NVIDIA: tf32x3.
_MEAN: dict[str, Rows] = {
    "sm_80": (
        (2, 64, Tile(128, 64, 64, 64, 8, 3)),  # 180, 32 KiB
        (2, 128, Tile(128, 32, 128, 128, 8, 3)),  # 250, 64 KiB
        (2, 256, Tile(64, 32, 256, 256, 8, 3)),  # 255, 72 KiB
        (2, ANY, Tile(32, 64, 64, 512, 8, 3)),  # 252, 64 KiB; n = 64 spills 408
        (4, 128, Tile(64, 16, 32, 128, 8, 3)),  # 223, 20 KiB; v = 32 spills 16
        (4, ANY, Tile(32, 16, 32, 256, 8, 3)),  # 228, 16 KiB; v = 32 spills 16
    ),
    "sm_90": (
        (2, 64, Tile(128, 64, 64, 64, 8, 3)),  # 182, 40 KiB; v = 128 spills 8 with Triton 3.6
        (2, 128, Tile(128, 64, 128, 128, 8, 3)),  # 211, 80 KiB
        (2, 256, Tile(128, 32, 256, 256, 8, 3)),  # 220, 128 KiB; v = 64 spills 32
        (2, ANY, Tile(64, 64, 64, 512, 8, 2)),  # 248, 128 KiB; k = 128 spills 8 with Triton 3.6, k = 512 spills 504
        (4, ANY, Tile(128, 32, 32, 128, 8, 2)),  # 255, 64 KiB; d = 256 spills 64, with n = 64
    ),
    "sm_100": (
        (2, 64, Tile(128, 32, 64, 64, 8, 3)),  # 182, 33 KiB; v = 64 spills 32
        (2, 128, Tile(128, 32, 128, 128, 8, 3)),  # 220, 65 KiB; v = 64 spills 216
        (2, 256, Tile(64, 32, 256, 256, 8, 3)),  # 210, 97 KiB; n = 128 spills 184
        (2, ANY, Tile(64, 64, 64, 512, 8, 2)),  # 243, 96 KiB; k = 128 spills 24
        (4, ANY, Tile(128, 32, 32, 128, 8, 2)),  # 236, 32 KiB
    ),
    "gfx942": (
        (2, 64, Tile(128, 32, 64, 64, 8, 2)),  # 184, 20 KiB; v = 64 spills 68
        (2, 128, Tile(128, 32, 64, 128, 8, 2)),  # 208, 20 KiB
        (2, 256, Tile(64, 64, 64, 256, 8, 2)),  # 221, 32 KiB; k = 256 spills 508, with v = 32
        (2, ANY, Tile(32, 32, 64, 512, 8, 2)),  # 188, 32 KiB; n = 64 spills 8, v = 64 spills 116
        (4, 128, Tile(64, 32, 32, 128, 8, 2)),  # 161, 16 KiB
        (4, ANY, Tile(64, 32, 32, 256, 8, 2)),  # 248, 32 KiB
    ),
}

# The table's tile at full width, with the next on its way. Columns beyond D are masked: they cost no reading. With one
# part of the vocabulary for every processor, the sums of the parts are small beside the table.
_MEAN_FEW_ROWS: dict[str, Rows] = {
    "sm_80": (
        (2, 128, Tile(16, 128, 128, 128, 4, 3)),  # 168, 72 KiB
        (2, 256, Tile(16, 64, 256, 256, 4, 3)),  # 128, 74 KiB
        (2, 512, Tile(16, 32, 512, 512, 4, 3)),  # 148, 81 KiB; 8 warps spill 24
        (2, 1024, Tile(16, 16, 1024, 1024, 8, 3)),  # 178, 97 KiB; v = 32 leaves no room for the next tile
        (2, ANY, Tile(16, 32, 128, 512, 8, 3)),  # 168, 32 KiB
        (4, ANY, Tile(16, 16, 32, 512, 8, 3)),  # 240, 32 KiB; v = 32 spills 40 with Triton 3.6, k = 512 spills 8,900
    ),
    "sm_90": (
        (2, 128, Tile(16, 128, 128, 128, 4, 3)),  # 174, 72 KiB
        (2, 256, Tile(16, 64, 256, 256, 4, 3)),  # 149, 74 KiB
        (2, 512, Tile(16, 64, 512, 512, 8, 3)),  # 106, 146 KiB
        (2, 1024, Tile(16, 32, 1024, 1024, 8, 3)),  # 208, 162 KiB; n = 32 spills 120
        (2, ANY, Tile(16, 32, 128, 512, 8, 3)),  # 170, 32 KiB
        (4, ANY, Tile(16, 16, 32, 512, 8, 3)),  # 230, 32 KiB; v = 32 spills 24 with Triton 3.6
    ),
    "gfx942": (
        (2, 128, Tile(16, 64, 64, 128, 4, 2)),  # 230, 28 KiB; the next row takes 74 KiB there
        (2, 512, Tile(16, 32, 64, 512, 8, 3)),  # 154, 32 KiB; k = 512 spills 792, so the table is loaded twice
        (2, ANY, Tile(16, 32, 64, 1024, 8, 2)),  # 178, 64 KiB; k = 1,024 spills 2,676
        (4, ANY, Tile(16, 32, 32, 512, 8, 2)),  # 170, 64 KiB
    ),
}
_MEAN_FEW_ROWS["sm_100"] = _MEAN_FEW_ROWS["sm_90"]

# Without the second product; k = d.
_STATISTICS: dict[str, Rows] = {
    "sm_80": (
        (2, ANY, Tile(128, 64, 64, 64, 8, 3)),  # 191, 48 KiB; v = 128 spills 40
        (4, ANY, Tile(64, 64, 32, 32, 8, 3)),  # 255, 32 KiB
    ),
    "sm_90": (
        (2, ANY, Tile(128, 64, 64, 64, 8, 3)),  # 189, 72 KiB; v = 128 spills 64
        (4, ANY, Tile(64, 64, 32, 32, 8, 3)),  # 150, 48 KiB
    ),
    "sm_100": (
        (2, ANY, Tile(128, 64, 64, 64, 8, 3)),  # 216, 72 KiB; v = 128 spills 304
        (4, ANY, Tile(64, 64, 32, 32, 8, 3)),  # 113, 48 KiB
    ),
    "gfx942": (
        (2, ANY, Tile(128, 128, 64, 64, 8, 2)),  # 256, 32 KiB
        (4, ANY, Tile(64, 64, 32, 32, 8, 2)),  # 128, 16 KiB
    ),
}

_STATISTICS_FEW_ROWS: dict[str, Rows] = {
    "sm_80": (
        (2, ANY, Tile(16, 128, 128, 128, 4, 3)),  # 202, 72 KiB
        (4, ANY, Tile(16, 64, 64, 64, 4, 3)),  # 219, 40 KiB; v = 128 spills 104 on sm_90
    ),
    "gfx942": (
        (2, ANY, Tile(16, 128, 64, 64, 4, 2)),  # 122, 18 KiB
        (4, ANY, Tile(16, 64, 64, 64, 4, 3)),  # 118, 40 KiB
    ),
}
_STATISTICS_FEW_ROWS["sm_90"] = _STATISTICS_FEW_ROWS["sm_100"] = _STATISTICS_FEW_ROWS["sm_80"]

# With the largest logits and their tokens of every place of a tile in registers: 1, 2 or 4. v divides recall.STEP, so
# that the places of a few tiles are the buckets.
_KEEP: dict[int, dict[str, Rows]] = {
    1: {
        "sm_80": (
            (2, ANY, Tile(128, 64, 64, 64, 8, 3)),  # 255, 48 KiB
            (4, ANY, Tile(64, 64, 32, 32, 8, 3)),  # 255, 32 KiB
        ),
        "sm_90": (
            (2, ANY, Tile(128, 64, 64, 64, 8, 3)),  # 254, 72 KiB
            (4, ANY, Tile(64, 64, 32, 32, 8, 3)),  # 192, 48 KiB
        ),
        "sm_100": (
            (2, ANY, Tile(128, 64, 64, 64, 8, 3)),  # 254, 72 KiB
            (4, ANY, Tile(64, 64, 32, 32, 8, 3)),  # 175, 48 KiB
        ),
        "gfx942": (
            (2, ANY, Tile(128, 64, 64, 64, 8, 2)),  # 194, 24 KiB
            (4, ANY, Tile(64, 64, 32, 32, 8, 2)),  # 186, 16 KiB
        ),
    },
    2: {
        "sm_80": (
            (2, ANY, Tile(64, 64, 64, 64, 8, 3)),  # 252, 32 KiB; n = 128 spills 72
            (4, ANY, Tile(32, 64, 32, 32, 8, 3)),  # 181, 24 KiB; n = 64 spills 168
        ),
        "sm_90": (
            (2, ANY, Tile(64, 64, 64, 64, 8, 3)),  # 205, 48 KiB; n = 128 spills 176
            (4, ANY, Tile(64, 64, 32, 32, 8, 3)),  # 212, 48 KiB
        ),
        "sm_100": (
            (2, ANY, Tile(64, 64, 64, 64, 8, 3)),  # 214, 48 KiB; n = 128 spills 344
            (4, ANY, Tile(64, 64, 32, 32, 8, 3)),  # 225, 48 KiB
        ),
        "gfx942": (
            (2, ANY, Tile(128, 64, 64, 64, 8, 2)),  # 220, 24 KiB
            (4, ANY, Tile(64, 64, 32, 32, 8, 2)),  # 216, 16 KiB
        ),
    },
    4: {
        "sm_80": (
            (2, ANY, Tile(64, 64, 64, 64, 8, 3)),  # 255, 32 KiB; n = 128 spills 1,632
            (4, ANY, Tile(32, 64, 32, 32, 8, 3)),  # 211, 24 KiB; n = 64 spills 912
        ),
        "sm_90": (
            (2, ANY, Tile(64, 32, 64, 64, 8, 3)),  # 178, 36 KiB; v = 64 spills 24
            (4, ANY, Tile(64, 32, 32, 32, 8, 3)),  # 194, 32 KiB; v = 64 spills 16
        ),
        "sm_100": (
            (2, ANY, Tile(64, 64, 64, 64, 8, 3)),  # 255, 48 KiB; n = 128 spills 976
            (4, ANY, Tile(64, 64, 32, 32, 8, 3)),  # 255, 48 KiB
        ),
        "gfx942": (
            (2, ANY, Tile(64, 64, 64, 64, 4, 2)),  # 286, 16 KiB; 8 warps spill 104
            (4, ANY, Tile(64, 32, 32, 32, 4, 2)),  # 294, 12 KiB; 8 warps spill 80, with 3 stages
        ),
    },
}

_KEEP_FEW_ROWS: dict[int, dict[str, Rows]] = {
    1: {
        "sm_80": (
            (2, ANY, Tile(16, 128, 128, 128, 8, 3)),  # 182, 72 KiB; 4 warps spill 16 on sm_90
            (4, ANY, Tile(16, 64, 64, 64, 4, 3)),  # 252, 40 KiB
        ),
        "gfx942": (
            (2, ANY, Tile(16, 128, 64, 64, 4, 3)),  # 144, 36 KiB
            (4, ANY, Tile(16, 64, 64, 64, 4, 3)),  # 126, 40 KiB
        ),
    },
    4: {
        "sm_80": (
            (2, ANY, Tile(16, 128, 64, 64, 8, 3)),  # 174, 36 KiB; 4 warps spill 8 on sm_90
            (4, ANY, Tile(16, 64, 32, 32, 4, 3)),  # 213, 20 KiB; k = 64 spills 16 on sm_90
        ),
        "gfx942": (
            (2, ANY, Tile(16, 128, 64, 64, 4, 3)),  # 178, 36 KiB
            (4, ANY, Tile(16, 64, 32, 32, 4, 3)),  # 124, 20 KiB
        ),
    },
}
_KEEP_FEW_ROWS[2] = _KEEP_FEW_ROWS[1]
for _of in _KEEP_FEW_ROWS.values():
    _of["sm_90"] = _of["sm_100"] = _of["sm_80"]

TILES = {
    "mean": _MEAN,
    "mean, few rows": _MEAN_FEW_ROWS,
    "statistics": _STATISTICS,
    "statistics, few rows": _STATISTICS_FEW_ROWS,
    **{f"statistics, keep {keep}": of for keep, of in _KEEP.items()},
    **{f"statistics, keep {keep}, few rows": of for keep, of in _KEEP_FEW_ROWS.items()},
}


def pick_tile(kind: str, family: str, dtype: torch.dtype, width: int) -> Tile:
    """kind and family: of TILES; dtype: of the products."""
    return next(tile for size, widest, tile in TILES[kind][family] if size == dtype.itemsize and width <= widest)


def pick_bucket_splits(n: int, v: int, buckets: int, tile: Tile, processors: int) -> int:
    """Parts whose tiles' places are the buckets, or shares of a bucket each where so few parts would leave processors
    idle: finer buckets keep all that coarser ones do, and more."""
    least = buckets // tile.v
    blocks = -(-n // tile.n)
    finer = min(processors // (blocks * least), -(-v // tile.v) // least)
    return least * max(1, finer)


def pick_splits(n: int, v: int, column_blocks: int, tile: Tile, processors: int) -> int:
    """Parts of the vocabulary: as many as keep all processors busy, each of whole tiles and none of them empty."""
    blocks = -(-n // tile.n) * column_blocks
    tiles = -(-v // tile.v)
    each = -(-tiles // max(1, processors // blocks))
    return -(-tiles // each)

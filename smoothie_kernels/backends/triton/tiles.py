"""Which tile a call gets, and in how many parts it takes the vocabulary: tables, by kind, GPU, type and width.

No tile has been timed on a GPU yet. Each is one that compiles for its family without spilling at D = 384 and 768, with
Triton 3.6 and 3.9, and within its shared memory: `make kernels-check` compiles them again, and prints registers and
shared memory. Behind a tile: what is wrong with its neighbour, in bytes that a thread spills.

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
        (2, 64, Tile(128, 64, 64, 64, 8, 3)),
        (2, 128, Tile(128, 32, 128, 128, 8, 3)),
        (2, 256, Tile(64, 32, 256, 256, 8, 3)),
        (2, ANY, Tile(32, 64, 64, 512, 8, 3)),  # n = 64 spills 370 and more
        (4, 128, Tile(64, 16, 32, 128, 8, 3)),
        (4, ANY, Tile(32, 16, 32, 256, 8, 3)),  # v = 32 spills 16
    ),
    "sm_90": (
        (2, 64, Tile(128, 64, 64, 64, 8, 3)),  # v = 128 spills 16
        (2, 128, Tile(128, 64, 128, 128, 8, 3)),
        (2, 256, Tile(128, 32, 256, 256, 8, 3)),  # v = 64 spills 40
        (2, ANY, Tile(64, 64, 64, 512, 8, 2)),  # k = 512 spills 500
        (4, 256, Tile(128, 32, 32, 128, 8, 2)),
        (4, ANY, Tile(128, 16, 32, 128, 8, 2)),  # v = 32 spills 8 with Triton 3.6, d = 256 with n = 64 up to 170
    ),
    "sm_100": (
        (2, 64, Tile(128, 32, 64, 64, 8, 3)),  # v = 64 spills 32
        (2, 128, Tile(128, 32, 128, 128, 8, 3)),  # v = 64 spills 190
        (2, 256, Tile(64, 32, 256, 256, 8, 3)),  # n = 128 spills 160
        (2, ANY, Tile(64, 64, 64, 512, 8, 2)),
        (4, ANY, Tile(128, 32, 32, 128, 8, 2)),
    ),
    "gfx942": (
        (2, 64, Tile(128, 32, 64, 64, 8, 2)),  # v = 64 spills 40
        (2, 128, Tile(128, 32, 64, 128, 8, 2)),
        (2, 256, Tile(64, 64, 64, 256, 8, 2)),
        (2, ANY, Tile(32, 32, 64, 512, 8, 2)),
        (4, 128, Tile(64, 32, 32, 128, 8, 2)),
        (4, ANY, Tile(64, 32, 32, 256, 8, 2)),
    ),
}

# The table's tile at full width, with the next on its way. Columns beyond D are masked: they cost no reading. With one
# part of the vocabulary for every processor, the sums of the parts are small beside the table.
_MEAN_FEW_ROWS: dict[str, Rows] = {
    "sm_80": (
        (2, 128, Tile(16, 128, 128, 128, 4, 3)),
        (2, 256, Tile(16, 64, 256, 256, 4, 3)),
        (2, 512, Tile(16, 32, 512, 512, 4, 3)),
        (2, 1024, Tile(16, 16, 1024, 1024, 8, 3)),  # v = 32 leaves no room for the next tile
        (2, ANY, Tile(16, 32, 128, 512, 8, 3)),
        (4, ANY, Tile(16, 16, 32, 512, 8, 3)),  # v = 32 spills 48 with Triton 3.6, k = 512 spills 8,600
    ),
    "sm_90": (
        (2, 128, Tile(16, 128, 128, 128, 4, 3)),
        (2, 256, Tile(16, 64, 256, 256, 4, 3)),
        (2, 512, Tile(16, 64, 512, 512, 8, 3)),
        (2, 1024, Tile(16, 32, 1024, 1024, 8, 3)),  # n = 32 spills 96
        (2, ANY, Tile(16, 32, 128, 512, 8, 3)),
        (4, ANY, Tile(16, 16, 32, 512, 8, 3)),  # v = 32 spills 24 with Triton 3.6
    ),
    "gfx942": (
        (2, 128, Tile(16, 64, 64, 128, 4, 2)),
        (2, 512, Tile(16, 32, 64, 512, 8, 3)),  # k = 512 takes 66 KiB, so the table is loaded twice
        (2, ANY, Tile(16, 32, 64, 1024, 8, 2)),  # k = 1,024 spills 690
        (4, ANY, Tile(16, 32, 32, 512, 8, 2)),
    ),
}
_MEAN_FEW_ROWS["sm_100"] = _MEAN_FEW_ROWS["sm_90"]

# Without the second product; k = d.
_STATISTICS: dict[str, Rows] = {
    "sm_80": (
        (2, ANY, Tile(128, 64, 64, 64, 8, 3)),  # v = 128 spills 24
        (4, ANY, Tile(64, 64, 32, 32, 8, 3)),
    ),
    "sm_90": (
        (2, ANY, Tile(128, 64, 64, 64, 8, 3)),  # v = 128 spills 80
        (4, ANY, Tile(64, 64, 32, 32, 8, 3)),
    ),
    "sm_100": (
        (2, ANY, Tile(128, 64, 64, 64, 8, 3)),
        (4, ANY, Tile(64, 64, 32, 32, 8, 3)),
    ),
    "gfx942": (
        (2, ANY, Tile(128, 128, 64, 64, 8, 2)),
        (4, ANY, Tile(64, 64, 32, 32, 8, 2)),
    ),
}

_STATISTICS_FEW_ROWS: dict[str, Rows] = {
    "sm_80": (
        (2, ANY, Tile(16, 128, 128, 128, 4, 3)),
        (4, ANY, Tile(16, 64, 64, 64, 4, 3)),  # v = 128 spills 32 on sm_90
    ),
    "gfx942": (
        (2, ANY, Tile(16, 128, 64, 64, 4, 2)),
        (4, ANY, Tile(16, 64, 64, 64, 4, 3)),
    ),
}
_STATISTICS_FEW_ROWS["sm_90"] = _STATISTICS_FEW_ROWS["sm_100"] = _STATISTICS_FEW_ROWS["sm_80"]

# With the largest logits and their tokens of every place of a tile in registers: 1, 2 or 4. v divides recall.STEP, so
# that the places of a few tiles are the buckets.
_KEEP: dict[int, dict[str, Rows]] = {
    1: {
        "sm_80": (
            (2, ANY, Tile(128, 64, 64, 64, 8, 3)),
            (4, ANY, Tile(64, 64, 32, 32, 8, 3)),
        ),
        "sm_90": (
            (2, ANY, Tile(128, 64, 64, 64, 8, 3)),
            (4, ANY, Tile(64, 64, 32, 32, 8, 3)),
        ),
        "sm_100": (
            (2, ANY, Tile(128, 64, 64, 64, 8, 3)),
            (4, ANY, Tile(64, 64, 32, 32, 8, 3)),
        ),
        "gfx942": (
            (2, ANY, Tile(128, 64, 64, 64, 8, 2)),
            (4, ANY, Tile(64, 64, 32, 32, 8, 2)),
        ),
    },
    2: {
        "sm_80": (
            (2, ANY, Tile(64, 64, 64, 64, 8, 3)),  # n = 128 spills 32
            (4, ANY, Tile(32, 64, 32, 32, 8, 3)),  # n = 64 spills 170
        ),
        "sm_90": (
            (2, ANY, Tile(64, 64, 64, 64, 8, 3)),  # n = 128 spills 190
            (4, ANY, Tile(64, 64, 32, 32, 8, 3)),
        ),
        "sm_100": (
            (2, ANY, Tile(64, 64, 64, 64, 8, 3)),  # n = 128 spills 260
            (4, ANY, Tile(64, 64, 32, 32, 8, 3)),
        ),
        "gfx942": (
            (2, ANY, Tile(128, 64, 64, 64, 8, 2)),
            (4, ANY, Tile(64, 64, 32, 32, 8, 2)),
        ),
    },
    4: {
        "sm_80": (
            (2, ANY, Tile(64, 64, 64, 64, 8, 3)),  # n = 128 spills 800
            (4, ANY, Tile(32, 64, 32, 32, 8, 3)),  # n = 64 spills 900
        ),
        "sm_90": (
            (2, ANY, Tile(64, 32, 64, 64, 8, 3)),  # v = 64 spills 8 with Triton 3.6
            (4, ANY, Tile(64, 32, 32, 32, 8, 3)),  # v = 64 spills 8
        ),
        "sm_100": (
            (2, ANY, Tile(64, 64, 64, 64, 8, 3)),  # n = 128 spills 1,000
            (4, ANY, Tile(64, 64, 32, 32, 8, 3)),
        ),
        "gfx942": (
            (2, ANY, Tile(64, 64, 64, 64, 4, 2)),  # 8 warps spill 12
            (4, ANY, Tile(64, 32, 32, 32, 4, 2)),  # 8 warps spill 36, with 3 stages
        ),
    },
}

_KEEP_FEW_ROWS: dict[int, dict[str, Rows]] = {
    1: {
        "sm_80": (
            (2, ANY, Tile(16, 128, 128, 128, 8, 3)),
            (4, ANY, Tile(16, 64, 64, 64, 4, 3)),
        ),
        "gfx942": (
            (2, ANY, Tile(16, 128, 64, 64, 4, 3)),
            (4, ANY, Tile(16, 64, 64, 64, 4, 3)),
        ),
    },
    4: {
        "sm_80": (
            (2, ANY, Tile(16, 128, 64, 64, 8, 3)),
            (4, ANY, Tile(16, 64, 32, 32, 4, 3)),
        ),
        "gfx942": (
            (2, ANY, Tile(16, 128, 64, 64, 4, 3)),
            (4, ANY, Tile(16, 64, 32, 32, 4, 3)),
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

"""The noise field, version 1: a pure function of (seed, offset, row id, column). The same in all backends and releases.

    once per field:       (key, row_shift, ., .) = Philox4x32-10(counter = (offset, 0x534D4F4F, 0), key = seed)
    per pair of columns:  (r0, r1) = Philox2x32-10(counter = (column >> 1, row + row_shift), key)
    normals:              sqrt(-2 ln u) * (cos 2 pi v, sin 2 pi v),  u = (r0 + 1/2) / 2**32, v = (r1 + 1/2) / 2**32

32-bit words are kept in int64 tensors here. The C++ twin is csrc/philox.h, the Triton twin backends/triton/parts.py.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from smoothie_kernels import checks, library

ROUNDS = 10
MULTIPLIER = 0xD256D193  # Philox2x32, Random123
KEY_INCREMENT = 0x9E3779B9
MOST_NUMBERS = 2**61  # float32, that a tensor can be asked for at all
MAX_ABS_NORMAL = 6.77  # sqrt(-2 ln 2**-33) = 6.764
_MASK = 0xFFFFFFFF
_DOMAIN = 0x534D4F4F  # "SMOO"


def gaussian(
    rows: int,
    cols: int,
    *,
    seed: int | Tensor,
    offset: int | Sequence[int] | Tensor = 0,
    field_weights: Sequence[float] | Tensor | None = None,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """The standard normals of the field: (rows, cols) float32.

    Element (i, j) is the noise that `fused_smoothie_step` adds to the logit of token j in row i, for the same seed,
    offset and row ids; |value| <= 6.77, or that times the sum of |field_weights|. Any part of the field may be asked
    for: it does not depend on rows and cols.

    Args:
        rows, cols: how much of it.
        seed, offset: 64 bits each; ints or 0-d int64 tensors. Several offsets, F ints or int64 (F,): the sum of fields.
        field_weights: what each counts in it: F finite numbers, or a float tensor (F,). None where offset is one.
        row_offset: row i has the id `row_offset + i`.
        row_ids: int64, shape (rows,): the ids themselves, in [0, 2**32).
        device: where to make it; that of row_ids where they are given.
        backend: "auto", or "reference", "cpu", "triton", "cuda" by name.

    Backends agree in every 32-bit word; their normals lie within 5e-5 (rms 2e-6) of the float64 values (the cuda
    backend's within 1e-3 where both of a pair are below 0.03, one pair in 2,000: approximate logarithms next to 1); of
    a sum of fields, within so much times the sum of |field_weights|.
    """
    checks.check_backend(backend)
    rows, cols = checks.count("rows", rows), checks.count("cols", cols)
    if rows * cols > MOST_NUMBERS:
        raise ValueError(f"cols must be at most {MOST_NUMBERS:,} over rows, got rows={rows} and cols={cols}")
    if device is None:
        device = row_ids.device if isinstance(row_ids, Tensor) else "cpu"
    device = checks.as_device("device", device)
    checks.check_device("device", device)
    shape_of_rows = torch.empty(rows, 0, dtype=torch.float32, device=device)
    ids, row_offset = checks.check_row_ids(row_ids, row_offset, shape_of_rows)
    seed, fields = checks.word("seed", seed), checks.noise_fields(offset, field_weights, shape_of_rows)
    noise: Tensor = library.gaussian(shape_of_rows, cols, ids, seed, *fields, row_offset, backend)
    return noise


def noise_key(seed: int, offset: int) -> tuple[int, int]:
    """(key, row_shift) of a field: Philox4x32-10, once, on the host."""
    words = philox4x32((offset & _MASK, offset >> 32 & _MASK, _DOMAIN, 0), (seed & _MASK, seed >> 32 & _MASK))
    return words[0], words[1]


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & _MASK, p0 >> 32 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + KEY_INCREMENT & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def philox2x32(c0: Tensor, c1: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Two int64 tensors of 32-bit counters, broadcast against each other, to two words each."""
    for i in range(ROUNDS):
        # The product may pass 2**63; int64 wraps, and both halves come out right.
        product = c0 * MULTIPLIER
        c0, c1 = (product >> 32 & _MASK) ^ (key + i * KEY_INCREMENT & _MASK) ^ c1, product & _MASK
    return c0, c1


def words(row_ids: Tensor, first_col: int, cols: int, seed: int, offset: int) -> Tensor:
    """The field's 32-bit words: (rows, cols) int64. Column j has r0 of its pair where j is even, r1 where it is odd."""
    key, row_shift = noise_key(seed, offset)
    first_pair, last_pair = first_col // 2, (first_col + cols + 1) // 2
    pairs = torch.arange(first_pair, last_pair, dtype=torch.int64, device=row_ids.device)
    r0, r1 = philox2x32(pairs[None, :], (row_ids[:, None] + row_shift) & _MASK, key)
    both = torch.stack((r0.expand_as(r1), r1), dim=-1).flatten(1)
    return both[:, first_col - 2 * first_pair :][:, :cols]


def normals(row_ids: Tensor, first_col: int, cols: int, seed: int, offset: int) -> Tensor:
    """Columns [first_col, first_col + cols) of the field for these rows, in float64: the truth."""
    first_pair, last_pair = first_col // 2, (first_col + cols + 1) // 2
    both = words(row_ids, 2 * first_pair, 2 * (last_pair - first_pair), seed, offset)
    uniform = (both.double() + 0.5) * 2.0**-32
    radius, angle = (-2 * uniform[:, 0::2].log()).sqrt(), 2 * math.pi * uniform[:, 1::2]
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    return pairs[:, first_col - 2 * first_pair :][:, :cols]

"""Blocks of rows and tokens, and their products by the library: what backends share."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from smoothie_kernels.stream import Request, sum_dtype

MAX_ROWS = 4096  # of a block: more do not make the products any faster
USEFUL_TOKENS = 1024  # of a block, before it takes more rows
USEFUL_ROWS = 128
ROOM = 2**26  # bytes of a copy in float64


# A row's reference lies so far below the highest logit that there can be, 6.77 std sum_f |weight_f|: no weight is above
# e^15. More would leave room for rows farther away, but a logarithm about that large would be rounded too coarsely for
# lse.
HEADROOM = 15.0
# The best logit of a row, less its reference, for which its weights and their sum are sound in float32 and bfloat16:
# above, a sum over 10^5 tokens comes near 10^38; below, tokens of 10^-11 of the best one's weight begin to vanish. Rows
# very far from all tokens (at std 1, logits below -65), with very loud noise or a negative scale lie outside.
LOWEST, HIGHEST = -60.0, 70.0


class Tile(Protocol):
    @property
    def n(self) -> int: ...  # rows of a program
    @property
    def v(self) -> int: ...  # tokens of a program


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pick_block(
    n: int, v: int, workspace: int, weight_bytes: int, row_bytes: int, tile: Tile, most_rows: int = MAX_ROWS
) -> tuple[int, int]:
    """Rows and tokens of a block, in whole tiles, at least one, in nearly equal blocks: what fits into the workspace.

    Every pair takes weight_bytes, every row row_bytes beside them."""
    all_rows, all_tokens = (cdiv(size, by) * by for size, by in ((n, tile.n), (v, tile.v)))
    useful = min(all_tokens, USEFUL_TOKENS) * weight_bytes + row_bytes
    rows = max(tile.n, min(workspace // useful // tile.n * tile.n, all_rows, most_rows))
    rows = even(all_rows, rows, tile.n)
    tokens = max(tile.v, min((workspace // rows - row_bytes) // weight_bytes // tile.v * tile.v, all_tokens))
    return rows, even(all_tokens, tokens, tile.v)


def even(size: int, most: int, by: int) -> int:
    """The smallest multiple of `by` with which as many blocks cover `size` as with `most`."""
    blocks = -(-size // most)
    return -(-size // (blocks * by)) * by


def rows_of(inputs: Request, rows: slice | Tensor) -> Request:
    """The same call with some of its rows."""
    row_ids, row_offset = inputs.row_ids, inputs.row_offset
    if row_ids is not None:
        row_ids = row_ids[rows]
    elif isinstance(rows, Tensor):
        row_ids = rows + row_offset
    else:
        row_offset += rows.start
    return inputs._replace(
        x=inputs.x[rows],
        scale=inputs.scale[rows],
        std=None if inputs.std is None else inputs.std[rows],
        row_ids=row_ids,
        row_offset=row_offset,
        bound=None if inputs.bound is None else inputs.bound[rows],
    )


def column_bias(embeddings: Tensor) -> Tensor:
    """-||E_j||^2 / 2, [V], summed in float64: next to it the scores of near tokens cancel."""
    v, d = embeddings.shape
    bias = embeddings.new_empty(v, dtype=sum_dtype(embeddings))
    for rows in slices(v, max(1, ROOM // (8 * d))):
        bias[rows] = embeddings[rows].double().square().sum(1) / -2
    return bias


def slices(size: int, block: int) -> Iterator[slice]:
    for first in range(0, size, block):
        yield slice(first, min(first + block, size))


ALIGNED = 8  # terms of a sum in 16 bits: of another number of them cuBLAS takes a kernel at a third of the speed


def add_product(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """acc += a . b, acc float32. On a GPU the library sums products of 16-bit numbers in float32 itself: out_dtype of
    torch.addmm, which takes a float32 sum since torch 2.10, on CUDA and on ROCm. Other types, and the CPU under
    Triton's interpreter, where torch has no out_dtype, multiply float32 copies."""
    if not (a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)):
        acc.addmm_(a.float(), b.float())
        return
    aligned = len(b) // ALIGNED * ALIGNED
    for terms in (slice(0, aligned), slice(aligned, len(b))):
        if terms.start == terms.stop:
            continue
        torch.addmm(acc, a[:, terms], b[terms], out_dtype=torch.float32, out=acc)


# --- what names the noise, on the device


def noise_on_device(inputs: Request) -> Request:
    """The same call; what names its noise stands beside x."""
    device, weights = inputs.x.device, inputs.field_weights
    return inputs._replace(
        seed=on_device(device, inputs.seed),
        offset=on_device(device, inputs.offset),
        field_weights=None if weights is None else on_device(device, weights),
    )


def on_device(device: torch.device, numbers: Tensor) -> Tensor:
    return numbers if numbers.device == device else fill_like(numbers, device)


def fill_like(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy by fills: they can be captured in a CUDA graph."""
    there = torch.empty_like(numbers, device=device)
    for one, number in zip(there.view(-1), numbers.view(-1).tolist(), strict=True):
        one.fill_(number)
    return there

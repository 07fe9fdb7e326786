"""The step, with the largest logits of every row where they are wanted, and means of a few tokens a row.

    mean         forward.mean or chunked.mean                                         as without top-k
    approximate  forward.kept: the largest logits of every bucket of tokens           the pass of the statistics
    exact        chunk_keys_kernel: all logits of some rows and tokens                one product more
    average      _average_kernel: sum_k weights[i, k] embeddings[tokens[i, k]]        reads K rows of the table a row

Keys are parts.sort_key; largest.py says which pass runs, and makes logits and tokens of them.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothie_kernels.backends import Statistics, StepOutputs, nearest_alone
from smoothie_kernels.backends.blocks import noise_on_device
from smoothie_kernels.backends.largest import Passes, largest_kept, largest_of_all, with_largest
from smoothie_kernels.backends.triton import chunked, forward, launch
from smoothie_kernels.backends.triton.chunked import Tile as BlockTile
from smoothie_kernels.backends.triton.chunked import arguments_of, pick_tile
from smoothie_kernels.backends.triton.chunked_kernels import chunk_keys_kernel
from smoothie_kernels.backends.triton.launch import OPTIONS, device_of, stored_type
from smoothie_kernels.backends.triton.parts import load_tile
from smoothie_kernels.backends.triton.tiles import Tile, pick_bucket_splits
from smoothie_kernels.recall import Buckets
from smoothie_kernels.stream import Request

# With keys in place of weights these take up to 255 registers and 128 KiB (64 KiB on gfx942), without spilling.
KEYS = chunked.FORWARD

BLOCK_K, BLOCK_D = 16, 128  # tokens at a time and columns of a program of _average_kernel


def step_fwd(inputs: Request) -> StepOutputs:
    """All but the mean is of one pass, or brought to it. What buckets keep takes registers that a mean has not: with
    both, top-k is a pass of its own, and so one product more."""
    if not inputs.logits:
        return nearest_alone(*forward.nearest_fwd(inputs.x, inputs.embeddings, inputs.bias, col=inputs.col))
    inputs = noise_on_device(inputs)
    smoothed, found = inputs.x.new_empty(len(inputs.x), 0), None
    if inputs.mean:
        smoothed, found = chunked.mean(inputs) if chunked.prefers(inputs) else forward.mean(inputs)
    return with_largest(inputs, smoothed, found, Passes(forward.statistics, approximate, exact))


def approximate(
    inputs: Request, buckets: Buckets, tile: Tile | None = None, splits: int | None = None
) -> tuple[Statistics, Tensor, Tensor]:
    """As largest.Passes has it."""
    x, embeddings = inputs.x, inputs.embeddings
    tile = tile or forward.tile_of(f"statistics, keep {buckets.keep}", x, embeddings)
    splits = splits or pick_bucket_splits(
        len(x), len(embeddings), buckets.buckets, tile, launch.gpu(x.device).processors
    )
    return largest_kept(
        inputs, splits * buckets.keep * tile.v, tile.n, lambda rows: forward.kept(rows, buckets.keep, tile, splits)
    )


def exact(inputs: Request, ref_score: Tensor, tile: BlockTile | None = None) -> Tensor:
    """As largest.Passes has it."""
    tile = tile or pick_tile(KEYS, inputs)
    return largest_of_all(inputs, tile, partial(_launch_keys, tile), ref_score)


def _launch_keys(tile: BlockTile, inputs: Request, tokens: slice, ref_score: Tensor, keys: Tensor) -> None:
    tiles = triton.cdiv(len(inputs.x), tile.n) * triton.cdiv(tokens.stop - tokens.start, tile.v)
    with device_of(inputs.x):
        chunk_keys_kernel[tiles,](
            **arguments_of(inputs, tokens, tile), ref_score_ptr=ref_score, keys_ptr=keys, stride_kn=keys.stride(0)
        )  # fmt: skip


def average(weights: Tensor, tokens: Tensor, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    (n, k), d = tokens.shape, embeddings.shape[1]
    smoothed = embeddings.new_empty(n, d, dtype=stored_type(dtype))
    with device_of(embeddings):
        _average_kernel[n, triton.cdiv(d, BLOCK_D)](
            weight_ptr=weights, tokens_ptr=tokens, e_ptr=embeddings, smoothed_ptr=smoothed, K=k,
            stride_ev=embeddings.stride(0), D=d, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D, **OPTIONS,
        )  # fmt: skip
    return smoothed.to(dtype)


@triton.jit(do_not_specialize=["K"])
def _average_kernel(
    weight_ptr,  # [N, K] fp32
    tokens_ptr,  # [N, K] int64
    e_ptr,  # [V, D]
    smoothed_ptr,  # [N, D]
    K,
    stride_ev,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, K, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        tokens = tl.load(tokens_ptr + row * K + o_k, mask=m_k, other=0)
        weights = tl.load(weight_ptr + row * K + o_k, mask=m_k, other=0.0)
        b_e = load_tile(e_ptr, tokens, m_k, stride_ev, o_d, D).to(tl.float32)  # [k, d]
        total += tl.sum(weights[:, None] * b_e, 0)
    tl.store(smoothed_ptr + row * D + o_d, total.to(smoothed_ptr.dtype.element_ty), mask=o_d < D)

"""The step, with the largest logits of every row where they are wanted, and means of a few tokens a row.

    mean         forward.mean or chunked.mean                                         as without top-k
    approximate  forward.kept: the largest logits of every bucket of tokens           the pass of the statistics
    certified    the same, with so many buckets that hardly a row lacks anything      the same; the host waits
    exact        chunk_keys_kernel: all logits of some rows and tokens                one product more
    average      _average_kernel: sum_k weights[i, k] embeddings[tokens[i, k]]        reads K rows of the table a row

All end in torch.topk over int64 keys, parts.sort_key: so ties go to the lowest token.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothie_kernels.backends import StepInputs, StepOutputs
from smoothie_kernels.backends.triton import chunked, forward
from smoothie_kernels.backends.triton.chunked import Tile as BlockTile
from smoothie_kernels.backends.triton.chunked import arguments_of, even, pick_block, pick_tile, rows_of, slices
from smoothie_kernels.backends.triton.chunked_kernels import chunk_keys_kernel
from smoothie_kernels.backends.triton.launch import (
    OPTIONS,
    device_of,
    noise_on_device,
    processors,
    stored_type,
)
from smoothie_kernels.backends.triton.merge import Statistics
from smoothie_kernels.backends.triton.parts import load_tile
from smoothie_kernels.backends.triton.tiles import Tile, pick_bucket_splits
from smoothie_kernels.recall import FEW, STEP, Buckets, pick_buckets

KEY = 8  # bytes
ROOM = 2**26  # bytes that the keys of all buckets of some rows may take, whatever the workspace
NO_KEY = torch.iinfo(torch.int64).min

# With keys in place of weights these take up to 255 registers and 128 KiB (64 KiB on gfx942), without spilling.
KEYS = chunked.FORWARD

BLOCK_K, BLOCK_D = 16, 128  # tokens at a time and columns of a program of _average_kernel


def step_fwd(inputs: StepInputs) -> StepOutputs:
    """All but the mean is of one pass, or brought to it. What buckets keep takes registers that a mean has not: with
    both, top-k is a pass of its own, and so one product more."""
    inputs = noise_on_device(inputs)
    x, k = inputs.x, inputs.topk
    smoothed, found = x.new_empty(len(x), 0), None
    if inputs.mean:
        smoothed, found = chunked.mean(inputs) if chunked.prefers(inputs) else forward.mean(inputs)
    if k == 0:
        found = found or forward.statistics(inputs)
        nothing = x.new_empty(len(x), 0, dtype=torch.float32)
        return StepOutputs(smoothed, *found[:5], nothing, nothing.long())
    buckets = pick_buckets(len(inputs.embeddings), k, inputs.recall_target)
    enough = None if buckets or not _may_wait(x) else certifying_buckets(len(inputs.embeddings), k)
    if buckets:
        found, keys, _ = approximate(inputs, buckets)
    elif enough:
        found, keys = certified(inputs, enough)
    else:
        found = found or forward.statistics(inputs)
        keys = exact(inputs, found.best_score)
    logits, tokens = _of_keys(keys)
    # Far from the origin scores are large, and two tiles round them differently: a common shift of a row's logits.
    logits = logits + (found.best_logit[:, None] - logits[:, :1])
    unknown = found.lse.isnan()[:, None]
    logits = logits.masked_fill(unknown, torch.nan)
    tokens = torch.where(unknown, torch.arange(k, device=x.device), tokens)
    return StepOutputs(
        smoothed, found.tokens, tokens[:, 0].clone(), found.lse, found.best_score, found.log_sum, logits, tokens
    )  # fmt: skip


def _may_wait(x: Tensor) -> bool:
    """A CUDA graph cannot hold a question of the host."""
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def certifying_buckets(v: int, k: int) -> Buckets | None:
    """So many that in 99 of 100 rows with winners at random places no bucket has all that it keeps among them; None
    where these would be a large part of the vocabulary."""
    keep, most = 4, min(FEW, v // 8)
    fits = (b for b in range(STEP, most + 1, STEP) if math.comb(k, keep) <= 0.01 * b ** (keep - 1) and b * keep >= k)
    count = next(fits, None)
    return Buckets(count, keep) if count else None


def certified(inputs: StepInputs, buckets: Buckets) -> tuple[Statistics, Tensor]:
    """The statistics, and the K largest keys of all tokens, [N, K].

    What a bucket drops is below all that it keeps. So a row has its largest where no bucket has the last of what it
    keeps among them. The host asks which rows have not; they are done again, by `exact`.
    """
    found, keys, complete = approximate(inputs, buckets)
    rows = complete.logical_not().nonzero()[:, 0]
    if len(rows):
        keys[rows] = exact(rows_of(inputs, rows), found.best_score[rows])
    return found, keys


def approximate(
    inputs: StepInputs, buckets: Buckets, tile: Tile | None = None, splits: int | None = None
) -> tuple[Statistics, Tensor, Tensor]:
    """The statistics, the K largest keys of all that the buckets keep, [N, K], and whether these are certainly the
    largest of all tokens, [N]."""
    x, embeddings = inputs.x, inputs.embeddings
    n, v = len(x), len(embeddings)
    tile = tile or forward.tile_of(f"statistics, keep {buckets.keep}", x, embeddings)
    splits = splits or pick_bucket_splits(n, v, buckets.buckets, tile, processors(x.device))
    most = max(inputs.workspace, ROOM) // (KEY * splits * buckets.keep * tile.v)
    found = []
    for rows in slices(n, even(n, max(1, most // tile.n) * tile.n, tile.n)):
        statistics, keys = forward.kept(rows_of(inputs, rows), buckets.keep, tile, splits)
        largest = keys.flatten(1).topk(inputs.topk).values
        last_kept = keys[:, :, -1].flatten(1).amax(1)
        found.append((*statistics, largest, last_kept < largest[:, -1]))
    *rest, largest, complete = (torch.cat(same) for same in zip(*found, strict=True))
    return Statistics(*rest), largest, complete


def exact(inputs: StepInputs, ref_score: Tensor, tile: BlockTile | None = None) -> Tensor:
    """The K largest keys of all tokens' logits relative to ref_score [N], [N, K]. Of some rows and tokens at a time:
    the keys of a block stand beside the largest of the blocks before it."""
    x, k = inputs.x, inputs.topk
    n, v = len(x), len(inputs.embeddings)
    largest = x.new_empty(n, k, dtype=torch.int64)
    tile = tile or pick_tile(KEYS, inputs)
    ahead = triton.cdiv(k, 16) * 16  # so that rows are aligned
    block_n, block_v = pick_block(n, v, inputs.workspace, KEY, KEY * ahead, tile)
    workspace = x.new_empty(min(n, block_n), ahead + block_v, dtype=torch.int64)
    for rows in slices(n, block_n):
        of_rows, keys = rows_of(inputs, rows), workspace[: rows.stop - rows.start]
        keys[:, :ahead] = NO_KEY
        for tokens in slices(v, block_v):
            _launch_keys(of_rows, tokens, tile, ref_score[rows], keys[:, ahead:])
            keys[:, :k] = keys[:, : ahead + tokens.stop - tokens.start].topk(k).values
        largest[rows] = keys[:, :k]
    return largest


def _launch_keys(inputs: StepInputs, tokens: slice, tile: BlockTile, ref_score: Tensor, keys: Tensor) -> None:
    tiles = triton.cdiv(len(inputs.x), tile.n) * triton.cdiv(tokens.stop - tokens.start, tile.v)
    with device_of(inputs.x):
        chunk_keys_kernel[tiles,](
            **arguments_of(inputs, tokens, tile), ref_score_ptr=ref_score, keys_ptr=keys, stride_kn=keys.stride(0)
        )  # fmt: skip


def _of_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """As parts.of_key."""
    high = (keys >> 32).int()
    return (high ^ ((high >> 31) & 0x7FFFFFFF)).view(torch.float32), 0x7FFFFFFF - (keys & 0x7FFFFFFF)


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

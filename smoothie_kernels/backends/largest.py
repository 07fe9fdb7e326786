"""The largest logits of every row, whatever kernels find them: which pass, and what is made of its keys.

    approximate  the largest logits of every bucket of tokens                   the pass of the statistics
    certified    the same, with so many buckets that hardly a row lacks one     the same; the host waits
    exact        all logits of some rows and tokens                             one product more

All end in torch.topk over int64 keys that sort as logits do, and where these are equal as the lower token first.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from smoothie_kernels.backends import Statistics, StepOutputs
from smoothie_kernels.backends.blocks import Tile, cdiv, even, pick_block, rows_of, slices
from smoothie_kernels.recall import FEW, STEP, Buckets, pick_buckets
from smoothie_kernels.stream import Request

KEY = 8  # bytes
NO_KEY = torch.iinfo(torch.int64).min
ROOM = 2**26  # bytes that the keys of all buckets of some rows may take, whatever the workspace


class Passes(NamedTuple):
    """What a backend has for it."""

    statistics: Callable[[Request], Statistics]
    # the statistics, the K largest keys of all that the buckets keep, [N, K], and whether these are certainly the
    # largest of all tokens, [N]
    approximate: Callable[[Request, Buckets], tuple[Statistics, Tensor, Tensor]]
    # the K largest keys of all tokens' logits relative to best_score [N], [N, K]
    exact: Callable[[Request, Tensor], Tensor]


def with_largest(inputs: Request, smoothed: Tensor, found: Statistics | None, passes: Passes) -> StepOutputs:
    """found: the statistics, where a pass has them already."""
    x, k = inputs.x, inputs.topk
    if k == 0:
        found = found or passes.statistics(inputs)
        nothing = x.new_empty(len(x), 0, dtype=torch.float32)
        return StepOutputs(smoothed, *found[:5], nothing, nothing.long())
    buckets = pick_buckets(len(inputs.embeddings), k, inputs.recall_target)
    enough = None if buckets or not _may_wait(x) else certifying_buckets(len(inputs.embeddings), k)
    if buckets:
        found, keys, _ = passes.approximate(inputs, buckets)
    elif enough:
        found, keys = _certified(inputs, enough, passes)
    else:
        found = found or passes.statistics(inputs)
        keys = passes.exact(inputs, found.best_score)
    logits, tokens = of_keys(keys)
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


def _certified(inputs: Request, buckets: Buckets, passes: Passes) -> tuple[Statistics, Tensor]:
    """The statistics, and the K largest keys of all tokens, [N, K].

    What a bucket drops is below all that it keeps. So a row has its largest where no bucket has the last of what it
    keeps among them. The host asks which rows have not; they are done again, by `exact`.
    """
    found, keys, complete = passes.approximate(inputs, buckets)
    rows = complete.logical_not().nonzero()[:, 0]
    if len(rows):
        keys[rows] = passes.exact(rows_of(inputs, rows), found.best_score[rows])
    return found, keys


def largest_kept(
    inputs: Request, kept: int, tile_rows: int, keep: Callable[[Request], tuple[Statistics, Tensor]]
) -> tuple[Statistics, Tensor, Tensor]:
    """Passes.approximate, of keys [N, ..., keep, buckets] that `keep` gives for some rows: `kept` of each."""
    most = max(inputs.workspace, ROOM) // (KEY * kept)
    n, found = len(inputs.x), []
    for rows in slices(n, even(n, max(1, most // tile_rows) * tile_rows, tile_rows)):
        statistics, keys = keep(rows_of(inputs, rows))
        largest = keys.flatten(1).topk(inputs.topk).values
        last_kept = keys[:, :, -1].flatten(1).amax(1)
        found.append((*statistics, largest, last_kept < largest[:, -1]))
    *rest, largest, complete = (torch.cat(same) for same in zip(*found, strict=True))
    return Statistics(*rest), largest, complete


def largest_of_all(
    inputs: Request, tile: Tile, write: Callable[[Request, slice, Tensor, Tensor], None], ref_score: Tensor
) -> Tensor:
    """Passes.exact: write(inputs of some rows, tokens, ref_score, keys) writes the keys of a block. They stand beside
    the largest of the blocks before it."""
    x, k = inputs.x, inputs.topk
    n, v = len(x), len(inputs.embeddings)
    largest = x.new_empty(n, k, dtype=torch.int64)
    ahead = cdiv(k, 16) * 16  # so that rows are aligned
    block_n, block_v = pick_block(n, v, inputs.workspace, KEY, KEY * ahead, tile)
    workspace = x.new_empty(min(n, block_n), ahead + block_v, dtype=torch.int64)
    for rows in slices(n, block_n):
        of_rows, keys = rows_of(inputs, rows), workspace[: rows.stop - rows.start]
        keys[:, :ahead] = NO_KEY
        for tokens in slices(v, block_v):
            write(of_rows, tokens, ref_score[rows], keys[:, ahead:])
            keys[:, :k] = keys[:, : ahead + tokens.stop - tokens.start].topk(k).values
        largest[rows] = keys[:, :k]
    return largest


def of_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The logits and tokens of keys."""
    high = (keys >> 32).int()
    return (high ^ ((high >> 31) & 0x7FFFFFFF)).view(torch.float32), 0x7FFFFFFF - (keys & 0x7FFFFFFF)

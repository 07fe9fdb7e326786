"""The step on a GPU: launchers, then kernels. Strides are in elements.

A program takes BLOCK_N rows, BLOCK_D columns of the result and a part of the vocabulary: of S parts, part s has tiles
s, s + S, s + 2S, ... of tokens. It goes through them once, one by one, with the nearest token so far:

    score   scores = col (x . E^T) + bias                             product over D, in fp32
    weigh   logits = scale (scores - nearest) + std eps               noise, argmax twice, row sum: all in registers
            weights = exp(logits - highest)
    gather  acc = acc exp(old highest - highest) + weights . values   product over the tile; values: E, or another table

merge.py makes one result of the parts. Without acc it is the statistics alone, without highest the nearest token alone.

With keys every place of a tile also keeps its KEEP largest logits. A place sees every (S BLOCK_V)-th token, so it is a
bucket of recall.py; topk.py takes the largest of all that were kept.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothie_kernels.backends import Statistics
from smoothie_kernels.backends.blocks import on_device
from smoothie_kernels.backends.triton import launch
from smoothie_kernels.backends.triton.launch import (
    INTERPRETED,
    MIXED,
    OPTIONS,
    device_of,
    dot_type,
    noise_arguments,
    product_types,
    signed,
    stored_type,
    values_arguments,
)
from smoothie_kernels.backends.triton.merge import Parts, merge, merge_kept, merge_nearest
from smoothie_kernels.backends.triton.parts import (
    add_bias,
    add_noise,
    begin_noise,
    exp,
    keep_first_max,
    keep_largest,
    load_row_ids,
    load_tile,
    noise_key,
    normals,
    score_tile,
    sort_key,
)
from smoothie_kernels.backends.triton.tiles import FEW_ROWS, Tile, pick_splits, pick_tile
from smoothie_kernels.stream import Request

__all__ = ["INTERPRETED", "MIXED", "gaussian", "kept", "mean", "nearest_fwd", "redo", "statistics"]

ROWS, COLUMNS = 32, 128  # of a program, where there is no product


def mean(inputs: Request, tile: Tile | None = None, splits: int | None = None) -> tuple[Tensor, Statistics]:
    """smoothed [N, D], and the statistics of the same pass."""
    x = inputs.x
    n, d = x.shape
    tile = tile or mean_tile(inputs, tile_of("mean", x, inputs.embeddings))
    splits = splits or _splits(x, inputs.embeddings, triton.cdiv(d, tile.d), tile)
    result = inputs.result_dtype(x)
    smoothed = x.new_empty(n, d, dtype=stored_type(result))
    # One part: its program writes the mean itself. Sums of few rows and all parts are about as large as one tile of
    # every processor: 64 x 512 x 132 numbers are 17 MB.
    acc = smoothed[None] if splits == 1 else x.new_empty(splits, n, d, dtype=torch.float32)
    parts = _stream(inputs, tile, splits, acc)
    rest = merge(inputs, parts) if splits == 1 else merge(inputs, parts, acc, smoothed)
    return smoothed.to(result), rest


def statistics(inputs: Request, tile: Tile | None = None, splits: int | None = None) -> Statistics:
    """Without the second product."""
    tile = tile or tile_of("statistics", inputs.x, inputs.embeddings)
    splits = splits or _splits(inputs.x, inputs.embeddings, 1, tile)
    return merge(inputs, _stream(inputs, tile, splits, None))


def kept(inputs: Request, keep: int, tile: Tile, splits: int) -> tuple[Statistics, Tensor]:
    """statistics, and of the same pass what splits * tile.v buckets keep: keys [N, splits, keep, tile.v], which are
    parts.sort_key of logits relative to best_score. Of a bucket with fewer tokens some have the logit -inf."""
    keys = inputs.x.new_empty(len(inputs.x), splits, keep, tile.v, dtype=torch.int64)
    parts = _stream(inputs, tile, splits, None, keys=keys)
    statistics = merge(inputs, parts)
    merge_kept(inputs, parts, statistics.best_score, keys)
    return statistics, keys


def redo(inputs: Request, only: Tensor, smoothed: Tensor) -> Statistics:
    """mean for the rows that only [N] bool names: their means go into smoothed [N, D], which keeps the others; of
    the statistics of other rows nothing is known. Programs without such rows return at once: the host does not ask."""
    x, embeddings = inputs.x, inputs.embeddings
    of = launch.gpu(x.device).family
    tile = redo_tile(of, mean_tile(inputs, pick_tile("mean", of, dot_type(x, embeddings), x.shape[1])))
    return merge(inputs, _stream(inputs, tile, 1, smoothed[None], only), only=only)


def mean_tile(inputs: Request, tile: Tile) -> Tile:
    """A tile that serves both products of one table is too large for two: 290 KiB on sm_90. With two, v = 64 spills 8
    bytes on sm_90 with Triton 3.6."""
    if values_arguments(inputs, True)["values_ptr"] is None:
        return tile
    if tile.k >= tile.d:
        return tile._replace(k=min(64, tile.k), stages=2)
    return tile._replace(v=min(32, tile.v)) if launch.gpu(inputs.x.device).family == "sm_90" else tile


def redo_tile(of: str, tile: Tile) -> Tile:
    """With the question before its loop the kernel spills; with half as many tokens, or columns, it does not."""
    less = {"sm_90": {"v": min(32, tile.v)}, "sm_100": {"d": min(256, tile.d)}}
    return tile._replace(**less.get(of, {}))


def nearest_fwd(
    x: Tensor,
    embeddings: Tensor,
    bias: Tensor,
    tile: Tile | None = None,
    splits: int | None = None,
    col: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tile = tile or tile_of("statistics", x, embeddings)
    splits = splits or _splits(x, embeddings, 1, tile)
    best_score = x.new_empty(splits, x.shape[0], dtype=torch.float32)
    token = x.new_empty(splits, x.shape[0], dtype=torch.int32)
    _launch(x, embeddings, tile, splits, col_ptr=col, bias_ptr=bias, best_score_ptr=best_score, token_ptr=token)
    return merge_nearest(x, embeddings, best_score, token)


def tile_of(kind: str, x: Tensor, embeddings: Tensor) -> Tile:
    n, d = x.shape
    return pick_tile(
        f"{kind}, few rows" if n <= FEW_ROWS else kind, launch.gpu(x.device).family, dot_type(x, embeddings), d
    )


def _splits(x: Tensor, embeddings: Tensor, column_blocks: int, tile: Tile) -> int:
    return pick_splits(x.shape[0], embeddings.shape[0], column_blocks, tile, launch.gpu(x.device).processors)


def _stream(
    inputs: Request,
    tile: Tile,
    splits: int,
    acc: Tensor | None,
    only: Tensor | None = None,
    keys: Tensor | None = None,
) -> Parts:
    x, n = inputs.x, inputs.x.shape[0]
    best_score, highest, total = (x.new_empty(splits, n, dtype=torch.float32) for _ in range(3))
    token, noisy_token = (x.new_empty(splits, n, dtype=torch.int32) for _ in range(2))
    _launch(
        x, inputs.embeddings, tile, splits, **values_arguments(inputs, acc is not None),
        col_ptr=inputs.col, bias_ptr=inputs.bias, best_score_ptr=best_score, token_ptr=token,
        scale_ptr=inputs.scale, std_ptr=inputs.std, row_ids_ptr=inputs.row_ids, **noise_arguments(inputs),
        highest_ptr=highest, total_ptr=total, noisy_token_ptr=noisy_token, acc_ptr=acc, only_ptr=only,
        keys_ptr=keys, KEEP=0 if keys is None else keys.shape[2],
        row_offset=signed(inputs.row_offset),
    )  # fmt: skip
    return Parts(best_score, highest, total, best_score, highest, token, noisy_token)


_ABSENT: dict[str, Any] = {
    **dict.fromkeys(("scale_ptr", "std_ptr", "row_ids_ptr", "seed_ptr", "offsets_ptr", "field_weights_ptr")),
    **dict.fromkeys(("only_ptr", "acc_ptr", "highest_ptr", "total_ptr", "noisy_token_ptr", "keys_ptr")),
    **dict.fromkeys(("col_ptr", "values_ptr", "stride_vv")),
    "F": 0,
    "KEEP": 0,
    "row_offset": 0,
}


def _launch(x: Tensor, embeddings: Tensor, tile: Tile, splits: int, **arguments: Any) -> None:
    (n, d), v = x.shape, embeddings.shape[0]
    column_blocks = 1 if arguments.get("acc_ptr") is None else triton.cdiv(d, tile.d)
    with device_of(x):
        _stream_kernel[triton.cdiv(n, tile.n), column_blocks, splits](
            x_ptr=x, e_ptr=embeddings, **{**_ABSENT, **arguments},
            N=n, V=v, stride_xn=x.stride(0), stride_ev=embeddings.stride(0),
            D=d, BLOCK_N=tile.n, BLOCK_V=tile.v, BLOCK_K=tile.k, BLOCK_D=tile.d, **product_types(x, embeddings),
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip


def gaussian(out: Tensor, row_ids: Tensor | None, row_offset: int, seed: Tensor, offset: Tensor) -> Tensor:
    n, cols = out.shape
    with device_of(out):
        _gaussian_kernel[triton.cdiv(n, ROWS) * triton.cdiv(cols, COLUMNS),](
            out_ptr=out, row_ids_ptr=row_ids, seed_ptr=on_device(out.device, seed),
            offset_ptr=on_device(out.device, offset),
            N=n, V=cols, stride_on=out.stride(0), row_offset=signed(row_offset),
            BLOCK_N=ROWS, BLOCK_V=COLUMNS, **OPTIONS,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["N", "V", "F", "row_offset"])
def _stream_kernel(
    x_ptr,  # [N, D]
    e_ptr,  # [V, D]
    values_ptr,  # [V, D], None where the mean is of E, or not wanted
    col_ptr,  # [V] fp32, None for ones
    bias_ptr,  # [V] fp32
    scale_ptr,  # [N] fp32, None for the nearest token alone; so are all others but best_score and token
    std_ptr,  # [N] fp32, None without noise
    row_ids_ptr,  # [N] int64, None for row_offset + i
    seed_ptr,  # [] int64
    offsets_ptr,  # [F] int64
    field_weights_ptr,  # [F] fp32, None for one field as it is
    best_score_ptr,  # [S, N] fp32; these six are merge.Parts and acc, S the parts of the vocabulary
    token_ptr,  # [S, N] int32
    highest_ptr,  # [S, N] fp32
    total_ptr,  # [S, N] fp32
    noisy_token_ptr,  # [S, N] int32
    acc_ptr,  # [S, N, D] fp32, None for the statistics alone; of one part the mean, in any type
    only_ptr,  # [N] bool, None for all rows
    keys_ptr,  # [N, S, KEEP, BLOCK_V] int64, None without top-k: parts.sort_key of logits relative to best_score
    N,
    V,
    F,
    stride_xn,
    stride_ev,
    stride_vv,
    row_offset,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEEP: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    HAS_LOGITS: tl.constexpr = highest_ptr is not None
    HAS_NOISE: tl.constexpr = std_ptr is not None
    HAS_MEAN: tl.constexpr = acc_ptr is not None
    # The table's tile is loaded once, for both products.
    ONE_TILE: tl.constexpr = BLOCK_K >= D and BLOCK_D == BLOCK_K and values_ptr is None
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n = o_n < N
    if only_ptr is not None:
        wanted = tl.load(only_ptr + o_n, mask=m_n, other=0).to(tl.int32)
        if tl.max(wanted, 0) == 0:
            return
    if HAS_LOGITS:
        scale = tl.load(scale_ptr + o_n, mask=m_n, other=0.0)
    if HAS_NOISE:
        std = tl.load(std_ptr + o_n, mask=m_n, other=0.0)
        row_ids = load_row_ids(row_ids_ptr, row_offset, o_n, m_n)
        key, noise_rows = begin_noise(seed_ptr, offsets_ptr, field_weights_ptr, row_ids)
    if ONE_TILE:
        b_x = load_tile(x_ptr, o_n, m_n, stride_xn, o_d, D).to(DOT)

    nearest = tl.full([BLOCK_N], -float("inf"), tl.float32)
    tokens = tl.zeros([BLOCK_N], tl.int32)
    if HAS_LOGITS:
        # The largest noisy logit itself. Logits are bounded above, but with loud noise or scale <= 0 rows could sum to
        # nothing without it, and to send those through again the host would have to wait for the device.
        highest = tl.full([BLOCK_N], -float("inf"), tl.float32)
        noisy_tokens = tl.zeros([BLOCK_N], tl.int32)
        total = tl.zeros([BLOCK_N], tl.float32)
    if HAS_MEAN:
        acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    kept = (tl.full([BLOCK_N, BLOCK_V], -float("inf"), tl.float32),) * KEEP
    kept_from = (tl.zeros([BLOCK_N, BLOCK_V], tl.int32),) * KEEP  # the first token of their tiles
    for first in range(tl.program_id(2) * BLOCK_V, V, tl.num_programs(2) * BLOCK_V):
        o_v = first + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        if values_ptr is not None:
            b_e = load_tile(values_ptr, o_v, m_v, stride_vv, o_d, D).to(DOT)  # [v, d]
        elif HAS_MEAN or ONE_TILE:
            b_e = load_tile(e_ptr, o_v, m_v, stride_ev, o_d, D).to(DOT)
        if ONE_TILE:
            scores = tl.dot(b_x, tl.trans(b_e), input_precision=PRECISION)
        else:
            scores = score_tile(x_ptr, o_n, m_n, stride_xn, e_ptr, o_v, m_v, stride_ev, D, BLOCK_K, DOT, PRECISION)
        scores = add_bias(scores, col_ptr, bias_ptr, o_v, m_v)
        before = nearest
        nearest, tokens = keep_first_max(nearest, tokens, scores, o_v)
        if HAS_LOGITS:
            # Relative to the nearest score, so that logits of rows far from the origin lose nothing to rounding.
            logits = scale[:, None] * (scores - nearest[:, None])
            if HAS_NOISE:
                logits = add_noise(
                    logits, std, first, key, noise_rows, seed_ptr, offsets_ptr, field_weights_ptr, F
                )  # fmt: skip
            logits = tl.where(m_v[None, :], logits, -float("inf"))
            moved = tl.where(before == -float("inf"), 0.0, scale * (before - nearest))
            highest_before = highest + moved
            highest, noisy_tokens = keep_first_max(highest_before, noisy_tokens, logits, o_v)
            if KEEP > 0:
                kept, kept_from = keep_largest(kept, kept_from, moved, logits, first)
            weights = exp(logits - highest[:, None])
            rescale = exp(highest_before - highest)
            total = total * rescale + tl.sum(weights, 1)
            if HAS_MEAN:
                acc = tl.dot(weights.to(DOT), b_e, acc * rescale[:, None], input_precision=PRECISION)

    if only_ptr is not None:
        m_n = m_n & (tl.load(only_ptr + o_n, mask=m_n, other=0) != 0)
    at = tl.program_id(2).to(tl.int64) * N + o_n
    if HAS_MEAN:
        factor = tl.where(tl.num_programs(2) == 1, 1.0 / total, 1.0)
        at_mean = at[:, None] * D + o_d[None, :]
        tl.store(acc_ptr + at_mean, acc * factor[:, None], mask=m_n[:, None] & (o_d < D)[None, :])
    if tl.program_id(1) == 0:
        tl.store(best_score_ptr + at, nearest, mask=m_n)
        tl.store(token_ptr + at, tokens, mask=m_n)
        if HAS_LOGITS:
            tl.store(highest_ptr + at, highest, mask=m_n)
            tl.store(total_ptr + at, total, mask=m_n)
            tl.store(noisy_token_ptr + at, noisy_tokens, mask=m_n)
    if KEEP > 0:
        o_b = tl.arange(0, BLOCK_V)
        at_part = (o_n.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * (KEEP * BLOCK_V)
        for r in tl.static_range(KEEP):
            keys = sort_key(kept[r], kept_from[r] + o_b[None, :])
            tl.store(keys_ptr + (at_part + r * BLOCK_V)[:, None] + o_b[None, :], keys, mask=m_n[:, None])


@triton.jit(do_not_specialize=["N", "V", "row_offset"])
def _gaussian_kernel(
    out_ptr,  # [N, V]
    row_ids_ptr,  # [N], None for row_offset + i
    seed_ptr,  # []
    offset_ptr,  # []
    N,
    V,
    stride_on,
    row_offset,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks = tl.cdiv(V, BLOCK_V)  # on one axis with the rows: the second axis of a grid ends at 65,535
    o_n = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_V
    o_v = first + tl.arange(0, BLOCK_V)
    m_n = o_n < N
    key, row_shift = noise_key(seed_ptr, offset_ptr)
    eps = normals(first, load_row_ids(row_ids_ptr, row_offset, o_n, m_n) + row_shift, key, BLOCK_V)
    at = o_n.to(tl.int64)[:, None] * stride_on + o_v[None, :]
    tl.store(out_ptr + at, eps, mask=m_n[:, None] & (o_v < V)[None, :])

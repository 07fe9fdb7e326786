"""Launches the compiled kernels for Hopper, csrc/cuda: bfloat16 and float16, forward. The triton backend's gradients.

    few rows     stream     both products in one pass, every tile of the table fetched once
    D <= 256     narrow     the same for many rows, with their means in registers
    many rows    score      weights of some rows and tokens, and the library multiplies them by the table
    no mean      score      statistics, buckets' largest logits, or the nearest token alone

Beside every pass: prepare (references of rows, keys of noise fields) before it, merge after it.

Why two kernels and a library product where one kernel could keep the mean in registers: the mean of 64 rows alone takes
three quarters of them at D = 768, and none would be left for noise. The weights are 2 bytes a logit, written and read
once; a block of them is no larger than `workspace`. docs/hopper.md has what was measured.
"""

from collections import Counter
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smoothie_kernels.backends import Gradients, Grads, Saved, Statistics, StepOutputs, Wanted, nearest_alone
from smoothie_kernels.backends.blocks import (
    HEADROOM,
    HIGHEST,
    LOWEST,
    add_product,
    cdiv,
    column_bias,
    noise_on_device,
    on_device,
    pick_block,
    rows_of,
    slices,
)
from smoothie_kernels.backends.largest import ROOM, Passes, largest_kept, largest_of_all, with_largest
from smoothie_kernels.backends.shared_library import why_not
from smoothie_kernels.recall import Buckets, expected_found
from smoothie_kernels.stream import Request

__all__ = ["average", "column_bias", "gaussian", "lacks", "step_bwd", "step_fwd", "supports"]

LIBRARY = Path(__file__).parent.parent / "libsmoothie_kernels_cuda.so"
# The same, but what hangs ends with an error: where setup.py is given SMOOTHIE_WATCHDOG=1. Both register the same
# operators: a process loads one of them.
WATCHDOG_LIBRARY = LIBRARY.with_name("libsmoothie_kernels_cuda_watchdog.so")
BUILD = "install CUDA's compiler, nvcc >= 12.5, then install smoothie-kernels again"
DTYPES = (torch.bfloat16, torch.float16)
DEVICE = "cuda"  # in tests, with the kernels in an emulator, "cpu"
CAPABILITY = (9, 0)  # sm_90a: wgmma is of this one generation
WIDEST, WIDTH_STEP = 1024, 8  # TMA copies take rows of whole 16 bytes
MOST_STRIDE = 2**39  # below it, in numbers of 2 bytes: that of a tensor map

NEAREST, STATISTICS, KEEP, WEIGHTS, KEYS = 0, 1, {1: 2, 2: 3, 4: 4}, 5, 6  # Mode in csrc/cuda/params.h
BUCKETS_OF_PART = 8  # the same file


class Tile(NamedTuple):
    n: int
    v: int


SCORE, NARROW, STREAM = Tile(128, 128), Tile(128, 64), Tile(32, 64)  # csrc/cuda/score.h, narrow.h, stream.h


def supports(device_type: str, dtype: torch.dtype | None) -> str | None:
    if device_type != DEVICE:
        return "it takes CUDA tensors"
    if dtype and dtype not in DTYPES:
        return "it takes bfloat16 and float16"
    no_gpu = _why_no_gpu() if DEVICE == "cuda" else None  # first: without one the library stays out of the process
    return no_gpu or why_not(LIBRARY, BUILD)


def lacks(request: Request) -> str | None:
    x, embeddings, d = request.x, request.embeddings, request.x.shape[1]
    if request.bound is not None or request.col is not None:
        return "takes Euclidean distances"
    if x.dtype != embeddings.dtype:
        return f"takes x and embeddings of one type, got {x.dtype} and {embeddings.dtype}"
    if d % WIDTH_STEP or d > WIDEST:
        return f"takes widths D that are multiples of {WIDTH_STEP} up to {WIDEST:,}, got {d}"
    return None


def _why_no_gpu() -> str | None:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability != CAPABILITY:
        return "it takes GPUs of compute capability 9.0 (Hopper), this one has {}.{}".format(*capability)
    return None


@cache
def _ops() -> Any:
    if reason := why_not(LIBRARY, BUILD):
        raise RuntimeError(reason)
    return torch.ops.smoothie_kernels_cuda


def _call(name: str, x: Tensor, *arguments: object) -> None:
    """On x's device, which the operator makes the current one, and on torch's stream there."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    getattr(_ops(), name)(*arguments, stream)


# --- plans


@cache
def processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


NARROWEST = 256  # D up to which the means of 64 rows leave a warpgroup registers for noise: csrc/cuda/narrow.h
FEW_ROWS = 64  # up to here both products are bound by fetching the table: once for every 32 rows
START = 2.0  # tiles' time that a block takes before its first tile and after its last
RESIDENT = 8  # of 14 TMA tiles; the rest of x is loaded again with every tile of tokens. 0 to 10 take the same time


def pick_rows(d: int, processors: int) -> int:
    """Rows of a block: as many as fill all processors once with the library's tiles of the second product, 128 x 256.
    (D = 768: 44 x 3 of 132. With 4,096 rows a quarter of the processors would have nothing to do.)"""
    return max(1, processors // cdiv(d, 256)) * SCORE.n


def pick_cluster(row_blocks: int) -> int:
    """Blocks that share every box of the table: alone, a block would ask L2 for more than its share of what L2 gives.
    An odd number of blocks takes one more, which has nothing to do."""
    return 2 if row_blocks % 2 == 0 or row_blocks > 8 else 1


def whole_tiles(n: int) -> int:
    """Rows of all tiles of a launch for n rows: it writes weights for each of them."""
    row_blocks = cdiv(n, SCORE.n)
    cluster = pick_cluster(row_blocks)
    return cdiv(row_blocks, cluster) * cluster * SCORE.n


def pick_chunks(row_blocks: int, tiles: int, processors: int, most: int = 2**31) -> int:
    """In how many chunks, `most` at most, the table is taken so that all processors end at about the same time."""

    def rounds(chunks: int) -> float:
        return cdiv(row_blocks * chunks, processors) * (cdiv(tiles, chunks) + START)

    return min(range(1, max(1, min(tiles, 2 * processors, most)) + 1), key=rounds)


@lru_cache(maxsize=256)
def pick_parts(v: int, k: int, recall_target: float, buckets: Buckets) -> int | None:
    """In how many parts the table is taken, each at least a whole tile, with 8 buckets each.

    A tile has pairs of tokens from all over the table (csrc/cuda/params.h), because neighbours are alike: near tokens
    of BERT's table, K = 64 at 0.95, this finds 0.96, as buckets of j mod 640 do; tiles of neighbours found 0.84. So
    many buckets as the other backends have; their sizes differ by a tile's 16, and where that finds less than the
    target, more. At a target of 1 they need only certify.
    """
    for parts in range(cdiv(buckets.buckets, BUCKETS_OF_PART), v // SCORE.v + 1):
        if recall_target >= 1 or _expected_recall(v, k, parts, buckets.keep) >= recall_target:
            return parts
    return None


def _expected_recall(v: int, k: int, parts: int, keep: int) -> float:
    whole, rest = divmod(v, SCORE.v)  # tiles; tokens of the last, if it is not
    sizes: Counter[int] = Counter()
    for part in range(parts):
        size = len(range(part, whole, parts)) * (SCORE.v // BUCKETS_OF_PART)
        of_rest = rest if part == whole % parts else 0
        larger = of_rest % BUCKETS_OF_PART
        sizes[size + of_rest // BUCKETS_OF_PART] += BUCKETS_OF_PART - larger
        sizes[size + of_rest // BUCKETS_OF_PART + 1] += larger
    return sum(count * expected_found(v, k, size, keep) for size, count in sizes.items() if count) / k


# --- one pass over tokens


class Refs(NamedTuple):
    """What is taken off a row's logits, and the noise: csrc/cuda/params.h, StepParams."""

    fields: Tensor  # [F, 3] int32
    ref_score: Tensor  # [N] fp32
    highest: Tensor  # [N] fp32


NO_REFS = (None, None, None)


class Parts(NamedTuple):
    """What C chunks of the table say of every row."""

    numbers: Tensor  # [3, C, N] fp32: best score, best logit less highest, sum of weights
    tokens: Tensor  # [2, C, N] int32: of the best score, of the best logit


def _prepare(inputs: Request) -> Refs:
    """Logits are bounded beforehand: a row's reference lies HEADROOM below the highest that there can be."""
    x, n = inputs.x, len(inputs.x)
    refs = Refs(x.new_empty(len(inputs.offset), 3, dtype=torch.int32), _floats(x, n), _floats(x, n))
    _call(
        "prepare", x, x, inputs.std, inputs.seed, inputs.offset, inputs.field_weights, HEADROOM,
        refs.ref_score, refs.highest, refs.fields,
    )  # fmt: skip
    return refs


def _known(refs: Refs, found: Statistics) -> Refs:
    """Now that a pass has found them: the row's own highest logit."""
    return Refs(refs.fields, found.best_score, found.best_logit)


def _score(
    mode: int, inputs: Request, refs: Refs | None, tokens: slice, *, parts: int | None = None,
    weights: Tensor | None = None, keys: Tensor | None = None,
) -> Parts:  # fmt: skip
    x = inputs.x
    row_blocks, tiles = cdiv(len(x), SCORE.n), cdiv(tokens.stop - tokens.start, SCORE.v)
    cluster = pick_cluster(row_blocks)
    chunks = pick_chunks(cdiv(row_blocks, cluster) * cluster, parts or tiles, processors(x.device))
    found = _empty_parts(x, chunks)
    _call(
        "score", x, mode, *_of_step(inputs, refs), tokens.start, tokens.stop, parts or chunks, chunks, RESIDENT,
        cluster, *found, weights, keys,
    )  # fmt: skip
    return found


def _narrow(inputs: Request, refs: Refs, acc: Tensor, chunks: int, cluster: int) -> Parts:
    found = _empty_parts(inputs.x, chunks)
    _call("narrow", inputs.x, *_of_step(inputs, refs), chunks, cluster, *found, acc)
    return found


def _stream(inputs: Request, refs: Refs, acc: Tensor | None, chunks: int, only: Tensor | None = None) -> Parts:
    found = _empty_parts(inputs.x, chunks)
    _call("stream", inputs.x, *_of_step(inputs, refs), chunks, only, *found, acc)
    return found


def _of_step(inputs: Request, refs: Refs | None) -> tuple[object, ...]:
    """What all passes take."""
    return (
        inputs.x, inputs.embeddings, inputs.bias, inputs.scale if refs else None, inputs.std, inputs.row_ids,
        inputs.row_offset % 2**32, *(refs or NO_REFS),
    )  # fmt: skip


def _empty_parts(x: Tensor, chunks: int) -> Parts:
    return Parts(_floats(x, 3, chunks, len(x)), x.new_empty(2, chunks, len(x), dtype=torch.int32))


def _floats(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(*shape, dtype=torch.float32)


class Merged(NamedTuple):
    statistics: Statistics
    far: Tensor  # [N] bool: weights overflow or vanish with this reference


def _merge(
    inputs: Request, refs: Refs, parts: Parts, acc: Tensor | None, smoothed: Tensor | None,
    only: Tensor | None = None, into: Statistics | None = None,
) -> Merged:  # fmt: skip
    """acc: [A, N, D], sums of weights times the table, of every chunk or of all (A = 1)."""
    x, n = inputs.x, len(inputs.x)
    if into is None:
        longs = (x.new_empty(n, dtype=torch.int64) for _ in range(2))
        into = Statistics(*longs, *(_floats(x, n) for _ in range(4)))
    far = x.new_empty(n, dtype=torch.bool)
    _call(
        "merge", x, x, inputs.embeddings, inputs.scale, refs.ref_score, refs.highest, LOWEST, HIGHEST,
        *parts, acc, only, smoothed, *into, far,
    )  # fmt: skip
    return Merged(into, far)


def _redo_far(inputs: Request, refs: Refs, first: Merged, acc: Tensor | None, smoothed: Tensor | None) -> None:
    """Blocks without such rows return at once: to ask first, the host would have to wait for the device."""
    again = _known(refs, first.statistics)
    parts = _stream(inputs, again, acc, 1 if acc is None else len(acc), first.far)
    _merge(inputs, again, parts, acc, smoothed, first.far, first.statistics)


# --- what they are for


def _mean(inputs: Request) -> tuple[Tensor, Statistics]:
    """smoothed [N, D], and the statistics."""
    x, v = inputs.x, len(inputs.embeddings)
    (n, d), smoothed = x.shape, torch.empty_like(x, dtype=inputs.result_dtype(x))
    if n <= FEW_ROWS or d <= NARROWEST:
        return smoothed, _mean_of_block(inputs, v, None, smoothed)
    row_bytes = 4 * d + 20 * cdiv(v, SCORE.v)  # its sum and its parts
    most_rows = pick_rows(d, processors(x.device))
    block_n, block_v = pick_block(n, v, inputs.workspace, x.itemsize, row_bytes, SCORE, most_rows)
    weights = x.new_empty(whole_tiles(min(n, block_n)), block_v)
    blocks = [
        _mean_of_block(rows_of(inputs, rows), block_v, weights[: whole_tiles(rows.stop - rows.start)], smoothed[rows])
        for rows in slices(n, block_n)
    ]
    return smoothed, Statistics(*(torch.cat(same) for same in zip(*blocks, strict=True)))


def _mean_of_block(inputs: Request, block_v: int, weights: Tensor | None, smoothed: Tensor) -> Statistics:
    refs = _prepare(inputs)
    # The weights of a flat row would vanish in float16, beside those that overflow: it takes the true reference.
    half = inputs.x.dtype == torch.float16
    if half:
        refs = _known(refs, _score_statistics(inputs, refs).statistics)
    parts, acc = _gather(inputs, refs) if weights is None else _gather_by_blocks(inputs, refs, block_v, weights)
    merged = _merge(inputs, refs, parts, acc, smoothed)
    if not half:
        _redo_far(inputs, refs, merged, acc, smoothed)
    return merged.statistics


def _gather(inputs: Request, refs: Refs) -> tuple[Parts, Tensor]:
    (n, d), v = inputs.x.shape, len(inputs.embeddings)
    few = n <= FEW_ROWS
    tile = STREAM if few else NARROW
    row_blocks = cdiv(n, tile.n)
    cluster = 1 if few else pick_cluster(row_blocks)
    most = max(inputs.workspace, ROOM) // (4 * n * d)  # each has sums of its own
    chunks = pick_chunks(cdiv(row_blocks, cluster) * cluster, cdiv(v, tile.v), processors(inputs.x.device), most)
    acc = _floats(inputs.x, chunks, n, d)
    return _stream(inputs, refs, acc, chunks) if few else _narrow(inputs, refs, acc, chunks, cluster), acc


def _gather_by_blocks(inputs: Request, refs: Refs, block_v: int, weights: Tensor) -> tuple[Parts, Tensor]:
    (n, d), embeddings = inputs.x.shape, inputs.embeddings
    acc = inputs.x.new_zeros(1, n, d, dtype=torch.float32)
    found = []
    for tokens in slices(len(embeddings), block_v):
        found.append(_score(WEIGHTS, inputs, refs, tokens, weights=weights))
        add_product(acc[0], weights[:n, : tokens.stop - tokens.start], embeddings[tokens])
    return Parts(*(torch.cat(same, 1) for same in zip(*found, strict=True))), acc


def _score_statistics(inputs: Request, refs: Refs) -> Merged:
    parts = _score(STATISTICS, inputs, refs, slice(0, len(inputs.embeddings)))
    return _merge(inputs, refs, parts, None, None)


def _statistics(inputs: Request) -> Statistics:
    refs = _prepare(inputs)
    merged = _score_statistics(inputs, refs)
    _redo_far(inputs, refs, merged, None, None)
    return merged.statistics


def _approximate(inputs: Request, buckets: Buckets) -> tuple[Statistics, Tensor, Tensor]:
    """Where tiles are too few for the buckets, all logits are written down."""
    x = inputs.x
    parts = pick_parts(len(inputs.embeddings), inputs.topk, inputs.recall_target, buckets)
    if parts is None:
        found = _statistics(inputs)
        return found, _exact(inputs, found.best_score), torch.ones(len(x), dtype=torch.bool, device=x.device)
    return largest_kept(inputs, parts * BUCKETS_OF_PART * buckets.keep, SCORE.n, partial(_kept, parts, buckets.keep))


def _kept(parts: int, keep: int, inputs: Request) -> tuple[Statistics, Tensor]:
    refs = _prepare(inputs)
    keys = inputs.x.new_empty(len(inputs.x), parts, keep, BUCKETS_OF_PART, dtype=torch.int64)
    found = _score(KEEP[keep], inputs, refs, slice(0, len(inputs.embeddings)), parts=parts, keys=keys)
    merged = _merge(inputs, refs, found, None, None)
    _redo_far(inputs, refs, merged, None, None)
    return merged.statistics, keys


def _exact(inputs: Request, ref_score: Tensor) -> Tensor:
    return largest_of_all(inputs, SCORE, partial(_write_keys, _prepare(inputs).fields), ref_score)


def _write_keys(fields: Tensor, inputs: Request, tokens: slice, ref_score: Tensor, keys: Tensor) -> None:
    _score(KEYS, inputs, Refs(fields, ref_score, torch.zeros_like(ref_score)), tokens, keys=keys)


# --- the backend


def step_fwd(inputs: Request) -> StepOutputs:
    inputs = inputs._replace(x=_aligned(inputs.x), embeddings=_aligned(inputs.embeddings))
    if not inputs.logits:
        return _nearest(inputs)
    inputs = noise_on_device(inputs)
    smoothed, found = _mean(inputs) if inputs.mean else (inputs.x.new_empty(len(inputs.x), 0), None)
    return with_largest(inputs, smoothed, found, Passes(_statistics, _approximate, _exact))


def _nearest(inputs: Request) -> StepOutputs:
    x, table = inputs.x, inputs.embeddings
    tokens, distance = x.new_empty(len(x), dtype=torch.int64), _floats(x, len(x))
    found = _score(NEAREST, inputs, None, slice(0, len(table)))
    _call("nearest", x, x, table, found.numbers[:1], found.tokens[:1], tokens, distance)
    return nearest_alone(tokens, distance)


def gaussian(out: Tensor, row_ids: Tensor | None, row_offset: int, seed: Tensor, offset: Tensor) -> Tensor:
    seed, offset = on_device(out.device, seed), on_device(out.device, offset)
    _call("gaussian", out, row_ids, row_offset % 2**32, seed, offset, out)
    return out


def step_bwd(inputs: Request, saved: Saved, grads: Grads, wanted: Wanted) -> Gradients:
    from smoothie_kernels.backends import triton

    return triton.step_bwd(inputs, saved, grads, wanted)


def average(weights: Tensor, tokens: Tensor, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    from smoothie_kernels.backends import triton

    return triton.average(weights, tokens, embeddings, dtype)


def _aligned(rows: Tensor) -> Tensor:
    """As a tensor map needs them: rows that begin on 16 bytes, do not overlap (an expanded table has the stride 0), and
    lie less than 2^40 bytes apart (a single row may have any stride)."""
    stride = rows.stride(0)
    fits = rows.data_ptr() % 16 == 0 and stride % WIDTH_STEP == 0 and rows.shape[1] <= stride < MOST_STRIDE
    return rows if fits else rows.clone(memory_format=torch.contiguous_format)

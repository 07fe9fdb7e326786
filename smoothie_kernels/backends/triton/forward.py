"""The step on a GPU: launchers, then kernels. Strides are in elements.

A program takes BLOCK_N rows and BLOCK_D columns of the result, and goes through the vocabulary once, tile by tile:

    score   scores = x . E^T + bias                        product over D, in fp32
    weigh   weights = exp(scale scores + std eps - max)    noise, argmax twice, row sum: all in registers
    gather  acc = acc exp(old max - max) + weights . E     product over the tile

    finish: smoothed = acc / sum, lse = max - scale ||x||^2 / 2 + log(sum)
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothie_kernels.backends.triton.parts import (
    keep_first_max,
    load_tile,
    noise_key,
    normals,
    score_tile,
    squared_distance,
    sum_of_squares,
)
from smoothie_kernels.backends.triton.tiles import Tile, pick_tile

# Triton decides where it decorates a function: for its own when it is imported, for ours when this module is.
INTERPRETED = not isinstance(load_tile, triton.JITFunction)
MIXED = isinstance(tl.max, triton.JITFunction) == INTERPRETED

OPTIONS = {"enable_fp_fusion": True}  # Triton 3.10 leaves it out where nobody asks

ROWS, COLUMNS = 32, 128  # of a program, where there is no product

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def step_fwd(
    x: Tensor,
    embeddings: Tensor,
    bias: Tensor,
    mu: Tensor,
    std: Tensor | None,
    row_ids: Tensor | None,
    row_offset: int,
    seed: Tensor,
    offset: Tensor,
    sigma_min: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, d), v = x.shape, embeddings.shape[0]
    tile = tile or pick_tile(_dot_type(x, embeddings), d)
    smoothed = x.new_empty(n, d, dtype=torch.float32 if INTERPRETED else x.dtype)
    tokens, noisy_tokens = (x.new_empty(n, dtype=torch.int64) for _ in range(2))
    lse = x.new_empty(n, dtype=torch.float32)
    with _device_of(x):
        # Few rows: a block of rows still goes through the whole vocabulary alone; V is not shared out between programs.
        _step_fwd_kernel[triton.cdiv(n, tile.n), triton.cdiv(d, tile.d)](
            x_ptr=x, e_ptr=embeddings, bias_ptr=bias, mu_ptr=mu, std_ptr=std, row_ids_ptr=row_ids,
            seed_ptr=_on(x.device, seed), offset_ptr=_on(x.device, offset),
            smoothed_ptr=smoothed, tokens_ptr=tokens, noisy_tokens_ptr=noisy_tokens, lse_ptr=lse,
            N=n, V=v, stride_xn=x.stride(0), stride_ev=embeddings.stride(0), stride_sn=smoothed.stride(0),
            row_offset=_signed(row_offset), inverse_variance=sigma_min**-2,
            D=d, BLOCK_N=tile.n, BLOCK_V=tile.v, BLOCK_K=tile.k, BLOCK_D=tile.d, DOT=_TYPES[_dot_type(x, embeddings)],
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    return smoothed.to(x.dtype), tokens, noisy_tokens, lse


def nearest_fwd(x: Tensor, embeddings: Tensor, bias: Tensor, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    (n, d), v = x.shape, embeddings.shape[0]
    tile = tile or pick_tile(_dot_type(x, embeddings), d)
    tokens, distance = x.new_empty(n, dtype=torch.int64), x.new_empty(n, dtype=torch.float32)
    with _device_of(x):
        _nearest_fwd_kernel[triton.cdiv(n, tile.n),](
            x_ptr=x, e_ptr=embeddings, bias_ptr=bias, tokens_ptr=tokens, distance_ptr=distance,
            N=n, V=v, stride_xn=x.stride(0), stride_ev=embeddings.stride(0),
            D=d, BLOCK_N=tile.n, BLOCK_V=tile.v, BLOCK_K=tile.k, DOT=_TYPES[_dot_type(x, embeddings)],
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    return tokens, distance


def column_bias(embeddings: Tensor) -> Tensor:
    v, d = embeddings.shape
    bias = embeddings.new_empty(v, dtype=torch.float32)
    with _device_of(embeddings):
        _column_bias_kernel[triton.cdiv(v, ROWS),](
            e_ptr=embeddings, bias_ptr=bias, V=v, stride_ev=embeddings.stride(0), D=d, BLOCK_V=ROWS, **OPTIONS,
        )  # fmt: skip
    return bias


def gaussian(out: Tensor, row_ids: Tensor | None, row_offset: int, seed: Tensor, offset: Tensor) -> Tensor:
    n, cols = out.shape
    with _device_of(out):
        _gaussian_kernel[triton.cdiv(n, ROWS) * triton.cdiv(cols, COLUMNS),](
            out_ptr=out, row_ids_ptr=row_ids, seed_ptr=_on(out.device, seed), offset_ptr=_on(out.device, offset),
            N=n, V=cols, stride_on=out.stride(0), row_offset=_signed(row_offset),
            BLOCK_N=ROWS, BLOCK_V=COLUMNS, **OPTIONS,
        )  # fmt: skip
    return out


def _device_of(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device."""
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]


def _dot_type(x: Tensor, embeddings: Tensor) -> torch.dtype:
    """What the products read. Triton's interpreter would multiply the bits of bfloat16 as integers."""
    same = x.dtype == embeddings.dtype and not (INTERPRETED and x.dtype == torch.bfloat16)
    return x.dtype if same else torch.float32


def _on(device: torch.device, word: Tensor) -> Tensor:
    """A fill, not a copy: it can be captured in a CUDA graph."""
    return word if word.device == device else torch.full((), int(word), dtype=torch.int64, device=device)


def _signed(row_offset: int) -> int:
    """The same number mod 2^32 in an int32, so that one compiled kernel takes every offset."""
    return (row_offset + 2**31) % 2**32 - 2**31


@triton.jit(do_not_specialize=["N", "V", "row_offset"])
def _step_fwd_kernel(
    x_ptr,  # [N, D]
    e_ptr,  # [V, D]
    bias_ptr,  # [V]
    mu_ptr,  # [N]
    std_ptr,  # [N], None without noise
    row_ids_ptr,  # [N], None for row_offset + i
    seed_ptr,  # []
    offset_ptr,  # []
    smoothed_ptr,  # [N, D]
    tokens_ptr,  # [N]
    noisy_tokens_ptr,  # [N]
    lse_ptr,  # [N]
    N,
    V,
    stride_xn,
    stride_ev,
    stride_sn,
    row_offset,
    inverse_variance,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    HAS_NOISE: tl.constexpr = std_ptr is not None
    ONE_TILE: tl.constexpr = BLOCK_K >= D and BLOCK_D == BLOCK_K  # the table's tile is loaded once, for both products
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n = o_n < N
    scale = tl.load(mu_ptr + o_n, mask=m_n, other=0.0) * inverse_variance
    if HAS_NOISE:
        std = tl.load(std_ptr + o_n, mask=m_n, other=0.0)
        key, row_shift = noise_key(seed_ptr, offset_ptr)
        noise_rows = _row_ids(row_ids_ptr, row_offset, o_n, m_n) + row_shift
    if ONE_TILE:
        b_x = load_tile(x_ptr, o_n, m_n, stride_xn, o_d, D).to(DOT)

    # The running maximum is the largest noisy logit itself. Logits are bounded above, but far-away rows would sum to
    # nothing without it, and to send those through again the host would have to wait for the device.
    highest = tl.full([BLOCK_N], -float("inf"), tl.float32)
    nearest = tl.full([BLOCK_N], -float("inf"), tl.float32)
    tokens = tl.zeros([BLOCK_N], tl.int32)
    noisy_tokens = tl.zeros([BLOCK_N], tl.int32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, V, BLOCK_V):
        o_v = first + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        b_e = load_tile(e_ptr, o_v, m_v, stride_ev, o_d, D).to(DOT)  # [v, d]
        if ONE_TILE:
            scores = tl.dot(b_x, tl.trans(b_e), input_precision="ieee")
        else:
            scores = score_tile(x_ptr, o_n, m_n, stride_xn, e_ptr, o_v, m_v, stride_ev, D, BLOCK_K, DOT)
        scores += tl.load(bias_ptr + o_v, mask=m_v, other=0.0)[None, :]
        logits = scale[:, None] * scores
        if HAS_NOISE:
            logits += std[:, None] * normals(first, noise_rows, key, BLOCK_V)
        scores = tl.where(m_v[None, :], scores, -float("inf"))
        logits = tl.where(m_v[None, :], logits, -float("inf"))
        nearest, tokens = keep_first_max(nearest, tokens, scores, o_v)
        before = highest
        highest, noisy_tokens = keep_first_max(highest, noisy_tokens, logits, o_v)
        weights = tl.exp(logits - highest[:, None])
        rescale = tl.exp(before - highest)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(DOT), b_e, acc * rescale[:, None], input_precision="ieee")

    at = o_n.to(tl.int64)[:, None] * stride_sn + o_d[None, :]
    tl.store(smoothed_ptr + at, acc * (1.0 / total)[:, None], mask=m_n[:, None] & (o_d < D)[None, :])
    if tl.program_id(1) == 0:
        tl.store(tokens_ptr + o_n, tokens.to(tl.int64), mask=m_n)
        tl.store(noisy_tokens_ptr + o_n, noisy_tokens.to(tl.int64), mask=m_n)
        row_constant = -0.5 * scale.to(tl.float64) * sum_of_squares(x_ptr, o_n, m_n, stride_xn, D)
        lse = row_constant + highest.to(tl.float64) + tl.log(total).to(tl.float64)
        tl.store(lse_ptr + o_n, lse.to(tl.float32), mask=m_n)


@triton.jit(do_not_specialize=["N", "V"])
def _nearest_fwd_kernel(
    x_ptr,  # [N, D]
    e_ptr,  # [V, D]
    bias_ptr,  # [V]
    tokens_ptr,  # [N]
    distance_ptr,  # [N]
    N,
    V,
    stride_xn,
    stride_ev,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    nearest = tl.full([BLOCK_N], -float("inf"), tl.float32)
    tokens = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, V, BLOCK_V):
        o_v = first + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        scores = score_tile(x_ptr, o_n, m_n, stride_xn, e_ptr, o_v, m_v, stride_ev, D, BLOCK_K, DOT)
        scores += tl.load(bias_ptr + o_v, mask=m_v, other=-float("inf"))[None, :]
        nearest, tokens = keep_first_max(nearest, tokens, scores, o_v)
    # The winner's distance directly: the scores' difference of large numbers would cancel.
    distance = squared_distance(x_ptr, o_n, stride_xn, e_ptr, tokens, stride_ev, m_n, D)
    tl.store(tokens_ptr + o_n, tokens.to(tl.int64), mask=m_n)
    tl.store(distance_ptr + o_n, distance.to(tl.float32), mask=m_n)


@triton.jit(do_not_specialize=["V"])
def _column_bias_kernel(
    e_ptr,  # [V, D]
    bias_ptr,  # [V]
    V,
    stride_ev,
    D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    bias = -0.5 * sum_of_squares(e_ptr, o_v, m_v, stride_ev, D)
    tl.store(bias_ptr + o_v, bias.to(tl.float32), mask=m_v)


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
    eps = normals(first, _row_ids(row_ids_ptr, row_offset, o_n, m_n) + row_shift, key, BLOCK_V)
    at = o_n.to(tl.int64)[:, None] * stride_on + o_v[None, :]
    tl.store(out_ptr + at, eps, mask=m_n[:, None] & (o_v < V)[None, :])


@triton.jit
def _row_ids(row_ids_ptr, row_offset, o_n, m_n):
    """[n] uint32"""
    if row_ids_ptr is not None:
        ids = tl.load(row_ids_ptr + o_n, mask=m_n, other=0).to(tl.uint32)
    else:
        ids = row_offset.to(tl.uint32) + o_n.to(tl.uint32)
    return ids

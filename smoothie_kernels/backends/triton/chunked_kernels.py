"""The kernels of chunked.py and of exact top-k: one program computes the weights, or the keys, of one tile of rows and
tokens. Strides are in elements.

Weights, gradients and keys are stored to the end of the last tile, beyond V: rows of the workspace are whole tiles
wide. With a mask of columns every number would be a store of its own, 64 of 2 bytes a thread instead of 8 of 16.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from smoothie_kernels.backends.triton.parts import (
    add_bias,
    add_noise,
    begin_noise,
    exp,
    keep_first_max,
    load_row_ids,
    load_tile,
    score_tile,
    sort_key,
)


@triton.jit(do_not_specialize=["N", "V", "F", "first_token", "row_offset"])
def chunk_fwd_kernel(
    x_ptr,  # [N, D]
    e_ptr,  # [V, D]
    col_ptr,  # [V], None for ones
    bias_ptr,  # [V]
    scale_ptr,  # [N]
    std_ptr,  # [N], None without noise
    row_ids_ptr,  # [N], None for row_offset + i
    seed_ptr,  # []
    offsets_ptr,  # [F]
    field_weights_ptr,  # [F], None for one field as it is
    ref_score_ptr,  # [N]
    highest_ptr,  # [N]
    total_ptr,  # [V / BLOCK_V, N]; this and the last four are merge.Parts
    weights_ptr,  # [N, tiles of V], None for total alone
    best_score_ptr,  # [V / BLOCK_V, N]
    best_logit_ptr,  # [V / BLOCK_V, N]
    token_ptr,  # [V / BLOCK_V, N]
    noisy_token_ptr,  # [V / BLOCK_V, N]
    N,
    V,
    F,
    first_token,
    stride_xn,
    stride_ev,
    stride_wn,
    row_offset,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, tile_v, o_n, o_v, m_n, m_v, scores, _ = _scores(
        x_ptr, stride_xn, None, None, e_ptr, stride_ev, None, None, col_ptr, bias_ptr, N, V,
        D, BLOCK_N, BLOCK_V, BLOCK_K, DOT, PRECISION,
    )  # fmt: skip
    nothing, no_token = tl.full([BLOCK_N], -float("inf"), tl.float32), tl.zeros([BLOCK_N], tl.int32)
    best_score, token = keep_first_max(nothing, no_token, scores, first_token + o_v)
    logits, _ = _logits(
        scores, scale_ptr, ref_score_ptr, std_ptr, row_ids_ptr, seed_ptr, offsets_ptr, field_weights_ptr, F,
        row_offset, o_n, m_n, first_token + tile_v * BLOCK_V,
    )  # fmt: skip
    logits = tl.where(m_v[None, :], logits, -float("inf"))
    best_logit, noisy_token = keep_first_max(nothing, no_token, logits, first_token + o_v)
    weights = exp(logits - tl.load(highest_ptr + o_n, mask=m_n, other=0.0)[:, None])
    at_part = tile_v.to(tl.int64) * N + o_n
    tl.store(total_ptr + at_part, tl.sum(weights, 1), mask=m_n)
    if weights_ptr is not None:
        at = o_n.to(tl.int64)[:, None] * stride_wn + o_v[None, :]
        tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty), mask=m_n[:, None])
        tl.store(best_score_ptr + at_part, best_score, mask=m_n)
        tl.store(best_logit_ptr + at_part, best_logit, mask=m_n)
        tl.store(token_ptr + at_part, token, mask=m_n)
        tl.store(noisy_token_ptr + at_part, noisy_token, mask=m_n)


@triton.jit(do_not_specialize=["N", "V", "F", "first_token", "row_offset"])
def chunk_keys_kernel(
    x_ptr,  # [N, D]
    e_ptr,  # [V, D]
    col_ptr,  # [V], None for ones
    bias_ptr,  # [V]
    scale_ptr,  # [N]
    std_ptr,  # [N], None without noise
    row_ids_ptr,  # [N], None for row_offset + i
    seed_ptr,  # []
    offsets_ptr,  # [F]
    field_weights_ptr,  # [F], None for one field as it is
    ref_score_ptr,  # [N]
    keys_ptr,  # [N, tiles of V] int64: parts.sort_key of logits relative to ref_score
    N,
    V,
    F,
    first_token,
    stride_xn,
    stride_ev,
    stride_kn,
    row_offset,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, tile_v, o_n, o_v, m_n, _, scores, _ = _scores(
        x_ptr, stride_xn, None, None, e_ptr, stride_ev, None, None, col_ptr, bias_ptr, N, V,
        D, BLOCK_N, BLOCK_V, BLOCK_K, DOT, PRECISION,
    )  # fmt: skip
    logits, _ = _logits(
        scores, scale_ptr, ref_score_ptr, std_ptr, row_ids_ptr, seed_ptr, offsets_ptr, field_weights_ptr, F,
        row_offset, o_n, m_n, first_token + tile_v * BLOCK_V,
    )  # fmt: skip
    keys = sort_key(logits, first_token + o_v[None, :])
    at = o_n.to(tl.int64)[:, None] * stride_kn + o_v[None, :]
    tl.store(keys_ptr + at, keys, mask=m_n[:, None])


@triton.jit(do_not_specialize=["N", "V", "F", "first_token", "row_offset"])
def chunk_bwd_kernel(
    x_ptr,  # [N, D]
    grad_ptr,  # [N, D], None where smoothed has no gradient
    e_ptr,  # [V, D]
    values_ptr,  # [V, D], None where the mean is of E, or has no gradient
    col_ptr,  # [V], None for ones
    bias_ptr,  # [V]
    scale_ptr,  # [N]
    std_ptr,  # [N], None without noise
    row_ids_ptr,  # [N], None for row_offset + i
    seed_ptr,  # []
    offsets_ptr,  # [F]
    field_weights_ptr,  # [F], None for one field as it is
    best_score_ptr,  # [N]
    log_sum_ptr,  # [N]
    shift_ptr,  # [N]: grad_lse - delta
    noisy_tokens_ptr,  # [N]: their dS are left out
    p_ptr,  # [N, tiles of V], None where not needed
    ds_ptr,  # [N, tiles of V]: times col
    row_sums_ptr,  # [V / BLOCK_V, N]
    noisy_p_ptr,  # [V / BLOCK_V, N]: P of the noisy token, 0 in tiles that are not its own
    p_sums_ptr,  # [V / BLOCK_V, N]
    token_sums_ptr,  # [N / BLOCK_N, V]
    N,
    V,
    F,
    first_token,
    stride_xn,
    stride_gn,
    stride_ev,
    stride_vv,
    stride_wn,
    row_offset,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WEIGHT: tl.constexpr = ds_ptr.dtype.element_ty
    tile_n, tile_v, o_n, o_v, m_n, m_v, scores, grad_weights = _scores(
        x_ptr, stride_xn, grad_ptr, stride_gn, e_ptr, stride_ev, values_ptr, stride_vv, col_ptr, bias_ptr, N, V,
        D, BLOCK_N, BLOCK_V, BLOCK_K, DOT, PRECISION,
    )  # fmt: skip
    logits, scale = _logits(
        scores, scale_ptr, best_score_ptr, std_ptr, row_ids_ptr, seed_ptr, offsets_ptr, field_weights_ptr, F,
        row_offset, o_n, m_n, first_token + tile_v * BLOCK_V,
    )  # fmt: skip
    logits -= tl.load(log_sum_ptr + o_n, mask=m_n, other=0.0)[:, None]
    weights = tl.where(m_v[None, :], exp(tl.where(logits > 0.0, 0.0, logits)), 0.0)  # log_sum may be rounded coarsely
    noisy = (tl.load(noisy_tokens_ptr + o_n, mask=m_n, other=-1) - first_token).to(tl.int32)
    is_noisy = noisy[:, None] == o_v[None, :]
    at_part = tile_v.to(tl.int64) * N + o_n
    tl.store(noisy_p_ptr + at_part, tl.sum(tl.where(is_noisy, weights, 0.0), 1), mask=m_n)
    tl.store(p_sums_ptr + at_part, tl.sum(weights, 1), mask=m_n)
    at = o_n.to(tl.int64)[:, None] * stride_wn + o_v[None, :]
    if p_ptr is not None:
        tl.store(p_ptr + at, weights.to(WEIGHT), mask=m_n[:, None])
    shift = tl.load(shift_ptr + o_n, mask=m_n, other=0.0)[:, None]
    grad_scores = scale[:, None] * weights * (grad_weights + shift)
    grad_scores = tl.where(is_noisy | ~m_n[:, None], 0.0, grad_scores).to(WEIGHT)
    # Sums of what the products will read, roundings included.
    rounded = grad_scores.to(tl.float32)
    if col_ptr is not None:
        col = tl.load(col_ptr + o_v, mask=m_v, other=0.0)
        tl.store(ds_ptr + at, (rounded * col[None, :]).to(WEIGHT), mask=m_n[:, None])
    else:
        tl.store(ds_ptr + at, grad_scores, mask=m_n[:, None])
    tl.store(row_sums_ptr + at_part, tl.sum(rounded, 1), mask=m_n)
    tl.store(token_sums_ptr + tile_n.to(tl.int64) * V + o_v, tl.sum(rounded, 0), mask=m_v)


@triton.jit
def _scores(
    x_ptr, stride_xn, grad_ptr, stride_gn, e_ptr, stride_ev, values_ptr, stride_vv, col_ptr, bias_ptr, N, V,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """This program's tile: its numbers, its rows and tokens, which of these there are, scores and g . values [n, v]."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n  # neighbours share a tile of the table
    tile_v = tl.program_id(0) // tiles_n
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_n, m_v = o_n < N, o_v < V
    if grad_ptr is None:
        scores = score_tile(x_ptr, o_n, m_n, stride_xn, e_ptr, o_v, m_v, stride_ev, D, BLOCK_K, DOT, PRECISION)
        grad_weights = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    else:
        scores, grad_weights = _products(
            x_ptr, stride_xn, grad_ptr, stride_gn, o_n, m_n, e_ptr, stride_ev, values_ptr, stride_vv, o_v, m_v,
            D, BLOCK_K, DOT, PRECISION,
        )  # fmt: skip
    scores = add_bias(scores, col_ptr, bias_ptr, o_v, m_v)
    return tile_n, tile_v, o_n, o_v, m_n, m_v, scores, grad_weights


@triton.jit
def _logits(
    scores, scale_ptr, ref_score_ptr, std_ptr, row_ids_ptr, seed_ptr, offsets_ptr, field_weights_ptr, F, row_offset,
    o_n, m_n, first,
):  # fmt: skip
    """scale (scores - ref_score) + std eps, [n, v], and scale [n]; first: the token of the first column."""
    scale = tl.load(scale_ptr + o_n, mask=m_n, other=0.0)
    logits = scale[:, None] * (scores - tl.load(ref_score_ptr + o_n, mask=m_n, other=0.0)[:, None])
    if std_ptr is not None:
        std = tl.load(std_ptr + o_n, mask=m_n, other=0.0)
        row_ids = load_row_ids(row_ids_ptr, row_offset, o_n, m_n)
        key, noise_rows = begin_noise(seed_ptr, offsets_ptr, field_weights_ptr, row_ids)
        logits = add_noise(logits, std, first, key, noise_rows, seed_ptr, offsets_ptr, field_weights_ptr, F)
    return logits, scale


@triton.jit
def _products(
    x_ptr, stride_xn, g_ptr, stride_gn, o_n, m_n, e_ptr, stride_ev, values_ptr, stride_vv, o_v, m_v,
    D: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x . E^T and g . values^T, [n, v] each; values: E where there are no others."""
    x_e = tl.zeros([o_n.shape[0], o_v.shape[0]], tl.float32)
    g_e = tl.zeros([o_n.shape[0], o_v.shape[0]], tl.float32)
    for first in range(0, D, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        b_e = tl.trans(load_tile(e_ptr, o_v, m_v, stride_ev, o_k, D).to(DOT))  # [k, v]
        b_x = load_tile(x_ptr, o_n, m_n, stride_xn, o_k, D).to(DOT)  # [n, k]
        x_e = tl.dot(b_x, b_e, x_e, input_precision=PRECISION)
        if values_ptr is not None:
            b_e = tl.trans(load_tile(values_ptr, o_v, m_v, stride_vv, o_k, D).to(DOT))
        b_g = load_tile(g_ptr, o_n, m_n, stride_gn, o_k, D).to(DOT)
        g_e = tl.dot(b_g, b_e, g_e, input_precision=PRECISION)
    return x_e, g_e

"""Results of parts of the vocabulary to one result: a launcher and a kernel for the step, for what its buckets have
kept, and for the nearest token.

    best = max of best_score        highest' = highest + scale (ref_score - best)        the same for best_logit
    log_sum = log sum_s total_s exp(highest'_s)        mean = sum_s acc_s exp(highest'_s - log_sum)
    lse = log_sum - scale ||x - E_nearest||^2 / 2, or log_sum + scale best where scores are not those of distances

Only scores are subtracted, and those of near tokens are near: nothing cancels in rows far from the origin. lse takes
the nearest token's distance from the table, in float64: tensor cores truncate, so all scores are off by about as much,
to the same side. Differences of scores lose most of that error; lse would keep it.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothie_kernels.backends import Statistics
from smoothie_kernels.backends.triton.launch import OPTIONS, device_of
from smoothie_kernels.backends.triton.parts import of_key, sort_key, squared_distance
from smoothie_kernels.stream import Request

PARTS = 16  # of the vocabulary, at a time
# Rows, sums, columns and warps of a program. With others ptxas spills a word or more in one type or another, on sm_80,
# sm_90 or sm_100, under Triton 3.6 or 3.9.
NEAREST = {"BLOCK_N": 8, "BLOCK_S": PARTS}
NO_SUM = {"BLOCK_N": 16, "BLOCK_S": PARTS, "BLOCK_A": 1, "BLOCK_D": 64, "num_warps": 2}
ONE_SUM = {"BLOCK_N": 8, "BLOCK_S": PARTS, "BLOCK_A": 1, "BLOCK_D": 64}
# Sums of many parts are those of few rows: the columns are shared out between programs.
MANY_SUMS = {"BLOCK_N": 8, "BLOCK_S": PARTS, "BLOCK_A": 16, "BLOCK_D": 64, "num_warps": 8}
KEYS = 2048  # of a program


class Parts(NamedTuple):
    """What S parts of the vocabulary say of every row; logits are scale (score - ref_score) + std eps.

    An empty part has highest = best_score = best_logit = -inf and total = 0; its other numbers do not matter.
    """

    ref_score: Tensor  # [S, N] fp32
    highest: Tensor  # [S, N] fp32: what was taken off the logits in total and acc
    total: Tensor  # [S, N] fp32: sum of exp(logit - highest)
    best_score: Tensor  # [S, N] fp32
    best_logit: Tensor  # [S, N] fp32
    token: Tensor  # [S, N] int32: of best_score
    noisy_token: Tensor  # [S, N] int32: of best_logit


def merge(
    inputs: Request, parts: Parts, acc: Tensor | None = None, smoothed: Tensor | None = None,
    only: Tensor | None = None,
) -> Statistics:  # fmt: skip
    """acc: fp32 [A, N, D], sums of exp(logit - highest) values of each part, or of all of them (A = 1: then they share
    ref_score and highest). Their mean goes into smoothed [N, D]: x's type, or fp32. only: bool [N], the rows that the
    parts know of, and that are written; None for all."""
    x, embeddings = inputs.x, inputs.embeddings
    n, d = x.shape
    tokens, noisy_tokens = (x.new_empty(n, dtype=torch.int64) for _ in range(2))
    lse, best_score, log_sum, best_logit = (x.new_empty(n, dtype=torch.float32) for _ in range(4))
    sums = 0 if acc is None else acc.shape[0]
    blocks = (NO_SUM, ONE_SUM, MANY_SUMS)[min(sums, 2)]
    column_blocks = triton.cdiv(d, blocks["BLOCK_D"]) if sums > 1 else 1
    ends: dict[str, Any] = dict.fromkeys(("x_ptr", "stride_xn", "e_ptr", "stride_ev"))
    if inputs.bound is None:
        ends = dict(x_ptr=x, stride_xn=x.stride(0), e_ptr=embeddings, stride_ev=embeddings.stride(0))
    with device_of(x):
        _merge_kernel[triton.cdiv(n, blocks["BLOCK_N"]), column_blocks](
            **ends, scale_ptr=inputs.scale, only_ptr=only, ref_score_ptr=parts.ref_score,
            highest_ptr=parts.highest, total_ptr=parts.total, part_score_ptr=parts.best_score,
            part_logit_ptr=parts.best_logit, token_ptr=parts.token, noisy_token_ptr=parts.noisy_token, acc_ptr=acc,
            smoothed_ptr=smoothed, tokens_ptr=tokens, noisy_tokens_ptr=noisy_tokens, lse_ptr=lse,
            best_score_ptr=best_score, log_sum_ptr=log_sum, best_logit_ptr=best_logit,
            N=n, S=parts.total.shape[0], A=sums, D=d, **blocks, **OPTIONS,
        )  # fmt: skip
    return Statistics(tokens, noisy_tokens, lse, best_score, log_sum, best_logit)


def merge_kept(inputs: Request, parts: Parts, best_score: Tensor, keys: Tensor) -> None:
    """Brings keys [N, S, KEEP, BLOCK_V] of logits relative to ref_score to best_score [N], in place."""
    size = keys[0, 0].numel()
    blocks = {"BLOCK_S": max(1, KEYS // size), "SIZE": size}
    with device_of(keys):
        _merge_kept_kernel[triton.cdiv(keys.numel() // size, blocks["BLOCK_S"]),](
            keys_ptr=keys, scale_ptr=inputs.scale, ref_score_ptr=parts.ref_score, best_score_ptr=best_score,
            N=keys.shape[0], S=keys.shape[1], **blocks, **OPTIONS,
        )  # fmt: skip


def merge_nearest(x: Tensor, embeddings: Tensor, best_score: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """best_score and token as in Parts, to tokens [N] int64 and their squared distance [N] fp32."""
    n, d = x.shape
    tokens, distance = x.new_empty(n, dtype=torch.int64), x.new_empty(n, dtype=torch.float32)
    with device_of(x):
        _merge_nearest_kernel[triton.cdiv(n, NEAREST["BLOCK_N"]),](
            x_ptr=x, e_ptr=embeddings, part_score_ptr=best_score, token_ptr=token,
            tokens_ptr=tokens, distance_ptr=distance,
            N=n, S=token.shape[0], stride_xn=x.stride(0), stride_ev=embeddings.stride(0),
            D=d, **NEAREST, **OPTIONS,
        )  # fmt: skip
    return tokens, distance


@triton.jit(do_not_specialize=["N", "S", "A"])
def _merge_kernel(
    x_ptr,  # [N, D], None where scores are not those of distances; then e_ptr as well
    e_ptr,  # [V, D]
    scale_ptr,  # [N]
    only_ptr,  # [N] bool, None for all rows
    ref_score_ptr,  # [S, N]
    highest_ptr,  # [S, N]
    total_ptr,  # [S, N]
    part_score_ptr,  # [S, N]
    part_logit_ptr,  # [S, N]
    token_ptr,  # [S, N]
    noisy_token_ptr,  # [S, N]
    acc_ptr,  # [A, N, D], None where no mean is wanted
    smoothed_ptr,  # [N, D], None where no mean is wanted
    tokens_ptr,  # [N]
    noisy_tokens_ptr,  # [N]
    lse_ptr,  # [N]
    best_score_ptr,  # [N]
    log_sum_ptr,  # [N]
    best_logit_ptr,  # [N]
    N,
    S,
    A,
    stride_xn,
    stride_ev,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    if only_ptr is not None:
        m_n = m_n & (tl.load(only_ptr + o_n, mask=m_n, other=0) != 0)
    scale = tl.load(scale_ptr + o_n, mask=m_n, other=0.0)
    best, tokens = _best_part(part_score_ptr, token_ptr, o_n, m_n, N, S, BLOCK_S)

    highest = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    best_logit = tl.full([BLOCK_N], -float("inf"), tl.float32)
    noisy_tokens = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, S, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        mask = (o_s < S)[:, None] & m_n[None, :]
        at = o_s.to(tl.int64)[:, None] * N + o_n[None, :]
        part_total = tl.load(total_ptr + at, mask=mask, other=0.0)
        part_highest, moved = _part(ref_score_ptr, highest_ptr, at, mask, scale, best)
        logits = _moved(tl.load(part_logit_ptr + at, mask=mask, other=-float("inf")), moved)
        best_logit, noisy_tokens = _keep_best_part(best_logit, noisy_tokens, logits, noisy_token_ptr + at, mask)
        before = highest
        highest = tl.maximum(highest, tl.max(part_highest, 0))
        # A block of nothing but empty parts leaves highest at -inf, and -inf - -inf is NaN.
        finite = tl.where(highest == -float("inf"), 0.0, highest)
        total = total * tl.exp(before - finite) + tl.sum(part_total * tl.exp(part_highest - finite[None, :]), 0)
    log_sum = highest + tl.log(total)

    if tl.program_id(1) == 0:
        tl.store(tokens_ptr + o_n, tokens.to(tl.int64), mask=m_n)
        tl.store(noisy_tokens_ptr + o_n, noisy_tokens.to(tl.int64), mask=m_n)
        tl.store(best_score_ptr + o_n, best, mask=m_n)
        tl.store(log_sum_ptr + o_n, log_sum, mask=m_n)
        tl.store(best_logit_ptr + o_n, best_logit, mask=m_n)
        if x_ptr is not None:
            distance = squared_distance(x_ptr, o_n, stride_xn, e_ptr, tokens, stride_ev, m_n, D)
            lse = log_sum.to(tl.float64) - 0.5 * scale.to(tl.float64) * distance
        else:
            lse = log_sum.to(tl.float64) + scale.to(tl.float64) * best.to(tl.float64)
        tl.store(lse_ptr + o_n, lse.to(tl.float32), mask=m_n)

    if acc_ptr is not None:
        for first_d in range(tl.program_id(1) * BLOCK_D, D, tl.num_programs(1) * BLOCK_D):
            o_d = first_d + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for first in range(0, A, BLOCK_A):
                o_s = first + tl.arange(0, BLOCK_A)
                mask = (o_s < A)[:, None] & m_n[None, :]
                at = o_s.to(tl.int64)[:, None] * N + o_n[None, :]
                part_highest, _ = _part(ref_score_ptr, highest_ptr, at, mask, scale, best)
                share = tl.exp(part_highest - log_sum[None, :])  # [a, n]
                b_acc = tl.load(
                    acc_ptr + at[:, :, None] * D + o_d[None, None, :],
                    mask=mask[:, :, None] & m_d[None, None, :],
                    other=0.0,
                )  # [a, n, d]
                mean += tl.sum(share[:, :, None] * b_acc, 0)
            at_mean = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
            tl.store(smoothed_ptr + at_mean, mean, mask=m_n[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["N", "S"])
def _merge_kept_kernel(
    keys_ptr,  # [N, S, SIZE]
    scale_ptr,  # [N]
    ref_score_ptr,  # [S, N]
    best_score_ptr,  # [N]
    N,
    S,
    BLOCK_S: tl.constexpr,
    SIZE: tl.constexpr,
):
    o_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)  # parts of rows: row 0's, then row 1's, ...
    row = o_s // S
    mask = row < N
    scale = tl.load(scale_ptr + row, mask=mask, other=0.0)
    ref_score = tl.load(ref_score_ptr + o_s % S * N + row, mask=mask, other=0.0)
    moved = scale * (ref_score - tl.load(best_score_ptr + row, mask=mask, other=0.0))
    at = o_s[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    logits, tokens = of_key(tl.load(keys_ptr + at, mask=mask[:, None], other=0))
    tl.store(keys_ptr + at, sort_key(_moved(logits, moved[:, None]), tokens), mask=mask[:, None])


@triton.jit(do_not_specialize=["N", "S"])
def _merge_nearest_kernel(
    x_ptr,  # [N, D]
    e_ptr,  # [V, D]
    part_score_ptr,  # [S, N]
    token_ptr,  # [S, N]
    tokens_ptr,  # [N]
    distance_ptr,  # [N]
    N,
    S,
    stride_xn,
    stride_ev,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    _, tokens = _best_part(part_score_ptr, token_ptr, o_n, m_n, N, S, BLOCK_S)
    # The winner's distance directly: the scores' difference of large numbers would cancel.
    distance = squared_distance(x_ptr, o_n, stride_xn, e_ptr, tokens, stride_ev, m_n, D)
    tl.store(tokens_ptr + o_n, tokens.to(tl.int64), mask=m_n)
    tl.store(distance_ptr + o_n, distance.to(tl.float32), mask=m_n)


@triton.jit
def _best_part(part_score_ptr, token_ptr, o_n, m_n, N, S, BLOCK_S: tl.constexpr):
    """The best score of all parts, and its token: [n] each."""
    best = tl.full([o_n.shape[0]], -float("inf"), tl.float32)
    tokens = tl.zeros([o_n.shape[0]], tl.int32)
    for first in range(0, S, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        mask = (o_s < S)[:, None] & m_n[None, :]
        at = o_s.to(tl.int64)[:, None] * N + o_n[None, :]
        scores = tl.load(part_score_ptr + at, mask=mask, other=-float("inf"))
        best, tokens = _keep_best_part(best, tokens, scores, token_ptr + at, mask)
    return best, tokens


@triton.jit
def _keep_best_part(best, tokens, values, token_at, mask):
    """The running maximum [n] and its token, after other parts [s, n]: ties to the lowest token, because parts may lie
    between each other. A NaN is never larger."""
    value = tl.max(values, 0)
    part_tokens = tl.load(token_at, mask=mask, other=0)
    token = tl.min(tl.where(values == value[None, :], part_tokens, 2147483647), 0)
    better = (value > best) | ((value == best) & (token < tokens))
    return tl.where(better, value, best), tl.where(better, token, tokens)


@triton.jit
def _part(ref_score_ptr, highest_ptr, at, mask, scale, best):
    """highest relative to the best score, and what a logit relative to ref_score lacks to that: [s, n] each."""
    moved = scale[None, :] * (tl.load(ref_score_ptr + at, mask=mask, other=0.0) - best[None, :])
    return _moved(tl.load(highest_ptr + at, mask=mask, other=-float("inf")), moved), moved


@triton.jit
def _moved(logits, moved):
    """Of an empty part, moved may be anything."""
    return tl.where(logits == -float("inf"), logits, logits + moved)

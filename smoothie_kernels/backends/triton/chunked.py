"""The step in blocks: a kernel writes the weights of some rows and tokens, and library products multiply them.

    forward     for rows, for tokens:  kernel:  W = exp(logits - ref), sums and argmaxes of the tile's rows
                                       library: acc += W . E
    backward    for tokens, for rows:  kernel:  P = exp(logits - lse), dS = scale P (g . E - delta + grad_lse)
                                       library: dx += dS . E,  dE += (P, dS)^T . (g, x)

Where the mean is of other `values`, these take the place of E in W . E and g . E, and P^T . g is their gradient. With
col the kernel writes col dS.

Beside the tables it takes inputs.workspace bytes for W, or P and dS. Every block takes the same reference of a row off
its logits, so blocks simply add; there are no atomics, and the same call gives the same bits. A row's bits may depend
on how many rows there are, because the library picks its kernels by shape.

W, P and dS are bfloat16 where x and embeddings both are, and else float32: the weights of a flat row would underflow
in float16. Sums are float32. Products of float32 numbers obey torch.set_float32_matmul_precision: as torch comes
("highest") they are exact float32 products, and TF32 only where the caller has asked torch for it.

What is said about speed here is arithmetic; README.md has what an H100 took.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from smoothie_kernels import noise
from smoothie_kernels.backends import Gradients, Grads, Saved, Statistics, Wanted, gather
from smoothie_kernels.backends.blocks import (
    HEADROOM,
    HIGHEST,
    LOWEST,
    MAX_ROWS,
    USEFUL_ROWS,
    USEFUL_TOKENS,
    add_product,
    column_bias,
    noise_on_device,
    pick_block,
    rows_of,
    slices,
)
from smoothie_kernels.backends.triton import forward, launch
from smoothie_kernels.backends.triton.chunked_kernels import chunk_bwd_kernel, chunk_fwd_kernel
from smoothie_kernels.backends.triton.launch import (
    OPTIONS,
    device_of,
    dot_type,
    noise_arguments,
    product_types,
    signed,
    stored_type,
    values_arguments,
)
from smoothie_kernels.backends.triton.merge import Parts, merge
from smoothie_kernels.backends.triton.tiles import FEW_ROWS
from smoothie_kernels.stream import Request


class Tile(NamedTuple):
    n: int  # rows of a program
    v: int  # tokens of a program
    k: int  # columns at a time
    warps: int
    stages: int


# GPU family (tiles.FAMILIES) -> bytes of a number in the products -> tile. As in tiles.py nothing has been timed, and
# `make kernels-check` compiles them.
#
# Of the forward, 128 x 256 spills 2,300 bytes. On sm_90, Tile(64, 128, 64, 4, 3) and Tile(128, 64, 64, 4, 3) take up to
# 253 registers in half as many threads, so that two programs share a processor, one's noise behind the other's
# products, for 1.5 times the traffic from L2: to be measured. The backward has two products: 128 x 128 spills 40 to 140
# bytes on sm_80 and sm_90.
FORWARD = {
    "sm_80": {2: Tile(128, 128, 64, 8, 4), 4: Tile(128, 64, 32, 8, 2)},
    "sm_90": {2: Tile(128, 128, 64, 8, 4), 4: Tile(128, 64, 32, 8, 2)},
    "sm_100": {2: Tile(128, 128, 64, 8, 4), 4: Tile(128, 64, 32, 8, 2)},
    "gfx942": {2: Tile(128, 128, 64, 8, 2), 4: Tile(128, 64, 32, 8, 2)},
}
BACKWARD = {
    "sm_80": {2: Tile(64, 128, 64, 8, 3), 4: Tile(32, 128, 32, 8, 2)},  # n = v = 64 spills 56 in fp32
    "sm_90": {2: Tile(64, 128, 64, 8, 3), 4: Tile(64, 64, 32, 8, 2)},
    "sm_100": {2: Tile(64, 128, 64, 8, 3), 4: Tile(64, 64, 32, 8, 2)},
    "gfx942": {2: Tile(64, 128, 64, 8, 2), 4: Tile(64, 64, 32, 8, 2)},
}


def pick_tile(table: dict[str, dict[int, Tile]], inputs: Request) -> Tile:
    tile = table[launch.gpu(inputs.x.device).family][dot_type(inputs.x, inputs.embeddings).itemsize]
    return tile if inputs.field_weights is None and inputs.col is None else half_the_rows(tile)


def half_the_rows(tile: Tile) -> Tile:
    """With a loop over fields the forward's tiles would spill 80 bytes for bfloat16 on sm_90; with col, up to 152 bytes
    on sm_100, 120 on sm_90 and 8 on sm_80."""
    return tile._replace(n=tile.n // 2)


# --- forward


def prefers(inputs: Request) -> bool:
    """Whether mean here should be faster than forward.mean: from arithmetic, not yet measured on any GPU.

    Up to D = 256 the streaming kernel keeps a row's mean in registers, and reads the table once for both products. A
    wider table takes it one program for every 512 columns (128 in fp32), each with scores and noise anew. Here every
    score is computed once, and the library multiplies the weights. Picoseconds a pair of row and token at D = 768 on
    an H100, whose 1,536 flop a product take 1.5 in bfloat16, 9.3 as three products of tf32, and 23 in fp32:

                streaming                             here
        bf16    (2 + 1) 1.5 = 4.6, at 25 to 60 %      1.5 at 25 to 60 %, 1.5 the library, 1.2 for 4 bytes of a weight
        fp32    (6 + 1) 9.3 = 65                      9.3 and 23 (3 where the caller allows TF32), 2.4 for 8 bytes
        fp16    as bf16                               as fp32: float16 weights would underflow, so streaming stays

    At D = 384 both take 19 in fp32 where everything runs at its peak, which the library is nearer to. A table of 16
    bits with float32 weights would need a copy. Too small a block, and the launches and the sums' traffic, 8 D bytes
    for every row and block of tokens, are no longer small beside the products.
    """
    x, embeddings = inputs.x, inputs.embeddings
    n, d = x.shape
    return (
        (embeddings.dtype == torch.float32 or x.dtype == embeddings.dtype == torch.bfloat16)
        and d > 256
        and n > FEW_ROWS
        and inputs.workspace // _weight_type(inputs).itemsize >= USEFUL_ROWS * USEFUL_TOKENS
    )


def mean(inputs: Request, tile: Tile | None = None) -> tuple[Tensor, Statistics]:
    """As forward.mean, but with no running maximum: logits are at most 6.77 std sum_f |weight_f|, so a row's
    reference is known before, and blocks add."""
    x, embeddings = inputs.x, inputs.embeddings
    (n, d), v = x.shape, embeddings.shape[0]
    tile = tile or pick_tile(FORWARD, inputs)
    weight_type = _weight_type(inputs)
    row_bytes = 4 * d + 4 * len(Parts._fields) * triton.cdiv(v, tile.v)  # its sum and its parts
    block_n, block_v = pick_block(n, v, inputs.workspace, weight_type.itemsize, row_bytes, tile)
    workspace = x.new_empty(block_n * block_v, dtype=stored_type(weight_type))
    result = inputs.result_dtype(x)
    smoothed = x.new_empty(n, d, dtype=stored_type(result))
    statistics, far = [], []
    for rows in slices(n, block_n):
        of_rows = rows_of(inputs, rows)
        parts, acc = _weigh(of_rows, block_v, workspace, tile)
        statistics.append(merge(of_rows, parts, acc[None], smoothed[rows]))
        best = parts.best_logit.amax(0) - parts.highest[0]
        far.append(~((best > LOWEST) & (best < HIGHEST)))  # NaN is far
    # Its programs return at once where no row is far: to ask first, the host would have to wait for the device.
    again = forward.redo(inputs, torch.cat(far), smoothed)
    first = (torch.cat(same) for same in zip(*statistics, strict=True))
    rest = (torch.where(torch.cat(far), b, a) for a, b in zip(first, again, strict=True))
    return smoothed.to(result), Statistics(*rest)


def _weigh(inputs: Request, block_v: int, workspace: Tensor, tile: Tile) -> tuple[Parts, Tensor]:
    """What every tile of the vocabulary says of these rows, and the sum of all weights times the table, [n, d]."""
    n, d = inputs.x.shape
    v = inputs.embeddings.shape[0]
    parts = _empty_parts(inputs, triton.cdiv(v, tile.v))
    weights = workspace[: n * block_v].view(n, block_v)
    acc = inputs.x.new_zeros(n, d, dtype=torch.float32)
    for tokens in slices(v, block_v):
        of_tiles = Parts(*(p[tokens.start // tile.v :] for p in parts))
        _launch_fwd(
            inputs, tokens, tile, ref_score_ptr=of_tiles.ref_score, highest_ptr=of_tiles.highest, weights_ptr=weights,
            total_ptr=of_tiles.total, best_score_ptr=of_tiles.best_score, best_logit_ptr=of_tiles.best_logit,
            token_ptr=of_tiles.token, noisy_token_ptr=of_tiles.noisy_token, stride_wn=block_v,
        )  # fmt: skip
        table = (inputs.embeddings if inputs.values is None else inputs.values)[tokens]
        add_product(acc, weights[:, : len(table)].to(_weight_type(inputs)), table)
    return parts, acc


def _launch_fwd(inputs: Request, tokens: slice, tile: Tile, **arguments: Any) -> None:
    tiles = triton.cdiv(len(inputs.x), tile.n) * triton.cdiv(tokens.stop - tokens.start, tile.v)
    with device_of(inputs.x):
        chunk_fwd_kernel[tiles,](**arguments_of(inputs, tokens, tile), **arguments)


def _empty_parts(inputs: Request, tiles: int) -> Parts:
    """With the reference that all tiles share: the highest score there can be, that of distance 0 or the bound, and the
    loudest noise, less HEADROOM."""
    x, n = inputs.x, inputs.x.shape[0]
    ref_score = -column_bias(x) if inputs.bound is None else inputs.bound
    highest = torch.full_like(ref_score, -HEADROOM)
    if inputs.std is not None:
        loudest = 1.0 if inputs.field_weights is None else inputs.field_weights.abs().sum()
        highest += noise.MAX_ABS_NORMAL * loudest * inputs.std
    numbers = (x.new_empty(tiles, n, dtype=torch.float32) for _ in range(3))
    tokens = (x.new_empty(tiles, n, dtype=torch.int32) for _ in range(2))
    shared = (s.expand(tiles, n).contiguous() for s in (ref_score, highest))
    return Parts(*shared, *numbers, *tokens)


# --- backward


def pick_backward_tile(inputs: Request, grads: Grads) -> Tile:
    """For lse alone whole tiles spill 8 bytes on sm_80, and with a loop over fields in float32."""
    family = launch.gpu(inputs.x.device).family
    tile = BACKWARD[family][dot_type(inputs.x, inputs.embeddings).itemsize]
    alone = grads.smoothed is None and (inputs.field_weights is not None or family == "sm_80")
    return half_the_rows(tile) if alone else tile


class _OfTable:
    """The gradient of a table, block by block; the rows of noisy tokens also before they are rounded to 16 bits."""

    def __init__(self, table: Tensor, noisy: Tensor, result: torch.dtype) -> None:
        self.noisy, self.grad = noisy, table.new_empty(table.shape, dtype=result)
        narrow = result.itemsize == 2
        self.of_noisy = table.new_zeros(len(noisy), table.shape[1], dtype=torch.float32) if narrow else None

    def begin(self, tokens: slice) -> None:
        self.tokens, self.block = tokens, torch.zeros_like(self.grad[tokens], dtype=torch.float32)

    def keep(self) -> None:
        self.grad[self.tokens] = self.block
        if self.of_noisy is not None:
            at = self.noisy - self.tokens.start
            inside = (at >= 0) & (at < len(self.block))
            self.of_noisy = torch.where(inside[:, None], self.block[at.where(inside, 0)], self.of_noisy)

    def add_to_noisy(self, change: Tensor) -> None:
        of_noisy = self.grad[self.noisy] if self.of_noisy is None else self.of_noisy
        of_noisy += gather.sum_by_token(self.noisy, change)
        self.grad[self.noisy] = of_noisy.to(self.grad.dtype)


def step_bwd(inputs: Request, saved: Saved, grads: Grads, wanted: Wanted, tile: Tile | None = None) -> Gradients:
    """As reference.step_bwd: a block of its loop in two. The dS of noisy tokens come last, from the others' sums."""
    inputs = noise_on_device(inputs)
    x, embeddings, distances = inputs.x, inputs.embeddings, inputs.bound is None
    one_table, values = inputs.values is None, embeddings if inputs.values is None else inputs.values
    (n, d), v, noisy, grad = x.shape, embeddings.shape[0], saved.noisy_tokens, grads.smoothed
    tile = tile or pick_backward_tile(inputs, grads)
    needs_p = grad is not None and (wanted.embeddings if one_table else wanted.values)
    matrices = 2 if needs_p else 1  # P and dS, or dS alone
    weight_type = _weight_type(inputs)
    weight_bytes = matrices * weight_type.itemsize
    block_n, block_v = pick_block(n, v, inputs.workspace, weight_bytes, d * weight_bytes, tile)  # its end beside them
    workspace = x.new_empty(matrices * block_n * block_v, dtype=stored_type(weight_type))
    if dot_type(x, embeddings) == torch.float32:
        saved = saved._replace(log_sum=_log_sum(inputs, saved, tile))
    shift = _shift(saved, grads, block_n)
    sums = x.new_zeros(n, d, dtype=torch.float32) if wanted.x else None
    total, noisy_p, one = (x.new_zeros(n, dtype=torch.float32) for _ in range(3))  # sums of dS, noisy tokens' P, P
    result = inputs.result_dtype(embeddings)
    of_table = _OfTable(embeddings, noisy, result) if wanted.embeddings else None
    of_values = None if one_table else _OfTable(values, noisy, result) if wanted.values else None
    of_bias = x.new_empty(v, dtype=torch.float32) if wanted.bias else None
    of_tables = [each for each in (of_table, of_values) if each is not None]
    for tokens in slices(v, block_v):
        table = embeddings[tokens]
        token_total = table.new_zeros(len(table), dtype=torch.float32)
        for each in of_tables:
            each.begin(tokens)
        for rows in slices(n, block_n):
            weights, token_sums, *row_sums = _grad_scores(
                rows_of(inputs, rows), saved_of(saved, rows), shift[rows], None if grad is None else grad[rows],
                tokens, workspace, matrices, tile,
            )  # fmt: skip
            for of_all, of_block in zip((total, noisy_p, one), row_sums, strict=True):
                of_all[rows] += of_block
            token_total += token_sums
            if sums is not None:
                add_product(sums[rows], weights[-1], table)
            if of_values is not None and grad is not None:
                add_product(of_values.block, weights[0].T, grad[rows])
            if of_table is not None and grad is not None and one_table:
                add_product(of_table.block, weights.flatten(0, 1).T, torch.cat((grad[rows], x[rows])))
            elif of_table is not None:
                add_product(of_table.block, weights[-1].T, x[rows])
        if of_table is not None and distances:
            of_table.block -= token_total[:, None] * table
        if of_bias is not None:
            of_bias[tokens] = token_total
        for each in of_tables:
            each.keep()
    table = embeddings[noisy].float()
    grad_weights = shift if grad is None else shift + (grad * values[noisy].float()).sum(1)
    grad_scores = inputs.scale * noisy_p * grad_weights
    # Of a token with all the weight of a row, dS is only the rounding of delta. All dS of a row add up to `in_all`: by
    # its share of the weight the token takes what the others leave of that, and P lacks of 1.
    share = torch.where(one == 0, 1, noisy_p / one)
    left = (1 - share) * grad_scores + share * (_in_all(inputs, grads) - total)
    through_mean = None if grad is None else (share * (1 - one))[:, None] * grad
    if of_bias is not None:
        of_bias[noisy] += gather.sum_by_token(noisy, left[:, None])[:, 0]
    if of_table is not None:
        end = x if inputs.col is None else inputs.col[noisy, None] * x
        change = left[:, None] * (end - table if distances else end)
        if through_mean is not None and one_table:
            change += through_mean
        of_table.add_to_noisy(change)
    if of_values is not None and through_mean is not None:
        of_values.add_to_noisy(through_mean)
    if sums is not None:
        end = table if inputs.col is None else inputs.col[noisy, None] * table
        sums += grad_scores[:, None] * end
        total += grad_scores
        around = saved.smoothed if distances or saved.smoothed is None else end
        sums = _grad_x(inputs, grads, sums, total, around, block_n)
    made = (None if each is None else each.grad for each in (of_table, of_values))
    return Gradients(sums, next(made), of_bias, next(made))


def saved_of(saved: Saved, rows: slice) -> Saved:
    smoothed, *of_rows = saved
    return Saved(None if smoothed is None else smoothed[rows], *(each[rows] for each in of_rows))


def _in_all(inputs: Request, grads: Grads) -> Tensor:
    """The sum of a row's dS, [N]."""
    return torch.zeros_like(inputs.scale) if grads.lse is None else inputs.scale * grads.lse


def _log_sum(inputs: Request, saved: Saved, tile: Tile) -> Tensor:
    """log_sum anew, [N], with the scores as this tile rounds them: the weights then add up to 1 to the last bit.

    Of rows far from the origin scores are large, and another tile's roundings of them, in best_score, would be a common
    factor of all weights: 1e-3 where rows have norm 4,000. 16-bit inputs do not ask for more; for them it is left out.
    """
    log_sum, v = saved.log_sum.clone(), inputs.embeddings.shape[0]
    for rows in slices(len(log_sum), MAX_ROWS):
        of_rows = rows_of(inputs, rows)
        total = log_sum.new_empty(triton.cdiv(v, tile.v), len(of_rows.x))
        _launch_fwd(
            of_rows, slice(0, v), tile, ref_score_ptr=saved.best_score[rows], highest_ptr=saved.log_sum[rows],
            total_ptr=total, weights_ptr=None, best_score_ptr=None, best_logit_ptr=None, token_ptr=None,
            noisy_token_ptr=None, stride_wn=0,
        )  # fmt: skip
        log_sum[rows] += total.sum(0).log()
    return log_sum


def _shift(saved: Saved, grads: Grads, block_n: int) -> Tensor:
    """grad_lse - delta, [N]"""
    shift = torch.zeros_like(saved.log_sum) if grads.lse is None else grads.lse.float().clone()
    if grads.smoothed is not None and saved.smoothed is not None:
        for rows in slices(len(shift), block_n):
            shift[rows] -= (grads.smoothed[rows].float() * saved.smoothed[rows].float()).sum(1)
    return shift


def _grad_x(inputs: Request, grads: Grads, sums: Tensor, total: Tensor, around: Tensor | None, block_n: int) -> Tensor:
    """Of sums [N, D] over all tokens; a row's dS add up to total [N], and lack a multiple of around [N, D]."""
    grad_x = torch.empty_like(inputs.x, dtype=inputs.result_dtype(inputs.x))
    in_all = _in_all(inputs, grads)
    for rows in slices(len(sums), block_n):
        # A row's dS add up to `in_all`, but for the rounding of delta, P and dS: add the difference back.
        part = sums[rows]
        if around is None:
            part = part * torch.where(total == 0, 1, in_all / total)[rows, None]
        else:
            part = part + (in_all - total)[rows, None] * around[rows]
        from_x = grads.lse is not None and inputs.bound is None
        grad_x[rows] = part - in_all[rows, None] * inputs.x[rows] if from_x else part
    return grad_x


def _grad_scores(
    inputs: Request, saved: Saved, shift: Tensor, grad: Tensor | None, tokens: slice, workspace: Tensor,
    matrices: int, tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(P and) col dS of a block, [matrices, n, v], the sum of dS over rows [v], its sum over tokens [n], P of the noisy
    tokens [n], whose dS are left out, 0 for those of other blocks, and the sum of P over tokens [n]."""
    x, n, v = inputs.x, len(inputs.x), tokens.stop - tokens.start
    tiles_n, tiles_v = triton.cdiv(n, tile.n), triton.cdiv(v, tile.v)
    stride = tiles_v * tile.v  # so that rows begin on 16 bytes
    weights = workspace[: matrices * n * stride].view(matrices, n, stride)
    row_sums, token_sums = x.new_empty(3, tiles_v, n, dtype=torch.float32), x.new_empty(tiles_n, v, dtype=torch.float32)
    with device_of(x):
        chunk_bwd_kernel[tiles_n * tiles_v,](
            **arguments_of(inputs, tokens, tile), grad_ptr=grad, stride_gn=0 if grad is None else grad.stride(0),
            **values_arguments(inputs, grad is not None, tokens), best_score_ptr=saved.best_score,
            log_sum_ptr=saved.log_sum, shift_ptr=shift, noisy_tokens_ptr=saved.noisy_tokens,
            p_ptr=weights[0] if matrices == 2 else None, ds_ptr=weights[-1], stride_wn=stride,
            row_sums_ptr=row_sums[0], noisy_p_ptr=row_sums[1], p_sums_ptr=row_sums[2], token_sums_ptr=token_sums,
        )  # fmt: skip
    return weights[..., :v].to(_weight_type(inputs)), token_sums.sum(0), *row_sums.sum(1)


# --- blocks and products


def arguments_of(inputs: Request, tokens: slice, tile: Tile) -> dict[str, Any]:
    """What all kernels take for a block."""
    x, embeddings = inputs.x, inputs.embeddings[tokens]
    return dict(
        x_ptr=x, e_ptr=embeddings, col_ptr=None if inputs.col is None else inputs.col[tokens],
        bias_ptr=inputs.bias[tokens], scale_ptr=inputs.scale, std_ptr=inputs.std,
        row_ids_ptr=inputs.row_ids, **noise_arguments(inputs),
        N=len(x), V=len(embeddings), first_token=tokens.start,
        stride_xn=x.stride(0), stride_ev=embeddings.stride(0),
        row_offset=signed(inputs.row_offset),
        D=x.shape[1], BLOCK_N=tile.n, BLOCK_V=tile.v, BLOCK_K=tile.k, **product_types(x, embeddings),
        num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip


def _weight_type(inputs: Request) -> torch.dtype:
    both = inputs.x.dtype == inputs.embeddings.dtype == torch.bfloat16
    return torch.bfloat16 if both else torch.float32

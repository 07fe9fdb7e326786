"""Pieces of the Triton kernels: noise, score tiles, running maxima. Shapes: [n] rows, [v] tokens, [d], [k] columns."""

# Triton has no types.
# mypy: disable-error-code="assignment,import-untyped,no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from smoothie_kernels import noise

_ROUNDS = tl.constexpr(noise.ROUNDS)
_MULTIPLIER = tl.constexpr(noise.MULTIPLIER)
_KEY_INCREMENT = tl.constexpr(noise.KEY_INCREMENT)
_LOG2_E = tl.constexpr(1.4426950408889634)
_CHUNK = tl.constexpr(32)  # columns of a row sum: float64 takes two registers each


@triton.jit
def _multiply(a, b):
    """High and low 32 bits of the product of two uint32: one wide multiply, where tl.umulhi and * would take two."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def noise_key(seed_ptr, offset_ptr):
    """(key, row_shift) of a field, two uint32: the twin of noise.noise_key, without waiting for seeds on the device."""
    seed, offset = tl.load(seed_ptr), tl.load(offset_ptr)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
    c2, c3 = tl.full((), 0x534D4F4F, tl.uint32), tl.full((), 0, tl.uint32)  # "SMOO"
    for _ in tl.static_range(_ROUNDS):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _KEY_INCREMENT, k1 + 0xBB67AE85
    return c0, c1


@triton.jit
def words(pairs, rows, key):
    """Philox2x32-10: counters [1, v / 2] and [n, 1] to two words [n, v / 2], all uint32; rows are shifted already."""
    c0, c1 = pairs, rows
    for _ in tl.static_range(_ROUNDS):
        high, low = _multiply(c0, _MULTIPLIER)
        c0, c1 = high ^ key ^ c1, low
        key = key + _KEY_INCREMENT
    return tl.broadcast(c0, c1)


@triton.jit
def box_muller(r0, r1):
    """Two standard normals: sqrt(-2 ln u) * (cos, sin)(2 pi v), u = (r0 + 1/2) / 2^32, v = (r1 + 1/2) / 2^32.

    As csrc/cpu/vector_math.h: next to u = 1 the distance 1 - u is taken from the integer, so that the small radius is
    exact. Polynomials, because tl.sin and tl.cos bring a range reduction that takes longer than all the rest.
    """
    # u < 1/2: u = 2^e f with f in [1/2, 1), r = f - 1. u >= 1/2: e = 0, r = u - 1.
    signed = r0.to(tl.int32, bitcast=True)
    upper_half = signed < 0
    folded = signed ^ (signed >> 31)  # min(r0, ~r0)
    near_end = folded.to(tl.float32) + 0.5  # 2^32 min(u, 1 - u)
    bits = near_end.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    r = tl.where(upper_half, near_end * -(2.0**-32), mantissa - 1.0)
    e = tl.where(upper_half, 0, (bits >> 23) - (126 + 32)).to(tl.float32)
    p = tl.fma(r, -1.981164228, -1.275843251)  # -2 ln(1 + r) / r on [-1/2, 0]: 9.7e-7 relative
    p = tl.fma(p, r, -1.045490328)
    p = tl.fma(p, r, 0.3750648501)
    p = tl.fma(p, r, -0.6778220121)
    p = tl.fma(p, r, 0.9996334909)
    p = tl.fma(p, r, -2.000001941)
    radius = tl.sqrt(tl.fma(e, -1.38629436, r * p))

    # angle = pi (y + half turns), y in [-1/2, 1/2]; an odd number of half turns flips both signs.
    y = ((r1 << 1) | 1).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32
    flip = (r1 + 0x40000000) & 0x80000000
    radius = (radius.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
    y2 = y * y
    cos = tl.fma(y2, 0.2196968087, -1.331880166)  # cos(pi y): 4.7e-8
    cos = tl.fma(cos, y2, 4.058411915)
    cos = tl.fma(cos, y2, -4.934792859)
    cos = tl.fma(cos, y2, 0.9999999535)
    sin = tl.fma(y2, -0.5548396415, 2.541995237)  # sin(pi y) / y: 6e-7
    sin = tl.fma(sin, y2, -5.167156414)
    sin = tl.fma(sin, y2, 3.141582561)
    return radius * cos, radius * (y * sin)


@triton.jit
def normals(first, rows, key, BLOCK_V: tl.constexpr):
    """Columns [first, first + BLOCK_V) of the field, [n, v]; first is even. rows: [n] uint32, shifted."""
    BLOCK_N: tl.constexpr = rows.shape[0]
    pairs = (first // 2 + tl.arange(0, BLOCK_V // 2)).to(tl.uint32)
    r0, r1 = words(pairs[None, :], rows[:, None], key)
    even, odd = box_muller(r0, r1)
    return tl.reshape(tl.join(even, odd), [BLOCK_N, BLOCK_V])


@triton.jit
def begin_noise(seed_ptr, offsets_ptr, field_weights_ptr, row_ids):
    """(key, rows) for add_noise: what tiles of tokens share. Of one field all; of several each tile makes its own."""
    if field_weights_ptr is None:
        key, row_shift = noise_key(seed_ptr, offsets_ptr)
        rows = row_ids + row_shift
    else:
        key, rows = tl.full((), 0, tl.uint32), row_ids
    return key, rows


@triton.jit
def add_noise(logits, std, first, key, rows, seed_ptr, offsets_ptr, field_weights_ptr, F):
    """logits [n, v] + std [n] times the weighted sum of F fields, from column `first` on; key, rows: of begin_noise.

    Field by field to the logits themselves: a tile for their sum would be one more in registers.
    """
    if field_weights_ptr is None:
        logits += std[:, None] * normals(first, rows, key, logits.shape[1])
    else:
        for f in range(F):
            of_field, row_shift = noise_key(seed_ptr, offsets_ptr + f)
            weighted = std * tl.load(field_weights_ptr + f)
            logits += weighted[:, None] * normals(first, rows + row_shift, of_field, logits.shape[1])
    return logits


@triton.jit
def load_row_ids(row_ids_ptr, row_offset, o_n, m_n):
    """[n] uint32"""
    if row_ids_ptr is not None:
        ids = tl.load(row_ids_ptr + o_n, mask=m_n, other=0).to(tl.uint32)
    else:
        ids = row_offset.to(tl.uint32) + o_n.to(tl.uint32)
    return ids


@triton.jit
def load_tile(ptr, o_row, m_row, stride, o_d, D: tl.constexpr):
    """[row, d] of a matrix whose rows are contiguous; zero beyond its columns.

    Beyond its rows it gives zero or row 0, which the caller has to mask: where D is a multiple of the tile, a mask
    would cost more than the load.
    """
    at = ptr + tl.where(m_row, o_row, 0).to(tl.int64)[:, None] * stride + o_d[None, :]
    whole: tl.constexpr = tl.constexpr(D) % o_d.shape[0] == 0
    return tl.load(at) if whole else tl.load(at, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def score_tile(
    x_ptr, o_n, m_n, stride_xn, e_ptr, o_v, m_v, stride_ev,
    D: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x . E^T, [n, v], by BLOCK_K of the columns at a time."""
    scores = tl.zeros([o_n.shape[0], o_v.shape[0]], tl.float32)
    for first in range(0, D, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        b_x = load_tile(x_ptr, o_n, m_n, stride_xn, o_k, D).to(DOT)  # [n, k]
        b_e = load_tile(e_ptr, o_v, m_v, stride_ev, o_k, D).to(DOT)  # [v, k]
        scores = tl.dot(b_x, tl.trans(b_e), scores, input_precision=PRECISION)
    return scores


@triton.jit
def add_bias(products, col_ptr, bias_ptr, o_v, m_v):
    """Scores of products x . E^T [n, v]; -inf beyond V."""
    if col_ptr is not None:
        products *= tl.load(col_ptr + o_v, mask=m_v, other=0.0)[None, :]
    products += tl.load(bias_ptr + o_v, mask=m_v, other=-float("inf"))[None, :]
    return products


@triton.jit
def exp(x):
    """e^x with the roundings of tl.exp, but 0 below 2^-126: what lies there takes tl.exp three instructions more."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def keep_first_max(best, index, values, o_v):
    """The running maximum [n] of rows and its first column, after another tile [n, v]. A NaN is never larger."""
    value = tl.max(values, 1)
    column = tl.min(tl.where(values == value[:, None], o_v[None, :], 2147483647), 1)
    better = value > best
    return tl.where(better, value, best), tl.where(better, column, index)


@triton.jit
def keep_largest(kept, kept_from, moved, logits, first):
    """A column's largest logits so far, in order, tuples of [n, v], after another tile; `first` says which tile. Equal
    ones stay in the order of their tokens. The kept are brought to the tile's reference: `moved` [n] is added."""
    tops, tops_from = (), ()
    rest, rest_from = logits, first
    for r in tl.static_range(len(kept)):
        top = kept[r] + moved[:, None]
        better = logits > top  # from the first such r on, all go one down
        tops += (tl.where(better, rest, top),)
        tops_from += (tl.where(better, rest_from, kept_from[r]),)
        rest, rest_from = tl.where(better, top, rest), tl.where(better, kept_from[r], rest_from)
    return tops, tops_from


@triton.jit
def sort_key(logits, tokens):
    """int64 that sort as logits do, in float32, and where these are equal as the lower token first: largest first."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)  # of -0.0 as of 0.0
    high = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (high << 32) | (0x7FFFFFFF - tokens).to(tl.int64)


@triton.jit
def of_key(keys):
    """The logits and tokens of sort_key."""
    high = (keys >> 32).to(tl.int32)
    return (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), 0x7FFFFFFF - keys.to(tl.int32)


@triton.jit
def squared_distance(a_ptr, o_a, stride_a, b_ptr, o_b, stride_b, m_row, D: tl.constexpr):
    """||a - b||^2 of pairs of rows in float64, [row]."""
    total = tl.zeros([o_a.shape[0], _CHUNK], tl.float64)  # added up across threads once, behind the loop
    for first in range(0, D, _CHUNK):
        o_k = first + tl.arange(0, _CHUNK)
        a = load_tile(a_ptr, o_a, m_row, stride_a, o_k, D).to(tl.float64)
        b = load_tile(b_ptr, o_b, m_row, stride_b, o_k, D).to(tl.float64)
        total += (a - b) * (a - b)
    return tl.sum(total, 1)

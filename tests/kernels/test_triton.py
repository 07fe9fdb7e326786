"""What is Triton's alone: tiles and parts of the vocabulary that do not matter, merging.

Without a GPU the kernels run in Triton's interpreter (conftest.py sets TRITON_INTERPRET before triton is imported).
"""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from cases import VARIANCE, words_of
from conftest import DEVICE

from smoothie_kernels import fused_smoothie_step, nearest_token, noise
from smoothie_kernels.backends import reference
from smoothie_kernels.backends import triton as backend
from smoothie_kernels.backends.blocks import column_bias
from smoothie_kernels.stream import Request
from smoothie_kernels.testing import FLOOR, truncation

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

from smoothie_kernels.backends import blocks  # noqa: E402
from smoothie_kernels.backends.triton import forward, launch  # noqa: E402  (they import triton)
from smoothie_kernels.backends.triton.merge import Parts, merge  # noqa: E402
from smoothie_kernels.backends.triton.tiles import FAMILIES, TILES, Tile, pick_splits, pick_tile  # noqa: E402

pytestmark = pytest.mark.usefixtures("triton_runs")
# --- tiles and parts of the vocabulary


class Step(NamedTuple):
    """What the mean's launcher gives: of StepOutputs all but the largest logits, and the very largest."""

    smoothed: torch.Tensor
    tokens: torch.Tensor
    noisy_tokens: torch.Tensor
    lse: torch.Tensor
    best_score: torch.Tensor
    log_sum: torch.Tensor
    best_logit: torch.Tensor


def step_inputs(x, table, *, mu=0.05, std=0.99, row_offset=0, field_weights=None):
    rows = torch.ones(len(x), device=x.device)
    seed, offset = words_of(3, 1, DEVICE)
    offsets = offset.reshape(1)
    if field_weights is not None:
        offsets = offset - 2**40 * torch.arange(len(field_weights), device=x.device)
        field_weights = torch.tensor(field_weights, device=x.device)
    return Request(
        x, table, column_bias(table), mu / VARIANCE * rows, std * rows if std else None, None, row_offset, seed,
        offsets, field_weights, workspace=0,
    )  # fmt: skip


def step(x, table, tile=None, splits=None, **how):
    """The launcher itself, for which a tile and the number of parts may be chosen."""
    smoothed, statistics = forward.mean(step_inputs(x, table, **how), tile, splits)
    return Step(smoothed, *statistics)


def exact_step(x, table, **how):
    inputs = step_inputs(x, table, **how)
    double = (inputs.x.double(), inputs.embeddings.double(), column_bias(table.double()))
    wide = inputs._replace(x=double[0], embeddings=double[1], bias=double[2], scale=inputs.scale.double())
    wide = wide if inputs.std is None else wide._replace(std=inputs.std.double())
    found = reference.step_fwd(wide._replace(topk=1))
    return Step(*found[:6], found.top_logits[:, 0])


def inputs(n, v, d, dtype=torch.float32):
    table = torch.randn(v, d)
    x = table[torch.randint(v, (n,))] + 0.3 * torch.randn(n, d)
    return x.to(DEVICE, dtype), table.to(DEVICE, dtype)


def relative_error(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def assert_same_step(found, expected):
    """All outputs, but for the rounding of sums in another order."""
    assert relative_error(found.smoothed, expected.smoothed) <= 2e-6
    assert_same_statistics(found, expected)


def assert_same_statistics(found, expected):
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.noisy_tokens, expected.noisy_tokens)
    for name in ("lse", "best_score", "log_sum", "best_logit"):
        exact = getattr(expected, name)
        error = ((getattr(found, name) - exact) / (1 + exact.abs())).abs().max()
        assert error <= 3e-6, f"{name}: {error}"


SHORT = Tile(32, 16, 32, 32, 4, 2)  # many tiles in little time
OTHER_TILES = {
    "small": Tile(16, 16, 16, 16, 1, 1),  # one warp; every loop goes round, D takes several programs
    "one tile": Tile(32, 64, 64, 64, 4, 2),  # the table's tile serves both products
    "ragged slices": Tile(16, 128, 32, 32, 4, 3),
    "wider than D": Tile(32, 16, 32, 128, 4, 2),
    "all of V": Tile(16, 256, 16, 32, 8, 1),
}


@pytest.mark.parametrize("std", [0.99, 0.0])
@pytest.mark.parametrize("tile", OTHER_TILES)
def test_tiles_do_not_matter(tile, std):
    x, table = inputs(18, 75, 40)
    found = step(x, table, OTHER_TILES[tile], std=std)
    assert_same_step(found, exact_step(x, table, std=std))
    bias = column_bias(table)
    tokens, distance = forward.nearest_fwd(x, table, bias, OTHER_TILES[tile])
    assert torch.equal(tokens, found.tokens)
    torch.testing.assert_close(distance, forward.nearest_fwd(x, table, bias)[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("tile", "splits"), [(None, None), (SHORT, 2), (OTHER_TILES["one tile"], 3)])
def test_sum_of_fields_in_all_tiles(tile, splits):
    x, table = inputs(18, 75, 40)
    how = {"field_weights": [0.7, -1.1, 0.0, 0.4], "row_offset": 2**32 - 7}
    assert_same_step(step(x, table, tile, splits, **how), exact_step(x, table, **how))


# Of 5 tiles: 7 parts leave some empty.
@pytest.mark.parametrize(
    ("splits", "mu"), [(1, 0.05), (2, 0.05), (3, 0.05), (3, 0.0), (3, -0.4), (7, 0.05), (7, 0.0), (7, -0.4)]
)
def test_parts_of_the_vocabulary_do_not_matter(splits, mu):
    x, table = inputs(18, 75, 30)
    found, exact = step(x, table, SHORT, splits, mu=mu), exact_step(x, table, mu=mu)
    assert_same_step(found, exact)
    assert_same_statistics(forward.statistics(step_inputs(x, table, mu=mu), SHORT, splits), found)
    bias = column_bias(table)
    tokens, distance = forward.nearest_fwd(x, table, bias, SHORT, splits)
    assert torch.equal(tokens, exact.tokens)
    assert torch.equal(distance, forward.nearest_fwd(x, table, bias, SHORT, 1)[1])


@pytest.mark.parametrize(("tile", "splits"), [(None, None), (SHORT, 1), (SHORT, 4), (OTHER_TILES["one tile"], 2)])
@pytest.mark.parametrize("far", [1e2, 1e3])
def test_rows_far_from_the_origin(tile, splits, far):
    """lse goes up to 4e6 there, where a step of float32 is 0.25; log_sum keeps what decides between tokens."""
    x, table = inputs(18, 75, 16)
    found, exact = (f(far * x, table, *how, mu=0.684) for f, how in ((step, (tile, splits)), (exact_step, ())))
    assert (found.log_sum - exact.log_sum).abs().max() <= 5e-6 * far
    assert ((found.best_score - exact.best_score) / exact.best_score).abs().max() <= 1e-6
    assert torch.equal(found.tokens, exact.tokens)
    assert relative_error(found.smoothed, exact.smoothed) <= 1e-6 * far


@pytest.mark.parametrize("splits", [1, 4])
def test_near_tokens_far_from_the_origin(splits):
    """Scores of 65,536 and a little, all exact in float32: what they differ by must come through whole."""
    x, table = (torch.randint(-8, 9, (rows, 16), device=DEVICE) / 8 for rows in (18, 75))
    x[:, 0], table[:, 0] = 2.0**16, 1.0
    found, exact = step(x, table, SHORT, splits, mu=0.684), exact_step(x, table, mu=0.684)
    assert_same_step(found, exact)
    assert (found.log_sum - exact.log_sum).abs().max() <= 1e-5


@pytest.mark.parametrize(("tile", "splits"), [(None, None), (SHORT, 4), *((t, 1) for t in OTHER_TILES.values())])
def test_ties_within_and_between_tiles(tile, splits):
    """Five tokens, thirty times over: the first of them wins."""
    x, table = inputs(18, 5, 24)
    found = step(x, table.repeat(30, 1), tile, splits, std=0.0)
    nearest = torch.cdist(x.double(), table.double()).argmin(1)
    assert torch.equal(found.tokens, nearest)
    assert torch.equal(found.noisy_tokens, nearest)
    tokens, _ = forward.nearest_fwd(x, table.repeat(30, 1), column_bias(table.repeat(30, 1)), tile, splits)
    assert torch.equal(tokens, nearest)


def test_ties_between_parts():
    """Parts have every fourth tile: of the equal tokens 20 and 66 the higher one is in the first part."""
    x, table = inputs(18, 75, 24)
    table[66] = table[20]
    x[:] = table[20] + 0.1 * torch.randn_like(x)
    found = step(x, table, SHORT, 4, std=0.0)
    assert (found.tokens == 20).all()
    assert (found.noisy_tokens == 20).all()
    assert (forward.nearest_fwd(x, table, column_bias(table), SHORT, 4)[0] == 20).all()


def test_all_tokens_tie():
    """mu = 0 without noise: every logit is the same, in all parts."""
    x, table = inputs(18, 75, 24)
    found = step(x, table, SHORT, 4, mu=0.0, std=0.0)
    assert not found.noisy_tokens.any()
    assert (found.log_sum - math.log(75)).abs().max() <= 1e-6


def test_bits_do_not_depend_on_the_batch():
    """Few rows have one tile; with more processors the parts of the vocabulary would depend on the number of rows."""
    x, table = inputs(21, 150, 40)
    whole = step(x, table, splits=3, row_offset=100)
    for first, last in ((0, 1), (5, 21), (20, 21)):
        part = step(x[first:last], table, splits=3, row_offset=100 + first)
        assert all(torch.equal(p, w[first:last]) for p, w in zip(part, whole, strict=True))


@pytest.mark.parametrize("kind", TILES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_type_and_width_has_a_tile(kind, family):
    for dtype in backend.DTYPES:
        for width in (1, 3, 64, 65, 384, 768, 1024, 4096):
            tile = pick_tile(kind, family, dtype, width)
            assert all(size & (size - 1) == 0 and size >= 16 for size in tile[:4])


def tiles_of(kind):
    """(type, tile): of every GPU in float32 in the interpreter, which has as much shared memory as anyone wants; on a
    GPU its own, in the types that they are for."""
    families = FAMILIES if launch.INTERPRETED else [launch.gpu(torch.device("cuda")).family]
    rows = [row for of in (kind, f"{kind}, few rows") for family in families for row in TILES[of][family]]
    types = {4: torch.float32, 2: torch.float32 if launch.INTERPRETED else torch.bfloat16}
    return sorted({(types[size], tile) for size, _, tile in rows}, key=str)


@pytest.mark.parametrize(("dtype", "tile"), tiles_of("mean"), ids=str)
def test_every_tile_of_the_table(dtype, tile):
    x, table = inputs(5, tile.v + 3, 37, dtype)
    found, exact = step(x, table, tile, 2), exact_step(x, table)
    assert relative_error(found.smoothed, exact.smoothed) <= FLOOR[dtype]
    assert_same_statistics(found, exact)


@pytest.mark.parametrize(("dtype", "tile"), tiles_of("statistics"), ids=str)
def test_every_tile_of_statistics(dtype, tile):
    x, table = inputs(5, tile.v + 3, 37, dtype)
    exact = exact_step(x, table)
    assert_same_statistics(forward.statistics(step_inputs(x, table), tile, 2), exact)
    assert torch.equal(forward.nearest_fwd(x, table, column_bias(table), tile, 2)[0], exact.tokens)


def test_number_of_parts():
    """None is empty, one processor gets one, and there are programs for all processors where the rows are few."""
    tile = Tile(64, 32, 64, 512, 8, 2)
    for n, v, processors in ((1, 30_522, 132), (64, 100, 132), (700, 28_996, 108), (16_384, 28_996, 132), (5, 1, 9)):
        blocks, tiles = -(-n // tile.n) * 2, -(-v // tile.v)
        splits = pick_splits(n, v, 2, tile, processors)
        each = -(-tiles // splits)
        assert (splits - 1) * each < tiles <= splits * each
        assert splits == 1 or blocks * splits <= processors
        assert splits >= min(tiles, processors // blocks) / 2
        assert pick_splits(n, v, 2, tile, 1) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "v", "d"), [(35, 70, 384), (2, 40, 600)])
def test_wide(dtype, n, v, d):
    """The tiles of wide tables: the first product in parts, and more columns than one program has."""
    x, table = inputs(n, v, d, dtype)
    table[: v // 2] = table[:1] + 0.05 * torch.randn(v // 2, d).to(x)  # some weight on many tokens
    x[0] = table[0]
    found = fused_smoothie_step(x, table, 0.3, 0.9, seed=1, backend="triton")
    exact = fused_smoothie_step(x.double(), table.double(), 0.3, 0.9, seed=1, backend="reference")
    assert relative_error(found.smoothed, exact.smoothed) <= {4: 2e-6, 2: torch.finfo(dtype).eps / 2}[dtype.itemsize]
    assert torch.equal(found.tokens, exact.tokens)
    assert torch.equal(found.noisy_tokens, exact.noisy_tokens)
    allowed = 1e-5 * (1 + exact.lse.abs()) + truncation(x, table, torch.full_like(exact.lse, 0.3))
    assert ((found.lse - exact.lse).abs() <= allowed).all()


# --- merging


def parts_of(x, table, mu, bounds, shared):
    """Parts and sums of stretches of the vocabulary, in float64; with one reference for all, or each its own."""
    scale, eps = mu / 1.5**2, noise.gaussian(len(x), len(table), seed=3, offset=1).to(x.device).double()
    scores = x.double() @ table.double().T - table.double().square().sum(1) / 2
    parts, sums = [], []
    for first, last in pairwise(bounds):
        score, token = scores[:, first:last].max(1)
        ref = scores[:, bounds[0]] if shared else score
        logits = scale * (scores[:, first:last] - ref[:, None]) + 0.99 * eps[:, first:last]
        best_logit, noisy_token = logits.max(1)
        highest = torch.full_like(ref, 3.0) if shared else best_logit
        weights = (logits - highest[:, None]).exp()
        parts.append((ref, highest, weights.sum(1), score, best_logit, token + first, noisy_token + first))
        sums.append(weights @ table[first:last].double())
    stacked = [torch.stack(t) for t in zip(*parts, strict=True)]
    return Parts(*(t.float() for t in stacked[:5]), *(t.int() for t in stacked[5:])), torch.stack(sums).float()


def empty_at(position, parts, acc, ref_score):
    """The same with an empty part more."""
    values = (ref_score, -torch.inf, 0.0, -torch.inf, -torch.inf, 0, 0)
    pieces = ((t[:position], torch.full_like(t[:1], v), t[position:]) for t, v in zip(parts, values, strict=True))
    return Parts(*map(torch.cat, pieces)), torch.cat((acc[:position], torch.zeros_like(acc[:1]), acc[position:]))


def merged(inputs, parts, acc):
    smoothed = torch.empty(inputs.x.shape, device=inputs.x.device)
    return Step(smoothed, *merge(inputs, parts, acc, smoothed))


BOUNDS = [0, 16, 17, 30, 60, 75]


@pytest.mark.parametrize("mu", [0.3, 0.0, -0.4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("n", [7, 70])
def test_merge(n, shared, mu):
    """70 rows: programs of several rows. Shared reference: one sum for all parts."""
    x, table = inputs(n, 75, 40)
    parts, acc = parts_of(x, table, mu, BOUNDS, shared)
    acc = acc.sum(0, keepdim=True) if shared else acc
    found = merged(step_inputs(x, table, mu=mu), parts, acc)
    exact = exact_step(x, table, mu=mu)
    assert_same_step(found, exact)


@pytest.mark.parametrize(
    ("ref_score", "mu"),
    [(-torch.inf, 0.3), (-torch.inf, 0.0), (-torch.inf, -0.4), (0.0, 0.3), (3e38, -0.4), (torch.nan, 0.3)],
)
def test_empty_parts_change_nothing(ref_score, mu):
    x, table = inputs(7, 75, 40)
    how = step_inputs(x, table, mu=mu)
    parts, acc = parts_of(x, table, mu, BOUNDS, False)
    expected = merged(how, parts, acc)
    for position in (0, 2, 5):
        assert_same_step(merged(how, *empty_at(position, parts, acc, ref_score)), expected)
    for _ in range(33):  # more parts than a program takes at a time, the first of them all empty
        parts, acc = empty_at(0, parts, acc, ref_score)
    assert_same_step(merged(how, parts, acc), expected)


def test_merge_takes_lse_from_the_table():
    """A change of all scores by the same number, as truncation on tensor cores makes it, changes no lse."""
    x, table = inputs(7, 75, 40)
    how = step_inputs(x, table, mu=0.3)
    parts, acc = parts_of(x, table, 0.3, BOUNDS, False)
    less = parts._replace(ref_score=parts.ref_score - 0.5, best_score=parts.best_score - 0.5)
    torch.testing.assert_close(merged(how, less, acc).lse, merged(how, parts, acc).lse, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_that_are_not_done_again_are_not_read(dtype):
    """Of a program without such rows the parts are what memory held: any token, also one that the table lacks. So
    nothing is written of other rows: memory is poisoned."""
    x, table = inputs(70, 75, 40, dtype)
    only = torch.arange(70, device=x.device) % 64 == 3
    found = Step(x.clone(), *forward.redo(step_inputs(x, table), only, x.clone()))
    exact = exact_step(x, table)
    assert torch.equal(found.tokens[only], exact.tokens[only])
    assert (found.tokens[~only] == torch.iinfo(torch.int64).max).all()
    assert ((found.lse - exact.lse)[only].abs() <= 1e-5 * (1 + exact.lse[only].abs())).all()


def test_more_parts_than_a_program_takes_at_a_time():
    x, table = inputs(7, 75, 40)
    parts, acc = parts_of(x, table, 0.05, range(76), False)
    assert_same_step(merged(step_inputs(x, table), parts, acc), exact_step(x, table))


def test_merge_ties_go_to_the_lowest_token():
    x, table = inputs(7, 5, 24)
    parts, acc = parts_of(x, table, 0.3, [0, 5], False)
    copies = [Parts(*parts[:5], *(t + 5 * copy for t in parts[5:])) for copy in torch.randperm(40).tolist()]
    all_parts = Parts(*(torch.cat(same) for same in zip(*copies, strict=True)))
    found = merged(step_inputs(x, table, mu=0.3), all_parts, acc.repeat(40, 1, 1))
    assert torch.equal(found.tokens, parts.token[0].long())
    assert torch.equal(found.noisy_tokens, parts.noisy_token[0].long())


@pytest.mark.parametrize(
    ("bad", "mu"), [(torch.nan, 0.3), (torch.inf, 0.3), (torch.inf, 0.0), (torch.inf, -0.4), (3e38, 0.3), (3e38, -0.4)]
)
def test_non_finite_rows_stay_alone_in_parts(bad, mu):
    x, table = inputs(18, 75, 24)
    expected = step(x, table, SHORT, 3, mu=mu)
    x[3, 5] = bad
    found = step(x, table, SHORT, 3, mu=mu)
    others = torch.arange(18, device=x.device) != 3
    assert found.smoothed[3].isnan().all()
    assert found.lse[3].isnan()
    assert 0 <= found.tokens[3] < 75
    assert 0 <= found.noisy_tokens[3] < 75
    assert all(torch.equal(f[others], e[others]) for f, e in zip(found, expected, strict=True))


# --- memory around the tensors


@pytest.mark.parametrize(("n", "v", "d"), [(1, 1, 1), (1, 17, 5), (33, 129, 65)])
def test_reads_and_writes_stay_inside(n, v, d):
    """NaN around x, the table and the noise reaches no output, and what lies around the noise stays."""
    around = torch.full((v + 2, d + 3), torch.nan, device=DEVICE)
    table, x_around = around[1:-1, 1:-2], torch.full((n + 2, d), torch.nan, device=DEVICE)
    table.copy_(torch.randn(v, d))
    x = x_around[1:-1].copy_(torch.randn(n, d))
    assert all(bool(t.isfinite().all()) for t in step(x, table))
    found, expected = nearest_token(x, table, backend="triton"), nearest_token(x, table.clone(), backend="reference")
    assert torch.equal(found.tokens, expected.tokens)

    field = torch.full((n + 2, v + 3), torch.nan, device=DEVICE)
    forward.gaussian(field[1:-1, 1:-2], None, 2**32 - n, *words_of(5, 6, DEVICE))
    inside = noise.normals(torch.arange(2**32 - n, 2**32, device=DEVICE), 0, v, 5, 6)
    assert (field[1:-1, 1:-2] - inside).abs().max() <= 5e-5
    assert int(field.isnan().sum()) == field.numel() - n * v


def test_seed_and_offset_may_be_on_the_device():
    x, table = inputs(5, 60, 16)
    numbers = fused_smoothie_step(x, table, 0.05, 0.99, seed=-7, offset=2**40, backend="triton")
    seed, offset = words_of(-7, 2**40, DEVICE)
    tensors = fused_smoothie_step(x, table, 0.05, 0.99, seed=seed, offset=offset, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(numbers[:4], tensors[:4], strict=True))


def test_numbers_are_brought_to_the_device():
    """One by one, so that a CUDA graph can hold it; what stands there is taken as it is."""
    for numbers in (torch.tensor(-(2**63) + 1), torch.tensor([2**40, -1, 0]), torch.tensor([0.1, -2.5])):
        there = blocks.on_device(torch.device("meta"), numbers)
        assert (there.shape, there.dtype, there.device.type) == (numbers.shape, numbers.dtype, "meta")
        assert blocks.on_device(numbers.device, numbers) is numbers
        assert torch.equal(blocks.fill_like(numbers, numbers.device), numbers)

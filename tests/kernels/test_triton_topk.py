"""Triton's largest logits, exact and of buckets: their keys, their order, blocks and parts; means of a few tokens."""

import pytest
import torch
from cases import VARIANCE
from conftest import DEVICE
from test_triton import tiles_of

from smoothie_kernels import noise
from smoothie_kernels.backends import StepOutputs, reference
from smoothie_kernels.backends import triton as backend
from smoothie_kernels.backends.blocks import column_bias
from smoothie_kernels.recall import KEEPS, STEP, Buckets
from smoothie_kernels.stream import Request

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

from smoothie_kernels.backends import largest  # noqa: E402
from smoothie_kernels.backends.triton import chunked, forward, launch, parts, topk  # noqa: E402  (they import triton)
from smoothie_kernels.backends.triton.chunked import Tile as BlockTile  # noqa: E402
from smoothie_kernels.backends.triton.tiles import Tile, pick_bucket_splits  # noqa: E402

pytestmark = pytest.mark.usefixtures("triton_runs")
SHORT = Tile(16, 64, 16, 16, 4, 2)
BLOCKS = BlockTile(16, 64, 16, 1, 1)
SOME_BUCKETS = [Buckets(128, 1), Buckets(256, 1), Buckets(128, 2), Buckets(384, 2), Buckets(128, 4)]


@pytest.fixture(autouse=True)
def one_processor(monkeypatch):
    """So that buckets are the reference's: for more processors they are finer."""
    gpu = launch.gpu
    monkeypatch.setattr(launch, "gpu", lambda device: gpu(device)._replace(processors=1))


@pytest.fixture
def pick(monkeypatch):
    """Has both backends take these buckets, where the recall is not 1."""

    def of(buckets):
        for module in (largest, reference):
            monkeypatch.setattr(
                module, "pick_buckets", lambda v, k, recall_target: buckets if recall_target < 1 else None
            )

    return of


def inputs(
    n, v, d=24, *, mu=0.3, std=0.99, dtype=torch.float32, workspace=2**28, mean=False, field_weights=None, **how
):
    table = torch.randn(v, d)
    x = (table[torch.randint(v, (n,))] + 0.3 * torch.randn(n, d)).to(DEVICE, dtype)
    rows = torch.ones(n, device=DEVICE)
    seed, offsets = torch.tensor(3, device=DEVICE), torch.tensor([1], device=DEVICE)
    if field_weights is not None:
        offsets = 1 - 2**40 * torch.arange(len(field_weights), device=DEVICE)
        field_weights = torch.tensor(field_weights, device=DEVICE)
    step = Request(
        x, table.to(DEVICE, dtype), rows, mu / VARIANCE * rows, std * rows if std else None, None, 2**32 - 5, seed,
        offsets, field_weights, workspace, mean, **how,
    )  # fmt: skip
    return step._replace(bias=column_bias(step.embeddings))


def in_double(how):
    std = None if how.std is None else how.std.double()
    table = how.embeddings.double()
    return how._replace(x=how.x.double(), embeddings=table, bias=column_bias(table), scale=how.scale.double(), std=std)


def exact_step(how):
    return reference.step_fwd(in_double(how))


def all_logits(how):
    """In float64, relative to the nearest token's score, [N, V]."""
    wide = in_double(how)
    scores = wide.x @ wide.embeddings.T + wide.bias
    ids = (how.row_offset + torch.arange(len(how.x), device=DEVICE)) % 2**32
    eps = noise.normals(ids, 0, scores.shape[1], int(how.seed), int(how.offset)).double()
    std = 0.0 if wide.std is None else wide.std[:, None]
    return wide.scale[:, None] * (scores - scores.amax(1, keepdim=True)) + std * eps


def assert_same(found, expected, tolerance=1e-5):
    """The same tokens in the same order; logits and sums but for rounding."""
    assert torch.equal(found.tokens, expected.tokens)
    assert_same_order(found.top_tokens, expected, tolerance)
    assert torch.equal(found.noisy_tokens, found.top_tokens[:, 0])
    for name in ("lse", "best_score", "log_sum", "top_logits"):
        exact = getattr(expected, name)
        error = ((getattr(found, name) - exact) / (1 + exact.abs())).abs().max()
        assert error <= tolerance, f"{name}: {error}"


def assert_same_order(tokens, expected, tolerance=1e-5):
    """Distinct tokens, each in its place or in that of a logit which differs by rounding alone."""
    assert (tokens.sort().values.diff() > 0).all()
    same = tokens[:, :, None] == expected.top_tokens[:, None, :]
    last = expected.top_tokens.shape[1] - 1  # of a token that is not among them
    place = torch.where(same.any(2), same.int().argmax(2), last)
    moved = expected.top_logits.gather(1, place) - expected.top_logits
    assert (moved.abs() <= 2 * tolerance * (1 + expected.top_logits.abs())).all()


# --- keys


@triton.jit
def _key_kernel(logits_ptr, tokens_ptr, keys_ptr, logits_back_ptr, tokens_back_ptr, N: tl.constexpr):
    o_n = tl.arange(0, N)
    keys = parts.sort_key(tl.load(logits_ptr + o_n), tl.load(tokens_ptr + o_n))
    logits, tokens = parts.of_key(keys)
    tl.store(keys_ptr + o_n, keys)
    tl.store(logits_back_ptr + o_n, logits)
    tl.store(tokens_back_ptr + o_n, tokens)


def test_keys_sort_as_logits_do_and_lower_tokens_come_first():
    values = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf, 1.5, 1.0000001]
    logits = torch.tensor(values).repeat(22)[:256].to(DEVICE)
    tokens = torch.randperm(256, dtype=torch.int32).to(DEVICE)
    tokens[:2] = torch.tensor([2**31 - 1, 2**31 - 2], device=DEVICE)
    keys = torch.empty(256, dtype=torch.int64, device=DEVICE)
    back = torch.empty_like(logits), torch.empty_like(tokens)
    _key_kernel[(1,)](logits, tokens, keys, *back, N=256)
    pairs = list(zip((-logits).tolist(), tokens.tolist(), strict=True))
    order = sorted(range(256), key=lambda i: pairs[i])
    assert keys.argsort(descending=True).tolist() == order
    for found in (back, largest.of_keys(keys)):
        assert torch.equal(found[0], logits)
        assert torch.equal(found[1], tokens.to(found[1].dtype))


@triton.jit
def _keep_kernel(logits_ptr, moved_ptr, kept_ptr, from_ptr, TILES: tl.constexpr, V: tl.constexpr, KEEP: tl.constexpr):
    o_v = tl.arange(0, V)[None, :]
    kept = (tl.full([1, V], -float("inf"), tl.float32),) * KEEP
    kept_from = (tl.zeros([1, V], tl.int32),) * KEEP
    for t in range(TILES):
        moved = tl.load(moved_ptr + t + tl.arange(0, 1))
        kept, kept_from = parts.keep_largest(kept, kept_from, moved, tl.load(logits_ptr + t * V + o_v), t * V)
    for r in tl.static_range(KEEP):
        tl.store(kept_ptr + r * V + o_v, kept[r])
        tl.store(from_ptr + r * V + o_v, kept_from[r])


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_columns_keep_their_largest_in_order(keep):
    """Of few different values, so that most are equal to another; NaN is never kept."""
    logits = torch.randint(3, (9, 32)).float().to(DEVICE)
    logits[4, 5] = torch.nan
    moved = torch.tensor([0.0, 0, -1, 0, 0, 2, 0, 0, -1], device=DEVICE)
    kept = torch.empty(keep, 32, device=DEVICE)
    kept_from = torch.empty(keep, 32, dtype=torch.int32, device=DEVICE)
    _keep_kernel[(1,)](logits, moved, kept, kept_from, TILES=9, V=32, KEEP=keep)
    later = moved.flip(0).cumsum(0).flip(0)[:, None] - moved[:, None]
    values = torch.where(logits.isnan(), -torch.inf, logits + later)
    values, order = values.sort(dim=0, descending=True, stable=True)
    assert torch.equal(kept, values[:keep])
    assert torch.equal(kept_from, 32 * order[:keep].int())


# --- exact


@pytest.mark.parametrize(
    ("n", "v", "k", "mu", "std"),
    [
        (1, 1, 1, 0.3, 0.99),
        (1, 300, 7, 0.3, 0.99),
        (37, 150, 5, 0.3, 0.99),
        (5, 140, 140, 0.05, 0.99),
        (5, 300, 1, 0.02, 0.99),
        (5, 140, 20, 0.3, 0.0),
        (5, 140, 20, -0.4, 0.99),
        (5, 140, 20, 0.0, 0.99),
    ],
)
def test_exact_against_float64(n, v, k, mu, std):
    how = inputs(n, v, mu=mu, std=std, topk=k)
    found = backend.step_fwd(how)
    assert found.smoothed.shape == (n, 0)
    assert_same(found, exact_step(how))


@pytest.mark.parametrize("buckets", [None, Buckets(128, 2)])
def test_sum_of_fields(buckets, pick):
    how = with_buckets(inputs(7, 300, topk=9, field_weights=[0.7, -1.1, 0.0, 0.4]), buckets, pick)
    assert_same(backend.step_fwd(how), exact_step(how))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recall_target", [1.0, 0.9])
def test_16_bits(dtype, recall_target):
    how = inputs(5, 300, dtype=dtype, topk=9, recall_target=recall_target)
    found = backend.step_fwd(how)
    assert found.smoothed.dtype == dtype
    assert_same(found, exact_step(how))


@pytest.mark.parametrize("workspace", [0, 2**14, 2**28])
@pytest.mark.parametrize("k", [3, 70, 150])
def test_blocks_do_not_matter(workspace, k, monkeypatch):
    """Of rows and of tokens; no block takes more than the caller allows, or than one tile."""
    how = inputs(37, 150, topk=k)
    expected = backend.step_fwd(how)
    made = []

    def launch(tile, rows, tokens, *rest):
        made.append(len(rows.x) * (tokens.stop - tokens.start + k))
        return whole(tile, rows, tokens, *rest)

    whole = topk._launch_keys
    monkeypatch.setattr(topk, "_launch_keys", launch)
    keys = topk.exact(how._replace(workspace=workspace), expected.best_score, BLOCKS)
    logits, tokens = largest.of_keys(keys)
    assert_same_order(tokens, expected)
    assert (logits - expected.top_logits).abs().max() <= 1e-5
    assert 8 * max(made) <= max(workspace, 8 * BLOCKS.n * (BLOCKS.v + k))
    assert len(made) > 1 or workspace == 2**28


# --- exact, of buckets where these are certain


@pytest.fixture
def done_again(monkeypatch):
    """The rows, by their number in x, that `exact` is asked for."""
    asked, exact = [], topk.exact

    def spy(inputs, *rest):
        asked.append(inputs)
        return exact(inputs, *rest)

    monkeypatch.setattr(topk, "exact", spy)
    return asked


@pytest.mark.parametrize("given", [False, True], ids=["row_offset", "row_ids"])
@pytest.mark.parametrize("n", [3, 40])
def test_only_rows_without_certificate_are_done_again(n, given, done_again):
    """Ten tokens of one bucket are near to row 1: it keeps four of them."""
    how = inputs(n, 2100, mu=0.3, std=0.5, topk=20)
    how.embeddings[7:1287:128] = how.x[1] + 0.05 * torch.randn(10, 24, device=DEVICE)
    how = how._replace(bias=column_bias(how.embeddings))
    if given:
        how = how._replace(row_ids=torch.randint(2**32, (n,), device=DEVICE), row_offset=0)
    found = backend.step_fwd(how)
    assert_same(found, exact_step(how))
    assert len(done_again) == 1
    rows = [int((how.x == row).all(1).nonzero()[0, 0]) for row in done_again[0].x]
    assert 1 in rows
    assert len(rows) <= 1 + n // 10  # hardly a row at random


def test_certain_rows_are_not_done_again(done_again):
    how = inputs(5, 2100, mu=0.3, topk=20)
    assert_same(backend.step_fwd(how), exact_step(how))
    assert done_again == []


def test_a_cuda_graph_is_not_asked(done_again, monkeypatch):
    monkeypatch.setattr(largest, "_may_wait", lambda x: False)
    how = inputs(5, 2100, mu=0.3, topk=20)
    assert_same(backend.step_fwd(how), exact_step(how))
    assert [len(asked.x) for asked in done_again] == [5]


def test_certifying_buckets():
    assert largest.certifying_buckets(30522, 64) == Buckets(512, 4)
    assert largest.certifying_buckets(30522, 16) == Buckets(128, 4)
    assert largest.certifying_buckets(30522, 1) == Buckets(128, 4)
    assert [largest.certifying_buckets(v, k) for v, k in ((30522, 256), (1000, 8))] == [None] * 2
    for k in (8, 64, 100):
        buckets = largest.certifying_buckets(30522, k).buckets
        in_bucket = torch.rand(500, 30522).topk(k).indices % buckets
        full = torch.nn.functional.one_hot(in_bucket, buckets).sum(1).amax(1) >= 4
        assert full.float().mean() <= 0.01 + 4 * 0.1 / 500**0.5


# --- of buckets


@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("buckets", SOME_BUCKETS, ids=str)
def test_buckets_are_those_of_the_reference(n, buckets, pick):
    """V is no multiple of a tile, nor of the buckets; 40 rows take another tile than 3."""
    how = inputs(n, 777, mu=0.05, topk=60, recall_target=0.5)
    pick(buckets)
    found = backend.step_fwd(how)
    assert_same(found, exact_step(how))
    everything = exact_step(how._replace(recall_target=1.0))
    assert (found.top_logits <= everything.top_logits + 1e-5).all()
    assert buckets.buckets * buckets.keep > 256 or not torch.equal(found.top_tokens, everything.top_tokens)


def tiles_that_keep():
    """(keep, type, tile), as test_triton.tiles_of."""
    return [(keep, *of) for keep in KEEPS for of in tiles_of(f"statistics, keep {keep}")]


@pytest.mark.parametrize(("keep", "dtype", "tile"), tiles_that_keep(), ids=str)
def test_every_tile_of_the_table(keep, dtype, tile, pick):
    assert STEP % tile.v == 0
    how = inputs(3, 300, 20, dtype=dtype, topk=40, recall_target=0.5)
    pick(Buckets(128, keep))
    statistics, keys, _ = topk.approximate(how, Buckets(128, keep), tile)
    logits, tokens = largest.of_keys(keys)
    assert_same(StepOutputs(how.x, *statistics[:-1], logits, tokens), exact_step(how))


@pytest.mark.parametrize("mu", [0.3, 0.0, -0.4])
@pytest.mark.parametrize("std", [0.99, 0.0])
def test_buckets_without_noise_and_repelled(mu, std, pick):
    how = inputs(5, 300, mu=mu, std=std, topk=40, recall_target=0.5)
    pick(Buckets(128, 2))
    assert_same(backend.step_fwd(how), exact_step(how))


def test_finer_buckets_find_no_less():
    """More parts than the buckets need; as many as tiles: then every place has one token, and keeps it."""
    how = inputs(5, 640, mu=0.05, topk=60)
    buckets, found = Buckets(128, 1), []
    for splits in (2, 4, 10):
        statistics, keys, _ = topk.approximate(how, buckets, SHORT, splits)
        logits, tokens = largest.of_keys(keys)
        found.append(logits.sum(1))
        assert torch.equal(statistics.noisy_tokens, tokens[:, 0])
    assert (found[0] < found[1]).all()
    assert (found[1] < found[2]).all()
    assert_same_order(tokens, exact_step(how))


def test_number_of_parts_with_buckets():
    tile = Tile(64, 64, 64, 64, 8, 3)
    for n, v, buckets, processors in ((1, 30_522, 512, 132), (16_384, 28_996, 1024, 132), (5, 300, 128, 132)):
        splits = pick_bucket_splits(n, v, buckets, tile, processors)
        assert splits % (buckets // tile.v) == 0 < splits <= -(-v // tile.v)
        assert splits == buckets // tile.v or -(-n // tile.n) * splits <= processors
        assert pick_bucket_splits(n, v, buckets, tile, 1) == buckets // tile.v
    assert pick_bucket_splits(1, 30_522, 512, tile, 132) == 128


def test_rows_go_by_blocks(pick, monkeypatch):
    """As many as the room for what the buckets keep allows; which they are changes no bit."""
    how = inputs(70, 300, 16, topk=9, recall_target=0.5)
    tile = forward.tile_of("statistics, keep 2", how.x, how.embeddings)
    pick(Buckets(128, 2))
    expected = backend.step_fwd(how)
    sizes = []
    kept = forward.kept
    monkeypatch.setattr(forward, "kept", lambda rows, *rest: sizes.append(len(rows.x)) or kept(rows, *rest))
    monkeypatch.setattr(largest, "ROOM", 0)
    for workspace, blocks in ((0, [tile.n, 70 - tile.n]), (2 * tile.n * 8 * 128 * 2, [70])):
        sizes.clear()
        found = backend.step_fwd(how._replace(workspace=workspace))
        assert sizes == blocks
        assert all(torch.equal(f, e) for f, e in zip(found[:8], expected[:8], strict=True))


# --- what holds for both


BOTH = pytest.mark.parametrize("buckets", [None, Buckets(128, 1), Buckets(128, 2), Buckets(128, 4)], ids=str)


def with_buckets(how, buckets, pick):
    pick(buckets)
    return how._replace(recall_target=1.0 if buckets is None else 0.5)


@BOTH
def test_ties_go_to_the_lowest_token(buckets, pick):
    """Five tokens, sixty times over: in all tiles and parts."""
    how = inputs(7, 5, std=0.0, topk=12)
    nearest = torch.cdist(how.x.double(), how.embeddings.double()).argmin(1)
    how = how._replace(embeddings=how.embeddings.repeat(60, 1), bias=how.bias.repeat(60))
    found = backend.step_fwd(with_buckets(how, buckets, pick))
    assert torch.equal(found.top_tokens, nearest[:, None] + 5 * torch.arange(12, device=DEVICE))
    assert torch.equal(found.noisy_tokens, nearest)
    assert (found.top_logits == 0).all()


@BOTH
def test_ties_of_all_tokens(buckets, pick):
    how = inputs(3, 300, mu=0.0, std=0.0, topk=12)
    found = backend.step_fwd(with_buckets(how, buckets, pick))
    assert torch.equal(found.top_tokens, torch.arange(12, device=DEVICE).expand(3, 12))


@pytest.mark.parametrize("far", [1e2, 1e3])
@BOTH
def test_rows_far_from_the_origin(buckets, far, pick):
    """Scores go up to 4e6 there, and are rounded as coarsely; weights of the logits still add up to at most 1."""
    how = inputs(7, 300, 16, mu=0.684, topk=20)
    how = with_buckets(how._replace(x=far * how.x), buckets, pick)
    found, expected, logits = backend.step_fwd(how), exact_step(how), all_logits(how)
    error = (found.top_logits - logits.gather(1, found.top_tokens)).abs()
    assert (error <= 5e-6 * far + 3e-7 * logits.gather(1, found.top_tokens).abs()).all()
    assert ((found.top_logits - expected.top_logits).abs() <= 5e-6 * far + 3e-7 * expected.top_logits.abs()).all()
    assert (found.top_logits[:, :-1] >= found.top_logits[:, 1:]).all()
    assert torch.equal(found.noisy_tokens, found.top_tokens[:, 0])
    assert (found.top_logits - found.log_sum[:, None]).exp().sum(1).max() <= 1 + 1e-6


@BOTH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_non_finite_rows_stay_alone(buckets, bad, pick):
    how = with_buckets(inputs(7, 300, topk=5), buckets, pick)
    expected = backend.step_fwd(how)
    how.x[3, 5] = bad
    found = backend.step_fwd(how)
    assert found.lse[3].isnan()
    assert found.top_logits[3].isnan().all()
    assert found.top_tokens[3].tolist() == [0, 1, 2, 3, 4]
    others = torch.arange(7, device=DEVICE) != 3
    assert all(torch.equal(f[others], e[others]) for f, e in zip(found[:8], expected[:8], strict=True))


@BOTH
def test_rows_of_their_own(buckets, pick):
    """mu, std and row ids of every row."""
    how = with_buckets(inputs(7, 300, topk=9), buckets, pick)
    how = how._replace(row_ids=torch.randint(2**32, (7,), device=DEVICE))
    how.scale.copy_(torch.rand(7) / VARIANCE)
    how.std.copy_(torch.rand(7))
    assert_same(backend.step_fwd(how), exact_step(how))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beside_the_mean(buckets, dtype, pick, monkeypatch):
    """Streamed and chunked; the mean is the same as without top-k."""
    how = with_buckets(inputs(5, 300, mu=0.05, dtype=dtype, topk=300 if buckets is None else 9), buckets, pick)
    how = how._replace(mean=True)
    monkeypatch.setattr(chunked, "prefers", lambda inputs: dtype == torch.bfloat16)
    found = backend.step_fwd(how)
    assert_same(found, exact_step(how))
    assert torch.equal(found.smoothed, backend.step_fwd(how._replace(topk=0)).smoothed)
    if buckets is None:
        weights = (found.top_logits - found.log_sum[:, None]).exp()
        assert (weights.sum(1) - 1).abs().max() <= 2e-6
        mean = backend.average(weights, found.top_tokens, how.embeddings, torch.float32)
        assert (mean - found.smoothed).abs().max() <= {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_mean(dtype):
    how = inputs(40, 150, dtype=dtype)
    found, expected = backend.step_fwd(how), backend.step_fwd(how._replace(mean=True))
    assert (found.smoothed.shape, found.smoothed.dtype) == ((40, 0), dtype)
    assert found.top_logits.shape == found.top_tokens.shape == (40, 0)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.noisy_tokens, expected.noisy_tokens)
    torch.testing.assert_close(found.lse, expected.lse)


# --- means of a few tokens a row


@pytest.mark.parametrize("table_type", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k", "d"), [(3, 1, 5), (5, 16, 128), (4, 37, 150)])
def test_average(n, k, d, table_type, dtype):
    around = torch.full((60, d + 3), torch.nan).to(DEVICE, table_type)
    table = around[1:-1, :d].copy_(torch.randn(58, d))
    weights, tokens = torch.randn(n, k, device=DEVICE), torch.randint(58, (n, k), device=DEVICE)
    found = backend.average(weights, tokens, table, dtype)
    exact = (weights.double()[..., None] * table.double()[tokens]).sum(1)
    size = (weights.double().abs()[..., None] * table.double()[tokens].abs()).sum(1)
    assert found.dtype == dtype
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert ((found.double() - exact).abs() <= 1e-6 * size + 1.01 * rounding * exact.abs()).all()

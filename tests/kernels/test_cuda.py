"""Backend "cuda": the step against float64, and what must not change it: plans, schedules, strides, neighbours.

Without a Hopper GPU the kernels run in an emulator of one, whose order of events differs from launch to launch.
"""

import pytest
import torch
from cases import CASES, FIELDS, inputs, loudness

from smoothie_kernels import Vocabulary, fused_smoothie_step, nearest_token, noise
from smoothie_kernels.backends import cuda
from smoothie_kernels.testing import FLOOR, check_step, relative_error

KEY = {"seed": 3, "offset": 1}
TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
PATHS = pytest.mark.parametrize("path", ["stream", "narrow", "score"])


@pytest.fixture
def take(hopper, monkeypatch):
    """Has rows take one of the ways to a mean, however many they are; the narrow one only up to its width."""

    def path(name):
        monkeypatch.setattr(cuda, "FEW_ROWS", {"stream": 2**31}.get(name, 0))
        monkeypatch.setattr(cuda, "NARROWEST", {"narrow": cuda.NARROWEST}.get(name, 0))

    return path


def step(x, table, mu=0.05, std=0.99, **how):
    return fused_smoothie_step(x, table, mu, std, **{**KEY, **how}, backend="cuda")


def wrong(found, x, table, mu=0.05, std=0.99, *, loud=1.0, sigma_min=1.5, **where):
    rows = torch.ones(len(x), device=x.device)
    eps = noise.gaussian(len(x), len(table), **{**KEY, **where}, backend="reference").to(x.device)
    return check_step(found, x, table, mu * rows, std * rows, eps, sigma_min, loudness=loud)


def same_bits(a, b):
    return all(torch.equal(s, t) for s, t in zip(a[:4], b[:4], strict=True))


# --- shapes


@PATHS
@TYPES
@pytest.mark.parametrize("case", CASES)
def test_against_float64(hopper, take, case, dtype, path):
    n, v, d, mu, std, scale = CASES[case]
    take(path)
    x, table = inputs(n, v, -(-d // 8) * 8, scale, hopper, dtype)
    found = step(x, table, mu, std, row_offset=5)
    assert [t.dtype for t in found[:4]] == [dtype, torch.int64, torch.int64, torch.float32]
    assert wrong(found, x, table, mu, std, row_offset=5) == []


@pytest.mark.parametrize(
    ("d", "path"),
    [
        *((d, path) for d in (8, 40, 72, *range(64, 1025, 64), 1000, 1016) for path in ("stream", "score")),
        *((d, "narrow") for d in (8, 16, 40, 64, 72, 128, 136, 192, 248, 256)),
    ],
)
def test_widths(hopper, take, d, path):
    take(path)
    x, table = inputs(33, 200, d, 1.0, hopper, torch.float16 if d % 128 else torch.bfloat16)
    assert wrong(step(x, table, 0.1), x, table, 0.1) == []


@pytest.mark.parametrize("v", [1, 2, 63, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize(
    ("n", "path"),
    [
        *((n, "stream") for n in (1, 31, 32, 33, 64)),
        *((n, path) for n in (1, 65, 128, 129, 300) for path in ("narrow", "score")),
    ],
)
def test_rows_and_tokens(hopper, take, n, path, v):
    """A tile and one row or token less or more. Of few tokens an lse next to zero is no more exact than its terms."""
    take(path)
    x, table = inputs(n, v, 24, 1.0, hopper, torch.float16 if v % 2 else torch.bfloat16)
    mu, std = (0.3, 0.99) if v > 2 else (3.0, 0.2)
    assert wrong(step(x, table, mu, std), x, table, mu, std) == []


@TYPES
def test_width_and_scale(hopper, dtype):
    """sigma_min, and logits of a wide table from peaked to flat."""
    x, table = inputs(70, 300, 768, 1.0, hopper, dtype)
    for mu, std, sigma_min in ((0.684, 0.73, 1.5), (0.0244, 1.0, 1.5), (7e-5, 1.0, 0.7), (0.3, 0.9, 12.0)):
        found = step(x, table, mu, std, sigma_min=sigma_min)
        assert wrong(found, x, table, mu, std, sigma_min=sigma_min) == []


def test_no_rows(hopper):
    x, table = inputs(3, 20, 8, 1.0, hopper, torch.bfloat16)
    assert [t.shape for t in step(x[:0], table)[:4]] == [(0, 8), (0,), (0,), (0,)]
    assert step(x.view(3, 1, 8), table).smoothed.shape == (3, 1, 8)
    assert step(x[0], table).lse.shape == ()


# --- plans, blocks and schedules


@pytest.fixture
def launches(monkeypatch):
    """(mode, rows, tokens, chunks) of every launch of the score kernel."""
    made, score = [], cuda._score

    def spy(mode, given, refs, tokens, **how):
        parts = score(mode, given, refs, tokens, **how)
        made.append((mode, len(given.x), tokens.stop - tokens.start, parts.numbers.shape[1]))
        return parts

    monkeypatch.setattr(cuda, "_score", spy)
    return made


@TYPES
@pytest.mark.parametrize(
    ("workspace", "rows", "tokens"),
    [(0, {128, 44}, {128, 44}), (97_000, {128, 44}, {256, 44}), (2**18, {256, 44}, {300}), (2**28, {300}, {300})],
)
def test_blocks_do_not_matter(hopper, take, launches, monkeypatch, workspace, rows, tokens, dtype):
    """Of rows and of tokens, the last ones ragged."""
    take("score")
    monkeypatch.setattr(cuda, "pick_rows", lambda d, processors: 4096)
    x, table = inputs(300, 300, 40, 1.0, hopper, dtype)
    found = step(x, table, 0.3, row_offset=2**32 - 300, workspace=workspace)
    made = [launch for launch in launches if launch[0] == cuda.WEIGHTS]
    assert ({launch[1] for launch in made}, {launch[2] for launch in made}) == (rows, tokens)
    whole = step(x, table, 0.3, row_offset=2**32 - 300)
    assert torch.equal(found.tokens, whole.tokens)
    assert torch.equal(found.noisy_tokens, whole.noisy_tokens)
    assert relative_error(found.smoothed, whole.smoothed) <= FLOOR[dtype]
    assert wrong(found, x, table, 0.3, row_offset=2**32 - 300) == []
    ids = torch.randperm(300, device=hopper) + 2**32 - 300
    by_ids = step(x, table, 0.3, row_ids=ids, workspace=workspace)
    assert wrong(by_ids, x, table, 0.3, row_ids=ids) == []


@pytest.mark.parametrize("cluster", [1, 2, 4])
@pytest.mark.parametrize("n", [65, 129, 300])
@pytest.mark.parametrize("path", ["narrow", "score"])
def test_clusters_do_not_matter(hopper, take, monkeypatch, n, path, cluster):
    """Blocks that share boxes, some of them without rows; every result has the same bits."""
    take(path)
    x, table = inputs(n, 300, 200, 1.0, hopper, torch.bfloat16)
    monkeypatch.setattr(cuda, "pick_chunks", lambda row_blocks, tiles, *_: min(tiles, 2))
    monkeypatch.setattr(cuda, "pick_cluster", lambda row_blocks: 1)
    alone = step(x, table, 0.3)
    monkeypatch.setattr(cuda, "pick_cluster", lambda row_blocks: cluster)
    found = step(x, table, 0.3)
    assert same_bits(found, alone)
    assert wrong(found, x, table, 0.3) == []


@pytest.mark.parametrize(
    ("d", "resident"),
    [(d, r) for d, some in ((200, range(5)), (704, (0, 3, 6, 10, 11)), (1024, (0, 1, 4, 8, 9, 10))) for r in some],
)
def test_resident_boxes_do_not_matter(hopper, take, monkeypatch, d, resident):
    """From a table and rows that all go by, to rows that are all there; two blocks share the table."""
    take("score")
    x, table = inputs(130, 300, d, 1.0, hopper, torch.float16)
    expected = step(x, table, 0.1)
    monkeypatch.setattr(cuda, "RESIDENT", resident)
    found = step(x, table, 0.1)
    assert same_bits(found, expected)
    assert wrong(found, x, table, 0.1) == []


@TYPES
@PATHS
@pytest.mark.parametrize("chunks", [1, 2, 5, 1000])
def test_chunks_do_not_matter(hopper, take, monkeypatch, chunks, path, dtype):
    """From one block for all tokens to one for every tile; 5 does not divide the tiles."""
    take(path)
    x, table = inputs(40, 900, 72, 1.0, hopper, dtype)
    expected = step(x, table, 0.2)
    monkeypatch.setattr(cuda, "pick_chunks", lambda row_blocks, tiles, *_: min(tiles, chunks))
    found = step(x, table, 0.2)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.noisy_tokens, expected.noisy_tokens)
    assert wrong(found, x, table, 0.2) == []


@TYPES
@PATHS
def test_more_chunks_than_a_warp_merges_at_a_time(hopper, take, monkeypatch, path, dtype):
    """34 and more, the best tokens in the last ones."""
    take(path)
    monkeypatch.setattr(cuda, "pick_chunks", lambda row_blocks, tiles, *_: tiles)
    x, table = inputs(9, 4700, 24, 1.0, hopper, dtype)
    x = table[-9:] + 0.1 * torch.randn_like(x)
    assert wrong(step(x, table, 0.1), x, table, 0.1) == []


def test_all_ways_agree(hopper, monkeypatch):
    x, table = inputs(64, 300, 136, 1.0, hopper, torch.bfloat16)
    expected = step(x, table, 0.2)
    monkeypatch.setattr(cuda, "FEW_ROWS", 0)
    for narrowest in (cuda.NARROWEST, 0):
        monkeypatch.setattr(cuda, "NARROWEST", narrowest)
        found = step(x, table, 0.2)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.noisy_tokens, expected.noisy_tokens)
        torch.testing.assert_close(found.lse, expected.lse, rtol=1e-6, atol=2e-6)
        assert relative_error(found.smoothed, expected.smoothed) <= FLOOR[x.dtype]


@TYPES
@pytest.mark.parametrize(
    ("n", "d", "path"),
    [
        (40, 200, "stream"),
        (40, 1024, "stream"),
        (70, 64, "narrow"),
        (200, 256, "narrow"),
        (200, 200, "score"),
        (200, 1024, "score"),
    ],
)
def test_schedules_do_not_matter(hopper, take, monkeypatch, n, d, path, dtype):
    """In the emulator boxes arrive and products end when they like; every call is in another order."""
    take(path)
    monkeypatch.setattr(cuda, "pick_chunks", lambda row_blocks, tiles, *_: 1)
    v = {"narrow": 1100 if d > 64 else 1900}.get(path, 300)  # so that rings go round
    x, table = inputs(n, v, d, 1.0, hopper, dtype)
    x[::9] += 30  # done again
    expected = step(x, table, 0.3)
    for seed in (1, 2, 2**64 - 1):
        monkeypatch.setenv("SMOOTHIE_EMULATOR_SEED", str(seed))
        assert same_bits(step(x, table, 0.3), expected)


def test_sums_of_chunks_hold_in_the_workspace(hopper, take, monkeypatch):
    """Every chunk has sums of all rows; as many chunks as their room allows, at least one."""
    take("narrow")
    monkeypatch.setattr(cuda, "processors", lambda device: 64)
    x, table = inputs(100, 900, 64, 1.0, hopper, torch.bfloat16)
    made, narrow = [], cuda._narrow
    monkeypatch.setattr(cuda, "_narrow", lambda *given: made.append(given[3]) or narrow(*given))
    monkeypatch.setattr(cuda, "ROOM", 0)
    for workspace in (0, 3 * 4 * 100 * 64, 2**28):
        assert wrong(step(x, table, workspace=workspace), x, table) == []
    assert made[:2] == [1, 3]
    assert made[2] > 3


def test_plans():
    """None is empty, all blocks end at about the same time, one processor gets one."""
    for rows, v, processors in ((1, 28_996, 132), (2, 1, 132), (8, 30_522, 108), (128, 28_996, 132), (9, 300, 2)):
        tiles = -(-v // 128)
        chunks = cuda.pick_chunks(rows, tiles, processors)
        assert 1 <= chunks <= tiles
        rounds = -(-rows * chunks // processors)
        assert rounds * -(-tiles // chunks) <= 1.3 * rows * tiles / processors + 1 + cuda.START * rounds
        assert cuda.pick_chunks(rows, tiles, 1) == 1
    assert [cuda.pick_cluster(rows) for rows in (1, 2, 3, 8, 9, 128)] == [1, 2, 1, 2, 2, 2]


# --- what is given


@PATHS
def test_rows_of_their_own(hopper, take, path):
    """std with zeros, mu of either sign, row ids of either end; numbers as tensors, words of 64 bits."""
    take(path)
    x, table = inputs(70, 300, 72, 1.0, hopper, torch.bfloat16)
    mu, std = (torch.randn(70, device=hopper) * 0.2).clamp(-0.1, 0.4), torch.rand(70, device=hopper)
    mu[3:7], std[5:20] = 0.0, 0.0
    ids = torch.cat((torch.arange(35), 2**32 - 1 - torch.arange(35))).to(hopper)
    where = {"seed": -(2**63) + 1, "offset": 2**64 - 1}
    found = step(x, table, mu, std, row_ids=ids, **where)
    assert wrong(found, x, table, mu, std, row_ids=ids, **where) == []
    of_tensors = step(x, table, mu, std, row_ids=ids, seed=torch.tensor(-(2**63) + 1), offset=torch.tensor(-1))
    assert same_bits(found, of_tensors)
    far = torch.stack((ids, ids), 1)[:, 0], torch.stack((mu, mu), 1)[:, 0]
    assert same_bits(found, step(x, table, far[1], std, row_ids=far[0], **where))
    order = torch.randperm(70, device=hopper)
    moved = step(x[order], table, mu[order], std[order], row_ids=ids[order], **where)
    for name in ("tokens", "noisy_tokens"):
        assert torch.equal(getattr(moved, name), getattr(found, name)[order])
    torch.testing.assert_close(moved.lse, found.lse[order], rtol=1e-6, atol=2e-6)


@PATHS
@pytest.mark.parametrize("fields", FIELDS)
def test_sum_of_fields(hopper, take, fields, path):
    take(path)
    offset, weights, std = FIELDS[fields]
    x, table = inputs(33, 301, 24, 1.0, hopper, torch.float16)
    where = {"offset": offset, "field_weights": weights, "row_offset": 2**32 - 33}
    found = step(x, table, 0.1, std, **where)
    assert wrong(found, x, table, 0.1, std, loud=loudness(weights), **where) == []
    words = torch.tensor([o - 2**64 if o >= 2**63 else o for o in offset]).to(hopper)
    where |= {"offset": words, "field_weights": torch.tensor(weights).to(hopper)}
    assert same_bits(found, step(x, table, 0.1, std, **where))


@PATHS
@TYPES
def test_sum_of_many_fields(hopper, take, dtype, path):
    """So many that the largest noise is far below what it could be: in bfloat16 all rows are done again."""
    take(path)
    x, table = inputs(20, 140, 16, 1.0, hopper, dtype)
    x[::2] += 30
    where = {"offset": range(300), "field_weights": [(-1) ** f / 300**0.5 for f in range(300)]}
    found = step(x, table, 0.1, 0.9, **where)
    assert wrong(found, x, table, 0.1, 0.9, loud=300**0.5, **where) == []


@PATHS
def test_strides(hopper, take, path):
    """Of x and the table; what box copies cannot take as it stands is copied."""
    take(path)
    x, table = inputs(40, 150, 64, 1.0, hopper, torch.bfloat16)
    expected = step(x, table)
    wide = torch.full((150, 200), torch.nan, device=hopper).to(x.dtype)
    for first, width in ((0, 200), (8, 200), (1, 200), (3, 77), (0, 68)):
        rows = wide[:, :width].contiguous()[:, first : first + 64] if width != 200 else wide[:, first : first + 64]
        rows.copy_(table)
        in_place = cuda._aligned(rows).data_ptr() == rows.data_ptr()
        assert in_place == (first % 8 == 0 and width % 8 == 0)
        assert same_bits(step(x, rows), expected)
        assert same_bits(step(x, Vocabulary(rows, backend="cuda")), expected)
    for rows in (torch.cat((x, x), 1)[:, 64:], x.T.contiguous().T, torch.cat((x[0, :3], x.flatten()))[3:].view(40, 64)):
        assert same_bits(step(rows, table.T.contiguous().T), expected)


@PATHS
@pytest.mark.parametrize(
    ("v", "stride"), [(150, 0), (150, 8), (150, 56), (1, 0), (1, 3), (1, 8), (1, 2**39), (1, 2**45)]
)
def test_strides_that_no_tensor_map_has(hopper, take, path, v, stride):
    """Rows that are one row, rows that overlap, one row with any stride: copied, in every function that makes a map."""
    take(path)
    x, numbers = inputs(40, 150, 64, 1.0, hopper, torch.bfloat16)
    table = numbers.as_strided((v, 64), (stride, 1))
    dense = table.clone(memory_format=torch.contiguous_format)
    for how in ({}, {"topk": 1}):
        assert same_bits(step(x, table, **how), step(x, dense, **how))
    found, expected = (nearest_token(x, t, backend="cuda") for t in (table, dense))
    assert torch.equal(found.distance, expected.distance)
    one = x.as_strided((1, 64), (stride, 1))
    assert same_bits(step(one, dense), step(x[:1], dense))

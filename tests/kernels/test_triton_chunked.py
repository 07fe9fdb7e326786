"""The chunked form of Triton's step, forward and backward: float64, tiles and blocks that do not matter, redone rows.

What holds for gradients in every backend is in test_backward.py; here the launchers themselves, with tiles and
workspaces of which every loop goes round.
"""

import pytest
import torch
from cases import VARIANCE
from conftest import DEVICE
from test_backward import CASES
from test_triton import Step

from smoothie_kernels import fused_smoothie_step, noise
from smoothie_kernels.backends import Grads, Saved, Wanted, reference
from smoothie_kernels.backends.blocks import column_bias
from smoothie_kernels.ops import SmoothieStep
from smoothie_kernels.stream import Request
from smoothie_kernels.testing import check_gradients, check_step, relative_error

pytest.importorskip("triton", reason="triton is not installed")

from smoothie_kernels.backends.triton import chunked, forward, topk
from smoothie_kernels.backends.triton.chunked import Tile

pytestmark = pytest.mark.usefixtures("triton_runs")
SMALL = Tile(16, 64, 16, 1, 1)
TINY = 2**14  # bytes: a few small tiles
OTHERS = ((SMALL, 0), (SMALL, 2**28), (Tile(32, 64, 32, 4, 2), 3 * TINY))
DEFAULT = 2**28
TYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ROW_OFFSET = 2**32 - 300


def inputs(
    n, v, d, mu=0.05, std=0.99, scale=1.0, *, x_type=torch.float32, table_type=None, workspace=DEFAULT,
    field_weights=None,
):  # fmt: skip
    table = torch.randn(v, d)
    x = (scale * (table[torch.randint(v, (n,))] + 0.3 * torch.randn(n, d))).to(DEVICE, x_type)
    table = table.to(DEVICE, table_type or x_type)
    rows = torch.ones(n, device=DEVICE)
    seed, offsets = torch.tensor(3, device=DEVICE), torch.tensor([1], device=DEVICE)
    if field_weights is not None:
        offsets = 1 + 2**40 * torch.arange(len(field_weights), device=DEVICE)
        field_weights = torch.tensor(field_weights, device=DEVICE)
    return Request(
        x, table, column_bias(table), mu / VARIANCE * rows, std * rows if std else None, None, ROW_OFFSET,
        seed, offsets, field_weights, workspace,
    )  # fmt: skip


def mean(how, tile=None):
    """The launcher's outputs in the order of StepOutputs."""
    smoothed, statistics = chunked.mean(how, tile)
    return Step(smoothed, *statistics)


def field(how):
    """std [N] and the noise [N, V]."""
    ids = how.row_offset + torch.arange(len(how.x)) if how.row_ids is None else how.row_ids.cpu()
    offset, weights = how.offset.cpu(), None if how.field_weights is None else how.field_weights.cpu()
    where = {"seed": 3, "offset": offset[0] if weights is None else offset, "field_weights": weights, "row_ids": ids}
    eps = noise.gaussian(len(how.x), len(how.embeddings), **where, backend="reference")
    return torch.zeros_like(how.scale) if how.std is None else how.std, eps.to(DEVICE)


def loudness(how):
    return 1.0 if how.field_weights is None else float(how.field_weights.abs().sum())


def wrong_step(how, outputs):
    given = how.x, how.embeddings, VARIANCE * how.scale, *field(how)
    return check_step(SmoothieStep(*outputs[:4]), *given, loudness=loudness(how))


def incoming(how, *, smoothed=True, lse=True):
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(how.x.shape, generator=generator).to(how.x)
    grad_lse = torch.randn(len(how.x), generator=generator).to(DEVICE)
    return Grads(grad if smoothed else None, grad_lse if lse else None)


def backward(how, grads, needs_x=True, needs_embeddings=True, tile=None):
    saved = saved_of(reference.step_fwd(how))
    saved = saved if grads.smoothed is not None else saved._replace(smoothed=None)
    return chunked.step_bwd(how, saved, grads, Wanted(needs_x, needs_embeddings), tile)[:2]


def saved_of(step, **others):
    return Saved(*({**step._asdict(), **others}[name] for name in Saved._fields))


def wrong_gradients(how, found, grads):
    smoothed = torch.zeros_like(how.x) if grads.smoothed is None else grads.smoothed
    lse = torch.zeros_like(how.scale) if grads.lse is None else grads.lse
    # P and dS are rounded to bfloat16, like the naive form's: an error of terms, which may cancel in their sum.
    cancelled = 0.25 if how.x.dtype == how.embeddings.dtype == torch.bfloat16 else 0.0
    given = how.x, how.embeddings, VARIANCE * how.scale, *field(how)
    return check_gradients(found, *given, smoothed, lse, cancelled=cancelled, loudness=loudness(how))


# --- forward


# float32: where rounding decides
EXACT = ["odd", "peaked", "flat", "very far away", "very loud", "attracted by distance"]
ALL = [(case, torch.bfloat16) for case in CASES] + [(case, torch.float32) for case in EXACT]


@pytest.mark.parametrize(("case", "x_type"), ALL, ids=str)
def test_forward_against_float64(case, x_type):
    how = inputs(*CASES[case], x_type=x_type)
    assert wrong_step(how, mean(how)) == []


@pytest.mark.parametrize("table_type", TYPES, ids=str)
@pytest.mark.parametrize("x_type", TYPES, ids=str)
def test_forward_types_in_small_blocks(x_type, table_type):
    how = inputs(19, 131, 40, x_type=x_type, table_type=table_type, workspace=TINY)
    outputs = mean(how, SMALL)
    assert outputs.smoothed.dtype == x_type
    assert wrong_step(how, outputs) == []
    wide = mean(how._replace(wide=True), SMALL).smoothed
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(x_type), outputs.smoothed)


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16], ids=str)
def test_forward_blocks_do_not_matter(x_type):
    how = inputs(21, 141, 24, x_type=x_type)
    expected = mean(how)
    for tile, workspace in OTHERS:
        found = mean(how._replace(workspace=workspace), tile)
        assert relative_error(found.smoothed, expected.smoothed) <= BOUND[x_type]
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.noisy_tokens, expected.noisy_tokens)
        for name in ("lse", "best_score", "log_sum"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-6, atol=2e-6)


WEIGHTS = [0.7, -1.1, 0.0, 0.4]


@pytest.mark.parametrize(("std", "x_type"), [(0.99, torch.float32), (0.99, torch.bfloat16), (8.0, torch.float32)])
def test_sum_of_fields(std, x_type):
    """Forward and backward; with std 8 the reference knows how loud the sum can be."""
    how = inputs(21, 141, 24, std=std, x_type=x_type, workspace=TINY, field_weights=WEIGHTS)
    assert wrong_step(how, mean(how, SMALL)) == []
    highest = chunked._empty_parts(how, 1).highest
    torch.testing.assert_close(highest, torch.full_like(highest, 6.77 * std * 2.2 - chunked.HEADROOM))
    grads = incoming(how)
    assert wrong_gradients(how, backward(how, grads, tile=SMALL), grads) == []


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16], ids=str)
def test_only_far_rows_are_redone(x_type, monkeypatch):
    """Far, loud and repelled rows, and one that is not finite, among rows that are none of these."""
    how = inputs(40, 150, 16, 0.3, x_type=x_type, workspace=TINY)
    how.scale[10], how.std[10] = 1e-4 / VARIANCE, 21.2  # a best logit of 70, where 144 are possible
    expected = mean(how, SMALL)
    how.x[3] *= 1e2
    how.x[17] *= 1e3
    how.std[20] = 1e4
    how.scale[21] = -20.0 / VARIANCE
    how.x[30, 2] = torch.nan
    flagged = []
    redo = forward.redo
    monkeypatch.setattr(forward, "redo", lambda how, only, out: flagged.append(only) or redo(how, only, out))
    found = mean(how, SMALL)
    odd = torch.tensor([3, 17, 20, 21, 30], device=DEVICE)
    assert torch.equal(flagged[0].nonzero()[:, 0], odd)
    others = torch.ones(40, dtype=torch.bool, device=DEVICE).index_fill(0, odd, False)
    assert all(torch.equal(f[others], e[others]) for f, e in zip(found, expected, strict=True))
    finite = torch.arange(40, device=DEVICE) != 30
    kept = how._replace(x=how.x[finite], scale=how.scale[finite], std=how.std[finite])
    kept = kept._replace(row_ids=(ROW_OFFSET + torch.arange(40, device=DEVICE))[finite])
    assert wrong_step(kept, [f[finite] for f in found]) == []
    assert found.smoothed[30].isnan().all()
    assert found.lse[30].isnan()
    assert 0 <= found.tokens[30] < 150


def test_redo_leaves_other_rows_alone():
    """Flagged rows in one of three programs."""
    how = inputs(150, 90, 16)
    only = torch.zeros(150, dtype=torch.bool, device=DEVICE)
    only[[64, 70]] = True
    smoothed = torch.full_like(how.x, 7.0)
    statistics, (means, expected) = forward.redo(how, only, smoothed), forward.mean(how)
    assert relative_error(smoothed[only], means[only]) <= 2e-6
    assert (smoothed[~only] == 7.0).all()
    for found, wanted in zip(statistics, expected, strict=True):
        torch.testing.assert_close(found[only], wanted[only], rtol=2e-6, atol=2e-6)


def test_forward_ties_go_to_the_first_token():
    how = inputs(18, 5, 24, std=0.0)
    table = how.embeddings.repeat(30, 1)
    found = mean(how._replace(embeddings=table, bias=how.bias.repeat(30)), SMALL)
    nearest = torch.cdist(how.x.double(), how.embeddings.double()).argmin(1)
    assert torch.equal(found.tokens, nearest)
    assert torch.equal(found.noisy_tokens, nearest)


# --- backward


@pytest.mark.parametrize(("case", "x_type"), ALL, ids=str)
def test_backward_against_float64(case, x_type):
    """In small blocks; test_backward.py has float32 in one."""
    how = inputs(*CASES[case], x_type=x_type, workspace=8 * 64 * 256)
    grads = incoming(how)
    assert wrong_gradients(how, backward(how, grads, tile=Tile(64, 128, 32, 4, 2)), grads) == []


@pytest.mark.parametrize("x_type", [torch.bfloat16], ids=str)
@pytest.mark.parametrize(("smoothed", "lse"), [(True, True), (True, False), (False, True)])
def test_only_what_is_asked_for(smoothed, lse, x_type, monkeypatch):
    """Which products are made, and that the others do not change by it."""
    how = inputs(21, 141, 24, 0.3, x_type=x_type)
    grads = incoming(how, smoothed=smoothed, lse=lse)
    both = backward(how, grads, tile=SMALL)
    assert wrong_gradients(how, both, grads) == []
    made = []
    add_product = chunked.add_product
    monkeypatch.setattr(chunked, "add_product", lambda acc, a, b: made.append(a.shape) or add_product(acc, a, b))
    grad_x, nothing = backward(how, grads, needs_embeddings=False, tile=SMALL)
    assert nothing is None
    assert made == [(21, 141)]
    assert torch.equal(grad_x, both[0])
    made.clear()
    nothing, grad_embeddings = backward(how, grads, needs_x=False, tile=SMALL)
    assert nothing is None
    assert made == [(141, 2 * 21 if smoothed else 21)]
    assert torch.equal(grad_embeddings, both[1])


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16], ids=str)
def test_backward_blocks_do_not_matter(x_type):
    how = inputs(21, 141, 24, x_type=x_type)
    grads = incoming(how)
    expected = backward(how, grads)
    for tile, workspace in OTHERS:
        found = backward(how._replace(workspace=workspace), grads, tile=tile)
        for gradient, wanted in zip(found, expected, strict=True):
            assert relative_error(gradient, wanted) <= BOUND[x_type]


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_write_to_the_end_of_their_last_tile_and_no_further(x_type):
    """Rows of 70 tokens in two tiles of 64: columns to 128 are the workspace's; what lies beyond, and below, stays."""
    n, v, stride, guard = 19, 70, 192, 7.0
    how = inputs(n, v, 24, x_type=x_type)
    tokens, parts = slice(0, v), chunked._empty_parts(how, 2)._asdict()
    weights = torch.full((2 * SMALL.n, stride), guard, device=DEVICE)
    names = {name: parts[name] for name in ("total", "best_score", "best_logit", "token", "noisy_token")}
    chunked._launch_fwd(
        how, tokens, SMALL, ref_score_ptr=parts["ref_score"], highest_ptr=parts["highest"], weights_ptr=weights,
        stride_wn=stride, **{f"{name}_ptr": tensor for name, tensor in names.items()},
    )  # fmt: skip
    assert (weights[:n, :v] != guard).all()
    assert not weights[:n, v:128].any()  # of no weight
    assert (weights[:n, 128:] == guard).all()
    assert (weights[n:] == guard).all()

    keys = torch.full((2 * SMALL.n, stride), int(guard), device=DEVICE)
    topk._launch_keys(SMALL, how, tokens, parts["ref_score"][0], keys)
    assert (keys[:n, :v] != guard).all()
    assert (keys[:n, 128:] == guard).all()
    assert (keys[n:] == guard).all()

    workspace = torch.full((3, n, 128), guard, device=DEVICE)
    grad = incoming(how).smoothed
    zeros = torch.zeros(n, device=DEVICE)
    saved = Saved(how.x, zeros.long(), zeros, zeros)
    for matrices in (1, 2):
        workspace.fill_(guard)
        chunked._grad_scores(how, saved, zeros, grad, tokens, workspace.view(-1), matrices, SMALL)
        assert (workspace[:matrices, :, :v] != guard).all()
        assert not workspace[matrices - 1, :, v:].any()  # dS
        assert (workspace[matrices:] == guard).all()


def test_workspace_is_kept_to(monkeypatch):
    """What the kernels write weights to is as large as the caller allows, or as one tile."""
    largest = []

    def block(*arguments):
        made = chunked_block(*arguments)
        largest.append(made[0] * made[1])
        return made

    chunked_block = chunked.pick_block
    monkeypatch.setattr(chunked, "pick_block", block)
    for workspace in (0, 5 * TINY):
        largest.clear()
        how = inputs(40, 141, 24, workspace=workspace)
        mean(how, SMALL)
        backward(how, incoming(how), tile=SMALL)
        assert 4 * largest[0] <= max(workspace, 4 * 16 * 64)
        assert 2 * 4 * largest[1] <= max(workspace, 2 * 4 * 16 * 64)


@pytest.mark.parametrize(("n", "v"), [(1, 1), (37, 301), (16_384, 28_996), (70_000, 30_522), (200, 1_000_000)])
@pytest.mark.parametrize("workspace", [0, 1000, 2**20, 2**26, 2**28, 2**36])
def test_blocks(n, v, workspace):
    tile = Tile(128, 64, 64, 8, 3)
    rows, tokens = chunked.pick_block(n, v, workspace, 4, 3072, tile)
    assert rows % tile.n == tokens % tile.v == 0 < min(rows, tokens)
    assert rows * (4 * tokens + 3072) <= max(workspace, tile.n * (4 * tile.v + 3072))
    assert rows <= chunked.MAX_ROWS
    assert rows < n + tile.n
    assert tokens < v + tile.v
    assert tokens >= min(v, chunked.USEFUL_TOKENS) * 0.8 or workspace < 2**22


def test_best_score_of_other_roundings():
    """Far from the origin a unit in the last place of a score is a factor of its row's weights: 2 % here."""
    how = inputs(*CASES["very far away"])
    step = reference.step_fwd(how)
    other = step.best_score.clone()
    for _ in range(64):
        other = other.nextafter(torch.full_like(other, torch.inf))
    assert ((other - step.best_score) * how.scale).max() > 0.01
    grads = incoming(how)
    found = chunked.step_bwd(how, saved_of(step, best_score=other), grads, Wanted(True, True))[:2]
    assert wrong_gradients(how, found, grads) == []


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_rows_stay_where_they_are(bad):
    how = inputs(40, 150, 16, workspace=TINY)
    grads = incoming(how)
    expected, _ = backward(how, grads, needs_embeddings=False, tile=SMALL)
    how.x[3, 5] = bad
    found, _ = backward(how, grads, needs_embeddings=False, tile=SMALL)
    others = torch.arange(40, device=DEVICE) != 3
    assert torch.equal(found[others], expected[others])
    assert not found[3].isfinite().all()


def test_rows_of_their_own():
    """mu, std and row ids of every row."""
    ids = torch.randint(2**32, (37,), device=DEVICE)
    how = inputs(37, 150, 16, workspace=TINY)._replace(row_ids=ids, row_offset=0)
    how.scale.copy_(torch.rand(37) / 2 / VARIANCE)
    how.std.copy_(torch.rand(37))
    grads = incoming(how)
    assert wrong_step(how, mean(how, SMALL)) == []
    assert wrong_gradients(how, backward(how, grads, tile=SMALL), grads) == []


def test_same_call_same_bits():
    how = inputs(20, 140, 48, x_type=torch.bfloat16, workspace=TINY)
    how.x[3] *= 1e3
    grads = incoming(how)
    for call in (lambda: mean(how, SMALL), lambda: backward(how, grads, tile=SMALL)):
        assert all(torch.equal(a, b) for a, b in zip(call(), call(), strict=True))


# --- who takes it


@pytest.mark.parametrize("table_type", TYPES, ids=str)
@pytest.mark.parametrize("x_type", TYPES, ids=str)
def test_prefers_wide_tables_with_room(x_type, table_type):
    """Of float32 for any x, or of bfloat16 for bfloat16."""
    wide = inputs(64, 5, 300, x_type=x_type, table_type=table_type)
    taken = table_type == torch.float32 or x_type == table_type == torch.bfloat16
    assert chunked.prefers(wide) == taken
    assert not chunked.prefers(wide._replace(workspace=2**17))
    assert not chunked.prefers(wide._replace(x=wide.x[:8]))
    assert not chunked.prefers(inputs(64, 5, 256, x_type=x_type, table_type=table_type))


@pytest.mark.parametrize("workspace", [0, DEFAULT])
def test_through_the_public_function(workspace):
    """A wide bfloat16 call, forward and backward, streamed and chunked."""
    how = inputs(48, 150, 272, 0.02, x_type=torch.bfloat16)
    x, table = how.x.clone().requires_grad_(), how.embeddings.clone().requires_grad_()
    step = fused_smoothie_step(
        x, table, 0.02, 0.99, seed=3, offset=1, row_offset=ROW_OFFSET, workspace=workspace, backend="triton"
    )
    assert wrong_step(how, [t.detach() for t in step[:4]]) == []
    grads = incoming(how)
    found = torch.autograd.grad((step.smoothed, step.lse), (x, table), grads)
    assert wrong_gradients(how, found, grads) == []

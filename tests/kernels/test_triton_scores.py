"""Triton's other scores, col (x . E) + bias below a bound, and means of another table: known answers, and float64.

Noise, blocks and parts are those of test_triton*.py; here every kernel once with what a Request can have beside them.
"""

import numpy as np
import pytest
import torch
from conftest import DEVICE

from smoothie_kernels import Vocabulary, fused_smoothie_step, nearest_token
from smoothie_kernels.backends import Grads, Saved, Statistics, Wanted, reference
from smoothie_kernels.backends import triton as backend
from smoothie_kernels.recall import Buckets
from smoothie_kernels.stream import Request
from smoothie_kernels.testing import relative_error

pytest.importorskip("triton", reason="triton is not installed")

from smoothie_kernels.backends import largest
from smoothie_kernels.backends.triton import chunked, forward, launch
from smoothie_kernels.backends.triton.chunked import Tile as BlockTile
from smoothie_kernels.backends.triton.tiles import Tile

pytestmark = pytest.mark.usefixtures("triton_runs")
N, V, D = 13, 100, 24
SHORT = Tile(16, 64, 16, 16, 4, 2)  # columns of the mean in two programs
ONE_TILE = Tile(16, 64, 32, 32, 4, 2)  # of the table, where the mean is of E
BLOCKS = BlockTile(16, 64, 16, 1, 1)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
GIVEN = ["col", "values", "col, values", "col, E", ""]  # E: values are the table itself, as of cosine
FIELDS = [0.6, 0.8]


def inputs(given="col, values", n=N, *, std=0.9, x=FLOAT32, table=FLOAT32, workspace=2**14, fields=None, **how):
    """A call with a bound and what `given` names."""
    rows, tokens = torch.randn(n, D).to(DEVICE, x), torch.randn(V, D).to(DEVICE, table)
    col, bias = torch.rand(V, device=DEVICE) + 0.1, torch.randn(V, device=DEVICE)
    col[3] = 0  # of a row of zeros
    values = tokens if given.endswith("E") else torch.randn(V, D).to(DEVICE, table) + 1
    scale, offsets = torch.linspace(0.3, 0.7, n, device=DEVICE), torch.tensor([1, 2**40], device=DEVICE)
    return Request(
        rows, tokens, bias, scale, std * torch.ones_like(scale) if std else None, None, 2**32 - 5,
        torch.tensor(3, device=DEVICE), offsets if fields else offsets[:1],
        torch.tensor(fields, device=DEVICE) if fields else None, workspace,
        bound=1.1 * (rows.float() @ tokens.float().T).abs().amax(1) + bias.amax(),
        col=col if "col" in given else None, values=values if given.endswith(("values", "E")) else None, **how,
    )  # fmt: skip


def in_double(how):
    """On the numbers that the backend is given."""
    floats = {name: of.double() for name, of in how._asdict().items() if torch.is_tensor(of) and of.is_floating_point()}
    return how._replace(**floats | {"field_weights": how.field_weights})


def right(how, smoothed, found):
    """A mean and the statistics, against float64: as wrong as float32's 24 products and logits up to 10 allow."""
    exact = reference.step_fwd(in_double(how))
    assert torch.equal(found.tokens, exact.tokens)
    assert torch.equal(found.noisy_tokens, exact.noisy_tokens)
    for name in ("lse", "best_score", "log_sum"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), rtol=2e-6, atol=4e-6)
    if smoothed is not None:
        assert relative_error(smoothed, exact.smoothed) <= 2e-6 + (2**-8 if smoothed.dtype == BFLOAT16 else 0)


@pytest.mark.parametrize("metric", ["cosine", "mahalanobis"])
def test_known_answers(golden, metric):
    known = {key: torch.from_numpy(value) for key, value in np.load(golden / f"stream_metric_{metric}.npz").items()}
    x, table = known["x"].to(DEVICE), known["embeddings"].to(DEVICE)
    vocabulary = Vocabulary(table, metric="cosine" if metric == "cosine" else known["factor"].to(DEVICE))
    step = fused_smoothie_step(
        x, vocabulary, float(known["mu"]), float(known["std"]), sigma_min=float(known["sigma_min"]),
        seed=int(known["seed"]), offset=int(known["offset"]), backend="triton",
    )  # fmt: skip
    assert relative_error(step.smoothed.cpu(), known["smoothed"]) <= 2e-6
    assert torch.equal(step.tokens.cpu(), known["tokens"])
    assert torch.equal(step.noisy_tokens.cpu(), known["noisy_tokens"])
    assert (step.lse.cpu() - known["lse"]).abs().max() <= 1e-5
    assert torch.equal(nearest_token(x, vocabulary, backend="triton").tokens.cpu(), known["tokens"])


@pytest.mark.parametrize("given", GIVEN)
def test_forward(given):
    how = inputs(given)
    for mean in (forward.mean(how, SHORT, 1), forward.mean(how, ONE_TILE, 2), chunked.mean(how, BLOCKS)):
        right(how, *mean)


def test_rows_far_below_their_bound_are_redone():
    how = inputs()
    right(how, *chunked.mean(how._replace(bound=how.bound + 1e3), BLOCKS))


OTHERS = {
    "no noise": {"std": 0},
    "fields": {"fields": FIELDS},
    "16-bit table": {"table": BFLOAT16},
    "16 bits": {"x": BFLOAT16, "table": BFLOAT16},
}


@pytest.mark.parametrize("other", OTHERS)
def test_forward_of_others(other):
    how = inputs(**OTHERS[other])
    right(how, *chunked.mean(how, BLOCKS))
    right(how, *forward.mean(how, SHORT, 2))
    right(how, None, forward.statistics(how, ONE_TILE, 2))


def test_rows_of_a_block_have_their_bound(monkeypatch):
    """Row 16 is a block of its own: another row's bound lies so far below its scores that its weights overflow."""
    how = inputs(n=17, workspace=0)
    x = torch.cat((how.x[:16], 40 * how.x[16:]))
    how = how._replace(x=x, bound=(x @ how.embeddings.T * how.col + how.bias).amax(1))
    none = Statistics(*[torch.zeros(17, device=DEVICE).long()] * 6)
    monkeypatch.setattr(forward, "redo", lambda *_: none)  # it would mend them
    smoothed, _ = chunked.mean(how, BLOCKS)
    assert relative_error(smoothed, reference.step_fwd(in_double(how)).smoothed) <= 2e-6


@pytest.mark.parametrize(
    ("other", "buckets"), [("no noise", None), ("fields", None), ("16-bit table", Buckets(128, 2))]
)
def test_largest(other, buckets, monkeypatch):
    gpu = launch.gpu
    monkeypatch.setattr(launch, "gpu", lambda device: gpu(device)._replace(processors=1))  # buckets of the reference
    for module in (largest, reference):
        monkeypatch.setattr(module, "pick_buckets", lambda v, k, target: buckets)
    how = inputs(**OTHERS[other], mean=False, topk=5)
    found, exact = backend.step_fwd(how), reference.step_fwd(in_double(how))
    right(how, None, found)
    assert torch.equal(found.top_tokens, exact.top_tokens)
    torch.testing.assert_close(found.top_logits.double(), exact.top_logits, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("given", ["col", ""])
def test_nearest(given):
    how = inputs(given)._replace(logits=False)
    found, exact = backend.step_fwd(how), reference.step_fwd(in_double(how))
    assert torch.equal(found.tokens, exact.tokens)
    torch.testing.assert_close(found.distance.double(), exact.distance, rtol=2e-6, atol=0)


ALL = Wanted(True, True, True, True)
BOUND = 4e-6  # of gradients in float32: terms cancel in their sums


def grads_of(how, smoothed=True, lse=True):
    generator = torch.Generator().manual_seed(5)
    grad, of_lse = (torch.randn(size, generator=generator).to(DEVICE) for size in ((N, D), (N,)))
    return Grads(grad.to(how.x.dtype) if smoothed else None, of_lse if lse else None)


def backward(how, wanted, smoothed=True, lse=True, log_sum_off=0.0):
    """The gradients, and those in float64; the forward's results as the backend saves them."""
    grads, step = grads_of(how, smoothed, lse), reference.step_fwd(in_double(how))
    exact = Saved(step.smoothed if smoothed else None, step.noisy_tokens, step.best_score, step.log_sum)
    mean = step.smoothed.to(how.x.dtype) if smoothed else None
    saved = Saved(mean, step.noisy_tokens, step.best_score.float(), step.log_sum.float() + log_sum_off)
    in_64 = Grads(*(None if of is None else of.double() for of in grads))
    return chunked.step_bwd(how, saved, grads, wanted, BLOCKS), reference.step_bwd(in_double(how), exact, in_64, wanted)


def right_gradients(found, exact, wanted, bound=BOUND):
    for name, value, truth, needed in zip(found._fields, found, exact, wanted, strict=True):
        assert (value is not None) == needed, name
        if needed:
            assert relative_error(value, truth) <= bound, (name, relative_error(value, truth))


@pytest.mark.parametrize(("smoothed", "lse"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("given", GIVEN)
def test_gradients(given, smoothed, lse):
    how = inputs(given)
    wanted = Wanted(True, True, True, how.values is not None)
    right_gradients(*backward(how, wanted, smoothed, lse), wanted)


# Of a 16-bit table its gradients are rounded, of rows dS, delta and the results: terms that cancel in part.
@pytest.mark.parametrize(
    ("other", "bound"), [("no noise", BOUND), ("fields", BOUND), ("16-bit table", 2**-8), ("16 bits", 2**-7)]
)
def test_gradients_of_others(other, bound):
    how = inputs(**OTHERS[other])
    right_gradients(*backward(how, ALL), ALL, bound)


@pytest.mark.parametrize("name", Wanted._fields)
def test_one_gradient_alone(name):
    how, wanted = inputs(), Wanted(*(each == name for each in Wanted._fields))
    right_gradients(*backward(how, wanted), wanted)


def test_rounded_mean_of_peaked_rows():
    """Of a token with all the weight, dS is the rounding of smoothed to 16 bits: what is left of it is the token's."""
    how = inputs(x=BFLOAT16, wide=True)
    how = how._replace(scale=40 * how.scale)
    found, exact = backward(how, ALL, lse=False)
    step = reference.step_fwd(in_double(how))
    rounding = (grads_of(how).smoothed.double() * (step.smoothed.bfloat16().double() - step.smoothed)).sum(1)
    off = (how.scale * rounding)[:, None]  # of dS
    col = how.col[step.noisy_tokens, None]
    assert (found.x - exact.x).norm() <= 0.05 * (off * col * how.embeddings[step.noisy_tokens]).norm()
    assert (found.embeddings - exact.embeddings).norm() <= 0.05 * (off * col * how.x).norm()
    assert (found.bias - exact.bias).norm() <= 0.05 * off.norm()


def test_what_weights_lack_of_one_is_of_the_mean():
    """16-bit rows keep a log_sum that is rounded coarsely: of a token with all the weight, P would be off by 1 / 64."""
    how = inputs(x=torch.float16, table=torch.float16, wide=True)
    wanted = Wanted(False, False, False, True)
    right_gradients(*backward(how._replace(scale=40 * how.scale), wanted, log_sum_off=2**-6), wanted, 2**-8)

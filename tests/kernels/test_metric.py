"""Cosine and learned distances, in every backend that takes them, against the dense step."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import device_of

from smoothie_kernels import Vocabulary, dispatch, fused_smoothie_step, nearest_token, noise
from smoothie_kernels.stream import Request
from smoothie_kernels.testing import FLOOR, NAIVE_MARGIN, relative_error

METRICS = ["cosine", "factor"]


@pytest.fixture(autouse=True)
def takes_it(request):
    if "backend" in request.fixturenames:
        backend, row = request.getfixturevalue("backend"), torch.ones(1)
        given = Request(row, row, row, row, None, None, 0, row, row, None, 0, bound=row, col=row)
        if lacking := dispatch.load(backend).lacks(given):
            pytest.skip(f"{backend} {lacking}")


def unit(rows):
    """A row of zeros stays one."""
    norms = rows.norm(dim=1, keepdim=True)
    return rows * torch.where(norms > 0, 1 / norms.where(norms > 0, 1), 0)


def squared_distances(metric, x, table, factor):
    if metric == "cosine":
        return 2 - 2 * unit(x) @ unit(table).T
    return (
        (x @ factor).square().sum(1)[:, None] - 2 * x @ factor @ (table @ factor).T + (table @ factor).square().sum(1)
    )


def dense(metric, x, table, factor, mu, std, eps, k=3):
    """smoothed, lse, and the k largest logits."""
    logits = mu * squared_distances(metric, x, table, factor) / (-2 * 1.5**2) + std * eps
    return (
        logits.softmax(1) @ table,
        logits.logsumexp(1),
        logits.sort(dim=1, descending=True, stable=True).values[:, :k],
    )


def inputs(n, v, d, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n + v + d)
    table = torch.randn(v, d, generator=generator)
    x = table[torch.randint(v, (n,), generator=generator)] + 0.3 * torch.randn(n, d, generator=generator)
    factor = torch.eye(d) + 0.2 * torch.randn(d, d, generator=generator)
    return x.to(device), table.to(device, dtype), factor.to(device)


def vocabulary(metric, table, factor, **how):
    return Vocabulary(table, metric="cosine" if metric == "cosine" else factor, **how)


@pytest.mark.parametrize("name", ["cosine", "mahalanobis"])
def test_golden(golden, backend, name):
    known = {k: torch.from_numpy(a) for k, a in np.load(golden / f"stream_metric_{name}.npz").items()}
    x, table, factor = (known[k].to(device_of(backend)) for k in ("x", "embeddings", "factor"))
    metric = "cosine" if name == "cosine" else factor
    where = {"seed": known["seed"], "offset": known["offset"], "backend": backend}
    step = fused_smoothie_step(x, Vocabulary(table, metric=metric), float(known["mu"]), float(known["std"]), **where)
    assert relative_error(step.smoothed.cpu(), known["smoothed"]) <= FLOOR[torch.float32]
    torch.testing.assert_close(step.lse.cpu().double(), known["lse"], rtol=1e-5, atol=1e-5)
    assert torch.equal(step.tokens.cpu(), known["tokens"])
    assert torch.equal(step.noisy_tokens.cpu(), known["noisy_tokens"])


SHAPES = [(1, 301, 24), (33, 130, 37), (70, 517, 16), (5, 1, 8)]


@pytest.mark.parametrize("std", [0.7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_step_and_gradients(backend, metric, shape, dtype, std):
    """Within twice the error of the dense form in float32, or the rounding of the type."""
    (n, v, _), mu, k = shape, 0.6, min(3, shape[1])
    x, table, factor = inputs(*shape, device_of(backend), dtype)
    if n > 5:
        table[5] = 0.0  # a row of zeros has the cosine 0
        x[3] = 0.0
    eps = noise.gaussian(n, v, seed=2, backend="reference").to(x)
    weights = [
        torch.randn(shape_of, generator=torch.Generator().manual_seed(1)).to(x) for shape_of in (x.shape, n, (n, k))
    ]

    def gradients(outputs, leaves):
        loss = sum((o.to(w.dtype) * w).sum() for o, w in zip(outputs, weights, strict=True))
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]

    def dense_of(kind):
        leaves = [t.to(kind).requires_grad_() for t in (x, table, factor)]
        outputs = dense(metric, *leaves, mu, std, eps.to(kind), k)
        return outputs, gradients(outputs, leaves)

    leaves = [t.clone().requires_grad_() for t in (x, table, factor)]
    used = vocabulary(metric, *leaves[1:])
    step = fused_smoothie_step(leaves[0], used, mu, std, seed=2, topk=k, backend=backend)
    found = step.smoothed, step.lse, step.topk.values
    rest = gradients(found, leaves)
    weights[:] = [w.double() for w in weights]
    exact, exact_grads = dense_of(torch.float64)
    weights[:] = [w.float() for w in weights]
    naive, naive_grads = dense_of(torch.float32)
    names = "smoothed", "lse", "values", "x", "embeddings", "factor"
    for name, got, plain, right in zip(
        names, (*found, *rest), (*naive, *naive_grads), (*exact, *exact_grads), strict=True
    ):
        error, allowed = (float((each.detach().double() - right.detach()).norm()) for each in (got, plain))
        rounding = FLOOR[dtype if name == "embeddings" else torch.float32] * float(right.norm())
        assert error <= max(NAIVE_MARGIN * allowed, 2 * rounding, 2e-6 * len(x) ** 0.5), name


@pytest.mark.parametrize("metric", METRICS)
def test_a_table_in_16_bits_has_its_gradient_rounded_once(backend, metric):
    """Through products, norms and the mean: each rounded by itself they would lose ten times as much."""
    x, table, factor = inputs(32, 400, 64, device_of(backend), torch.bfloat16)
    weights = torch.randn(32, generator=torch.Generator().manual_seed(3)).to(x)
    leaf, wide = table.clone().requires_grad_(), table.double().requires_grad_()
    used, mu = vocabulary(metric, leaf, factor), 20.0 if metric == "cosine" else 1.0
    (found,) = torch.autograd.grad(fused_smoothie_step(x, used, mu, 0.0, backend=backend).lse @ weights, leaf)
    lse = dense(metric, x.double(), wide, factor.double(), mu, 0.0, torch.zeros(32, 400).to(wide))[1]
    (exact,) = torch.autograd.grad(lse @ weights.double(), wide)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, exact) <= 2**-8


@pytest.mark.parametrize("smooth", ["full", "topk"])
@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric, smooth):
    x, table, factor = (t.double().requires_grad_() for t in inputs(4, 9, 5, "cpu"))

    def step(x, table, factor):
        found = fused_smoothie_step(x, vocabulary(metric, table, factor), 0.5, 0.4, seed=1, topk=2, smooth=smooth)
        return found.smoothed, found.lse, found.topk.values

    assert torch.autograd.gradcheck(step, (x, table, factor))


@pytest.mark.parametrize("metric", METRICS)
def test_nearest_token(backend, metric):
    x, table, factor = inputs(40, 333, 24, device_of(backend))
    x.requires_grad_()
    found = nearest_token(x, vocabulary(metric, table, factor), backend=backend)
    exact = squared_distances(metric, x.double(), table.double(), factor.double())
    distance, tokens = exact.min(1)
    assert torch.equal(found.tokens, tokens)
    torch.testing.assert_close(found.distance.double(), distance, rtol=1e-5, atol=1e-6)
    found, wanted = (torch.autograd.grad(d.sum(), x, retain_graph=True)[0] for d in (found.distance, distance))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_factor_that_is_written_to(backend):
    x, table, factor = inputs(6, 50, 8, device_of(backend))
    kept = Vocabulary(table, metric=factor)
    fused_smoothie_step(x, kept, 0.5, 0.0, backend=backend)
    factor.mul_(1.5)
    found, fresh = (
        fused_smoothie_step(x, v, 0.5, 0.0, backend=backend) for v in (kept, Vocabulary(table, metric=factor))
    )
    assert torch.equal(found.smoothed, fresh.smoothed)


@pytest.mark.parametrize("metric", METRICS)
def test_copies(metric):
    x, table, factor = inputs(6, 50, 8, "cpu")
    used = vocabulary(metric, table, factor)
    copy = pickle.loads(pickle.dumps(used))
    assert repr(copy) == repr(used)
    assert torch.equal(*(fused_smoothie_step(x, v, 0.5, 0.3, seed=1).smoothed for v in (used, copy)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_factor_of_another_type_is_followed(dtype):
    x, table, factor = inputs(6, 50, 8, "cpu")
    trained = torch.nn.Parameter(factor.to(dtype))
    kept = copy.deepcopy(Vocabulary(table, metric=trained))
    kept.metric = trained
    before = fused_smoothie_step(x, kept, 0.5, 0.0).lse
    before.sum().backward()
    assert trained.grad.dtype == dtype
    assert trained.grad.any()
    with torch.no_grad():
        trained.mul_(2)
    after = fused_smoothie_step(x, kept, 0.5, 0.0).lse
    assert not torch.equal(after, before)
    assert torch.equal(after, fused_smoothie_step(x, Vocabulary(table, metric=trained), 0.5, 0.0).lse)


def test_a_module_that_changes_its_type():
    x, table, factor = inputs(6, 50, 8, "cpu")
    module = torch.nn.Module()
    module.table, module.factor = torch.nn.Parameter(table), torch.nn.Parameter(factor)
    module.used = Vocabulary(module.table, metric=module.factor)
    module.bfloat16()
    found = fused_smoothie_step(x.bfloat16(), module.used, 0.5, 0.0)
    fresh = Vocabulary(table.bfloat16(), metric=factor.bfloat16())
    assert torch.equal(found.lse, fused_smoothie_step(x.bfloat16(), fresh, 0.5, 0.0).lse)
    distances = (nearest_token(x.bfloat16(), used).distance for used in (module.used, fresh))
    assert torch.equal(*distances)


def test_cosines_of_rows_of_zeros_and_of_tiny_rows(backend):
    x, table, _ = inputs(4, 50, 8, device_of(backend))
    used = Vocabulary(table, metric="cosine")
    zeros = torch.zeros(2, 8, device=table.device, requires_grad=True)
    found = nearest_token(zeros, used, backend=backend)
    found.distance.sum().backward()
    assert found.distance.tolist() == [2.0, 2.0]
    assert not zeros.grad.any()
    usual, tiny = nearest_token(x, used, backend=backend), nearest_token(1e-23 * x, used, backend=backend)
    torch.testing.assert_close(usual.distance, tiny.distance, rtol=1e-4, atol=1e-9)
    near = table[:3] * (1 + 1e-4 * torch.randn(3, 8, device=table.device))
    wanted = (unit(near.double()) - unit(table[:3].double())).square().sum(1)
    found = nearest_token(near, used, backend=backend)
    torch.testing.assert_close(found.distance.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["x", "embeddings", "metric"])
def test_inference_tensors_are_named(name):
    given = dict(zip(("x", "embeddings", "metric"), inputs(4, 9, 5, "cpu"), strict=True))
    with torch.inference_mode():
        given[name] = given[name].clone()
    other = "x" if name == "metric" else "metric"
    given[other] = given[other].clone().requires_grad_()
    used = Vocabulary(given["embeddings"], metric=given["metric"])
    for call in (lambda: fused_smoothie_step(given["x"], used, 0.5, 0.0), lambda: nearest_token(given["x"], used)):
        with pytest.raises(ValueError, match=f"{name} must not be made in torch.inference_mode"):
            call()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_torch_func_differentiates_something_else(metric, trained):
    x, table, factor = inputs(4, 9, 5, "cpu")
    table.requires_grad_(trained)

    def weighted(weights):
        return (weights * fused_smoothie_step(x, vocabulary(metric, table, factor), 0.5, 0.0).lse).sum()

    expected = fused_smoothie_step(x, vocabulary(metric, table, factor), 0.5, 0.0).lse
    torch.testing.assert_close(torch.func.grad(weighted)(torch.ones(4)), expected)


def test_one_factor_for_all_samples():
    with pytest.raises(NotImplementedError, match="one metric for all samples"):
        torch.func.vmap(lambda factor: Vocabulary(TABLE, metric=factor).bias)(torch.eye(4).expand(2, 4, 4))


TABLE = torch.randn(7, 4)


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        ("manhattan", ValueError, "metric must be one of 'euclidean', 'cosine', got 'manhattan'"),
        (3, TypeError, r"metric must be one of .*, or a \(D, D\) tensor, got int"),
        (torch.eye(4).int(), TypeError, "or a .* tensor of floats, got torch.int32 tensor"),
        (torch.eye(3), ValueError, r"metric must have shape \[D, D\] with D = 4 as in embeddings, got \[3, 3\]"),
        (torch.eye(4, device="meta"), ValueError, "metric must be on the device of embeddings, cpu, got meta"),
        (torch.eye(4).double() * 1e200, ValueError, r"metric must be finite in torch.float32, got"),
        (torch.eye(4) * torch.nan, ValueError, "metric must be finite, got nan"),
    ],
)
def test_errors(metric, error, message):
    with pytest.raises(error, match=message):
        Vocabulary(TABLE, metric=metric)


@pytest.mark.parametrize("metric", METRICS)
def test_topk_and_mean_is_euclidean(metric):
    used = vocabulary(metric, TABLE, torch.eye(4))
    with pytest.raises(ValueError, match="smooth must be 'full' or 'topk' where distances are not Euclidean"):
        fused_smoothie_step(TABLE, used, 0.1, 0.0, topk=2, smooth="topk+mean")


def test_euclidean_by_a_factor(backend):
    """The identity is the Euclidean distance."""
    x, table, _ = inputs(20, 90, 16, device_of(backend))
    identity = Vocabulary(table, metric=torch.eye(16, device=table.device))
    a, b = (fused_smoothie_step(x, v, 0.3, 0.8, seed=3, backend=backend) for v in (identity, table))
    assert torch.equal(a.noisy_tokens, b.noisy_tokens)
    torch.testing.assert_close(a.smoothed, b.smoothed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-5, atol=1e-5)

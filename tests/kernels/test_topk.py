"""The largest noisy logits in every backend, what they leave out, means made of them, and their gradients."""

import itertools

import pytest
import torch
from cases import CASES, FIELDS, dense_outputs, inputs, loudness
from conftest import DEVICE, device_of
from hypothesis import given, settings
from hypothesis import strategies as st

from smoothie_kernels import Vocabulary, average, dispatch, fused_smoothie_step, library, noise
from smoothie_kernels.backends import gather, reference
from smoothie_kernels.recall import pick_buckets
from smoothie_kernels.stream import Request
from smoothie_kernels.testing import FLOOR, check_step, check_topk, dense_logits, relative_error

KEY = {"seed": 3, "offset": 1}


def interpreted(backend):
    return backend == "triton" and DEVICE == "cpu"


def field(n, v, device, **how):
    return noise.gaussian(n, v, **KEY, **how, backend="reference").to(device)


def dense(x, table, mu, std):
    """float64 logits of the field that KEY names."""
    rows = torch.ones(len(x), dtype=torch.float64, device=x.device)
    eps = noise.gaussian(len(x), len(table), **KEY, backend="reference").to(x.device).double()
    return dense_logits(x.double(), table.double(), mu * rows, std * rows, eps)[1]


# --- the largest logits


def of_case(case, device):
    n, v, d, mu, std, scale = CASES[case]
    x, table = inputs(n, v, d, scale, device)
    rows = torch.ones(n, device=x.device)
    return x, table, mu * rows, std * rows


@pytest.mark.parametrize("case", CASES)
def test_exact(backend, case):
    x, table, mu, std = of_case(case, device_of(backend))
    n, v = len(x), len(table)
    eps = field(n, v, x.device)
    plain = fused_smoothie_step(x, table, mu, std, **KEY, backend=backend)
    for k in [min(v, 9)] if interpreted(backend) else sorted({1, min(v, 9), v}):
        step = fused_smoothie_step(x, table, mu, std, **KEY, topk=k, backend=backend)
        assert check_step(step, x, table, mu, std, eps) == []
        assert check_topk(step.topk, x, table, mu, std, eps) == []
        assert torch.equal(step.topk.indices[:, 0], step.noisy_tokens)
        assert torch.equal(step.noisy_tokens, plain.noisy_tokens)
        assert (step.topk.values.dtype, step.topk.indices.dtype) == (torch.float32, torch.int64)
        if k == v:
            assert step.topk.tail_mass.max() <= 2e-6 * max(1.0, float(std.max()))


@pytest.mark.parametrize("fields", FIELDS)
def test_of_a_sum_of_fields(backend, fields):
    offset, weights, std = FIELDS[fields]
    x, table = inputs(9, 150, 24, 1.0, device_of(backend))
    where = {"seed": 3, "offset": offset, "field_weights": weights}
    mu, std = 0.1 * torch.ones(9, device=x.device), std * torch.ones(9, device=x.device)
    step = fused_smoothie_step(x, table, mu, std, **where, topk=7, backend=backend)
    eps, loud = noise.gaussian(9, 150, **where, backend="reference").to(x.device), loudness(weights)
    assert check_step(step, x, table, mu, std, eps, loudness=loud) == []
    assert check_topk(step.topk, x, table, mu, std, eps, loudness=loud) == []
    assert torch.equal(step.topk.indices[:, 0], step.noisy_tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types(backend, dtype):
    x, table = inputs(19, 261, 40, 1.0, device_of(backend), dtype)
    rows = torch.ones(19, device=x.device)
    for smooth in ("full", "topk", "topk+mean"):
        step = fused_smoothie_step(x, table, 0.05, 0.99, **KEY, topk=12, smooth=smooth, backend=backend)
        assert step.smoothed.dtype == dtype
        assert check_topk(step.topk, x, table, 0.05 * rows, 0.99 * rows, field(19, 261, x.device)) == []


@pytest.mark.parametrize("target", [0.5, 0.9, 0.99])
def test_approximate(backend, target, monkeypatch):
    """Neighbours in the table are alike, as neighbouring tokens are; over 200 rows, from peaked to flat."""
    n, v, d, k = (40, 2000, 16, 16) if interpreted(backend) else (200, 5000, 24, 48)
    monkeypatch.setattr(reference, "CHUNK", 4096)
    table = torch.randn(v // 20, d).repeat_interleave(20, 0) + 0.5 * torch.randn(v, d)
    table, x = table.to(device_of(backend)), (table[::7][:n] + 0.3 * torch.randn(n, d)).to(device_of(backend))
    rows, eps = torch.ones(n, device=x.device), field(n, v, x.device)
    levels = ((0.1, 0.995), (1e-3, 1.0), (0.684, 0.73), (0.01, 1.0), (7e-5, 1.0))
    for mu, std in levels[:2] if interpreted(backend) else levels:
        step = fused_smoothie_step(x, table, mu, std, **KEY, topk=k, recall_target=target, backend=backend)
        noisy = mu * rows, std * rows, eps
        assert check_topk(step.topk, x, table, *noisy, recall=target - 0.01) == []
        assert torch.equal(step.topk.indices[:, 0], step.noisy_tokens)
        if backend == "cpu":
            assert check_topk(step.topk, x, table, *noisy) == []  # exact at any target


def test_reference_keeps_strided_buckets(monkeypatch):
    """What the buckets are, in plain words, in chunks of any size."""
    x, table = inputs(6, 1000, 8, 1.0, "cpu", torch.float64)
    logits = dense(x, table, 0.1, 1.0)
    buckets, keep = pick_buckets(1000, 40, 0.9)
    kept = [
        sorted(sorted(range(b, 1000, buckets), key=lambda j: -row[j])[:keep] for b in range(buckets))
        for row in logits.tolist()
    ]
    for chunk in (1, 100, 128, 999, 5000):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        step = fused_smoothie_step(x, table, 0.1, 1.0, **KEY, topk=40, recall_target=0.9, backend="reference")
        for row, groups, found in zip(logits.tolist(), kept, step.topk.indices.tolist(), strict=True):
            assert found == sorted((j for group in groups for j in group), key=lambda j: -row[j])[:40]


def test_ties_go_to_the_lowest_token(backend):
    x, table = inputs(10, 40, 16, 1.0, device_of(backend))
    table = table.repeat(5, 1)  # every token again in later tiles
    step = fused_smoothie_step(x, table, 0.5, 0.0, topk=12, backend=backend)
    order = dense(x, table, 0.5, 0.0).sort(dim=1, descending=True, stable=True).indices[:, :12]
    assert torch.equal(step.topk.indices, order)
    flat = fused_smoothie_step(x, table, 0.0, 0.0, topk=12, backend=backend).topk
    assert torch.equal(flat.indices, torch.arange(12, device=x.device).expand(10, 12))
    torch.testing.assert_close(flat.tail_mass, torch.full_like(flat.tail_mass, 1 - 12 / 200))


def test_ties_between_buckets_go_to_the_lowest_token(backend):
    table = 9 + torch.randn(1000, 8, device=device_of(backend))
    table[200] = table[100] = 0  # of 128 buckets the later has the lower token
    step = fused_smoothie_step(table[:3] * 0, table, 0.5, 0.0, topk=2, recall_target=0.9, backend=backend)
    assert step.topk.indices.tolist() == [[100, 200]] * 3


def test_rows_that_are_not_finite(backend):
    x, table = inputs(9, 150, 16, 1.0, device_of(backend))
    clean = fused_smoothie_step(x, table, 0.1, 0.9, **KEY, topk=7, smooth="topk", backend=backend)
    x[2, 3], x[5, 0] = torch.nan, torch.inf
    step = fused_smoothie_step(x, table, 0.1, 0.9, **KEY, topk=7, smooth="topk", backend=backend)
    bad = torch.tensor([2, 5], device=x.device)
    assert step.topk.values[bad].isnan().all()
    assert torch.equal(step.topk.indices[bad], torch.arange(7, device=x.device).expand(2, 7))
    assert step.smoothed[bad].isnan().all()
    others = torch.tensor([0, 1, 3, 4, 6, 7, 8], device=x.device)
    for a, b in ((step.topk.values, clean.topk.values), (step.topk.indices, clean.topk.indices)):
        assert torch.equal(a[others], b[others])


def test_shapes(backend):
    x, table = inputs(12, 140, 24, 1.0, device_of(backend))
    for smooth in ("full", "topk", "topk+mean"):
        how = {"topk": 5, "smooth": smooth, "backend": backend}
        flat = fused_smoothie_step(x, table, 0.1, 0.9, **KEY, **how)
        step = fused_smoothie_step(x.view(2, 6, 24), table, 0.1, 0.9, **KEY, **how)
        assert step.topk.values.shape == step.topk.indices.shape == (2, 6, 5)
        assert step.topk.tail_mass.shape == (2, 6)
        assert torch.equal(step.topk.values.flatten(0, 1), flat.topk.values)
        assert torch.equal(step.smoothed.flatten(0, 1), flat.smoothed)
        one = fused_smoothie_step(x[0], table, 0.1, 0.9, **KEY, **how)
        assert (one.topk.values.shape, one.topk.tail_mass.shape) == ((5,), ())
        torch.testing.assert_close(one.smoothed, flat.smoothed[0])
        none = fused_smoothie_step(x[:0], table, 0.1, 0.9, **KEY, **how)
        assert (none.topk.values.shape, none.topk.tail_mass.shape) == ((0, 5), (0,))
        assert none.smoothed.shape == (0, 24)
        wide = torch.cat((x, x), 1)[:, :24]
        assert torch.equal(fused_smoothie_step(wide, table, 0.1, 0.9, **KEY, **how).smoothed, flat.smoothed)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 700), st.integers(1, 40), st.floats(0, 0.7), st.floats(0, 2), st.data())
def test_any_shape(n, v, d, mu, std, data):
    torch.manual_seed(n * v + d)
    k, target = data.draw(st.integers(1, v)), data.draw(st.sampled_from([1.0, 0.8]))
    x, table = inputs(n, v, d, 1.0, "cpu")
    eps, rows = field(n, v, "cpu"), torch.ones(n)
    for backend in ("reference", "cpu"):
        if dispatch.load(backend).supports("cpu", x.dtype):
            continue
        step = fused_smoothie_step(x, table, mu, std, **KEY, topk=k, recall_target=target, backend=backend)
        recall = 1.0 if target == 1.0 or backend == "cpu" else 0.3
        assert check_topk(step.topk, x, table, mu * rows, std * rows, eps, recall=recall) == []


def test_large_k(backend, monkeypatch):
    """More than any bucket scheme would keep, and many times the room of a row."""
    if interpreted(backend):
        pytest.skip("too large for the interpreter")
    monkeypatch.setattr(reference, "CHUNK", 4096)
    x, table = inputs(33, 30522, 16, 1.0, device_of(backend))
    rows, eps = torch.ones(33, device=x.device), field(33, 30522, x.device)
    for k in (64, 4096, 30522):
        step = fused_smoothie_step(x, table, 0.05, 0.99, **KEY, topk=k, backend=backend)
        assert check_topk(step.topk, x, table, 0.05 * rows, 0.99 * rows, eps) == []


# --- means of them


def test_smooth_topk(backend):
    x, table = inputs(30, 400, 24, 1.0, device_of(backend))
    step = fused_smoothie_step(x, table, 0.1, 0.9, **KEY, topk=20, smooth="topk", backend=backend)
    logits = dense(x, table, 0.1, 0.9).gather(1, step.topk.indices)
    wanted = (logits.softmax(1)[:, None] @ table.double()[step.topk.indices])[:, 0]
    assert relative_error(step.smoothed, wanted) <= 2e-6
    full = fused_smoothie_step(x, table, 0.1, 0.9, **KEY, topk=400, smooth="topk", backend=backend).smoothed
    exact = fused_smoothie_step(x, table, 0.1, 0.9, **KEY, backend=backend).smoothed
    assert relative_error(full, exact) <= 2e-6


def rest(x, table, mu, sigma_min=1.5):
    """The mean of the table under the weights without noise, to first order in their logits; float64."""
    table = table.double()
    logits = mu / sigma_min**2 * (x.double() @ table.T - table.square().sum(1) / 2)
    centred = table - table.mean(0)
    return table.mean(0) + logits @ centred / len(table)


@pytest.mark.parametrize("bare", [True, False], ids=["table", "vocabulary"])
def test_smooth_topk_and_mean(backend, bare):
    x, table = inputs(30, 400, 24, 1.0, device_of(backend))
    embeddings = table if bare else Vocabulary(table, backend=backend)
    for mu, std in ((0.3, 0.9), (0.01, 1.0)):
        step = fused_smoothie_step(x, embeddings, mu, std, **KEY, topk=20, smooth="topk+mean", backend=backend)
        weights = dense(x, table, mu, std).softmax(1).gather(1, step.topk.indices)
        kept = (weights[:, None] @ table.double()[step.topk.indices])[:, 0]
        wanted = kept + (1 - weights.sum(1, keepdim=True)) * rest(x, table, mu)
        assert relative_error(step.smoothed, wanted) <= 4e-6


def test_topk_and_mean_over_the_schedule():
    """Against the full mean, as a user sees it: never worse than renormalising, and good at both ends."""
    n, v, d = 64, 8000, 48
    table = torch.randn(v // 8, d).repeat_interleave(8, 0) * 0.8 + 0.6 * torch.randn(v, d)
    x = table[torch.randint(v, (n,))] + 0.25 * torch.randn(n, d)
    vocabulary = Vocabulary(table)
    # Half as much again as it is; the noise of the full mean itself, which no estimate knows, is 0.39 in the end.
    bounds = {0.684: 0.03, 0.2: 0.32, 0.06: 0.45, 0.0244: 0.55, 9.39e-3: 0.58, 1.27e-3: 0.58, 7.4e-5: 0.58}
    for mu, bound in bounds.items():
        means = {
            smooth: fused_smoothie_step(x, vocabulary, mu, 1.0, **KEY, topk=64, smooth=smooth).smoothed
            for smooth in ("full", "topk", "topk+mean")
        }
        errors = {smooth: relative_error(mean, means["full"]) for smooth, mean in means.items()}
        assert errors["topk+mean"] <= bound
        assert errors["topk+mean"] <= errors["topk"] / 4


def test_moments_are_kept_and_follow_gradients():
    table = torch.randn(50, 6)
    vocabulary = Vocabulary(table)
    assert vocabulary.moments()[1].data_ptr() == vocabulary.moments()[1].data_ptr()
    with_grad = Vocabulary(table.clone().requires_grad_())
    assert with_grad.moments()[1].requires_grad
    for _ in range(2):  # a graph lasts for one backward pass
        step = fused_smoothie_step(table[:3], with_grad, 0.1, 0.9, **KEY, topk=4, smooth="topk+mean")
        step.smoothed.sum().backward()
    mean, covariance = vocabulary.moments()
    features = torch.cat((table, -table.square().sum(1, keepdim=True) / 2), 1)
    torch.testing.assert_close(mean, table.mean(0))
    torch.testing.assert_close(covariance, (features - features.mean(0)).T @ (table - table.mean(0)) / 50)


@pytest.mark.parametrize("table_type", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 24, 213])
def test_average(backend, table_type, width):
    table = torch.randn(60, 2 * width).to(device_of(backend), table_type)[:, :width]  # rows apart
    weights = torch.randn(11, 7, device=table.device)
    tokens = torch.randint(60, (11, 7), device=table.device)
    wanted = (weights.double()[:, None] @ table.double()[tokens])[:, 0]
    sizes = (weights.double().abs()[:, None] @ table.double().abs()[tokens])[:, 0]
    for dtype, rounding in ((torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        found = average.average_fwd(weights, tokens, table, dtype, backend)
        assert found.dtype == dtype
        assert ((found.double() - wanted).abs() <= rounding * wanted.abs() + 8 * 2**-24 * sizes + 2**-25).all()


def test_gather_in_small_blocks(monkeypatch):
    """The products in plain PyTorch do not depend on how many rows of the table they read at a time."""
    table, tokens = torch.randn(60, 5).double(), torch.randint(60, (11, 7))
    weights, vectors = torch.randn(11, 7).double(), torch.randn(11, 5).double()
    one_hot = torch.nn.functional.one_hot(tokens, 60).double()
    for room in (1, 700, 2**26):
        monkeypatch.setattr(gather, "ROOM", room)
        matrix = (weights[..., None] * one_hot).sum(1)
        torch.testing.assert_close(gather.average(weights, tokens, table, torch.float64), matrix @ table)
        torch.testing.assert_close(gather.spread(weights, tokens, vectors, 60), matrix.T @ vectors)
        wanted = (vectors @ table.T).gather(1, tokens)
        torch.testing.assert_close(gather.dots(vectors, tokens, table, torch.float64), wanted)


# --- gradients


@pytest.mark.parametrize("smooth", ["full", "topk", "topk+mean"])
def test_gradcheck(smooth):
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(40, 4, dtype=torch.float64, requires_grad=True)

    def outputs(x, table):
        step = fused_smoothie_step(x, table, 0.2, 0.6, **KEY, topk=7, smooth=smooth, backend="reference")
        return step.smoothed, step.lse, step.topk.values, step.topk.tail_mass

    assert torch.autograd.gradcheck(outputs, (x, table))


@pytest.mark.parametrize("case", ["even", "odd", "one row", "one token", "peaked", "far away", "no noise"])
@pytest.mark.parametrize("smooth", ["full", "topk", "topk+mean"])
def test_gradients(backend, case, smooth):
    """Against float64 autograd through the dense step with the same choice of tokens."""
    x, table, mu, std = of_case(case, device_of(backend))
    k = min(len(table), 9)
    x, table = x.requires_grad_(), table.requires_grad_()
    step = fused_smoothie_step(x, table, mu, std, **KEY, topk=k, smooth=smooth, backend=backend)
    outputs = step.smoothed, step.lse, step.topk.values, step.topk.tail_mass
    incoming = [torch.randn_like(o) for o in outputs]
    found = torch.autograd.grad(outputs, (x, table), incoming)
    given = x, table, mu, std, step.topk.indices, smooth, incoming
    exact, naive = (dense_gradients(dtype, *given) for dtype in (torch.float64, torch.float32))
    for got, by_exact, by_naive in zip(found, exact, naive, strict=True):
        assert relative_error(got, by_exact) <= max(2e-6, 2 * relative_error(by_naive, by_exact))


def dense_gradients(dtype, x, table, mu, std, indices, smooth, incoming):
    """Of x and table, by autograd in dtype."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, table)]
    rest = (t.to(dtype) for t in (mu, std, field(len(x), len(table), x.device)))
    made = dense_outputs(*leaves, *rest, indices, smooth)
    return torch.autograd.grad(made, leaves, [i.to(dtype) for i in incoming])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_that_cancel_in_16_bits(backend, dtype):
    """Of tail_mass: what comes through lse and through values is large beside their sum, which alone is rounded."""
    x, table = (t.requires_grad_() for t in inputs(20, 150, 64, 1.0, device_of(backend), dtype))
    mu, std = (torch.full((20,), number, device=x.device) for number in (0.2, 0.99))
    step = fused_smoothie_step(x, table, mu, std, **KEY, topk=40, backend=backend)
    outputs = step.smoothed, step.lse, step.topk.values, step.topk.tail_mass
    incoming = [torch.zeros_like(o) for o in outputs]
    incoming[3].normal_()
    found = torch.autograd.grad(outputs, (x, table), incoming)
    exact = dense_gradients(torch.float64, x, table, mu, std, step.topk.indices, "full", incoming)
    rounded_weights = 2 if backend == "triton" and dtype == torch.bfloat16 else 1
    for got, by_exact in zip(found, exact, strict=True):
        assert relative_error(got, by_exact) <= rounded_weights * FLOOR[dtype]


def test_gradients_of_one_output_alone(backend):
    """lse costs the pass over the vocabulary, and nobody else asks for it."""
    n, v, d = (5, 40, 8) if interpreted(backend) else (12, 300, 16)
    x, table = inputs(n, v, d, 1.0, device_of(backend))
    x.requires_grad_(), table.requires_grad_()
    for smooth, name in itertools.product(("topk", "topk+mean", "full"), ("smoothed", "values", "lse", "tail_mass")):
        for wanted in ((x, table),) if interpreted(backend) else ((x,), (table,), (x, table)):
            step = fused_smoothie_step(x, table, 0.1, 0.9, **KEY, topk=9, smooth=smooth, backend=backend)
            output = getattr(step, name) if name in step._fields else getattr(step.topk, name)
            found = torch.autograd.grad(output.square().sum(), wanted)
            wide = [t.detach().double().requires_grad_() for t in (x, table)]
            exact = fused_smoothie_step(
                *wide, 0.1, 0.9, **KEY, topk=9, smooth=smooth, backend="reference"
            )  # fmt: skip
            output = getattr(exact, name) if name in exact._fields else getattr(exact.topk, name)
            all_exact = torch.autograd.grad(output.square().sum(), wide)
            for t, got in zip(wanted, found, strict=True):
                assert relative_error(got, all_exact[0 if t is x else 1]) <= 2e-5


def test_topk_alone_leaves_the_vocabulary_out_of_the_backward(backend, monkeypatch):
    x, table = inputs(4, 60, 8, 1.0, device_of(backend))
    step = fused_smoothie_step(
        x.requires_grad_(), table, 0.1, 0.9, **KEY, topk=3, smooth="topk", backend=backend
    )  # fmt: skip
    module = dispatch.load(backend)
    monkeypatch.setattr(module, "step_bwd", lambda *_: pytest.fail("the whole vocabulary again"))
    step.smoothed.sum().backward()
    assert x.grad.isfinite().all()


def test_same_call_same_bits(backend):
    x, table = inputs(40, 600, 32, 1.0, device_of(backend))

    def results():
        leaves = x.detach().requires_grad_(), table.detach().requires_grad_()
        step = fused_smoothie_step(*leaves, 0.05, 0.99, **KEY, topk=30, smooth="topk+mean", backend=backend)
        total = step.smoothed.square().sum() + step.topk.values.sum()
        return *step[:4], *step.topk, *torch.autograd.grad(total, leaves)

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


# --- as PyTorch sees it


@pytest.mark.compilers
@pytest.mark.parametrize("mean", [True, False])
def test_opcheck(backend, mean):
    table = torch.randn(40, 8, device=device_of(backend))
    x, bias = table[:6] + 0.1, Vocabulary(table, backend=backend).bias
    rows, zero = torch.ones(6, device=table.device), torch.tensor(0)
    given = Request(x, table, bias, 0.1 * rows, 0.9 * rows, None, 0, zero, zero[None], None, 2**28, mean, 5)._replace(
        backend=backend
    )
    torch.library.opcheck(library.step_fwd, given)
    leaves = {"x": x.detach().requires_grad_(), "embeddings": table.detach().requires_grad_()}
    torch.library.opcheck(library.step_fwd, given._replace(**leaves))
    *_, logits, tokens, _ = library.step_fwd(*given)
    weights = logits.softmax(1)
    torch.library.opcheck(average.average_fwd, (weights, tokens, table, torch.float32, backend))
    leaves = weights.requires_grad_(), tokens, table.requires_grad_(), torch.float32, backend
    torch.library.opcheck(average.average_fwd, leaves)
    for needs in ((True, True), (True, False), (False, True)):
        grad = torch.randn_like(x)
        torch.library.opcheck(average.average_bwd, (grad, weights.detach(), tokens, table.detach(), *needs))


@pytest.mark.compilers
@pytest.mark.parametrize("smooth", ["full", "topk", "topk+mean"])
def test_compile_fullgraph(smooth):
    x, table = inputs(12, 150, 16, 1.0, DEVICE)
    vocabulary = Vocabulary(table)

    def loss(x, table, offset):
        step = fused_smoothie_step(x, table, 0.1, 0.9, seed=7, offset=offset, topk=6, smooth=smooth)
        return step.smoothed.square().sum() + step.topk.values.sum() + step.topk.tail_mass.sum()

    compiled = torch.compile(loss, fullgraph=True)
    leaves = x.requires_grad_(), table.requires_grad_()
    for offset in (0, 1):
        found, expected = (torch.autograd.grad(f(*leaves, offset), leaves) for f in (compiled, loss))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(compiled(x, vocabulary, 3), loss(x, vocabulary, 3))


@pytest.mark.parametrize("smooth", ["full", "topk", "topk+mean"])
def test_vmap(backend, smooth):
    x, table = inputs(12, 150, 16, 1.0, device_of(backend))
    x, vocabulary = x.view(3, 4, 16), Vocabulary(table, backend=backend)

    def step(x):
        step = fused_smoothie_step(x, vocabulary, 0.1, 0.9, **KEY, topk=6, smooth=smooth, backend=backend)
        return *step[:4], *step.topk

    for a, *b in zip(torch.func.vmap(step)(x), *(step(sample) for sample in x), strict=True):
        torch.testing.assert_close(a, torch.stack(b))

"""fused_smoothie_step in every backend: known answers, float64, edges, and what must not change the result."""

import mmap

import numpy as np
import pytest
import torch
from cases import CASES, FIELDS, inputs, loudness
from conftest import device_of
from hypothesis import given, settings
from hypothesis import strategies as st

from smoothie_kernels import Vocabulary, fused_smoothie_step, noise
from smoothie_kernels.testing import check_step, relative_error

GOLDEN = ["even", "no_noise", "one_row", "peaked", "per_row", "ragged", "tiny_vocab"]


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden(golden, backend, name, dtype):
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is the reference's alone")
    known = {key: torch.from_numpy(value) for key, value in np.load(golden / f"step_{name}.npz").items()}
    where = {key: int(known[key]) for key in ("seed", "offset", "row_offset")}
    x, table = (known[key].to(device_of(backend), dtype) for key in ("x", "embeddings"))
    mu, std = (known[key].to(x.device) if known[key].dim() else float(known[key]) for key in ("mu", "std"))
    step = fused_smoothie_step(x, table, mu, std, sigma_min=float(known["sigma_min"]), backend=backend, **where)
    assert relative_error(step.smoothed.cpu(), known["smoothed"]) <= (2e-6 if dtype == torch.float32 else 1e-12)
    assert torch.equal(step.tokens.cpu(), known["tokens"])
    assert torch.equal(step.noisy_tokens.cpu(), known["noisy_tokens"])
    assert (step.lse.cpu() - known["lse"]).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_against_float64(backend, case):
    n, v, d, mu, std, scale = CASES[case]
    x, table = inputs(n, v, d, scale, device_of(backend))
    step = fused_smoothie_step(x, table, mu, std, seed=3, offset=1, row_offset=5, backend=backend)
    eps = noise.gaussian(n, v, seed=3, offset=1, row_offset=5, backend="reference").to(x.device)
    rows = torch.ones(n, device=x.device)
    assert check_step(step, x, table, mu * rows, std * rows, eps) == []


@pytest.mark.parametrize("fields", FIELDS)
def test_sum_of_fields(backend, fields):
    offset, weights, std = FIELDS[fields]
    x, table = inputs(33, 301, 24, 1.0, device_of(backend))
    where = {"seed": 3, "offset": offset, "field_weights": weights, "row_offset": 2**32 - 33}
    step = fused_smoothie_step(x, table, 0.1, std, **where, backend=backend)
    eps = noise.gaussian(33, 301, **where, backend="reference").to(x.device)
    rows = torch.ones(33, device=x.device)
    assert check_step(step, x, table, 0.1 * rows, std * rows, eps, loudness=loudness(weights)) == []
    words = [o - 2**64 if o >= 2**63 else o for o in offset]
    where |= {"offset": torch.tensor(words).to(x.device), "field_weights": torch.tensor(weights).to(x.device)}
    of_tensors = fused_smoothie_step(x, table, 0.1, std, **where, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(step[:4], of_tensors[:4], strict=True))
    wide = torch.stack((where["offset"], where["offset"]), 1)[:, 0], torch.tensor(weights).double().to(x.device)
    where |= {"offset": wide[0], "field_weights": wide[1]}  # neither contiguous nor of the sums' type
    of_others = fused_smoothie_step(x, table, 0.1, std, **where, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(step[:4], of_others[:4], strict=True))


@pytest.mark.parametrize(("n", "far"), [(1, 0.0), (20, 30.0)])
def test_sum_of_many_fields(backend, n, far):
    """So many that the largest noise is far below what it could be; rows far from all tokens among others."""
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip("too many for the interpreter")
    x, table = inputs(n, 140, 16, 1.0, device_of(backend))
    x[::2] += far
    where = {"seed": 3, "offset": range(300), "field_weights": [(-1) ** f / 300**0.5 for f in range(300)]}
    step = fused_smoothie_step(x, table, 0.1, 0.9, **where, backend=backend)
    eps = noise.gaussian(n, 140, **where, backend="reference").to(x.device)
    assert 0.9 < eps.std() < 1.1
    rows = torch.ones(n, device=x.device)
    assert check_step(step, x, table, 0.1 * rows, 0.9 * rows, eps, loudness=300**0.5) == []


def test_fields_that_are_one(backend):
    """One field of weight 1 is the field as it is; a weight is a factor of std, equal offsets add."""
    x, table = inputs(20, 200, 16, 1.0, device_of(backend))

    def step(std, **fields):
        return fused_smoothie_step(x, table, 0.1, std, seed=3, backend=backend, **fields)

    plain = step(0.9, offset=5)
    if backend != "triton":  # which has two kernels for them
        one = step(0.9, offset=[5], field_weights=[1])
        assert all(torch.equal(a, b) for a, b in zip(one[:4], plain[:4], strict=True))
    ones = ([5], [1]), ([5], [2.0]), ([5, 5], [1.0, 1.0]), ([5, 6, 5], [2.5, 0.0, -0.5])
    for offset, weights in ones:
        found = step(0.9 / sum(weights), offset=offset, field_weights=weights)
        assert relative_error(found.smoothed, plain.smoothed) <= 2e-6
        torch.testing.assert_close(found.lse, plain.lse, rtol=1e-6, atol=2e-6)
        assert torch.equal(found.noisy_tokens, plain.noisy_tokens)
    assert not torch.equal(step(0.9, offset=[5], field_weights=[-1.0]).lse, plain.lse)


def test_weights_are_float64_for_float64():
    x, table = inputs(5, 60, 8, 1.0, device_of("reference"), torch.float64)
    where = {"offset": [1, 2], "field_weights": [0.1, 0.7], "seed": 3, "backend": "reference"}
    step, ids = fused_smoothie_step(x, table, 0.1, 3.0, **where), torch.arange(5, device=x.device)
    eps = 0.1 * noise.normals(ids, 0, 60, 3, 1) + 0.7 * noise.normals(ids, 0, 60, 3, 2)
    rows = torch.ones_like(ids).double()
    assert check_step(step, x, table, 0.1 * rows, 3.0 * rows, eps) == []


@pytest.mark.parametrize("table_type", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types(backend, x_type, table_type):
    x, table = inputs(19, 261, 40, 1.0, device_of(backend))
    x, table = x.to(x_type), table.to(table_type)
    step = fused_smoothie_step(x, table, 0.05, 0.99, seed=3, backend=backend)
    assert [t.dtype for t in step[:4]] == [x_type, torch.int64, torch.int64, torch.float32]
    eps = noise.gaussian(19, 261, seed=3, backend="reference").to(x.device)
    rows = torch.ones(19, device=x.device)
    assert check_step(step, x, table, 0.05 * rows, 0.99 * rows, eps) == []


def test_real_shape(backend):
    """The paper's width and a vocabulary of BERT's size, on few rows."""
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip("too large for the interpreter")
    x, table = inputs(24, 30522, 768, 1.0, device_of(backend))
    step = fused_smoothie_step(x, table, 0.05, 0.99, seed=3, backend=backend)
    eps = noise.gaussian(24, 30522, seed=3).to(x.device)
    rows = torch.ones(24, device=x.device)
    assert check_step(step, x, table, 0.05 * rows, 0.99 * rows, eps) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lse_of_rows_that_are_tokens(backend, dtype):
    """Its distance is zero. That of rounded scores is not."""
    table = torch.randn(150, 384, device=device_of(backend)).to(dtype)
    assert fused_smoothie_step(table[:9], table, 3.0, 0.0, backend=backend).lse.abs().max() <= 1e-6


def test_leading_dimensions_and_per_row_values(backend):
    x, table = inputs(24, 140, 24, 1.0, device_of(backend))
    mu, std = torch.rand(2, 1, device=x.device), torch.rand(2, 12, device=x.device)
    flat = fused_smoothie_step(
        x, table, mu.expand(2, 12).flatten(), std.flatten(), seed=1, row_offset=7, backend=backend
    )
    step = fused_smoothie_step(x.view(2, 12, 24), table, mu, std, seed=1, row_offset=7, backend=backend)
    assert step.smoothed.shape == (2, 12, 24)
    assert step.tokens.shape == step.noisy_tokens.shape == step.lse.shape == (2, 12)
    for a, b in zip(step[:4], flat[:4], strict=True):
        assert torch.equal(a.flatten(), b.flatten())
    single = fused_smoothie_step(x[0], table, mu[0, 0], std[0, 0], seed=1, row_offset=7, backend=backend)
    assert single.lse.shape == ()
    torch.testing.assert_close(single.smoothed, step.smoothed[0, 0])


def test_not_contiguous(backend):
    x, table = inputs(18, 140, 24, 1.0, device_of(backend))
    expected = fused_smoothie_step(x, table, 0.05, 0.99, seed=1, backend=backend)
    wide_x, wide_table = x.repeat(1, 2)[:, 24:], table.repeat_interleave(2, 1)[:, ::2]
    padded_table = torch.cat((table, table), 1)[:, :24]
    mu = torch.full((18, 2), 0.05, device=x.device)[:, 0]
    for a, b in ((wide_x, wide_table), (x.T.contiguous().T, padded_table), (x, table.T.contiguous().T)):
        assert not (a.is_contiguous() and b.is_contiguous())
        step = fused_smoothie_step(a, b, mu, 0.99, seed=1, backend=backend)
        for found, wanted in zip(step[:4], expected[:4], strict=True):
            if backend == "triton":  # another stride of the table may be another kernel
                torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)
            else:
                assert torch.equal(found, wanted)


def test_no_rows(backend):
    x, table = inputs(1, 20, 8, 1.0, device_of(backend))
    step = fused_smoothie_step(x[:0], table, 0.1, 0.9, seed=0, backend=backend)
    assert [t.shape for t in step[:4]] == [(0, 8), (0,), (0,), (0,)]
    step = fused_smoothie_step(x.expand(3, 0, 1, 8), table, torch.rand(3, 1, 1, device=x.device), 0.9, backend=backend)
    assert step.smoothed.shape == (3, 0, 1, 8)


def test_ties_go_to_the_lowest_token(backend):
    x, table = inputs(20, 40, 16, 1.0, device_of(backend))
    table = table.repeat(8, 1)  # every token again in later tiles
    step = fused_smoothie_step(x, table, 0.5, 0.0, backend=backend)
    assert step.tokens.max() < 40
    assert torch.equal(step.tokens, step.noisy_tokens)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_loudest_noise(backend):
    """Its largest value takes all the weight."""
    x, table = inputs(20, 300, 16, 1.0, device_of(backend))
    step = fused_smoothie_step(x, table, 0.5, 2.0**24, seed=4, backend=backend)
    largest, tokens = (2**24 * noise.gaussian(20, 300, seed=4, backend="reference").double()).max(1)
    assert torch.equal(step.noisy_tokens, tokens)
    torch.testing.assert_close(step.smoothed, table[tokens])
    torch.testing.assert_close(step.lse.double(), largest, rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_lse_beside_a_common_offset(backend):
    """The nearest token's own error is not that of all others: where rows are flat, lse averages errors."""
    generator = torch.Generator().manual_seed(0)
    table = 0.1 * torch.randn(3000, 384, generator=generator) + 10
    x, rows = torch.randn(64, 384, generator=generator) + table[:1], torch.ones(64)
    given = x, table, 0.3 * rows, 0 * rows, torch.zeros(64, 3000)
    assert check_step(fused_smoothie_step(x, table, 0.3, 0, backend=backend), *given) == []


def test_same_call_same_bits(backend):
    x, table = inputs(40, 600, 32, 1.0, device_of(backend))
    first, second = (fused_smoothie_step(x, table, 0.05, 0.99, seed=1, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


def test_seed_none_follows_torch(backend):
    x, table = inputs(4, 50, 8, 1.0, device_of(backend))

    def lse():
        return fused_smoothie_step(x, table, 0.05, 0.99, backend=backend).lse

    torch.manual_seed(1)
    first, second = lse(), lse()
    torch.manual_seed(1)
    assert torch.equal(lse(), first)
    assert not torch.equal(first, second)


def test_split_of_rows(backend):
    """Rows in several calls, by row_offset or by row_ids, up to the last row id."""
    x, table = inputs(40, 300, 24, 1.0, device_of(backend))
    first_id = 2**32 - 40
    whole = fused_smoothie_step(x, table, 0.05, 0.99, seed=1, row_offset=first_id, backend=backend)
    order = torch.randperm(40, device=x.device)
    parts = [
        fused_smoothie_step(x[i : i + 13], table, 0.05, 0.99, seed=1, row_offset=first_id + i, backend=backend)
        for i in range(0, 40, 13)
    ]
    shuffled = fused_smoothie_step(x[order], table, 0.05, 0.99, seed=1, row_ids=first_id + order, backend=backend)
    for name in ("smoothed", "tokens", "noisy_tokens", "lse"):
        torch.testing.assert_close(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
        torch.testing.assert_close(getattr(shuffled, name), getattr(whole, name)[order])


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 70), v=st.integers(1, 400), d=st.integers(1, 40), threads=st.sampled_from([1, 2, 3, 5]))
def test_cpu_shapes_and_threads(n, v, d, threads):
    """Any shape and any number of threads (rows shared out, or the vocabulary): float64's result; one thread's bits."""
    if device_of("cpu") != "cpu":
        pytest.skip("a CPU test")
    x, table = inputs(n, v, d, 1.0, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        step = fused_smoothie_step(x, table, 0.1, 0.9, seed=1, backend="cpu")
        again = fused_smoothie_step(x, table, 0.1, 0.9, seed=1, backend="cpu")
        torch.set_num_threads(1)
        one = fused_smoothie_step(x, table, 0.1, 0.9, seed=1, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(step[:4], again[:4], strict=True))
    assert torch.equal(step.tokens, one.tokens)
    torch.testing.assert_close(step.smoothed, one.smoothed, rtol=2e-6, atol=2e-6)
    eps, rows = noise.gaussian(n, v, seed=1, backend="reference"), torch.ones(n)
    wrong = check_step(step, x, table, 0.1 * rows, 0.9 * rows, eps)
    if n * d < 8:  # so few numbers may all come out next to zero, by chance
        wrong = [each for each in wrong if not each.startswith("smoothed")]
    assert wrong == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_non_finite_rows_stay_alone(backend, bad):
    x, table = inputs(20, 140, 24, 1.0, device_of(backend))
    expected = fused_smoothie_step(x, table, 0.05, 0.99, seed=1, backend=backend)
    x[3, 5] = bad
    step = fused_smoothie_step(x, table, 0.05, 0.99, seed=1, backend=backend)
    others = torch.arange(20, device=x.device) != 3
    assert step.smoothed[3].isnan().all()
    assert step.lse[3].isnan()
    assert 0 <= step.tokens[3] < 140
    assert 0 <= step.noisy_tokens[3] < 140
    for a, b in zip(step[:4], expected[:4], strict=True):
        assert torch.equal(a[others], b[others])


def test_more_than_2_31_elements_of_table():
    """A table whose rows lie 2**29 elements apart: offsets pass 2**31. Its memory is mapped, and hardly touched."""
    v, stride, d = 6, 2**29, 24
    try:
        memory = mmap.mmap(-1, 4 * ((v - 1) * stride + d), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    except (OSError, ValueError) as reason:
        pytest.skip(f"cannot map 10 GiB without reserving them: {reason}")
    table = torch.frombuffer(memory, dtype=torch.float32).as_strided((v, d), (stride, 1))
    dense = torch.randn(v, d)
    table.copy_(dense)
    x = dense + 0.1 * torch.randn(v, d)

    def results(table):
        inputs = x.detach().requires_grad_(), table.detach().requires_grad_()
        step = fused_smoothie_step(*inputs, 0.3, 0.9, seed=1)
        return *step[:4], *torch.autograd.grad(step.smoothed.square().sum() + step.lse.sum(), inputs)

    assert all(torch.equal(a, b) for a, b in zip(results(table), results(dense), strict=True))


def test_more_than_2_31_pairs_of_row_and_token():
    """N * V = 2.1e9. The last rows equal the same rows in a call of their own."""
    if device_of("cpu") != "cpu":
        pytest.skip("a CPU test")
    n, v = 70_400, 30_522
    x, table = torch.randn(n, 1, requires_grad=True), torch.randn(v, 1)
    vocabulary = Vocabulary(table)
    whole = fused_smoothie_step(x, vocabulary, 0.3, 0.0)
    last = fused_smoothie_step(x[-50:], vocabulary, 0.3, 0.0)
    grads = [torch.autograd.grad(step.smoothed.sum(), x)[0][-50:] for step in (whole, last)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.smoothed[-50:], last.smoothed, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.lse[-50:], last.lse)
    assert torch.equal(whole.tokens[-50:], last.tokens)

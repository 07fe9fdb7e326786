"""nearest_token in every backend."""

import pytest
import torch
from conftest import device_of

from smoothie_kernels import nearest_token


def exact(x, table):
    return torch.cdist(x.double(), table.double(), compute_mode="donot_use_mm_for_euclid_dist").square().min(-1)


@pytest.mark.parametrize(
    ("n", "v", "d"), [(1, 1, 1), (1, 257, 24), (8, 131, 37), (33, 300, 64), (70, 129, 5), (40, 2, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(backend, n, v, d, dtype):
    table = torch.randn(v, d, device=device_of(backend)).to(dtype)
    x = (table[torch.randint(v, (n,))].float() + 0.2 * torch.randn(n, d, device=table.device)).to(dtype)
    got = nearest_token(x, table, backend=backend)
    distance, tokens = exact(x, table)
    chosen = (x.double() - table[got.tokens].double()).square().sum(1)
    assert bool((chosen <= distance + 1e-5 * distance.clamp_min(1)).all())
    assert (got.tokens == tokens).float().mean() > 0.95 or v <= 2
    torch.testing.assert_close(got.distance.double(), chosen, rtol=1e-6, atol=0)
    assert got.distance.dtype == torch.float32


def test_distance_does_not_cancel(backend):
    """Far from the origin ||x||^2 - 2 x.E + ||E||^2 keeps no digit of a small distance; the direct form keeps all."""
    table = 1000 + torch.randn(50, 16, device=device_of(backend))
    x = table + 1e-2
    got = nearest_token(x, table, backend=backend)
    torch.testing.assert_close(got.distance, (x - table[got.tokens]).square().sum(1), rtol=1e-5, atol=0)


def test_own_token_is_nearest(backend):
    table = torch.randn(300, 24, device=device_of(backend))
    got = nearest_token(table.view(3, 100, 24), table, backend=backend)
    assert torch.equal(got.tokens.flatten(), torch.arange(300, device=table.device))
    assert got.tokens.shape == (3, 100)
    assert not got.distance.any()


def test_ties_go_to_the_lowest_token(backend):
    table = torch.randn(45, 16, device=device_of(backend)).repeat(7, 1)
    got = nearest_token(table[-45:], table, backend=backend)
    assert torch.equal(got.tokens, torch.arange(45, device=table.device))


def test_no_rows(backend):
    table = torch.randn(5, 4, device=device_of(backend))
    got = nearest_token(table[:0], table, backend=backend)
    assert got.tokens.shape == got.distance.shape == (0,)


def test_nan_row(backend):
    table = torch.randn(200, 8, device=device_of(backend))
    x = table[:3].clone()
    x[1, 2] = float("nan")
    got = nearest_token(x, table, backend=backend)
    assert got.tokens[[0, 2]].tolist() == [0, 2]
    assert 0 <= got.tokens[1] < 200
    assert got.distance[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_distance(backend, dtype):
    """Many rows have one token; its rows' gradients are added up."""
    table = torch.randn(7, 6, device=device_of(backend)).to(dtype).requires_grad_()
    x = torch.randn(500, 6, device=table.device).to(dtype).requires_grad_()
    weights = torch.randn(500, device=table.device)
    tokens, distance = nearest_token(x, table, backend=backend)
    found = torch.autograd.grad(distance @ weights, (x, table))
    exact_x, exact_table = x.detach().double(), table.detach().double()
    apart = 2 * weights.double()[:, None] * (exact_x - exact_table[tokens])
    wanted = apart, torch.zeros_like(exact_table).index_add(0, tokens, -apart)
    rounding = 1e-6 if dtype == torch.float32 else 2**-8
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=rounding, atol=1e-5)


def test_a_compiled_function_may_return_the_distance():
    table, x = torch.randn(30, 4).requires_grad_(), torch.randn(5, 4).requires_grad_()
    find = torch.compile(lambda x: (x.square().sum(), nearest_token(x, table)), backend="aot_eager", fullgraph=True)
    loss, (tokens, distance) = find(x)
    expected = nearest_token(x, table)
    assert torch.equal(tokens, expected.tokens)
    assert torch.equal(distance, expected.distance)
    (grad,) = torch.autograd.grad(loss + distance.sum(), x)
    torch.testing.assert_close(grad, 2 * x + 2 * (x - table[tokens]))

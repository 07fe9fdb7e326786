"""The operators as PyTorch sees them: schema, fake kernels, torch.compile."""

import pytest
import torch
from conftest import DEVICE

from smoothie_kernels import Vocabulary, fused_smoothie_step, library, nearest_token, noise


def step_args(backend="auto"):
    table = torch.randn(40, 8, device=DEVICE)
    rows = torch.ones(6, device=DEVICE)
    seed = torch.tensor(3)
    x, bias = table[:6] + 0.1, Vocabulary(table).bias
    return x, table, bias, 0.1 * rows, 0.9 * rows, None, seed, torch.tensor(0), 0, 1.5, True, backend


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend):
    x, table, bias, *_ = args = step_args(backend)
    torch.library.opcheck(library.step_fwd, args)
    torch.library.opcheck(library.nearest_fwd, (x, table, bias, backend))
    torch.library.opcheck(library.column_bias, (table, True, backend))
    like = x.new_empty(6, 0)
    torch.library.opcheck(library.gaussian, (like, 11, None, torch.tensor(3), torch.tensor(0), 5, backend))


@pytest.mark.parametrize("bare", [True, False], ids=["table", "vocabulary"])
def test_compile_fullgraph(bare):
    table = torch.randn(150, 16, device=DEVICE)
    embeddings = table if bare else Vocabulary(table)
    x = torch.randn(2, 9, 16, device=DEVICE)

    def both(x, mu, std, offset):
        step = fused_smoothie_step(2 * x, embeddings, mu, std, seed=7, offset=offset)
        return step.smoothed + 1, step.lse, nearest_token(step.smoothed, embeddings).tokens

    compiled = torch.compile(both, fullgraph=True)
    for mu, std, offset in ((0.1, 0.9, 0), (0.2, 0.8, 1), (torch.rand(2, 1, device=DEVICE), 0.0, 2)):
        for a, b in zip(compiled(x, mu, std, offset), both(x, mu, std, offset), strict=True):
            torch.testing.assert_close(a, b)


def test_compile_dynamic_rows():
    table = torch.randn(50, 16, device=DEVICE)
    compiled = torch.compile(
        lambda x: fused_smoothie_step(x, table, 0.1, 0.9, seed=7).lse, fullgraph=True, dynamic=True
    )
    for n in (3, 5, 17):
        x = torch.randn(n, 16, device=DEVICE)
        torch.testing.assert_close(compiled(x), fused_smoothie_step(x, table, 0.1, 0.9, seed=7).lse)


def test_compile_draws_new_seeds():
    table = torch.randn(50, 16, device=DEVICE)
    x = torch.randn(3, 16, device=DEVICE)
    compiled = torch.compile(lambda x: fused_smoothie_step(x, table, 0.1, 0.9).lse, fullgraph=True)
    assert not torch.equal(compiled(x), compiled(x))


def test_values_are_checked_under_compile():
    table = torch.randn(50, 16)
    compiled = torch.compile(lambda x, std: fused_smoothie_step(x, table, 0.1, std, seed=0).lse, fullgraph=True)
    with pytest.raises(ValueError, match="std must not be negative"):
        compiled(torch.randn(3, 16), torch.tensor([0.1, -0.1, 0.1]))


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x, table = torch.empty(4, 7, 16, dtype=torch.bfloat16), torch.empty(50, 16)
        step = fused_smoothie_step(x, table, 0.1, 0.9, seed=0)
        assert (step.smoothed.shape, step.smoothed.dtype) == ((4, 7, 16), torch.bfloat16)
        assert (step.lse.shape, step.lse.dtype) == ((4, 7), torch.float32)
        assert step.tokens.dtype == torch.int64
        assert noise.gaussian(3, 5, seed=0).shape == (3, 5)


def test_backward_is_refused_clearly():
    x = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    step = fused_smoothie_step(x, torch.randn(50, 16, device=DEVICE), 0.1, 0.9, seed=0)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        step.smoothed.sum().backward()

"""Vocabulary: the column bias in float64's value, and the same results with it as with the bare table."""

import pytest
import torch
from conftest import device_of

from smoothie_kernels import Vocabulary, fused_smoothie_step, nearest_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("v", "d"), [(1, 1), (5, 3), (1030, 37), (600, 768)])
def test_bias_is_the_float64_value_rounded(backend, v, d, dtype):
    table = (100 * torch.randn(v, d, device=device_of(backend))).to(dtype)
    bias = Vocabulary(table, backend=backend).bias
    exact = -table.double().square().sum(1) / 2
    assert bias.dtype == torch.float32
    assert ((bias.double() - exact).abs() <= 2**-23 * exact.abs()).all()


def test_same_result_as_the_bare_table(backend):
    table = torch.randn(140, 24, device=device_of(backend))
    x, vocabulary = table[:20] + 0.1, Vocabulary(table, backend=backend)
    bare = fused_smoothie_step(x, table, 0.1, 0.9, seed=1, backend=backend)
    step = fused_smoothie_step(x, vocabulary, 0.1, 0.9, seed=1, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(step[:4], bare[:4], strict=True))
    assert torch.equal(nearest_token(x, vocabulary, backend=backend)[0], nearest_token(x, table, backend=backend)[0])


def test_nothing_is_copied_unless_rows_are_not_contiguous():
    table = torch.randn(10, 4)
    assert Vocabulary(table).embeddings is table
    assert Vocabulary(table[:, :2]).embeddings.data_ptr() == table.data_ptr()
    assert Vocabulary(table[:, ::2]).embeddings.is_contiguous()


def test_surface():
    vocabulary = Vocabulary(torch.randn(10, 4))
    assert len(vocabulary) == 10
    assert repr(vocabulary) == "Vocabulary(V=10, D=4, dtype=torch.float32, device='cpu')"
    assert vocabulary.to("cpu") is vocabulary
    assert vocabulary.to("meta").bias.device.type == "meta"
    with pytest.raises(ValueError, match="device must be on a CPU or a CUDA device, got xpu"):
        vocabulary.to("xpu")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_table_that_is_not_finite(bad):
    table = torch.randn(700, 4)
    table[613, 2] = bad
    with pytest.raises(ValueError, match=r"embeddings must be finite.* row 613 is not"):
        Vocabulary(table)
    with pytest.raises(ValueError, match="embeddings must be finite"):
        fused_smoothie_step(torch.randn(2, 4), table, 0.1, 0.9)


def test_a_table_that_was_set_twice_is_read_again():
    """The second storage may lie where the first one lay."""
    table, x = torch.nn.Parameter(torch.randn(500, 32), requires_grad=False), torch.randn(6, 32)
    vocabulary = Vocabulary(table)
    for _ in range(20):
        fused_smoothie_step(x, vocabulary, 0.3, 0.5, seed=1)
        for _ in range(2):
            table.data = torch.randn(500, 32)
        found, wanted = (fused_smoothie_step(x, t, 0.3, 0.5, seed=1).lse for t in (vocabulary, table.clone()))
        assert torch.equal(found, wanted)

"""Token ids to smoothed embeddings: the step itself, positions left out, gradients for the table, messages."""

import numpy as np
import pytest
import torch
from conftest import device_of

from smoothie_kernels import Vocabulary, fused_smoothie_step, noise
from smoothie_kernels.diffusion import SCHEDULES, make_schedule, noise_tokens
from smoothie_kernels.testing import dense_step, relative_error

ARCTAN = make_schedule("arctan")
KEY = {"seed": 5, "offset": 2, "row_offset": 7}


def material(device="cpu", v=140, d=16):
    return torch.randint(v, (3, 5), device=device), torch.randn(v, d, device=device), torch.tensor([0.01, 0.2, 0.9])


@pytest.mark.parametrize("bare", [True, False], ids=["table", "vocabulary"])
def test_is_the_step_of_the_tokens_embeddings(backend, bare):
    tokens, table, t = material(device_of(backend))
    smoothed = noise_tokens(
        tokens, table if bare else Vocabulary(table, backend=backend), ARCTAN, t, **KEY, backend=backend
    )  # fmt: skip
    mu, std = (m.repeat_interleave(5).double() for m in ARCTAN.marginal(t))
    eps = noise.gaussian(15, 140, **KEY, backend="reference").double()
    exact = dense_step(table[tokens].flatten(0, 1).cpu().double(), table.cpu().double(), mu, std, eps).smoothed
    assert smoothed.shape == (3, 5, 16)
    assert relative_error(smoothed.flatten(0, 1).cpu(), exact) <= 2e-6


def test_positions_that_are_left_out(backend):
    tokens, table, t = material(device_of(backend))
    everything = noise_tokens(tokens, table, ARCTAN, t, **KEY, backend=backend)
    mask = torch.rand(3, 5, device=table.device) < 0.6
    some = noise_tokens(tokens, table, ARCTAN, t, **KEY, mask=mask, backend=backend)
    assert (some[~mask] == 0).all()
    torch.testing.assert_close(some[mask], everything[mask])
    none = noise_tokens(tokens, table, ARCTAN, t, **KEY, mask=torch.zeros_like(mask), backend=backend)
    assert torch.equal(none, torch.zeros_like(everything))


@pytest.mark.parametrize("bare", [True, False], ids=["table", "vocabulary"])
def test_compiles_to_one_graph(bare):
    tokens, table, t = material()
    embeddings = table if bare else Vocabulary(table)

    def smoothed(tokens, t):
        return noise_tokens(tokens, embeddings, ARCTAN, t, **KEY)

    compiled = torch.compile(smoothed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, t), smoothed(tokens, t))


def test_one_time_for_all_and_other_arguments():
    tokens, table, _ = material()
    smoothed = noise_tokens(tokens, table, make_schedule("arctan", delta=0.25), 0.3, sigma_min=2.0, **KEY)
    mu, std = (float(m) for m in ARCTAN.marginal(0.3))
    step = fused_smoothie_step(table[tokens], table, mu, 0.25 * std, sigma_min=2.0, **KEY)
    torch.testing.assert_close(smoothed, step.smoothed)
    torch.manual_seed(1)
    first, second = (noise_tokens(tokens, table, ARCTAN, 0.3) for _ in range(2))
    assert not torch.equal(first, second)
    assert noise_tokens(tokens[:, :0], table, ARCTAN, 0.3).shape == (3, 0, 16)
    assert noise_tokens(tokens[0], table, ARCTAN, 0.3).shape == (5, 16)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_reach_the_table_through_rows_and_columns(masked):
    tokens, table = torch.randint(20, (2, 3)), torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, True]]) if masked else None

    def smoothed(table):
        return noise_tokens(tokens, table, ARCTAN, 0.1, seed=3, mask=mask, backend="reference")

    assert torch.autograd.gradcheck(smoothed, table)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": torch.tensor([0.5])}, TypeError, "tokens must be an int64 tensor, got torch.float32"),
        ({"tokens": [1, 2]}, TypeError, "tokens must be an int64 tensor, got list"),
        ({"tokens": torch.tensor(3)}, ValueError, r"tokens must have shape \[..., L\], got \[\]"),
        ({"tokens": torch.tensor([[1, 20]])}, ValueError, r"tokens must be in \[0, V\) with V = 20, got 20"),
        ({"tokens": torch.tensor([[1, -3]])}, ValueError, r"tokens must be in \[0, V\) with V = 20, got -3"),
        ({"t": torch.rand(3)}, ValueError, r"t must be a number or have shape \[2\], got \[3\]"),
        ({"t": 1.5}, ValueError, r"t must be in \[0, 1\], got 1.5"),
        ({"mask": torch.ones(2, 3)}, ValueError, r"mask must be torch.bool of shape \[2, 3\] .* got torch.float32"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask must be .* got torch.bool of shape \[3\]"),
        ({"mask": [True]}, TypeError, "mask must be a tensor, got list"),
        ({"step": np.array(["fused", "eager"])}, ValueError, "step must be one of 'fused', 'eager', got array"),
        ({"embeddings": torch.randn(20)}, ValueError, r"embeddings must have shape \[V, D\], got \[20\]"),
    ],
)
def test_messages(change, error, message):
    call = {"tokens": torch.ones(2, 3, dtype=torch.int64), "embeddings": torch.randn(20, 4), "t": 0.5} | change
    with pytest.raises(error, match=message):
        noise_tokens(call.pop("tokens"), call.pop("embeddings"), ARCTAN, call.pop("t"), **call, seed=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_surrounds_a_call_changes_nothing(name):
    """float16 in autocast to bfloat16; another default device."""
    tokens, table, _ = material()
    call = tokens, table.half(), make_schedule(name), 0.3
    how = KEY | {"mask": torch.rand(3, 5) < 0.6}
    expected = noise_tokens(*call, **how)
    for around in (torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        with around:
            found = noise_tokens(*call, **how)
        assert torch.equal(found, expected)

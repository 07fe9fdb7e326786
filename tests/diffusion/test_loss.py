"""The training loss: fused against eager against float64, its options, and that no way to split a batch changes it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

pytest.importorskip("transformers", reason="comes with the extra `train`")

from smoothie_kernels import noise
from smoothie_kernels.diffusion import loss as module
from smoothie_kernels.diffusion.loss import STREAMS, Draws, Losses, Place, TrainingLoss, cross_entropy, spread
from smoothie_kernels.diffusion.model import SmoothieConfig, SmoothieModel
from smoothie_kernels.diffusion.options import LossOptions

pytestmark = pytest.mark.usefixtures("one_thread")
V, D, B, L, S = 300, 16, 6, 9, 7
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "condition_layers": 2,
    "self_condition_layers": 1, "target_length": L, "source_length": S,
}  # fmt: skip
CASES = {
    "plain": ({}, {"self_conditioning": 0.0}),
    "self-conditioning": ({}, {"self_conditioning": 1.0}),
    "all options": ({}, {"skip_padding": True, "guidance_dropout": 0.3, "x_0_variance": 0.1, "self_conditioning": 1.0}),
    "table": ({"trainable_embeddings": True}, {"self_conditioning": 1.0}),
    "table, no padding": ({"trainable_embeddings": True}, {"skip_padding": True, "x_0_variance": 0.2}),
    "tokens": ({"token_head": True}, {"self_conditioning": 1.0}),
    "tokens and table": ({"token_head": True, "trainable_embeddings": True}, {}),
    "unconditional": ({"condition_layers": 0}, {}),
    "cosine": ({"metric": "cosine", "trainable_embeddings": True}, {}),
    "learned distances": ({"metric": "learned"}, {"skip_padding": True}),
    "learned distances and table": ({"metric": "learned", "trainable_embeddings": True}, {}),
    "tess": ({"noise_schedule": "tess"}, {}),
}


def small(**changes) -> SmoothieModel:
    torch.manual_seed(0)
    return SmoothieModel(SmoothieConfig(V, D, **SMALL | changes), torch.randn(V, D))


def texts(count: int = B) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = {}
    for name, length, least in (("target", L, 2), ("source", S, 0)):
        batch[name] = torch.randint(V, (count, length), generator=generator)
        ends = torch.randint(least, length + 1, (count, 1), generator=generator)
        batch[f"{name}_mask"] = torch.arange(length) < ends
    return batch


def losses_and_gradients(model, options, batch, *, parts=1, scale=None):
    training = TrainingLoss(model, options)
    size = B // parts
    found = []
    for first in range(0, B, size):
        part = {name: tensor[first : first + size] for name, tensor in batch.items()}
        found.append(training(part, Place(5, first, B), scale))
        found[-1].total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return Losses(*(sum(float(losses[i].detach()) for losses in found) for i in range(len(Losses._fields)))), gradients


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@pytest.mark.parametrize("name", CASES)
def test_fused_is_eager(name):
    changes, options = CASES[name]
    fused, eager = (
        losses_and_gradients(small(**changes), LossOptions(step=step, **options), texts())
        for step in ("fused", "eager")
    )
    torch.testing.assert_close(torch.tensor(fused[0]), torch.tensor(eager[0]), rtol=2e-6, atol=1e-7)
    for parameter, gradient in eager[1].items():
        assert relative(fused[1][parameter], gradient) < 1e-4, parameter


@pytest.mark.parametrize("name", [name for name in CASES if name != "unconditional"])
def test_every_parameter_takes_a_gradient(name):
    changes, options = CASES[name]
    _, gradients = losses_and_gradients(small(**changes), LossOptions(**options), texts())
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert ("embeddings.weight" in gradients) == changes.get("trainable_embeddings", False)


@pytest.mark.parametrize("skip_padding", [False, True])
def test_it_is_what_the_paper_says_in_float64(skip_padding):
    """Written out in dense float64, but for the network, which is the model's own."""
    model = small(trainable_embeddings=True).double()
    batch, place = texts(), Place(3, 2, B + 4)
    options = LossOptions(self_conditioning=0.0, skip_padding=skip_padding, seed=7)
    draw = Draws(options, place, B, torch.device("cpu"))
    table, tokens = model.embeddings.weight, batch["target"]
    counted = batch["target_mask"] if skip_padding else torch.ones_like(batch["target_mask"])

    def smoothed(t, stream, std_factor):
        mu, std = (m.double()[..., None, None] for m in model.schedule().marginal(t))
        x = table[tokens]
        distances = -torch.cdist(x, table, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * 1.5**2)
        eps = noise.gaussian(B * L, V, seed=7, offset=STREAMS * 3 + stream, row_offset=2 * L, backend="reference")
        logits = mu * distances + std_factor * std * eps.double().view(B, L, V)
        return (logits.softmax(-1) @ table).where(counted[..., None], 0)

    t = draw.times()
    condition = model.encode(batch["source"], batch["source_mask"])
    with torch.no_grad():
        wrong = (model(smoothed(t, 0, 1), t.double(), condition, None, counted) - table[tokens]).square().mean(-1)
        collapse = smoothed(1.0, 0, 0)[counted]
        rounding = functional.cross_entropy(smoothed(draw.early_times(), 1, 1)[counted] @ table.T, tokens[counted])
    found = TrainingLoss(model, options)(batch, place)
    assert float(found.prediction) == pytest.approx(float(wrong[counted].mean()), rel=1e-5)
    assert float(found.collapse) == pytest.approx(float((collapse - collapse.mean(0)).square().mean()), rel=1e-5)
    assert float(found.rounding) == pytest.approx(float(rounding), rel=1e-5)
    assert float(found.total.detach()) == pytest.approx(sum(map(float, found[1:])), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if "table" not in name])
@pytest.mark.parametrize("parts", [2, 6])
def test_micro_batches_add_up(name, parts):
    changes, options = CASES[name]
    options, batch = LossOptions(**options), texts()
    scale = 1 / float(batch["target_mask"].sum() if options.skip_padding else B * L)
    whole = losses_and_gradients(small(**changes), options, batch, scale=scale)
    split = losses_and_gradients(small(**changes), options, batch, parts=parts, scale=scale)
    torch.testing.assert_close(torch.tensor(split[0]), torch.tensor(whole[0]), rtol=5e-6, atol=1e-7)
    for parameter, gradient in whole[1].items():
        assert relative(split[1][parameter], gradient) < 2e-5, parameter


def test_gradient_of_spread_is_that_of_a_mean_with_gradient():
    x = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 5, dtype=torch.float64)
    mean = (x * weights[..., None]).sum((0, 1)) / weights.sum()
    wanted = ((x - mean).square().mean(-1) * weights).sum()
    assert torch.autograd.gradcheck(lambda x: spread(x, weights), x)
    torch.testing.assert_close(spread(x, weights), wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (spread(x, weights), wanted)))


@pytest.mark.parametrize("rows_at_a_time", [1, 4, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy_by_blocks(rows_at_a_time, bias, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * V * rows_at_a_time)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    table = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(V, dtype=torch.float64, requires_grad=True) if bias else None
    tokens, weights = torch.randint(V, (2, 5)), torch.rand(2, 5, dtype=torch.float64)
    leaves = [leaf for leaf in (x, table, shift) if leaf is not None]
    losses = [cross_entropy(x, table, tokens, weights, shift, step) for step in ("fused", "eager")]
    wanted = (
        functional.cross_entropy(functional.linear(x, table, shift).transpose(1, 2), tokens, reduction="none") * weights
    ).sum()
    for loss in losses:
        torch.testing.assert_close(loss, wanted)
        for got, exact in zip(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(got, exact)


def test_cross_entropy_keeps_no_logits(monkeypatch):
    """What autograd saves is as large as the inputs, not as rows x vocabulary."""
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * V * 8)
    x, table = torch.randn(64, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        cross_entropy(x, table, torch.randint(V, (64,)), torch.ones(64))
    assert max(saved, default=0) < 64 * V / 8


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**31), st.integers(0, 5), st.integers(1, 7))
def test_draws_are_those_of_the_place(seed, step, first, count):
    options = LossOptions(seed=seed, guidance_dropout=0.5)
    device, total = torch.device("cpu"), 12
    whole, part = (
        Draws(options, Place(step, 0, total), total, device),
        Draws(options, Place(step, first, total), count, device),
    )
    here = slice(first, first + count)
    assert torch.equal(whole.times()[here], part.times())
    assert torch.equal(whole.early_times()[here], part.early_times())
    assert torch.equal(whole.kept_sources()[here], part.kept_sources())
    assert whole.self_conditions() == part.self_conditions()
    assert (whole.times() >= 1e-5).all()
    assert (whole.times() <= 1).all()
    assert (whole.early_times() <= 0.05).all()
    other = Draws(options, Place(step + 1, 0, total), total, device)
    assert not torch.equal(whole.times(), other.times())


def test_draws_are_spread_over_the_steps():
    options = LossOptions(guidance_dropout=0.25)
    draws = [Draws(options, Place(step, 0, 50), 50, torch.device("cpu")) for step in range(200)]
    times = torch.cat([draw.times() for draw in draws])
    assert float(times.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(times.std()) == pytest.approx(12**-0.5, abs=0.02)
    kept = torch.cat([draw.kept_sources() for draw in draws]).double()
    assert float(kept.mean()) == pytest.approx(0.75, abs=0.03)
    assert sum(draw.self_conditions() for draw in draws) == pytest.approx(100, abs=30)


def test_self_conditioning_sees_the_first_answer(monkeypatch):
    model, seen = small(), []
    inner = model.hidden_states

    def spy(smoothed, t, condition, answer, mask):
        seen.append((smoothed, answer, torch.is_grad_enabled()))
        return inner(smoothed, t, condition, answer, mask)

    monkeypatch.setattr(model, "hidden_states", spy)
    TrainingLoss(model, LossOptions(self_conditioning=1.0))(texts(), Place(0, 0, B))
    (first, nothing, with_gradient), (second, answer, then) = seen
    assert (nothing, with_gradient, then) == (None, False, True)
    assert first is second  # one step feeds both passes
    assert answer.shape == (B, L, D)
    assert not answer.requires_grad


def test_dropped_sources_are_not_seen():
    batch = texts()
    other = {**batch, "source": (batch["source"] + 7) % V}
    for dropped in (1.0, 0.0):
        options = LossOptions(guidance_dropout=dropped)
        before, after = (losses_and_gradients(small(), options, each)[0].prediction for each in (batch, other))
        assert (before == after) == bool(dropped)


def test_x_0_variance_moves_the_input_and_not_the_target(monkeypatch):
    seen = []
    inner = module.smooth
    monkeypatch.setattr(module, "smooth", lambda x, *args, **named: seen.append(x) or inner(x, *args, **named))
    model, batch = small(), texts()
    for variance in (0.0, 0.25):
        TrainingLoss(model, LossOptions(x_0_variance=variance))(batch, Place(1, 0, B))
    moved = seen[1] - seen[0]
    assert float(moved.std()) == pytest.approx(0.5, rel=0.1)
    torch.testing.assert_close(seen[0], model.embeddings(batch["target"]))


def test_bf16_trains_every_weight_of_both_passes():
    """Weights cast without gradient in the first pass must not be found by the second."""
    model = small()
    _, gradients = losses_and_gradients(model, LossOptions(bf16=True, self_conditioning=1.0), texts())
    _, exact = losses_and_gradients(small(), LossOptions(self_conditioning=1.0), texts())
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.dtype == torch.float32
        assert relative(gradient, exact[name]) < 0.1, name


def test_padding_that_is_skipped_does_not_matter():
    batch, options = texts(), LossOptions(skip_padding=True, self_conditioning=1.0)
    other = {**batch, "target": torch.where(batch["target_mask"], batch["target"], (batch["target"] + 11) % V)}
    before, after = (losses_and_gradients(small(), options, each) for each in (batch, other))
    assert before[0] == after[0]
    for name, gradient in before[1].items():
        assert torch.equal(gradient, after[1][name]), name


def test_torch_noise_follows_the_default_generator():
    training = TrainingLoss(small(), LossOptions(step="eager", torch_noise=True, self_conditioning=0.0))
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(float(training(texts(), Place(0, 0, B)).total.detach()))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": "naive"}, "step must be one of 'fused', 'eager', got 'naive'"),
        ({"torch_noise": True}, "torch_noise must be False with step 'fused', got True"),
        ({"self_conditioning": 1.5}, "self_conditioning must be at least 0 and at most 1, got 1.5"),
        ({"guidance_dropout": -0.1}, "guidance_dropout must be at least 0 and at most 1, got -0.1"),
        ({"x_0_variance": -1.0}, "x_0_variance must be at least 0, got -1.0"),
        ({"seed": -1}, "seed must be at least 0 and at most 9223372036854775807, got -1"),
    ],
)
def test_option_messages(options, message):
    with pytest.raises(ValueError, match=message):
        LossOptions(**options)


def test_messages():
    with pytest.raises(
        ValueError, match=r"self_conditioning must be 0 for a model with self_condition_layers = 0, got 0.5"
    ):
        TrainingLoss(small(self_condition_layers=0), LossOptions())
    with pytest.raises(ValueError, match=r"guidance_dropout must be 0 for a model with condition_layers = 0, got 0.1"):
        TrainingLoss(small(condition_layers=0), LossOptions(guidance_dropout=0.1))

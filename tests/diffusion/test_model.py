"""The denoiser: skips, what it looks at, its config, saving and loading."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="comes with the extra `train`")

from transformers import AutoModel

from smoothie_kernels import Vocabulary
from smoothie_kernels.diffusion.layers import Attention, Layer
from smoothie_kernels.diffusion.model import Condition, SmoothieConfig, SmoothieModel, sinusoids

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "condition_layers": 2,
    "self_condition_layers": 1, "target_length": 12, "source_length": 9,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")
V, D, B, L, S = 50, 16, 3, 7, 5


def small(**changes) -> SmoothieModel:
    torch.manual_seed(0)
    return SmoothieModel(SmoothieConfig(V, D, **SMALL | changes), torch.randn(V, D)).eval()


def inputs():
    torch.manual_seed(1)
    return torch.randn(B, L, D), torch.rand(B), torch.randint(V, (B, S))


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_input_of_a_layer_is_added_to_its_mirror_image(layers):
    model = small(num_hidden_layers=layers, condition_layers=0, self_condition_layers=0)
    seen = []
    for module in model.layers:
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        module.register_forward_hook(lambda _, args, out: torch.zeros_like(out))  # only skips and extras get through
    smoothed, t, _ = inputs()
    model(smoothed, t)
    time = model.time(sinusoids(t, 32))
    extra = [linear(time)[:, None] for linear in model.time_of_layer]
    inside = []
    for i in range(layers):
        x = model.input(smoothed) + model.positions.weight[:L] if i == 0 else 0
        mirrored = layers - 1 - i
        inside.append(x + extra[i] + (inside[mirrored] if mirrored < i else 0))
    for got, wanted in zip(seen, inside, strict=True):
        torch.testing.assert_close(got, wanted.expand(B, L, -1))


@pytest.mark.parametrize("change", ["time", "source", "answer", "smoothed", "position"])
def test_answer_depends_on(change):
    model = small()
    smoothed, t, source = inputs()
    answer = torch.randn(B, L, D)
    before = model(smoothed, t, model.encode(source), answer)
    if change == "time":
        t = t / 2
    if change == "source":
        source = (source + 1) % V
    if change == "answer":
        answer = -answer
    if change == "smoothed":
        smoothed = -smoothed
    if change == "position":
        smoothed, answer = smoothed.flip(1), answer.flip(1)
        before = before.flip(1)
    assert (model(smoothed, t, model.encode(source), answer) - before).abs().max() > 1e-3


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("source", [False, True])
def test_layer_is_torch_s(norm_first, source):
    kind = nn.TransformerDecoderLayer if source else nn.TransformerEncoderLayer
    torch.manual_seed(0)
    theirs = kind(24, 4, 48, 0.0, activation="gelu", batch_first=True, norm_first=norm_first).double()
    ours = Layer(24, 4, 48, 0.0, norm_first=norm_first, source=source).double()
    pairs = [
        (ours.attention, theirs.self_attn),
        (ours.feed_forward[0], theirs.linear1),
        (ours.feed_forward[3], theirs.linear2),
    ]
    pairs += [(norm, getattr(theirs, f"norm{i + 1}")) for i, norm in enumerate(ours.norms)]
    if source:
        pairs.append((ours.source_attention, theirs.multihead_attn))
    with torch.no_grad():
        for mine, its in pairs:
            if isinstance(mine, Attention):
                parts = (mine.query, mine.key, mine.value)
                for part, weight, bias in zip(
                    parts, its.in_proj_weight.chunk(3), its.in_proj_bias.chunk(3), strict=True
                ):
                    part.weight.copy_(weight)
                    if part.bias is not None:
                        part.bias.copy_(bias.normal_())
                mine.output.load_state_dict(its.out_proj.state_dict())
            else:
                mine.load_state_dict(its.state_dict())
    x, states = torch.randn(B, L, 24).double(), torch.randn(B, S, 24).double()
    there, source_there = (
        torch.arange(L) < torch.tensor([[L], [3], [1]]),
        torch.arange(S) < torch.tensor([[2], [S], [1]]),
    )
    if source:
        wanted = theirs(x, states, tgt_key_padding_mask=~there, memory_key_padding_mask=~source_there)
        torch.testing.assert_close(ours(x, there, (states, source_there)), wanted)
    else:
        torch.testing.assert_close(ours(x, there)[there], theirs(x, src_key_padding_mask=~there)[there])


@pytest.mark.parametrize("masked", [False, True])
def test_no_answer_is_an_answer_of_zeros(masked):
    model = small()
    smoothed, t, source = inputs()
    condition = model.encode(source)
    mask = torch.arange(L) < torch.tensor([[L], [3], [1]]) if masked else None
    found = [model(smoothed, t, condition, answer, mask) for answer in (None, torch.zeros_like(smoothed))]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_masked_positions_are_left_out_of_the_products():
    """Each sample as it is alone and short; gradients too."""
    model, (smoothed, t, source) = small(), inputs()
    lengths, answer = [L, 3, 1], torch.randn(B, L, D)
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    mask[0, 2] = False  # a hole
    seen = set()
    for layers in (model.layers, model.answer_encoder):
        for layer in layers:
            layer.feed_forward.register_forward_pre_hook(lambda _, args: seen.add(args[0].shape))
    condition = model.encode(source)
    found = model(smoothed, t, condition, answer, mask)
    assert seen == {(int(mask.sum()), 32)}
    (found * mask[..., None]).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    total = 0
    for i, length in enumerate(lengths):
        one = slice(i, i + 1)
        of_one = Condition(*(part[one] for part in model.encode(source)[:2]))
        hole = mask[one, :length] if i == 0 else None
        wanted = model(smoothed[one, :length], t[one], of_one, answer[one, :length], hole)
        there = mask[i, :length]
        torch.testing.assert_close(found[i, :length][there], wanted[0][there])
        total = total + wanted[0][there].square().sum()
    total.backward()
    for gradient, p in zip(gradients, (p for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-4)


def test_what_is_masked_is_not_looked_at():
    model = small()
    smoothed, t, source = inputs()
    source_mask, mask = torch.arange(S) < 3, torch.arange(L) < 4
    there, kept = source_mask.expand(B, S), mask.expand(B, L)
    before = model(smoothed, t, model.encode(source, there), smoothed, kept)[:, :4]
    source = torch.where(source_mask, source, (source + 7) % V)
    smoothed = torch.where(mask[:, None], smoothed, smoothed + 5)
    torch.testing.assert_close(model(smoothed, t, model.encode(source, there), smoothed, kept)[:, :4], before)


def test_dropped_source_is_an_empty_source():
    model = small()
    smoothed, t, source = inputs()
    dropped = model.encode(source, keep=torch.tensor([True, False, True]))
    empty = model.encode(source, torch.zeros(B, S, dtype=torch.bool))
    torch.testing.assert_close(model(smoothed, t, dropped)[1], model(smoothed, t, empty)[1])
    torch.testing.assert_close(model(smoothed, t, dropped)[0], model(smoothed, t, model.encode(source))[0])
    assert torch.isfinite(model(smoothed, t, empty)).all()


def test_token_head_predicts_the_mean_embedding_of_its_softmax(monkeypatch):
    monkeypatch.setattr("smoothie_kernels.diffusion.model.ROWS_BYTES", 4 * V * 5)  # five rows at a time
    model = small(token_head=True)
    smoothed, t, source = inputs()
    hidden = model.hidden_states(smoothed, t, model.encode(source))
    wanted = model.output(hidden).softmax(-1) @ model.embeddings.weight
    torch.testing.assert_close(model.predict(hidden), wanted)


@pytest.mark.parametrize("changes", [{}, {"condition_layers": 0, "self_condition_layers": 0}, {"token_head": True},
                                     {"trainable_embeddings": True, "hidden_size": D},
                                     {"metric": "learned"}])  # fmt: skip
def test_saved_and_loaded_it_is_the_same(changes, tmp_path):
    model = small(**changes, noise_schedule="cosine", noise_options={"beta_max": 10.0})
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = SmoothieModel.from_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is SmoothieModel
    names = {*SMALL, *changes, "vocab_size", "noise_schedule", "noise_options", "intermediate_size", "sigma_min"}
    assert all(getattr(loaded.config, name) == getattr(model.config, name) for name in names)
    assert loaded.schedule() == model.schedule()
    for (name, tensor), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert loaded.embeddings.weight.requires_grad == model.config.trainable_embeddings
    smoothed, t, source = inputs()
    conditions = [m.encode(source) if m.config.condition_layers else None for m in (model, loaded)]
    assert torch.equal(model(smoothed, t, conditions[0]), loaded(smoothed, t, conditions[1]))


def test_every_parameter_takes_a_gradient():
    for changes in ({}, {"token_head": True, "trainable_embeddings": True}, {"norm_first": False}):
        model = small(**changes)
        smoothed, t, source = inputs()
        answer = torch.randn(B, L, D)
        model(smoothed, t, model.encode(source), answer).square().sum().backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without


def test_vocabulary_is_kept_until_the_table_changes():
    model = small()
    kept = model.vocabulary()
    assert isinstance(kept, Vocabulary)
    assert model.vocabulary() is kept
    model.set_embeddings(torch.randn(V, D))
    assert model.vocabulary() is not kept
    torch.testing.assert_close(
        model.vocabulary().bias, -model.embeddings.weight.square().sum(1) / 2, check_stride=False
    )
    trained = small(trainable_embeddings=True)
    assert trained.vocabulary() is not trained.vocabulary()
    assert trained.vocabulary().embeddings is trained.embeddings.weight


def test_schedule_takes_another_delta():
    model = small(noise_options={"sharpness": 5.0, "delta": 0.9})
    assert (model.schedule().sharpness, model.schedule().delta) == (5.0, 0.9)
    assert (model.schedule(0.25).sharpness, model.schedule(0.25).delta) == (5.0, 0.25)


def test_half_the_paper_is_the_paper_s_size():
    with torch.device("meta"):
        model = SmoothieModel(SmoothieConfig())
    assert sum(p.numel() for p in model.layers.parameters()) == pytest.approx(113.4e6, rel=0.01)
    assert len(model.source_encoder) == 6
    assert len(model.answer_encoder) == 3


def test_times_are_told_apart():
    times = torch.tensor([0.0, 0.001, 0.5, 0.999, 1.0])
    features = sinusoids(times, 64)
    assert features.shape == (5, 64)
    assert torch.pdist(features).min() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size must be even and a multiple of num_attention_heads = 4, got 30"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"condition_layers": -1}, "condition_layers must be at least 0, got -1"),
        ({"self_condition_layers": -2}, "self_condition_layers must be at least 0, got -2"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"sigma_min": 0}, "sigma_min must be positive and finite, got 0"),
        ({"noise_schedule": "linear"}, "schedule must be one of 'arctan', .* got 'linear'"),
    ],
)
def test_config_messages(changes, message):
    with pytest.raises(ValueError, match=message):
        SmoothieConfig(V, D, **SMALL | changes)


def test_messages():
    model, (smoothed, t, source) = small(), inputs()
    with pytest.raises(ValueError, match=r"smoothed must have at most 12 positions .* got \[3, 13, 16\]"):
        model(torch.randn(B, 13, D), t, model.encode(source))
    with pytest.raises(ValueError, match=r"source must have at most 9 positions .* got \[3, 10\]"):
        model.encode(torch.ones(B, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"condition must be what encode\(\) gives: .* condition_layers = 2"):
        model(smoothed, t)
    alone = small(condition_layers=0)
    with pytest.raises(ValueError, match=r"condition must be None: .* condition_layers = 0"):
        alone(smoothed, t, Condition(torch.zeros(1), torch.zeros(1)))
    with pytest.raises(ValueError, match="source must be None: the model is unconditional"):
        alone.encode(source)
    with pytest.raises(ValueError, match=r"embeddings must have shape \[50, 16\] .* got \[50, 17\]"):
        model.set_embeddings(torch.randn(V, 17))


def test_config_is_json(tmp_path):
    SmoothieConfig(V, D, **SMALL, pad_token_id=3).save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["model_type"] == "smoothie"
    assert kept["pad_token_id"] == 3

"""`SmoothieModel.generate`: the sampler as a caller would put it together by hand, for sources, masks and options."""

import inspect
from dataclasses import fields

import pytest
import torch

pytest.importorskip("transformers", reason="comes with the extra `train`")

from training import MODEL, D, L, S, V
from training import model as untrained

from smoothie_kernels.diffusion.batches import Collate
from smoothie_kernels.diffusion.loss import Place, TrainingLoss
from smoothie_kernels.diffusion.model import SmoothieModel
from smoothie_kernels.diffusion.options import LossOptions, SampleOptions
from smoothie_kernels.diffusion.sampling import Samples, sample

pytestmark = pytest.mark.usefixtures("one_thread")
END, PAD, B = 1, 0, 5
TOKENS = {"eos_token_id": END, "pad_token_id": PAD}
KINDS = {
    "conditional": {},
    "unconditional": {"condition_layers": 0},
    "token head": {"token_head": True},
    "blind to its answer": {"self_condition_layers": 0},
    "table": {"trainable_embeddings": True, "norm_first": False},
}


def texts(count: int, seed: int, source: bool = True) -> list[dict[str, list[int]]]:
    """A target says its source, of 1 to 5 of six words, and ends."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    words = [torch.randint(2, 8, (length,), generator=generator).tolist() for length in lengths]
    return [({"source": text} if source else {}) | {"target": [*text, END]} for text in words]


def make(kind: str) -> SmoothieModel:
    """Of random weights, with answers so large that tokens differ."""
    model = untrained(**KINDS[kind], **TOKENS).eval()
    with torch.no_grad():
        model.output.weight.mul_(4)
    return model


@pytest.fixture(params=KINDS)
def model(request) -> SmoothieModel:
    return make(request.param)


@pytest.fixture(scope="module")
def one_thread_for_all():
    """Other sums of more threads would train another model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(one_thread_for_all) -> SmoothieModel:
    """Says its source, most of it."""
    model = untrained(**TOKENS, self_condition_layers=0, dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows, loss = texts(256, 3), TrainingLoss(model, LossOptions(self_conditioning=0.0, guidance_dropout=0.1))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(200):
            batch = Collate(PAD, L, S)([rows[(step * 32 + i) % 256] for i in range(32)])
            optimizer.zero_grad()
            loss(batch, Place(step, 0, 32), None).total.backward()
            optimizer.step()
    return model.eval()


def sources(count: int = B, seed: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, (count, S)."""
    batch = Collate(PAD, L, S)(texts(count, seed))
    return batch["source"], batch["source_mask"]


def given(model: SmoothieModel) -> dict:
    """What a model is generated from."""
    if not model.config.condition_layers:
        return {"count": B}
    return dict(zip(("source", "source_mask"), sources(), strict=True))


def by_hand(model, *, delta=None, length=L, **options) -> Samples:
    """`sample` with all that generate takes from the model."""
    config, inputs = model.config, given(model)
    delta = (0.25 if "source" in inputs else 1.05) if delta is None else delta
    condition = model.encode(inputs["source"], inputs["source_mask"]) if "source" in inputs else None
    return sample(
        model, model.embeddings.weight, model.schedule(delta), length=length, condition=condition, max_length=L,
        self_conditioning=config.self_condition_layers > 0, end=END, pad=PAD, sigma_min=config.sigma_min,
        **{"sample_ids": range(B)} | options,
    )  # fmt: skip


def check_same(some: Samples, others: Samples):
    assert torch.equal(some.tokens, others.tokens)
    assert torch.equal(some.lengths, others.lengths)
    assert torch.equal(some.steps, others.steps)
    torch.testing.assert_close(some.embeddings, others.embeddings, rtol=1e-3, atol=1e-4)


def part(samples: Samples, rows) -> Samples:
    return Samples(*(value[rows] for value in samples[:4]))


OPTIONS = {
    "default": {},
    "ddim": {"solver": "ddim", "seed": 7},
    "ddpm": {"solver": "ddpm", "delta": 1.0},
    "sde, sum": {"solver": "sde", "accumulate": "sum", "delta": 0.5},
    "clamp": {"clamp": True},
    "patience": {"stop_after": 1, "shrink_after": 1},
    "eager": {"step": "eager"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_is_what_one_would_write_by_hand(model, name):
    samples = model.generate(**given(model), steps=7, **OPTIONS[name])
    check_same(samples, by_hand(model, steps=7, **OPTIONS[name]))
    assert samples.tokens.shape == (B, L)
    assert len(samples.tokens.unique(dim=0)) > 1
    assert not samples.embeddings.requires_grad
    assert samples.history is None


def test_the_trained_one_says_its_source(trained):
    """So that what follows is about texts, which end."""
    source, mask = sources(16)
    samples = trained.generate(source, mask, steps=20)
    assert (samples.tokens[:, :S] == source)[mask].float().mean() > 0.8
    assert (samples.lengths == mask.sum(1) + 1).float().mean() > 0.6


def test_other_arguments_of_the_sampler(model):
    """By hand again, all together."""
    fixed = torch.full((B, L - 1), -1)
    fixed[:, 1] = 5
    seen = {"by hand": [], "generate": []}

    def options(who):
        return {
            "length": L - 1, "lengths": [L - 1, 3, 4, 5, 2], "sample_ids": [8, 1, 2, 77, 5], "fixed": fixed,
            "times": [0.9, 0.6, 0.5, 0.1, 0.05], "guide": lambda answer, time: answer * (1 + time / 10),
            "output_history": True, "progress": lambda *now: seen[who].append(now),
        }  # fmt: skip

    inputs = {name: value for name, value in given(model).items() if name != "count"}
    samples = model.generate(**inputs, **options("generate"))
    wanted = by_hand(model, **options("by hand"))
    check_same(samples, wanted)
    assert torch.equal(samples.history, wanted.history)
    assert samples.history.shape == (B, 4, L - 1)
    assert seen["generate"] == seen["by hand"] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert samples.tokens[:, 1].tolist() == [5] * B


def test_samples_depend_on_their_ids_alone(model):
    """Neither batch mates nor their order matter; rows of noise are counted by the model's length, not the call's."""
    inputs = given(model)
    together = model.generate(**inputs, steps=6)
    for rows in ([2], [4, 0], [3, 2, 1]):
        chosen = {name: value[rows] for name, value in inputs.items() if name != "count"}
        check_same(model.generate(**chosen, sample_ids=rows, steps=6), part(together, rows))
    short = model.generate(**inputs, steps=6, length=L - 3)
    check_same(short, by_hand(model, length=L - 3, steps=6))


def test_seeds_of_samples(model):
    inputs, seeds = given(model), [3, 5, 3, 0, 5]
    together = model.generate(**inputs, seeds=seeds, steps=5)
    check_same(together, by_hand(model, seed=seeds, steps=5))
    for seed in set(seeds):
        rows = [i for i in range(B) if seeds[i] == seed]
        check_same(part(model.generate(**inputs, seed=seed, steps=5), rows), part(together, rows))


# --- Sources


@pytest.mark.parametrize("name", ["default", "patience", "guidance"])
def test_padding_of_the_source_does_not_matter(trained, name):
    source, mask = sources()
    choices = {"guidance": {"guidance": 0.7}}.get(name, OPTIONS.get(name)) | {"steps": 6}
    wanted = trained.generate(source, mask, **choices)
    garbage = torch.where(mask, source, 40)
    check_same(trained.generate(garbage, mask, **choices), wanted)
    lengths = mask.sum(1).tolist()
    assert len(set(lengths)) > 2
    for i, length in enumerate(lengths):
        alone = trained.generate(source[i : i + 1, :length], sample_ids=[i], **choices)
        check_same(alone, part(wanted, [i]))


def test_padding_may_stand_anywhere(trained):
    """A mask with holes: those positions are not looked at, and the others keep their places."""
    source, _ = sources()
    mask = torch.tensor([[False, True, False, True, True, False]] * B)
    wanted = sample(
        trained, trained.vocabulary(), trained.schedule(0.25), length=L, sample_ids=range(B), steps=5,
        condition=trained.encode(source, mask), end=END,
    )  # fmt: skip
    check_same(trained.generate(torch.where(mask, source, 33), mask, steps=5), wanted)


def test_columns_that_are_padding_everywhere_are_left_out(trained, monkeypatch):
    shapes = []
    encode = SmoothieModel.encode

    def looking(model, source, mask):
        shapes.append(source.shape)
        return encode(model, source, mask)

    monkeypatch.setattr(SmoothieModel, "encode", looking)
    source, _ = sources()
    trained.generate(source, torch.arange(S) < torch.tensor([[2], [3], [1], [3], [0]]), steps=1)
    trained.generate(source, torch.arange(S) >= torch.full((B, 1), 2), steps=1)
    trained.generate(source, torch.zeros(B, S, dtype=torch.bool), steps=1)
    assert shapes == [(B, 3), (B, S), (B, 0)]


@pytest.mark.parametrize("empty", ["masked", "no columns", "dropped"])
def test_an_empty_source_is_a_dropped_one(trained, empty):
    source, _ = sources()
    condition = trained.encode(source, keep=torch.zeros(B, dtype=torch.bool))
    wanted = sample(
        trained, trained.vocabulary(), trained.schedule(0.25), length=L, sample_ids=range(B), steps=5,
        condition=condition, end=END,
    )  # fmt: skip
    if empty == "dropped":  # by guidance: f + c (f - f_empty) with c = -1 is f_empty
        found = trained.generate(source, steps=5, guidance=-1.0)
    elif empty == "masked":
        found = trained.generate(source, torch.zeros(B, S, dtype=torch.bool), steps=5)
    else:
        found = trained.generate(source[:, :0], steps=5)
    check_same(found, wanted)


def test_keys_and_values_once(trained, monkeypatch):
    """The same answers as with the source's states, and no product with the source in later steps."""
    source, mask = sources()
    generator = torch.Generator().manual_seed(1)
    smoothed, t = torch.randn(B, L, D, generator=generator), torch.rand(B, generator=generator)
    condition = trained.encode(source, mask)
    projected = trained.project(condition)
    assert len(projected.projected) == MODEL["num_hidden_layers"]
    torch.testing.assert_close(
        trained(smoothed, t, projected, smoothed), trained(smoothed, t, condition, smoothed), rtol=1e-5, atol=1e-5
    )  # fmt: skip
    calls = []
    key = trained.layers[0].source_attention.key
    handle = key.register_forward_hook(lambda *_: calls.append(1))
    with_keys = trained.generate(source, mask, steps=6)
    handle.remove()
    assert len(calls) == 1
    monkeypatch.setattr(SmoothieModel, "project", lambda model, condition: condition)
    check_same(with_keys, trained.generate(source, mask, steps=6))


def test_one_sample_s_condition_for_many(trained):
    one = trained.project(trained.encode(sources()[0][:1]))
    many = trained.project(trained.encode(sources()[0][:1].expand(4, -1)))
    expanded = one.expand(4)
    for some, other in ((expanded.states, many.states), (expanded.there, many.there)):
        torch.testing.assert_close(some, other)
    for some, other in zip(expanded.projected, many.projected, strict=True):
        torch.testing.assert_close(some, other)
    assert trained.encode(sources()[0][:1]).expand(4).projected is None


# --- Guidance


@pytest.mark.parametrize("name", ["default", "patience"])
def test_guidance_is_against_no_source(trained, name):
    source, mask = sources()
    choices = OPTIONS[name] | {"steps": 6}
    guided = trained.generate(source, mask, guidance=1.5, **choices)
    empty = trained.encode(source, mask, keep=torch.zeros(B, dtype=torch.bool))
    check_same(guided, by_hand(trained, empty_condition=empty, guidance=1.5, **choices))
    plain = trained.generate(source, mask, **choices)
    assert (guided.embeddings - plain.embeddings).abs().max() > 1e-2
    none = trained.generate(source, mask, guidance=0.0, **choices)
    assert torch.equal(none.embeddings, plain.embeddings)


# --- Options


def test_an_object_or_names(trained):
    source, mask = sources()
    choices = {"solver": "ddpm", "steps": 5, "delta": 0.7, "seed": 3, "clamp": True, "stop_after": 2}
    by_object = trained.generate(source, mask, options=SampleOptions(**choices))
    by_name = trained.generate(source, mask, **choices)
    assert all(torch.equal(a, b) for a, b in zip(by_object[:4], by_name[:4], strict=True))


def test_every_option_reaches_the_sampler(trained, monkeypatch):
    """By its own name, but for the loudness of the noise and the type of the network."""
    calls = []
    module = inspect.getmodule(inspect.unwrap(SmoothieModel.generate))
    monkeypatch.setattr(module, "sample", lambda model, table, schedule, **given: calls.append((schedule, given)))
    choices = {
        "solver": "sde", "steps": 9, "delta": 0.4, "seed": 5, "guidance": 0.3, "clamp": True,
        "self_conditioning": False, "stop_after": 3, "shrink_after": 4, "accumulate": "sum", "step": "fused",
        "bf16": False, "keep_special": True,
    }  # fmt: skip
    assert {field.name for field in fields(SampleOptions)} == set(choices)
    trained.generate(*sources(), **choices)
    schedule, given = calls[0]
    assert schedule.delta == choices.pop("delta")
    choices.pop("bf16")
    choices.pop("keep_special")
    assert {name: given[name] for name in choices} == choices
    assert (given["end"], given["pad"], given["max_length"]) == (END, PAD, L)


@pytest.mark.parametrize(("kind", "delta"), [("conditional", 0.25), ("unconditional", 1.05)])
def test_loudness_of_the_noise(kind, delta):
    model = make(kind)
    default, same, other = (
        model.generate(**given(model), steps=4, **choice) for choice in ({}, {"delta": delta}, {"delta": 0.6})
    )
    assert torch.equal(default.embeddings, same.embeddings)
    assert (default.embeddings - other.embeddings).abs().max() > 1e-3
    assert model.generate(**given(model), steps=4, delta=0.0).tokens.shape == (B, L)


def test_two_hundred_steps_by_default(trained):
    assert trained.generate(*(part[:1] for part in sources()), length=2).steps.tolist() == [200]


def test_patience(trained):
    source, mask = sources(16)
    patient = trained.generate(source, mask, steps=30)
    impatient = trained.generate(source, mask, steps=30, stop_after=3, shrink_after=2)
    assert int(impatient.steps.min()) < 30
    assert (patient.steps == 30).all()
    assert (impatient.tokens == patient.tokens).float().mean() > 0.7


@pytest.mark.parametrize("solver", ["re-noise", "ddim", "ddpm", "sde"])
def test_eager_and_fused_agree_in_all_tokens(model, solver):
    eager, fused = (
        model.generate(**given(model), steps=8, solver=solver, accumulate="sum", step=step)
        for step in ("eager", "fused")
    )
    check_same(eager, fused)


@pytest.mark.parametrize("self_conditioning", [True, False])
def test_what_the_model_sees_of_its_answer(model, self_conditioning):
    seen = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[3]))
    model.generate(**given(model), steps=3, self_conditioning=self_conditioning)
    handle.remove()
    if self_conditioning and model.config.self_condition_layers:
        assert not seen[0].any()
        assert seen[1].any()
    else:
        assert seen == [None] * 3


def test_16_bit_network(model):
    """Under autocast: the network's products alone. The rest of the call, and the caller, stay as they are."""
    kinds = set()
    handle = model.layers[0].feed_forward[0].register_forward_hook(lambda *call: kinds.add(call[2].dtype))
    exact, rounded = (model.generate(**given(model), steps=1, bf16=bf16) for bf16 in (False, True))
    more = model.generate(**given(model), steps=8, bf16=True, solver="ddpm", stop_after=2)
    handle.remove()
    assert kinds == {torch.float32, torch.bfloat16}
    assert exact.embeddings.dtype == rounded.embeddings.dtype == more.embeddings.dtype == torch.float32
    error = (exact.embeddings - rounded.embeddings).norm() / exact.embeddings.norm()
    assert 1e-5 < error < 0.05
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_comes_back(training):
    model = make("conditional")
    assert model.config.dropout > 0
    wanted = model.generate(*sources(), steps=4)
    model.train(training)
    assert torch.equal(model.generate(*sources(), steps=4).embeddings, wanted.embeddings)
    assert all(module.training == training for module in model.modules())

    def failing(answer, time):
        assert not model.training
        raise KeyError("guide")

    with pytest.raises(KeyError, match="guide"):
        model.generate(*sources(), steps=4, guide=failing)
    assert model.training == training


def test_float64():
    model = untrained(**TOKENS).double()
    samples = model.generate(*sources(), steps=4)
    assert samples.embeddings.dtype == torch.float64
    wanted = untrained(**TOKENS).generate(*sources(), steps=4)
    torch.testing.assert_close(samples.embeddings.float(), wanted.embeddings, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("choices", "count"),
    [({}, 1), ({"count": 3}, 3), ({"count": 0}, 0), ({"sample_ids": [4, 2]}, 2), ({"sample_ids": [], "count": 0}, 0),
     ({"sample_ids": torch.tensor([3]), "count": 1}, 1)],
    ids=str,
)  # fmt: skip
def test_how_many(choices, count):
    model = make("unconditional")
    assert model.generate(**choices, steps=2).tokens.shape == (count, L)
    assert model.generate(**choices, steps=2, length=3).tokens.shape == (count, 3)


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_no_sources(trained, guidance):
    source, mask = sources()
    samples = trained.generate(source[:0], mask[:0], steps=2, guidance=guidance)
    assert samples.tokens.shape == (0, L)


def test_without_an_end_token():
    """A config may have neither."""
    samples = untrained().generate(*sources(), steps=3)
    assert samples.lengths.tolist() == [L] * B


def test_table_that_was_written_to():
    model = untrained(**TOKENS)
    before = model.generate(*sources(), steps=2)
    model.set_embeddings(torch.randn(V, D))
    assert (model.generate(*sources(), steps=2).embeddings - before.embeddings).abs().max() > 1e-3


# --- Messages

SOURCE = torch.ones(2, 3, dtype=torch.int64)


OF_SOURCES = [
    ({}, r"source must be int64 tokens \[B, S\] for a model with condition_layers > 0, got None"),
    ({"source": SOURCE.float()}, r"source must be torch.int64 of shape \[B, S\], got torch.float32 of shape"),
    ({"source": SOURCE[0]}, r"source must be torch.int64 of shape \[B, S\], got torch.int64 of shape \[3\]"),
    ({"source": [[1, 2]]}, r"source must be torch.int64 of shape \[B, S\], got list"),
    ({"source": torch.ones(2, 7).long()}, r"source must have at most 6 positions .* got \[2, 7\]"),
    ({"source": SOURCE, "source_mask": torch.ones(2, 3)}, "source_mask must be .* got torch.float32"),
    ({"source": SOURCE, "source_mask": torch.ones(2, 2).bool()}, r"source_mask must be .* got .*\[2, 2\]"),
    ({"source": SOURCE, "count": 3}, "source and count must be of as many samples, got 2, 3"),
    ({"source": SOURCE, "sample_ids": [1]}, "source and sample_ids must be of as many samples, got 2, 1"),
]
OF_NONE = [
    ({"source": SOURCE}, "source must be None for a model with condition_layers = 0, got a source"),
    ({"count": 3, "sample_ids": [1]}, "count and sample_ids must be of as many samples, got 3, 1"),
    ({"count": -1}, "count must not be negative, got -1"),
    ({"count": 2, "seeds": [1]}, "must be .* got "),
    ({"length": 9}, r"length must be in \[1, 8\] as the model does, got 9"),
    ({"length": 0}, r"length must be in \[1, 8\] as the model does, got 0"),
    ({"lengths": [9]}, r"lengths must be in \[1, 8\], got 9 to 9"),
    ({"guidance": 0.5}, "guidance must be 0 for a model with condition_layers = 0, got 0.5"),
    ({"options": SampleOptions(), "steps": 3}, "options must be None where they are given by name, got both: steps"),
    ({"solver": "euler"}, "solver must be one of 're-noise', .* got 'euler'"),
    ({"accumulate": "tree"}, "accumulate must be one of .* got 'tree'"),
    ({"step": "dense"}, "step must be one of 'fused', 'eager', got 'dense'"),
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"stop_after": 0}, "stop_after must be at least 1, got 0"),
    ({"shrink_after": -2}, "shrink_after must be at least 1, got -2"),
    ({"delta": -0.5}, "delta must be at least 0, got -0.5"),
    ({"step": "eager", "stop_after": 2}, "stop_after must be None with step 'eager'"),
    ({"fixed": torch.ones(2, L).long()}, r"fixed must be torch.int64 of shape \[1, 8\]"),
    ({"times": [0.1, 0.5]}, r"times must be two numbers or more that fall"),
]


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [("conditional", *row) for row in OF_SOURCES] + [("unconditional", *row) for row in OF_NONE],
    ids=lambda part: part.split(" must")[0] if isinstance(part, str) else "",
)
def test_messages(kind, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(kind).generate(**call)


def test_unknown_options():
    with pytest.raises(TypeError, match="beams"):
        make("unconditional").generate(beams=3)

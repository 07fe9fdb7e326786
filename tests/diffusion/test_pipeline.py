"""`SmoothiePipeline`: texts to texts, and what it says when something is wrong."""

import re

import pytest
import torch

pytest.importorskip("transformers", reason="the model is one of transformers'")
pytest.importorskip("datasets", reason="comes with the extra `train`")

import small
import training
from safetensors.torch import load_file, save_file
from tokenizers import decoders, pre_tokenizers
from transformers import BertConfig, BertModel

from smoothie_kernels.diffusion import SmoothieModel, SmoothiePipeline
from smoothie_kernels.diffusion.live import FREE

pytestmark = pytest.mark.usefixtures("one_thread")
END, PAD, CLS = 3, 0, 2
SOURCES = ["the baker made bread", "the king", "a cat and dog"]


def pipeline(**changes):
    torch.manual_seed(1)
    return SmoothiePipeline(training.model(eos_token_id=END, pad_token_id=PAD, **changes), small.tokenizer())


def ids(text):
    return [token for token in small.tokenizer()(text)["input_ids"] if token not in (CLS, END)]


def test_texts_are_those_of_generate():
    pipe = pipeline()
    made = pipe(SOURCES, steps=4, seed=5)
    source = torch.tensor([[CLS, *ids(text), END, *[PAD] * (4 - len(ids(text)))] for text in SOURCES[:2]])
    result = pipe.model.generate(source, source != PAD, steps=4, seed=5)
    for i in range(2):
        row = result.tokens[i, : result.lengths[i]].tolist()
        assert made[i] == (i, pipe.decode(row), row, 4)
    assert len(made) == 3


def test_a_sample_is_its_id_and_the_seed():
    pipe = pipeline()
    every = pipe(SOURCES, samples=4, steps=4, batch_size=12)
    assert [each.id for each in every] == [*range(12)]
    assert pipe(SOURCES, samples=4, steps=4, batch_size=5) == every
    assert pipe(SOURCES, samples=4, steps=4, batch_size=3, first_id=7) == every[7:]
    assert pipe(SOURCES, samples=4, steps=4, seed=1) != every
    assert len({tuple(each.tokens) for each in every[:4]}) > 1
    assert [len(batch) for batch in pipe.stream(SOURCES, samples=4, steps=1, batch_size=5)] == [5, 5, 2]


def test_templates_and_prefixes_come_out_as_given():
    pipe = pipeline()
    for made in pipe(SOURCES, steps=3, templates="where is [MASK] [MASK] ?"):
        assert made.tokens[:3] == [CLS, *ids("where is")]
        assert made.tokens[5:] == [*ids("?"), END]
    each = pipe(SOURCES, samples=2, steps=3, prefixes=["where", "who is", "a"])
    for made, prefix in zip(each[::2], ("where", "who is", "a"), strict=True):
        assert made.tokens[: 1 + len(ids(prefix))] == [CLS, *ids(prefix)]
    assert pipe._fixed("[MASK] king", whole=True) == [CLS, FREE, *ids("king"), END, PAD, PAD, PAD, PAD]
    assert pipe._fixed("king", whole=False) == [CLS, *ids("king"), *[FREE] * 6]


SPACES = {
    "byte-level": (pre_tokenizers.ByteLevel(add_prefix_space=False), "Ġ"),
    "SentencePiece": (pre_tokenizers.Metaspace(), "▁"),
}


@pytest.mark.parametrize("kind", SPACES)
def test_gaps_bring_their_own_space(kind):
    """A space before a gap would become a token, which no text has between two words."""
    splits, space = SPACES[kind]
    words = small.tokenizer(words=("who", "is", "old", space, *(space + word for word in ("who", "is", "old"))))
    words.backend_tokenizer.pre_tokenizer = splits
    pipe = SmoothiePipeline(training.model(eos_token_id=END, pad_token_id=PAD), words)
    before = [*words("who is old")["input_ids"]]
    assert [pipe.names([token]) for token in before[2:4]] == [f"{space}is", f"{space}old"]
    gaps = pipe._fixed("who [MASK] [MASK] old", whole=True)
    assert gaps == [CLS, before[1], FREE, FREE, before[3], END, PAD, PAD]
    assert pipe._fixed("who is ", whole=False) == [*before[:3], *[FREE] * 5]


def test_apostrophes_find_their_words_again():
    """In WordPiece, which drops spaces; where tokens hold spaces, those before an apostrophe are text."""
    words = small.tokenizer(words=("who", "'", "s", "old", "?"))
    tokens = words("who's old?")["input_ids"]
    words.clean_up_tokenization_spaces = True  # as a tokenizer's file may have it
    assert SmoothiePipeline(training.model(), words).decode(tokens) == "who ' s old ?"
    words.clean_up_tokenization_spaces = False
    words.backend_tokenizer.decoder = decoders.WordPiece()
    assert SmoothiePipeline(training.model(), words).decode(tokens) == "who's old?"


def test_unconditional():
    pipe = pipeline(condition_layers=0)
    assert [each.id for each in pipe(count=3, steps=2)] == [0, 1, 2]
    assert len(pipe(templates=["the [MASK]", "[MASK]"], samples=3, steps=2)) == 6
    assert len(pipe(templates="the [MASK]", count=5, steps=2)) == 5


def test_special_and_unused_tokens_are_not_text():
    pipe = SmoothiePipeline(training.model(), small.tokenizer(words=("a", "king", "[unused7]")))
    tokens = pipe.tokenizer.convert_tokens_to_ids(["[CLS]", "a", "[unused7]", "king", "[SEP]", "[PAD]"])
    assert pipe.decode(tokens) == "a king"
    assert pipe.decode([79, *tokens]) == "a king"  # a row of the table that is no token


def test_special_tokens_that_no_training_text_had_are_no_text():
    """Every answer is nearest to [MASK], then to "a": by default texts are "a", not empty."""
    words = small.tokenizer(words=("a", "king", "[MASK]"), mask_token="[MASK]")
    mask, king = words.convert_tokens_to_ids(["[MASK]", "king"])
    model = training.model(eos_token_id=END, pad_token_id=PAD, condition_layers=0)
    with torch.no_grad():
        model.embeddings.weight[:] = torch.linspace(-9, 9, 80)[:, None].roll(mask, 0) + torch.zeros(12)
        model.output.weight.zero_()
        model.output.bias[:] = model.embeddings.weight[mask] + 0.01
    nearest = {
        "none": (SmoothiePipeline(model, small.tokenizer(words=("a", "king"))), {}, mask),
        "mask": (SmoothiePipeline(model, words), {}, mask + 1),
        "kept": (SmoothiePipeline(model, words), {"keep_special": True}, mask),
    }
    for pipe, choices, token in nearest.values():
        (made,) = pipe(count=1, steps=2, **choices)
        assert made.tokens == [token] * 8
    assert pipe.names([mask, king]) == "[MASK] king"
    model.config.unseen_token_ids = [mask, mask + 1]  # which training knows better than the tokenizer
    assert SmoothiePipeline(model, words)(count=1, steps=2)[0].tokens == [mask + 2] * 8
    assert SmoothiePipeline(model, words)(count=1, steps=2, prefixes="[MASK]")[0].tokens[1] == mask  # which is given
    for excluded, message in (([80], r"excluded must be tokens in \[0, V\) .* got 80"), (range(80), "leave a token")):
        with pytest.raises(ValueError, match=message):
            model.generate(count=1, steps=1, excluded=excluded)


def test_what_sources_lose_is_logged(caplog):
    pipeline()([*SOURCES, "xyz ?", "xyz qrs"], steps=1)
    assert caplog.messages == ["1 of 5 sources have no token that the model knows: 'xyz qrs'"]
    caplog.clear()
    pipeline()(["the baker made bread at home", "a", "a cat and dog eat"], steps=1, truncate=True)
    assert caplog.messages == ["2 of 3 sources are cut at 6 tokens"]
    caplog.clear()
    pipeline()(["the baker made bread at home", "xyz"], steps=1, truncate=True, part=(1, 2))
    assert caplog.messages == []  # the first of several processes says it


def test_from_a_checkpoint_and_from_a_run(tmp_path):
    pipe = pipeline()
    for step in (5, 10):
        pipe.model.save_pretrained(tmp_path / f"checkpoint-{step}")
        small.tokenizer().save_pretrained(tmp_path / f"checkpoint-{step}")
        with torch.no_grad():
            pipe.model.output.bias += 1
    first, newest = (SmoothieModel.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (5, 10))
    for folder, model in ((tmp_path, newest), (tmp_path / "checkpoint-5", first)):
        loaded = SmoothiePipeline.from_pretrained(folder)
        assert torch.equal(loaded.model.output.bias, model.output.bias)
        assert not loaded.model.training
    assert loaded(SOURCES, steps=2)


def test_progress(capsys):
    pipeline()(SOURCES, steps=2, batch_size=2)
    assert capsys.readouterr().err == ""
    pipeline()(SOURCES, steps=2, batch_size=2, first_id=1, progress=True)
    said = capsys.readouterr().err
    assert "| 1/3 [" in said
    assert "| 3/3 [" in said
    assert "step=2/2" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (["the baker made bread at home"],),
            r"sources must have at most 6 tokens, or be truncated, got 8: 'the baker",
        ),
        ((SOURCES, {"templates": "a " * 9}), r"templates must have at most 8 tokens, got 11: 'a a"),
        ((SOURCES, {"prefixes": "a " * 9}), r"prefixes must have at most 8 tokens, got 10: 'a a"),
        ((SOURCES, {"prefixes": "a", "templates": "a"}), r"prefixes must be None where there are templates, got both"),
        ((SOURCES, {"templates": ["a", "a"]}), r"sources and templates must be as many, got 3 sources, 2 templates"),
        ((SOURCES, {"count": 2}), r"sources and count must be as many, got 3 sources, 2 count"),
        ((None, {}), r"count must be given where there are no sources, templates or prefixes, got None"),
        ((None, {"count": 2}), r"source must be int64 tokens \[B, S\] for a model with condition_layers > 0, got None"),
        ((SOURCES, {"samples": 0}), r"samples must be positive, got 0"),
        ((["a", "caf\udce9"],), r"sources must be Unicode, got 'caf"),
        (([3],), r"sources must be strings, got int"),
        ((SOURCES, {"prefixes": "\udcff"}), r"prefixes must be Unicode, got"),
        ((SOURCES, {"batch_size": 0}), r"batch_size must be positive, got 0"),
        ((SOURCES, {"solver": "euler"}), r"solver must be one of 're-noise', 'ddim', 'ddpm', 'sde', got 'euler'"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_wrong_arguments(arguments, message):
    sources, options = (*arguments, {})[:2]
    with pytest.raises((TypeError, ValueError), match=message):
        pipeline()(sources, **options)


def test_truncated_sources():
    long = "the baker made bread at home"
    pipe = pipeline()
    assert pipe([long], truncate=True, steps=2) == pipe(["the baker made bread"], steps=2)


def test_wrong_checkpoints(tmp_path):
    (tmp_path / "empty").mkdir()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "bert")
    small.tokenizer().save_pretrained(tmp_path / "bert")
    training.model().save_pretrained(tmp_path / "bare")
    pipeline().model.save_pretrained(tmp_path / "cut")
    small.tokenizer().save_pretrained(tmp_path / "cut")
    with open(tmp_path / "cut" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    pipeline().model.save_pretrained(tmp_path / "part")
    small.tokenizer().save_pretrained(tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    save_file(
        {k: w for k, w in weights.items() if k != "norm.weight"},
        tmp_path / "part" / "model.safetensors",
        {"format": "pt"},
    )
    reasons = {
        "nothing-there": "",
        "empty": "",
        "bert": "its model_type is 'bert'",
        "bare": "",
        "cut": "",
        "part": "it has no norm.weight",
    }
    for name, reason in reasons.items():
        wanted, folder = "checkpoint must be a Smoothie model's folder", str(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{wanted}.*got {re.escape(repr(folder))}.*{reason}"):
            SmoothiePipeline.from_pretrained(folder)
    many = small.tokenizer(words=tuple(f"w{i}" for i in range(90)))
    with pytest.raises(ValueError, match="tokenizer must be the model's, of at most 80 tokens, got one of 94"):
        SmoothiePipeline(training.model(), many)

"""What a run says at its start, and that whatever it refuses is refused before text is tokenised."""

import json
import re

import pytest
import torch

pytest.importorskip("datasets", reason="comes with the extra `train`")

from safetensors.torch import save_file
from small import SPECIAL, WORDS, tokenizer
from tokenizers import normalizers

from smoothie_kernels import cli
from smoothie_kernels.diffusion import train as command
from smoothie_kernels.diffusion.model import SmoothieModel
from smoothie_kernels.diffusion.tokens import check_tokens, load_tokenizer, surviving

pytestmark = pytest.mark.usefixtures("one_thread", "own_caches")
SMALL = ["--layers=1", "--heads=2", "--condition-layers=1", "--self-condition-layers=1", "--source-length=6",
         "--target-length=8", "--steps=1", "--batch-size=2", "--cpu"]  # fmt: skip


@pytest.fixture
def town(tmp_path, monkeypatch):
    """Here are a folder of a tokenizer, "words", and one of data, "town"."""
    monkeypatch.chdir(tmp_path)
    tokenizer().save_pretrained("words")
    rows = [("the baker made bread", "who made bread ?"), ("the old king is at home in town", "who is at home ?"),
            ("a queen", "xyz"), ("", "what ?"), ("a fish", None), ("milk", "where [SEP] is it ?")]  # fmt: skip
    write("train", rows)
    return tmp_path


def write(split, rows):
    with open(f"{split}.jsonl", "w") as file:
        file.writelines(json.dumps({"src": source, "trg": target}) + "\n" for source, target in rows)


def run(*flags, data="train.jsonl"):
    given = {"data": data, "embeddings": "random:8", "tokenizer": "words"}
    given |= dict(flag[2:].split("=", 1) for flag in flags if "=" in flag)
    return cli.main(
        ["train", "run", *SMALL, *(f"--{k}={v}" for k, v in given.items()), *(f for f in flags if "=" not in f)]
    )


def test_the_first_screen(town, capsys):
    assert run() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:6] == [
        "train: 4 of 6 rows, dropped: 1 without target, 1 without source",
        "validation: none in train.jsonl: no errors are measured",
        "source: column 'src', 19 tokens, 0.0% unknown; 25.0% of texts are cut at 6 tokens",
        "target: column 'trg', 23 tokens, 4.3% unknown; 0.0% of texts are cut at 8 tokens",
        "tokenizer: 49 tokens, capital letters become small, accents stay",
        "warning: 25% of source texts are cut: a larger --source-length keeps more",
    ]
    assert said[6] == "warning: 4% of target tokens are unknown to the tokenizer: [UNK]"
    assert said[7] == "warning: 1 target texts hold [SEP] or [PAD] before their end: what follows is never sampled"
    model = SmoothieModel.from_pretrained("run/checkpoint-1")
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or frozen) for frozen in (True, False)]
    assert said[8] == f"model: {counts[0]:,} parameters, {counts[1]:,} of them trained, on cpu, cpu backend"
    assert said[-1] == "trained: run/checkpoint-1"
    assert model.config.unseen_token_ids == []  # [UNK] is in a target, the others are in all


def test_nothing_to_warn_of(town, capsys):
    write("train", [("a cat", "what is it ?")] * 3)
    (town / "data").mkdir()
    for split in ("train", "validation"):
        (town / "train.jsonl").replace(town / "data" / f"{split}.jsonl")
        write("train", [("a cat", "what is it ?"), ("a dog", " ")])
    assert run("--step=eager", data="data") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["train: 3 of 3 rows", "validation: 1 of 2 rows, dropped: 1 without target"]
    assert "warning" not in "".join(said)
    assert any(line.endswith("on cpu, eager step") for line in said)
    assert SmoothieModel.from_pretrained("run/checkpoint-1").config.unseen_token_ids == [1]  # [UNK]


def test_only_the_first_process_speaks(town, capsys, monkeypatch):
    monkeypatch.setattr(type(command.PartialState()), "is_main_process", property(lambda _: False))
    assert run() == 0
    assert "train:" not in capsys.readouterr().out


# --- Refused before text is tokenised


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--self-condition-layers=0"], "self_conditioning must be 0 for a model with self_condition_layers = 0"),
        (["--unconditional", "--guidance-dropout=0.1"], "guidance_dropout must be 0 for a model with condition_layers"),
        (["--heads=3"], "hidden_size must be even and a multiple of heads = 3, got 8"),
        (["--hidden-size=0"], "hidden_size must be at least 1, got 0"),
        (["--source-length=0"], "source_length must be at least 1, got 0"),
        (["--report-to=wandb"], r"report_to must be an installed tracker \(none is\), got 'wandb': it is not install"),
        (["--report-to=pigeon"], r"report_to must be an installed tracker .* got 'pigeon': known are .*tensorboard"),
        (["--embeddings=table.safetensors", "--tokenizer=words"], "tokenizer must be the one of .* wrong vocabulary"),
        (["--data=empty"], "data must have rows with text, got none in 'empty/validation.jsonl'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_refused_at_once(flags, message, town, capsys, monkeypatch):
    save_file({"table": torch.randn(20, 8)}, "table.safetensors")
    (town / "empty").mkdir()
    (town / "empty" / "validation.jsonl").touch()
    (town / "empty" / "train.jsonl").write_bytes((town / "train.jsonl").read_bytes())
    monkeypatch.setattr("smoothie_kernels.diffusion.train.tokenize", None)
    monkeypatch.setattr("smoothie_kernels.diffusion.surroundings.get_available_trackers", list)
    assert run(*flags) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "fp16"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ],
)
def test_variables_that_would_change_the_run(name, value, town, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    assert run() == 2
    assert f"environment variable {name} must not be set" in capsys.readouterr().err
    monkeypatch.setenv(name, {"4": "1", "true": "false"}.get(value, "no"))  # as `accelerate launch` sets it
    command.check_surroundings(command.RunOptions(), 1)


# --- Tokenizers


def test_letters_that_survive():
    words = tokenizer()
    for normalizer, survives in (
        (None, (True, True)),
        (normalizers.Lowercase(), (False, True)),
        (normalizers.BertNormalizer(lowercase=True), (False, False)),
        (normalizers.BertNormalizer(lowercase=False), (True, True)),
        (
            normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Prepend("▁")]),
            (True, False),
        ),
    ):
        words.backend_tokenizer.normalizer = normalizer
        assert surviving(words) == survives


class Letters:
    """A tokenizer without a backend."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) for letter in text.lower()]}


def test_letters_that_survive_another_kind_of_tokenizer():
    assert surviving(Letters()) == (False, True)


def model_folder(words, name="model"):
    """A folder with a tokenizer and a table of 60 rows."""
    words.save_pretrained(name)
    save_file({"word_embeddings.weight": torch.randn(60, 8)}, f"{name}/model.safetensors")


def test_the_tables_own_tokenizer(town):
    model_folder(tokenizer())
    assert check_tokens(tokenizer(), "model") is None
    assert check_tokens(tokenizer(), "model/model.safetensors:word_embeddings.weight") is None
    assert check_tokens(tokenizer(words=(*WORDS, "new")), "model") is None
    assert check_tokens(tokenizer(), "random:8") is None
    other = tokenizer(words=("un", *WORDS[1:-2], "une", "le"))
    with pytest.raises(ValueError, match=r"tokenizer must be the one of the embeddings, got 3 of 49 tokens with other "
                                         r"ids: 4 is 'un', and 'a' in model"):  # fmt: skip
        check_tokens(other, "model")
    model_folder(tokenizer(words=("[unused1]", *WORDS[1:-2], "[unused2]", "[unused3]")))
    assert check_tokens(other, "model") is None


def test_a_table_without_a_tokenizer(town, capsys):
    save_file({"table": torch.randn(60, 8)}, "table.safetensors")
    said = check_tokens(tokenizer(), "table.safetensors")
    assert said == (
        "table.safetensors has no tokenizer of its own: its rows are taken for these tokens: "
        f"0 '[PAD]', 12 '{WORDS[8]}', 24 '{WORDS[20]}', 36 '{WORDS[32]}', ..."
    )
    assert SPECIAL[0] == "[PAD]"
    assert run("--embeddings=table.safetensors") == 0
    assert f"warning: {said}" in capsys.readouterr().out


def test_a_tokenizer_of_another_model_is_refused(town, capsys):
    model_folder(tokenizer())
    tokenizer(words=("un", *WORDS[1:])).save_pretrained("french")
    assert run("--embeddings=model", "--tokenizer=french") == 2
    assert "tokenizer must be the one of the embeddings, got 1 of 49 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}'])
def test_a_damaged_tokenizer(content, town):
    (town / "words" / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer must be a Hugging Face name or a folder, got 'words': "):
        load_tokenizer("words")

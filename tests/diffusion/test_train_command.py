"""`smoothie-kernels train`: from a sample and flags to a model that loads; what it says when something is wrong."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("datasets", reason="comes with the extra `train`")

from safetensors.torch import save_file
from small import tokenizer
from transformers import AutoTokenizer

from smoothie_kernels import cli
from smoothie_kernels.diffusion.model import SmoothieModel
from smoothie_kernels.diffusion.options import DataOptions, LossOptions, ModelOptions, RunOptions, as_record

pytestmark = pytest.mark.usefixtures("one_thread", "own_caches")
SMALL = [
    "--layers=2",
    "--heads=2",
    "--condition-layers=1",
    "--self-condition-layers=1",
    "--source-length=10",
    "--target-length=8",
    "--steps=4",
    "--batch-size=4",
    "--eval-every=2",
    "--eval-samples=8",
    "--save-every=2",
    "--log-every=2",
    "--warmup-steps=1",
    "--cpu",
]


@pytest.fixture
def words(tmp_path):
    """Folder of a tokenizer of 49 tokens."""
    tokenizer().save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


@pytest.fixture
def town(tmp_path):
    """A data set of 20 and 6 rows about a town."""
    folder = tmp_path / "town"
    folder.mkdir()
    for split, count in (("train", 20), ("validation", 6)):
        pairs = [("the baker made bread", f"who made bread {'?' * (i % 3 + 1)}") for i in range(count)]
        lines = [json.dumps({"src": source, "trg": target, "n": i}) for i, (source, target) in enumerate(pairs)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def run(*arguments) -> int:
    return cli.main(["train", *map(str, arguments)])


def test_from_flags_to_a_model(tmp_path, town, words, capsys):
    out = tmp_path / "run"
    assert run(out, "--data", town, "--embeddings", "random:12", "--tokenizer", words, *SMALL) == 0
    said = capsys.readouterr().out
    assert re.search(r"step 2/4: loss [\d.]+, gradient norm [\d.]+, tokens per second [\d,.]+", said)
    assert re.search(r"step 4, validation: loss [\d.]+, text loss .* mean loss .* accuracy [\d.]+", said)
    assert f"trained: {out / 'checkpoint-4'}" in said
    model = SmoothieModel.from_pretrained(out / "checkpoint-4")
    config = model.config
    assert (config.vocab_size, config.embedding_size, config.hidden_size) == (49, 12, 12)
    assert (config.target_length, config.source_length, config.pad_token_id, config.eos_token_id) == (8, 10, 0, 3)
    table = model.embeddings.weight
    assert float(table.mean()) == pytest.approx(0, abs=1e-5)
    assert float(table.std()) == pytest.approx(1, abs=1e-3)
    assert AutoTokenizer.from_pretrained(out / "checkpoint-4").decode([5], skip_special_tokens=True)
    assert (
        run(out, "--data", town, "--embeddings", "random:12", "--tokenizer", words, *SMALL, "--resume", "--steps=6")
        == 0
    )
    assert (out / "checkpoint-6").is_dir()


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainable-embeddings", "--normalisation=feature", "--x-0-variance=0.1"],
        ["--token-head", "--guidance-dropout=0.2", "--noise-schedule=tess", '--noise-options={"simplex": 3}'],
        ["--unconditional", "--self-condition-layers=0", "--self-conditioning=0", "--skip-padding"],
        ["--bf16", "--micro-batch-size=3", "--ema=0", "--hidden-size=16", "--step=eager", "--torch-noise"],
    ],
    ids=["table", "tokens", "unconditional", "bf16"],
)
def test_options_reach_the_run(flags, tmp_path, town, words):
    out = tmp_path / "run"
    assert run(out, "--data", town, "--embeddings", "random:8", "--tokenizer", words, *SMALL, *flags) == 0
    record = json.loads((out / "checkpoint-4" / "training.json").read_text())
    for flag in flags:
        name, _, value = flag.removeprefix("--").partition("=")
        kept = record[name.replace("-", "_")]
        assert kept == (True if not value else type(kept)(value))
    config = SmoothieModel.from_pretrained(out / "checkpoint-4").config
    assert config.condition_layers == (0 if "--unconditional" in flags else 1)
    assert config.noise_options == ({"simplex": 3} if "--token-head" in flags else {})


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_config_file_and_flags_that_win(ending, tmp_path, town, words):
    options = {name: value for name, value in (flag[2:].split("=") for flag in SMALL if "=" in flag)}
    options |= {"data": town, "embeddings": "random:8", "tokenizer": words, "cpu": True, "seed": 5, "clip": None}
    options |= {"noise_options": {"sharpness": 4}}
    file = tmp_path / f"options.{ending}"
    text = json.dumps(options) if ending == "json" else "".join(f"{k}: {json.dumps(v)}\n" for k, v in options.items())
    file.write_text(text)
    assert run(tmp_path / "run", "--config", file, "--seed=6") == 0
    record = json.loads((tmp_path / "run" / "checkpoint-4" / "training.json").read_text())
    assert (record["seed"], record["layers"], record["data"], record["clip"]) == (6, 2, town, 1.0)
    assert record["model"]["noise_options"] == {"sharpness": 4}


def test_embeddings_of_a_file(tmp_path, town, words):
    save_file({"table": torch.randn(49, 10)}, tmp_path / "table.safetensors")
    flags = ("--data", town, "--embeddings", tmp_path / "table.safetensors", "--tokenizer", words, *SMALL)
    assert run(tmp_path / "run", *flags) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere.jsonl"}, "data must be a folder or file that exists, got 'nowhere.jsonl'"),
        ({"source-column": "origin"}, r"source_column must be one of .*'src', 'trg', 'n', got 'origin'"),
        ({"target-column": "n"}, "column 'n' must hold strings, got int in line 1 of .*train.jsonl"),
        ({"embeddings": "small.safetensors"}, "tokenizer must .* got the wrong vocabulary: 49 tokens for 20 rows"),
        ({"embeddings": "none.safetensors"}, "embeddings must be a file that exists, got 'none.safetensors'"),
        ({"report-to": "pigeon"}, "pigeon"),
        ({"tokenizer": None}, "tokenizer must be given where embeddings are no model, got embeddings = 'random:8'"),
        ({"tokenizer": "not/there"}, "tokenizer must be a Hugging Face name or a folder, got 'not/there'"),
        ({"layers": "0"}, "layers must be at least 1, got 0"),
        ({"hidden-size": "9"}, "hidden_size must be even and a multiple of heads = 2, got 9"),
        ({"steps": "0"}, "steps must be at least 1, got 0"),
        ({"noise-options": "{"}, "noise_options must be JSON, got '{'"),
        ({"noise-options": "[1]"}, r"noise_options must be a JSON object, got '\[1\]'"),
        ({"noise-options": '{"speed": 1}'}, "options of schedule 'arctan' must be among .* got 'speed'"),
        ({"config": "gone.yaml"}, "config must be a file, got .*gone.yaml"),
        ({"config": "list.yaml"}, "config must hold options by name, got list in .*list.yaml"),
        ({"config": "bad.yaml"}, "config must be YAML or JSON, got .*bad.yaml"),
        ({"resume": ""}, "output must hold a checkpoint to resume from"),
        ({"guidance-dropout": "0.1", "unconditional": ""}, "guidance_dropout must be 0 for a model with condition_"),
        ({"self-condition-layers": "0"}, "self_conditioning must be 0 for a model with self_condition_layers = 0"),
    ],
)  # fmt: skip
def test_messages(changes, message, tmp_path, town, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"table": torch.randn(20, 10)}, "small.safetensors")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    flags = {"data": town, "embeddings": "random:8", "tokenizer": words} | changes
    given = [f"--{name}={value}" if value else f"--{name}" for name, value in flags.items() if value is not None]
    small = [flag for flag in SMALL if flag.partition("=")[0][2:] not in changes]
    assert run(tmp_path / "run", *small, *given) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("smoothie-kernels train: ")
    assert re.search(message, said), said


def test_checkpoint_of_another_model(tmp_path, town, words, capsys):
    flags = ("--data", town, "--embeddings", "random:8", "--tokenizer", words, *SMALL)
    assert run(tmp_path / "run", *flags) == 0
    assert run(tmp_path / "run", *flags, "--resume", "--layers=3") == 2
    differs = "it has layers = 2, got 3; model.num_hidden_layers = 2, got 3"
    assert re.search(f"options must be those of .*checkpoint-4 to resume it: {differs}$", capsys.readouterr().err)


def test_help_for_a_newcomer(capsys):
    with pytest.raises(SystemExit) as done:
        run("--help")
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert all(f"\n{group}:" in said for group in ("data", "model", "loss", "training"))
    assert "--data question-generation" in said
    for name in as_record(DataOptions(data="paraphrase"), ModelOptions(), LossOptions(), RunOptions()):
        assert f"--{name.replace('_', '-')}" in said, name
    assert "(default: None)" not in said
    assert "(default: 256)" in said


def test_unknown_flags_and_commands(capsys):
    for arguments in (["train", "x", "--data", "y", "--stepz", "3"], ["doctor", "--fast"], ["sing"], ["train"]):
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert done.value.code == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


def test_without_its_packages_it_says_what_to_install():
    program = """if True:
        import sys
        sys.modules["datasets"] = None
        from smoothie_kernels import cli
        sys.exit(cli.main(["train", "x", "--data", "y"]))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2
    assert (
        "smoothie-kernels train needs the package datasets: pip install '.[train]' in a clone of smoothie-kernels"
        in done.stderr
    )

"""`smoothie-kernels sample`: from a checkpoint to a file that a killed run goes on with."""

import io
import json
import re
import sys

import pytest
import torch

pytest.importorskip("datasets", reason="comes with the extra `train`")

import small
import training

from smoothie_kernels import cli
from smoothie_kernels.diffusion import SmoothiePipeline, pipeline

pytestmark = pytest.mark.usefixtures("one_thread", "own_caches")
FAST = ("--steps=3", "--batch-size=4", "--truncate", "--cpu")
ROWS = [("the baker made bread", "who made bread ?"), ("the king is old", "who is old ?"), ("a cat", "what is it ?")]


@pytest.fixture
def checkpoint(tmp_path):
    """A training run's folder with one checkpoint, whose weights are random."""
    return saved(tmp_path / "run")


@pytest.fixture
def town(tmp_path):
    """A data set of nine rows for validation."""
    (tmp_path / "town").mkdir()
    lines = [json.dumps({"src": source, "trg": target}) + "\n" for source, target in ROWS * 3]
    (tmp_path / "town" / "validation.jsonl").write_text("".join(lines))
    return tmp_path / "town"


def saved(folder, **changes):
    torch.manual_seed(1)
    training.model(eos_token_id=3, pad_token_id=0, **changes).save_pretrained(folder / "checkpoint-7")
    small.tokenizer().save_pretrained(folder / "checkpoint-7")
    return folder


def run(*arguments) -> int:
    return cli.main(["sample", *map(str, arguments)])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_a_data_set_to_a_file(checkpoint, town, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(checkpoint, out, "--data", town, "--samples=2", "--limit=5", *FAST, "--seed=3", "--solver=ddim") == 0
    assert f"sampled: {out}, 10 texts" in capsys.readouterr().out
    made = lines(out)
    assert [line["id"] for line in made] == [*range(10)]
    assert [(line["source"], line["reference"]) for line in made] == [row for row in (ROWS * 3)[:5] for _ in range(2)]
    pipe = SmoothiePipeline.from_pretrained(checkpoint)
    again = pipe([row[0] for row in (ROWS * 3)[:5]], samples=2, steps=3, seed=3, solver="ddim", truncate=True)
    assert [(line["text"], line["steps"]) for line in made] == [(each.text, each.steps) for each in again]


def test_sources_by_hand_are_printed(checkpoint, capsys):
    assert run(checkpoint, "-", "--source", "a cat", "the king", "--template", "what [MASK] it ?", *FAST) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["source"] for line in made] == ["a cat", "the king"]
    assert all(re.fullmatch(r"what .*it \?", line["text"]) for line in made)
    assert "reference" not in made[0]


def test_unconditional(tmp_path, town, capsys):
    folder = saved(tmp_path / "free", condition_layers=0)
    assert run(folder, "-", "--count=3", "--prefix=the king", *FAST) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [sorted(line) for line in made] == [["id", "steps", "text"]] * 3
    assert all(line["text"].startswith("the king") for line in made)
    assert run(folder, tmp_path / "out.jsonl", "--data", town, "--target-column=trg", "--limit=2", *FAST) == 0
    assert [line["reference"] for line in lines(tmp_path / "out.jsonl")] == [target for _, target in ROWS[:2]]


@pytest.mark.parametrize("killed", ["in a line", "in a batch", "between batches"])
def test_a_killed_run_goes_on(killed, checkpoint, town, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    arguments = ("--data", town, "--samples=1", *FAST)
    assert run(checkpoint, whole, *arguments) == 0
    assert run(checkpoint, out, *arguments, "--limit=4") == 0  # one batch
    rest = whole.read_bytes().split(b"\n")
    cut = {"in a line": rest[4] + b"\n" + rest[5][:9], "in a batch": rest[4] + b"\n" + rest[5] + b"\n"}
    with out.open("ab") as file:
        file.write(cut.get(killed, b""))
    made = []
    inner = pipeline.SmoothieModel.generate
    monkeypatch.setattr(
        pipeline.SmoothieModel, "generate", lambda *given, **how: made.append(how["sample_ids"]) or inner(*given, **how)
    )
    assert run(checkpoint, out, *arguments) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert made == [range(4, 8), range(8, 9)]
    assert run(checkpoint, out, *arguments) == 0  # nothing is left to do
    assert len(made) == 2
    assert out.read_bytes() == whole.read_bytes()


def test_other_options_do_not_go_on(checkpoint, town, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(checkpoint, out, "--data", town, *FAST) == 0
    before = out.read_bytes()
    assert run(checkpoint, out, "--data", town, *FAST, "--seed=1") == 2
    assert "options must be those of" in capsys.readouterr().err
    torch.manual_seed(2)
    model = training.model(eos_token_id=3, pad_token_id=0)
    with torch.no_grad():
        model.output.bias += 1
    model.save_pretrained(checkpoint / "checkpoint-7")
    assert run(checkpoint, out, "--data", town, *FAST) == 2
    assert "it has checkpoint = " in capsys.readouterr().err
    assert out.read_bytes() == before
    assert run(checkpoint, out, "--data", town, *FAST, "--seed=1", "--overwrite") == 0
    assert out.read_bytes() != before


def test_options_from_a_file(checkpoint, tmp_path, capsys):
    (tmp_path / "how.yaml").write_text("steps: 2\nbatch_size: 1\n")
    assert run(checkpoint, "-", "--source", "a cat", "--config", tmp_path / "how.yaml", "--cpu") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_a_terminal_that_lacks_letters(checkpoint, monkeypatch):
    """Every line is the JSON that it is elsewhere."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    sources = ["a cat \u00e9t\u00e9", "\u4e2d \U0001f600"]
    assert run(checkpoint, "-", "--source", *sources, *FAST) == 0
    sys.stdout.flush()
    assert [json.loads(line)["source"] for line in raw.getvalue().decode("ascii").splitlines()] == sources


def test_what_is_lost_is_said(tmp_path, capsys, caplog):
    folder = saved(tmp_path / "run")
    rows = [*ROWS, ("", "x"), ("xyz", "x"), ("x", None)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"src": s, "trg": t}) + "\n" for s, t in rows))
    model = training.SmoothieModel.from_pretrained(folder / "checkpoint-7")
    with torch.no_grad():  # [CLS], wherever it is
        model.output.weight.zero_()
        model.output.bias[:] = model.embeddings.weight[2]
    model.save_pretrained(folder / "checkpoint-7")
    assert run(folder, "-", "--data", tmp_path / "x.jsonl", "--split=train", "--samples=2", *FAST) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 8
    assert [line for line in said.err.splitlines() if "texts" in line or "rows" in line] == [
        f"{tmp_path / 'x.jsonl'}: 4 of 6 rows, left out are 1 without reference, 1 without source",
        f"8 of 8 texts are empty, their tokens are: 8 times {' '.join(['[CLS]'] * 8)}",
    ]
    assert caplog.messages == ["1 of 4 sources have no token that the model knows: 'xyz'"]


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        run("--help")
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "smoothie-kernels sample CHECKPOINT OUTPUT" in said
    assert "(default: 200)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solver=euler"], "invalid choice: 'euler'"),
        (["--source", "a cat", "--samples=0"], "samples must be at least 1, got 0"),
        (["--source", "a cat", "--limit=0"], "limit must be at least 1, got 0"),
        (["--source", "a cat", "--data=x"], "source must be None where there are data, got ['a cat']"),
        (["--source", "a cat", "--steps=0"], "steps must be at least 1, got 0"),
        (["--source", "a cat", "--stop-after=0"], "stop_after must be at least 1, got 0"),
        (["--source", "a cat", "--delta=-1"], "delta must be at least 0, got -1.0"),
        (["--source", "a cat and a dog eat"], "source must have at most 6 tokens, or be truncated, got 8"),
        (["--count=2"], "data or source must be given for a model with a source, got neither"),
        (["--source", "a", "--source", "b", "--count=2"], "count must be None where data or source say how many"),
        (["--source", "a", "--template", "a " * 9], "template must have at most 8 tokens, got 11"),
        (["--source", "a", "--prefix", "a " * 9], "prefix must have at most 8 tokens, got 10"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_wrong_options(arguments, message, checkpoint, capsys):
    with pytest.raises(SystemExit) as end:
        sys.exit(run(checkpoint, "-", *arguments))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_files(checkpoint, tmp_path, capsys):
    assert run(tmp_path / "nothing", "-", "--source", "a cat") == 2
    assert "smoothie-kernels sample: checkpoint must be a Smoothie model's folder" in capsys.readouterr().err
    assert run(checkpoint, tmp_path / "nothing" / "out.jsonl", "--source", "a cat", *FAST) == 2
    assert "output must be a file in a folder that exists" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text("mine\n")
    assert run(checkpoint, tmp_path / "other.jsonl", "--source", "a cat", *FAST) == 2
    assert "output must be one of this command, or be overwritten" in capsys.readouterr().err
    assert (tmp_path / "other.jsonl").read_text() == "mine\n"


def test_a_missing_package_is_named(monkeypatch, capsys):
    for name in ("sample_command", "pipeline"):
        monkeypatch.delitem(sys.modules, f"smoothie_kernels.diffusion.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run("x", "-") == 2
    assert (
        "smoothie-kernels sample needs the package tqdm: pip install '.[train]' in a clone of smoothie-kernels"
        in capsys.readouterr().err
    )

"""`smoothie-kernels evaluate`: from files of samples to lines of scores; what it says when something is wrong."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("sacrebleu", reason="comes with the extra `evaluate`")
pytest.importorskip("rouge_score", reason="comes with the extra `evaluate`")

import smoothie_kernels
from smoothie_kernels.diffusion import scores
from smoothie_kernels.diffusion.evaluate import ScoreOptions, command, evaluate

ROWS = [
    {"id": 0, "source": "the cat", "reference": "The cat sat here.", "text": "the cat sat there.", "steps": 10},
    {"id": 1, "source": "a dog", "reference": ["a dog ate", "dogs eat"], "text": "", "seed": None},
    {"id": 2, "source": "x\u2028y", "reference": "é", "text": "é\u2028e"},  # a line to str.splitlines, not to JSON
]
ALL = ["bleu", "chrf", "rouge", "sari", "distinct"]
KEYS = ["bleu", "chrf", "rouge1", "rouge2", "rougeL", "sari", "distinct1", "distinct2", "distinct3", "distinct4"]
MODELS = ["perplexity", "bertscore", "mauve"]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def without(rows, *keys):
    return [{key: value for key, value in row.items() if key not in keys} for row in rows]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "free.jsonl", without(ROWS, "source", "reference"))
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """The metrics that are computed, in order."""
    made = []
    for name, metric in scores.METRICS.items():

        def counted(*given, name=name, compute=metric.compute, **keywords):
            made.append(name)
            return compute(*given, **keywords)

        monkeypatch.setitem(scores.METRICS, name, metric._replace(compute=counted))
    return made


@pytest.fixture
def stubs(here, monkeypatch):
    """bert_score and mauve-text that know their answers, and the folder of a model."""
    transformers = pytest.importorskip("transformers", reason="comes with the extra `train`")
    from small import tokenizer

    tokenizer(special=False).save_pretrained(here / "model")
    config = transformers.GPT2Config(vocab_size=49, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(here / "model")

    class Scorer:
        def __init__(self, model_type, num_layers):
            self.layers, self._tokenizer = num_layers, SimpleNamespace(model_max_length=64)

        def score(self, texts, _):
            import torch

            return (torch.full((len(texts),), self.layers / 10),) * 3

    bert, utils, mauve = ModuleType("bert_score"), ModuleType("bert_score.utils"), ModuleType("mauve")
    bert.BERTScorer, utils.model2layers = Scorer, {"model": 6}
    mauve.compute_mauve = lambda **_: SimpleNamespace(mauve=0.75)
    for module in (bert, utils, mauve):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    scores._bert_scorer.cache_clear()
    yield
    scores._bert_scorer.cache_clear()


def lines(path="r.jsonl"):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def run(*arguments):
    return command([*map(str, arguments)])


def test_all_that_the_columns_allow(here, calls, capsys):
    assert run("a.jsonl", "free.jsonl", "--out", "r.jsonl") == 0
    assert calls == [*ALL, "distinct"]
    first, second = lines()
    texts, sources = [row["text"] for row in ROWS], [row["source"] for row in ROWS]
    references = [["The cat sat here."], ["a dog ate", "dogs eat"], ["é"]]
    want = {
        "samples": "a.jsonl",
        "sha256": hashlib.sha256((here / "a.jsonl").read_bytes()).hexdigest(),
        "texts": 3,
        "bleu": scores.bleu(texts, references),
        "chrf": scores.chrf(texts, references),
        **scores.rouge(texts, references),
        "sari": scores.sari(texts, references, sources),
        **scores.distinct(texts),
    }
    assert {key: first[key] for key in want} == want
    rest = ["options", "signatures", "versions", "left_out"]
    assert list(first) == [*want, *rest]
    assert first["options"] == {name: {"lowercase": False} if name in ("bleu", "chrf") else {} for name in ALL}
    assert first["signatures"] == {name: scores.signature(name, references) for name in ("bleu", "chrf")}
    assert {*first["versions"]} == {"smoothie-kernels", "torch", "sacrebleu", "rouge_score"}
    assert first["left_out"] == {name: f"it needs {name}_model" for name in MODELS}
    assert list(second) == ["samples", "sha256", "texts", *KEYS[-4:], *rest]
    assert second["left_out"]["sari"] == "it needs references and sources"
    assert second["left_out"]["bertscore"] == "it needs references and bertscore_model"
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["samples", "texts", *KEYS]
    assert said[1].split() == ["a.jsonl", "3", *(f"{want[key]:.4g}" for key in KEYS)]
    assert said[2].split()[:8] == ["free.jsonl", "3", *"------"]
    assert len({len(line) for line in said[:3]}) == 1
    assert said[3:].count("left out: perplexity, it needs perplexity_model") == 1  # once for both


def test_chosen_metrics_and_lower_case(here, calls):
    assert run("a.jsonl", "--out", "r.jsonl", "--metrics", "distinct,bleu", "--lowercase") == 0
    assert calls == ["bleu", "distinct"]
    assert run("a.jsonl", "--out", "r.jsonl", "--metrics", "bleu", "--metrics", "distinct", "--lowercase") == 0
    (line,) = lines()  # the same
    assert line["left_out"] == {}
    assert line["options"] == {"bleu": {"lowercase": True}, "distinct": {}}
    assert "case:lc" in line["signatures"]["bleu"]
    assert "chrf" not in line["signatures"]
    assert line["bleu"] > evaluate(["a.jsonl"], "other.jsonl", ScoreOptions(metrics=("bleu",)))[0]["bleu"]


def test_models(stubs, calls):
    flags = [f"--{name}-model=model" for name in MODELS]
    assert run("a.jsonl", "--out", "r.jsonl", *flags) == 0
    assert run("a.jsonl", "--out", "r.jsonl", *flags, "--metrics=distinct", "--bertscore-layers=2") == 0
    first, second = lines()
    assert calls == [*ALL, *MODELS, "distinct", *MODELS]
    assert (first["left_out"], second["left_out"]) == ({}, {})
    assert first["bertscore"] == pytest.approx(0.6 * 2 / 3)  # one text is empty
    assert second["bertscore"] == pytest.approx(0.2 * 2 / 3)
    assert first["mauve"] == 0.75
    assert first["perplexity"] == scores.perplexity([row["text"] for row in ROWS], "model") > 1
    assert first["options"]["bertscore"] == {"model": "model", "layers": None}
    assert second["options"] == {
        "distinct": {},
        "perplexity": {"model": "model"},
        "bertscore": {"model": "model", "layers": 2},
        "mauve": {"model": "model"},
    }
    assert {"transformers", "bert_score", "mauve"} < {*second["versions"]}


def test_a_score_that_does_not_exist_is_null(stubs, capsys):
    write_empty = [{"text": ""}, {"text": ""}]
    with open("e.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in write_empty)
    assert run("e.jsonl", "--out", "r.jsonl", "--perplexity-model=model") == 0
    assert lines()[0]["perplexity"] is None
    assert capsys.readouterr().out.splitlines()[1].split() == ["e.jsonl", "2", "0", "0", "0", "0", "-"]


def test_packages_that_are_not_here_are_left_out(here, monkeypatch, calls):
    for module in ("sacrebleu", "rouge_score"):
        monkeypatch.setitem(sys.modules, module, None)
    assert run("a.jsonl", "--out", "r.jsonl") == 0
    assert calls == ["distinct"]
    assert (
        lines()[0]["left_out"]["sari"]
        == "it needs the package sacrebleu: pip install '.[evaluate]' in a clone of smoothie-kernels"
    )
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert run("a.jsonl", "--out", "r.jsonl") == 0  # once they are installed, it is another set of metrics
    assert "sari" in lines()[1]


# --- The second time


def test_what_is_there_is_not_computed_again(here, calls, capsys):
    assert run("a.jsonl", "--out", "r.jsonl") == 0
    first, said = (here / "r.jsonl").read_bytes(), capsys.readouterr().out
    assert run("a.jsonl", "--out", "r.jsonl") == 0
    assert (calls, (here / "r.jsonl").read_bytes()) == (ALL, first)
    assert capsys.readouterr().out == said
    assert run("a.jsonl", "free.jsonl", "free.jsonl", "--out", "r.jsonl") == 0  # only what is new, and once
    assert [line["samples"] for line in lines()] == ["a.jsonl", "free.jsonl"]
    assert run("a.jsonl", "--out", "r.jsonl", "--lowercase") == 0  # other options
    assert run("a.jsonl", "--out", "r.jsonl", "--metrics", "bleu,distinct") == 0
    write(here / "a.jsonl", ROWS[:2])  # other content
    assert run("a.jsonl", "--out", "r.jsonl") == 0
    write(here / "b.jsonl", ROWS)  # another file
    assert run("b.jsonl", "--out", "r.jsonl") == 0
    assert [(line["samples"], line["texts"]) for line in lines()[2:]] == [
        ("a.jsonl", 3), ("a.jsonl", 3), ("a.jsonl", 2), ("b.jsonl", 3),
    ]  # fmt: skip
    assert len(calls) == 6 + 5 + 2 + 5 + 5
    assert (here / "r.jsonl").read_bytes().startswith(first)


@pytest.mark.parametrize("kept", [1, 12, 13, 200, -1])
def test_a_line_that_was_half_written(kept, here, calls):
    assert run("free.jsonl", "a.jsonl", "--out", "r.jsonl") == 0
    whole = (here / "r.jsonl").read_bytes()
    start = whole.index(b"\n") + 1
    (here / "r.jsonl").write_bytes(whole[:start] + whole[start:][:kept])
    calls.clear()
    assert run("free.jsonl", "a.jsonl", "--out", "r.jsonl") == 0
    assert calls == ALL
    assert (here / "r.jsonl").read_bytes() == whole


def test_killed_between_two_files(here):
    """A run that dies in its second file has kept the first."""
    program = """if True:
        import os
        from smoothie_kernels.diffusion import evaluate, scores

        def die(texts):
            if len(texts) == 2:
                os.kill(os.getpid(), 9)
            return {"distinct1": 0.5}

        scores.METRICS["distinct"] = scores.METRICS["distinct"]._replace(compute=die)
        evaluate.command(["a.jsonl", "b.jsonl", "--out", "r.jsonl"])
    """
    write(here / "b.jsonl", ROWS[:2])
    path = str(Path(smoothie_kernels.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", program], check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == -9
    assert [line["samples"] for line in lines()] == ["a.jsonl"]


# --- What is wrong


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "samples must be a file, got 's.jsonl'"),
        (b"", "samples must have at least one line, got none in 's.jsonl'"),
        (b"\n\n", "samples must have at least one line, got none in 's.jsonl'"),
        (b'{"text": "a"}\n{"text": "b"\n', "samples must be lines of JSON, got line 2 of s.jsonl: Expecting ',' delim"),
        (
            b'{"text": "a"}\n\n{"text": "\xff"}',
            "samples must be lines of JSON, got line 3 of s.jsonl: .* decode byte 0xff",
        ),
        (b'{"text": "a"}\n["b"]', 'samples must be JSON objects with "text", got line 2 of s.jsonl without'),
        (b'{"texts": "a"}', 'samples must be JSON objects with "text", got line 1 of s.jsonl without'),
        (b'{"text": null}', "text and source must be strings, got another in line 1 of s.jsonl"),
        (b'{"text": "a", "source": ["b"]}', "text and source must be strings, got another in line 1 of s.jsonl"),
        (b'{"text": "a", "reference": 3}', "reference must be a string or a list of them, got 3 in line 1 of s.jsonl"),
        (b'{"text": "a", "reference": []}', r"reference must be a string or a list of them, got \[\] in line 1"),
        (b'{"text": "a", "reference": ["b", null]}', r"reference must be .* got \['b', None\] in line 1 of s.jsonl"),
        (
            b'{"text": "a", "reference": "b"}\n{"text": "a"}\n{"text": "a", "reference": null}',
            "reference must be in all lines or none, got 1 of 3 in 's.jsonl'",
        ),
        (
            b'{"text": "a"}\n{"text": "a", "source": "b"}',
            "source must be in all lines or none, got 1 of 2 in 's.jsonl'",
        ),
    ],
)
def test_samples_that_are_wrong(content, message, here, capsys, calls):
    if content is not None:
        (here / "s.jsonl").write_bytes(content)
    assert run("a.jsonl", "s.jsonl", "--out", "r.jsonl") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.match(f"smoothie-kernels evaluate: {message}", said[0]), said
    assert not calls  # before anything is computed
    assert not (here / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metrics=bleu,blue"], "metrics must be among bleu, chrf, .*, mauve, got 'blue'$"),
        (["--metrics="], "metrics must be among .*, got ''$"),
        (["--metrics=sari"], "metrics must be able to run, got 'sari' for 'free.jsonl': it needs references and s"),
        (["--metrics=perplexity"], "metrics must be able to run, got 'perplexity' .* it needs perplexity_model$"),
        (["--mauve-model=x"], "metrics must be able to run, got 'mauve' for 'free.jsonl': it needs references$"),
        (["--bertscore-layers=3"], "bertscore_layers must come with bertscore_model, got 3 alone$"),
        (["--out=nowhere/r.jsonl"], "out must be a file in a folder that exists, got 'nowhere/r.jsonl'$"),
        (["--out=."], "out must be a file in a folder that exists, got '.'$"),
    ],
)  # fmt: skip
def test_options_that_are_wrong(flags, message, here, capsys, calls):
    assert run("free.jsonl", "--out", "r.jsonl", *flags) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.match(f"smoothie-kernels evaluate: {message}", said[0]), said
    assert not calls


def test_models_that_are_wrong(stubs, capsys, monkeypatch):
    for flag, message in [
        ("--perplexity-model=no/model", "perplexity_model must be a causal model on this machine, got 'no/model': "),
        ("--bertscore-model=nowhere", "bertscore_model must be a folder, got 'nowhere'"),
        ("--mauve-model=nowhere", "mauve_model must be a folder, got 'nowhere'"),
    ]:
        assert run("a.jsonl", "--out", "r.jsonl", flag) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1  # although transformers says more
        assert message in said[0]
    monkeypatch.setitem(sys.modules, "bert_score", None)
    assert run("a.jsonl", "--out", "r.jsonl", "--bertscore-model=model") == 2
    assert (
        "'bertscore' for 'a.jsonl': it needs the package bert_score: pip install bert_score" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"notes\nof mine", "out must hold results of this command, got another line 1 of 'r.jsonl'"),
        (b'{"samples": "a"}\n{"sa\nof mine', "out must hold results of this command, got another line 3 of 'r.jsonl'"),
        (b'{"id": 0, "text": "a"}', "out must hold results of this command, got another line 1 of 'r.jsonl'"),
        (b'{"samples": \n', "out must hold lines of JSON, got 'r.jsonl': "),
    ],
)
def test_results_of_something_else_are_left_alone(content, message, here, capsys, calls):
    (here / "r.jsonl").write_bytes(content)
    assert run("a.jsonl", "--out", "r.jsonl") == 2
    assert message in capsys.readouterr().err
    assert (here / "r.jsonl").read_bytes() == content
    assert not calls


def test_help_and_unknown_flags(capsys):
    for flags, status in ((["--help"], 0), (["a.jsonl"], 2), (["a.jsonl", "--out", "r", "--speed"], 2)):
        with pytest.raises(SystemExit) as done:
            run(*flags)
        assert done.value.code == status
    said = capsys.readouterr()
    assert ",".join(scores.METRICS) in said.out.replace("\n", "").replace(" ", "")
    assert "unrecognized arguments: --speed" in said.err

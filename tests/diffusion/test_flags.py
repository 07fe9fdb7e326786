"""What flags and --config files give: every option once, as it was written, or a complaint of one line."""

import re

import pytest

pytest.importorskip("datasets", reason="comes with the extra `train`")

from smoothie_kernels.diffusion import sample_command, train
from smoothie_kernels.diffusion.options import DataOptions, ModelOptions, RunOptions, SampleOptions
from smoothie_kernels.diffusion.sample_command import TextOptions


def options_of(module, *given):
    """All options by name."""
    known = {}
    for group in module.arguments_parser().read(list(given)):
        known |= vars(group)
    return known


@pytest.fixture
def config(tmp_path):
    def write(text, name="options.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return f"--config={tmp_path / name}"

    return write


def test_several_sources(config):
    def sources(*given):
        return options_of(sample_command, "run", "-", *given)["source"]

    assert sources("--source", "the cat", "--source", "a dog", "it", "--source=- ?") == [
        "the cat",
        "a dog",
        "it",
        "- ?",
    ]
    both = config("source: [the cat, '-a dog']")
    assert sources(both) == ["the cat", "-a dog"]
    assert sources(both, "--source", "it") == ["it"]
    assert sources(config("source: 007")) == ["007"]
    assert sources() is None


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("resume: true", "resume", True),
        ("resume: false", "resume", False),
        ("cpu: yes", "cpu", True),
        ("cpu: 'true'", "cpu", True),
        ("data: 007", "data", "007"),
        ("data: 1.50", "data", "1.50"),
        ("data: 2024-01-01", "data", "2024-01-01"),
        ("data: yes", "data", "yes"),
        ("learning-rate: 5e-4", "learning_rate", 5e-4),
        ("tokenizer:", "tokenizer", None),
        ("noise_options: {sharpness: 4, root: false}", "noise_options", '{"sharpness": 4, "root": false}'),
        ('{"seed": 5, "data": "\\u00e9t\\u00e9"}', "data", "été"),
    ],
)
def test_values_of_a_file(text, name, value, config):
    given = () if '"data"' in text or text.startswith("data") else ("--data=x",)
    assert options_of(train, "run", config(text), *given)[name] == value


def test_what_is_true_can_be_made_false(config):
    assert options_of(sample_command, "run", "-")["self_conditioning"] is True
    assert options_of(sample_command, "run", "-", "--no-self-conditioning")["self_conditioning"] is False
    no = config("self_conditioning: false")
    assert options_of(sample_command, "run", "-", no)["self_conditioning"] is False
    assert options_of(sample_command, "run", "-", no, "--self-conditioning")["self_conditioning"] is True


@pytest.mark.parametrize("switch", ["--unconditional", "--resume", "--cpu"])
def test_what_stands_behind_a_switch_may_be_no_value(switch):
    name = switch[2:]
    for given, value in (
        ((switch, "runs/a", "--data=x"), True),
        (("runs/a", "--data=x", switch), True),
        ((switch, "--data=x", "runs/a"), True),
        ((switch, "false", "runs/a", "--data=x"), False),
        (("runs/a", "--data=x", switch, "yes"), True),
    ):
        found = options_of(train, *given)
        assert (found["output"], found[name]) == ("runs/a", value)
    assert options_of(train, "--resume", "auto", "runs/a", "--data=x")["resume"] == "auto"
    assert options_of(sample_command, "--truncate", "run", "-")["checkpoint"] == "run"


def test_help_says_what_is_off_and_what_is_0(capsys):
    with pytest.raises(SystemExit):
        options_of(train, "--help")
    said = " ".join(capsys.readouterr().out.split())
    for text in ("--dropout DROPOUT in all layers (default: 0.0)", "processes that load data (default: 0)",
                 "--compile [COMPILE] torch.compile the network --cpu"):  # fmt: skip
        assert text in said
    with pytest.raises(SystemExit):
        options_of(sample_command, "--help")
    assert "--no-self-conditioning turn off --self-conditioning" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnign_rate: 1", "config must hold options of smoothie-kernels train, got 'learnign_rate' in "
         "'.*options.yaml'; did you mean learning_rate"),
        ("xyzzy: 1", "got 'xyzzy' in '.*options.yaml'$"),
        ("output: there", "got 'output' in '.*options.yaml'"),
        ("config: other.yaml", "got 'config' in"),
        ("steps: 3\nsteps: 4", "config must hold an option once, got 'steps' again in '.*options.yaml'"),
        ("steps: 3\n'steps': 4", "config must hold an option once, got 'steps' again"),
        ("data: [a, b]", "data is wrong in '.*options.yaml': it must be one value, got a list"),
        ("steps: many", "steps is wrong in '.*options.yaml': invalid literal for int"),
        ("steps: true", "steps is wrong in '.*options.yaml': invalid literal for int"),
        ("step: quick", "step is wrong in '.*options.yaml': it must be one of fused, eager, got 'quick'"),
        ("cpu: perhaps", "cpu is wrong in '.*options.yaml': Truthy value expected"),
        ("resume: perhaps", "resume is wrong in '.*options.yaml': .*perhaps"),
        ("", "config must hold options by name, got nothing in '.*options.yaml'"),
        ("steps", "config must hold options by name, got scalar in '.*options.yaml'"),
        ("a: [1", "config must be YAML or JSON, got '.*options.yaml'"),
        ("a: \0", "config must be YAML or JSON, got '.*options.yaml'"),
    ],
)  # fmt: skip
def test_files_that_are_wrong(text, message, config):
    with pytest.raises(ValueError, match=message):
        options_of(train, "run", "--data=x", config(text))


def test_a_list_with_nothing_in_it(config):
    with pytest.raises(ValueError, match=r"source is wrong in '.*options.yaml': it must be a list of values, got noth"):
        options_of(sample_command, "run", "-", config("source:\n- a\n-"))


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"data: \xff")
    with pytest.raises(ValueError, match=r"config must be YAML or JSON, got '.*x.yaml'"):
        options_of(train, "run", f"--config={tmp_path / 'x.yaml'}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data=x", "--stepps", "3"], r"unrecognized arguments: --stepps 3; did you mean --steps\?"),
        (["--data=x", ""], "unrecognized arguments: ''$"),
        (["--data=x", "--learn=3"], "unrecognized arguments: --learn=3"),  # no part of a name is one
        (["--data=x", "--conf=y"], r"unrecognized arguments: --conf=y; did you mean --config\?"),
        ([], "the following arguments are required: --data"),
        (["--data=x", "--steps=many"], "argument --steps: invalid int value: 'many'"),
        (["--data=x", "--step=quick"], "argument --step: invalid choice: 'quick'"),
    ],
)
def test_flags_that_are_wrong(given, message, capsys):
    with pytest.raises(SystemExit) as done:
        options_of(train, "run", *given)
    assert done.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.match(f"smoothie-kernels train: {message}", said[0]), said


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataOptions(data="x", source_length=0), "source_length must be at least 1, got 0"),
        (lambda: DataOptions(data="x", target_length=-1), "target_length must be at least 1, got -1"),
        (lambda: DataOptions(data=""), "data must not be empty, got ''"),
        (lambda: DataOptions(data="x", source_column=""), "source_column must not be empty, got ''"),
        (lambda: ModelOptions(embeddings=""), "embeddings must not be empty, got ''"),
        (lambda: ModelOptions(tokenizer=""), "tokenizer must not be empty, got ''"),
        (lambda: TextOptions(data=""), "data must not be empty, got ''"),
        (lambda: TextOptions(data="x", split=""), "split must not be empty, got ''"),
        (lambda: ModelOptions(hidden_size=0), "hidden_size must be at least 1, got 0"),
        (lambda: ModelOptions(heads=0), "heads must be at least 1, got 0"),
        (lambda: RunOptions(clip=float("nan")), "clip must be positive, got nan"),
        (lambda: RunOptions(learning_rate=float("inf")), "learning_rate must be at least 0, got inf"),
        (lambda: RunOptions(steps=-(10**400)), "steps must be at least 1, got -1000"),
        (lambda: SampleOptions(guidance=float("nan")), "guidance must be finite, got nan"),
        (lambda: SampleOptions(delta=float("inf")), "delta must be at least 0, got inf"),
        (lambda: SampleOptions(seed=2**63), "seed must be at least .* got 9223372036854775808"),
        (lambda: TextOptions(source=["a"], count=2), "count must be None where data or source say how many .* got 2"),
        (lambda: TextOptions(data="x", count=2), "count must be None where data or source say how many .* got 2"),
        (lambda: TextOptions(source=["a"], limit=2), "limit must be None without data, got 2"),
        (lambda: TextOptions(source_column="a"), "source_column must be None without data, got 'a'"),
    ],
)
def test_options_that_are_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("module", "given", "name"), [(train, ("", "--data=x"), "OUTPUT"), (sample_command, ("", "-"), "CHECKPOINT")]
)
def test_no_path_is_not_the_folder_we_are_in(module, given, name, capsys):
    with pytest.raises(SystemExit):
        options_of(module, *given)
    assert f"argument {name}: it must not be empty" in capsys.readouterr().err


def test_lengths_that_are_not_given_are_the_papers():
    assert DataOptions(data="paraphrase").lengths == (50, 50)
    assert DataOptions(data="paraphrase", source_length=1, target_length=2).lengths == (1, 2)

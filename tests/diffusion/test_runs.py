"""Runs that are stopped, restarted, in each other's way or go wrong: what is left, what is said, which exit status."""

import fcntl
import json
import os
import re
import resource
import signal
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("datasets", reason="comes with the extra `train`")

import forks
import small
import training

from smoothie_kernels import cli
from smoothie_kernels.diffusion import SmoothiePipeline, checkpoint, ranks, sample_command
from smoothie_kernels.diffusion.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "own_caches")
TINY = (
    "--layers=1", "--heads=2", "--condition-layers=1", "--self-condition-layers=0", "--self-conditioning=0",
    "--source-length=10", "--target-length=8", "--steps=4", "--batch-size=4", "--eval-samples=4", "--save-every=2",
    "--warmup-steps=1", "--embeddings=random:8", "--cpu",
)  # fmt: skip
PAIRS = [("the baker made bread", f"who made bread {'?' * (k % 3 + 1)}") for k in range(12)]


@pytest.fixture
def town(tmp_path):
    """A folder of data and one of a tokenizer."""
    write(tmp_path / "town", PAIRS)
    small.tokenizer().save_pretrained(tmp_path / "words")
    return tmp_path


def write(folder, pairs, split="train"):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"src": source, "trg": target}) + "\n" for source, target in pairs]
    (folder / f"{split}.jsonl").write_text("".join(lines))


def train(folder, *flags):
    """Of a town, into its folder `run`."""
    flags = (*TINY, "--tokenizer", folder / "words", "--data", folder / "town", *flags)
    return cli.main(["train", str(folder / "run"), *map(str, flags)])


def steps(folder):
    return [int(path.name.rpartition("-")[2]) for path in checkpoint.found(folder)]


def one_line(capsys, command="train"):
    said = [line for line in capsys.readouterr().err.splitlines() if line and "examples" not in line]
    assert len(said) == 1, said
    return said[0].removeprefix(f"smoothie-kernels {command}: ")


@contextmanager
def in_use(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


@contextmanager
def full_disk(size):
    """No file can become larger: as a full disk fails, but for the errno."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def at_step(monkeypatch, number, act):
    """Does something before step `number`."""
    inner = Trainer._step

    def step(self, batch):
        if self.done + 1 == number:
            act(self)
        return inner(self, batch)

    monkeypatch.setattr(Trainer, "_step", step)


@torch.no_grad()
def spoil(trainer):
    trainer.model.output.bias[0] = float("nan")


@pytest.mark.parametrize("number", [6, 8])
def test_a_diverging_run_keeps_its_last_good_checkpoint(number, tmp_path, monkeypatch):
    at_step(monkeypatch, number, spoil)
    with pytest.raises(
        FloatingPointError, match=rf"got NaN or infinity at step {number}: .* the last checkpoint is .*nt-4;"
    ):
        training.trainer(tmp_path).run()
    assert steps(tmp_path) == [4]


def test_weights_that_the_last_step_spoilt_are_not_saved(tmp_path, monkeypatch):
    inner = torch.optim.AdamW.step

    def step(self, *arguments):
        inner(self, *arguments)
        if trainer.done == 7:
            spoil(trainer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    trainer = training.trainer(tmp_path)
    with pytest.raises(FloatingPointError, match="step 8: training stops, the last checkpoint is"):
        trainer.run()
    assert steps(tmp_path) == [4]


def test_a_diverging_command_fails(town, capsys):
    assert train(town, "--learning-rate=1e30") == 1
    assert "loss, gradient and weights must be finite" in one_line(capsys)
    assert 4 not in steps(town / "run")


def test_a_model_that_diverged_is_not_sampled(tmp_path):
    model = training.model(eos_token_id=3, pad_token_id=0)
    with torch.no_grad():
        model.output.bias[0] = float("nan")
    model.save_pretrained(tmp_path)
    small.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its output.bias has values that are not finite"):
        SmoothiePipeline.from_pretrained(tmp_path)


def test_sigterm_saves_and_the_run_goes_on(tmp_path, monkeypatch):
    at_step(monkeypatch, 6, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        training.trainer(tmp_path / "a").run(resume="auto")
    monkeypatch.undo()
    assert end.value.code == 143
    assert steps(tmp_path / "a") == [4, 6]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    last = training.trainer(tmp_path / "a").run(resume="auto")
    whole = training.trainer(tmp_path / "b").run(resume="auto")
    resumed, unbroken = training.weights(last), training.weights(whole)
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_one_command_begins_and_goes_on(town, capsys):
    assert train(town, "--resume", "auto") == 0
    assert train(town, "--resume=auto", "--steps=6") == 0
    assert steps(town / "run") == [4, 6]
    assert train(town) == 2
    assert "output must hold no checkpoint, or resume must be given" in one_line(capsys)
    for flags, done in ((["--resume", "--steps=7"], 7), (["--resume=true", "--steps=8"], 8)):
        assert train(town, *flags) == 0
        assert steps(town / "run")[-1] == done
    assert train(town, "--resume=auto", "--steps=5") == 2
    assert "steps must be at least 8, which" in capsys.readouterr().err.splitlines()[-1]


def test_resume_leaves_the_next_argument(monkeypatch):
    from smoothie_kernels.diffusion import train as command

    seen = []
    monkeypatch.setattr(command, "train", lambda output, *_, resume: seen.append((str(output), resume)) or output)
    for flags in (["--resume", "x"], ["x", "--resume"], ["--resume", "auto", "x"], ["x", "--resume=no"]):
        assert cli.main(["train", *flags, "--data=y"]) == 0
    assert seen == [("x", True), ("x", True), ("x", "auto"), ("x", False)]


def test_a_folder_in_use(town, capsys, monkeypatch):
    (town / "run").mkdir()
    monkeypatch.setattr("smoothie_kernels.diffusion.train._texts", None)  # said before data are read
    with in_use(town / "run"):
        assert train(town, "--resume=auto") == 2
    assert "output must be written by one process at a time" in one_line(capsys)


@pytest.mark.parametrize("cut", ["empty", "half", "gone", "another kind"])
@pytest.mark.parametrize("name", [checkpoint.STATE, checkpoint.OPTIONS])
def test_a_damaged_checkpoint(name, cut, tmp_path):
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, step, lambda _: None, {"step": step}, {"a": 1}, keep=3)
    file = tmp_path / "checkpoint-6" / name
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "gone": b"", "another kind": b"[1]"}[cut])
    if cut == "gone":
        file.unlink()
    (tmp_path / "checkpoint-4" / checkpoint.STATE).write_bytes(b"")
    read = {checkpoint.OPTIONS: lambda folder: checkpoint.check_options(folder, {}, set())}
    with pytest.raises(ValueError, match=rf"have a {name} that can be read.*/{name}: .+; remove .*-6 to .*nt-2, wh"):
        read.get(name, checkpoint.load_state)(tmp_path / "checkpoint-6")


def test_no_older_checkpoint(tmp_path):
    folder = checkpoint.save(tmp_path, 2, lambda _: None, {"step": 2}, {}, keep=1)
    (folder / checkpoint.STATE).write_bytes(b"")
    with pytest.raises(ValueError, match="there is no older one that can be read"):
        checkpoint.load_state(folder)


@pytest.mark.parametrize("change", ["a word", "a row less", "another place", "other ids"])
def test_other_data_or_tokens_do_not_go_on(change, town, capsys):
    assert train(town) == 0
    words = small.WORDS
    if change == "a word":
        write(town / "town", [("the baker made milk", "who made bread ?"), *PAIRS[1:]])
    if change == "a row less":
        write(town / "town", PAIRS[:-1])
    if change == "other ids":
        small.tokenizer(words=(words[1], words[0], *words[2:])).save_pretrained(town / "words")
    if change == "another place":
        (town / "town").rename(town / "village")
    flags = ("--data", town / "village") if change == "another place" else ()
    assert train(town, "--resume", "--steps=5", *flags) == (0 if flags else 2)
    if not flags:
        name, now = {
            "a word": ("data", r"12 rows"), "a row less": ("data", "11 rows"), "other ids": ("tokenizer", "49 tokens"),
        }[change]  # fmt: skip
        said = capsys.readouterr().err
        assert f"{name}_fingerprint = " in said
        assert f'got "{now}, ' in said
        assert steps(town / "run") == [2, 4]


def test_sources_that_changed_do_not_go_on(town, capsys):
    model = training.model(eos_token_id=3, pad_token_id=0)
    model.save_pretrained(town / "model")
    small.tokenizer().save_pretrained(town / "model")
    flags = ["--data", str(town / "town"), "--truncate", "--steps=2", "--batch-size=4", "--cpu"]
    sampled = ["sample", str(town / "model"), str(town / "o.jsonl"), *flags]
    write(town / "town", PAIRS, "validation")
    assert cli.main(sampled) == 0
    before = (town / "o.jsonl").read_bytes()
    write(town / "town", [*PAIRS[:-1], ("the king is old", PAIRS[-1][1])], "validation")
    assert cli.main(sampled) == 2
    assert "source of text 11 must be that of" in one_line(capsys, "sample")
    assert cli.main([*sampled, "--overwrite", "--template", "who [MASK]" * 9]) == 2  # known when the model is there
    assert (town / "o.jsonl").read_bytes() == before
    write(town / "town", PAIRS, "validation")
    assert cli.main(sampled) == 0  # not refused


def test_a_full_disk(town, capsys):
    assert train(town, "--steps=2") == 0
    capsys.readouterr()
    with full_disk(9000):
        assert train(town, "--resume", "--steps=3") == 1
    assert "checkpoint-3 cannot be written" in one_line(capsys)
    assert sorted(path.name for path in (town / "run").iterdir()) == ["checkpoint-2", "metrics.csv"]


def test_a_full_disk_below_the_sampler(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample_command.SmoothiePipeline, "stream", lambda *_, **__: None)
    model = training.model(eos_token_id=3, pad_token_id=0, condition_layers=0)
    model.save_pretrained(tmp_path / "model")
    small.tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.undo()
    with full_disk(300):
        assert cli.main(["sample", str(tmp_path / "model"), str(tmp_path / "o"), "--count=50", "--steps=1"]) == 1
    assert f"File too large: '{tmp_path}/o.partial/" in one_line(capsys, "sample")


@pytest.mark.parametrize("output", ["file", "file/x", "/proc/self/x"])
@pytest.mark.parametrize("command", ["train", "sample"])
def test_an_output_that_cannot_be(command, output, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine\n")
    small.tokenizer().save_pretrained(tmp_path)
    training.model(eos_token_id=3, pad_token_id=0).save_pretrained(tmp_path)
    flags = (
        ["sample", str(tmp_path), output, "--source=a cat"] if command == "sample" else ["train", output, "--data=."]
    )
    assert cli.main(flags) in (1, 2)
    assert re.search(output.replace("self", r"\w+"), one_line(capsys, command))
    assert (tmp_path / "file").read_text() == "mine\n"


def test_ctrl_c_is_one_line(town, capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    at_step(monkeypatch, 3, interrupt)
    assert train(town) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "smoothie-kernels train: interrupted"
    assert steps(town / "run") == [2]


def test_processes_that_cannot_reach_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"processes must be started by torchrun or .*, got 2 of which each would run"):
        training.trainer(tmp_path)


def test_two_ranks_sample_the_file_of_one(town, capfd):
    training.model(eos_token_id=3, pad_token_id=0).save_pretrained(town / "model")
    small.tokenizer().save_pretrained(town / "model")
    write(town / "town", PAIRS[:9], "validation")

    def sample(name, *flags):
        sampled = ["sample", str(town / "model"), str(town / name), "--data", str(town / "town"), "--batch-size=2"]
        return cli.main([*sampled, "--steps=2", "--truncate", *flags])

    assert forks.ranks(lambda: sample("two", "--limit=5"), 2) == [0, 0]
    assert len((town / "two").read_text().splitlines()) == 5
    assert forks.ranks(lambda: sample("two"), 2) == [0, 0]  # goes on, with a round in which one of them has nothing
    assert sample("one") == 0
    assert (town / "two").read_bytes() == (town / "one").read_bytes()
    capfd.readouterr()
    assert forks.ranks(lambda: sample("two", "--seed=1"), 2) == [2, 2]  # what one refuses, no other waits for
    said = capfd.readouterr().err
    assert said.count("options must be those of") == 2
    assert ranks.gathered(1) == [1]


def test_two_ranks_train_one_run_and_stop_together(tmp_path):
    """Without --cpu, where there is no GPU. SIGTERM reaches one of them only."""

    def train(name, number=0):
        def terminate(self):
            if self.rank:
                os.kill(os.getpid(), signal.SIGTERM)

        if number:
            at_step(pytest.MonkeyPatch(), number, terminate)
        run = {"cpu": torch.cuda.is_available(), "log_every": 1}
        training.trainer(tmp_path / name, run=run, dropout=0.0).run(resume="auto")

    assert forks.ranks(lambda: train("two", 6), 2) == [143, 143]
    assert steps(tmp_path / "two") == [4, 6]
    assert forks.ranks(lambda: train("two"), 2) == [0, 0]
    train("one")
    one, two = (
        [[float(value) for value in line.split(",")[2:4]] for line in text.splitlines()[1:]]
        for text in ((tmp_path / name / "metrics.csv").read_text() for name in ("one", "two"))
    )
    assert len(one) == len(two) == 12
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-4, atol=1e-6)

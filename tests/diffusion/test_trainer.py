"""The training loop: parity, learning, killed and resumed, several processes, checkpoints, files, messages."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="comes with the extra `train`")
pytest.importorskip("tqdm", reason="comes with the extra `train`")

import training

from smoothie_kernels.diffusion import checkpoint
from smoothie_kernels.diffusion.ema import MovingAverage
from smoothie_kernels.diffusion.loss import Losses
from smoothie_kernels.diffusion.metrics import Table
from smoothie_kernels.diffusion.model import SmoothieModel
from smoothie_kernels.diffusion.options import RunOptions
from smoothie_kernels.diffusion.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


def start(*arguments, launcher=()):
    """The program, to its end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "tests/training.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize("changes", [{}, {"trainable_embeddings": True}, {"token_head": True}])
def test_fifty_steps_eager_and_fused(changes, tmp_path):
    losses = {}
    for step in ("fused", "eager"):
        run = {"steps": 50, "log_every": 1, "save_every": 50, "eval_every": 25, "learning_rate": 2e-3}
        trainer = training.trainer(tmp_path / step, loss={"step": step, "x_0_variance": 0.01}, run=run, **changes)
        trainer.run()
        losses[step] = [
            [float(row[name]) for name in ("loss", *Losses._fields[1:])]
            for row in read(tmp_path / step / "metrics.csv")
        ]
    fused, eager = (torch.tensor(losses[step]) for step in ("fused", "eager"))
    assert len(fused) == 50
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-6)
    assert (fused[:, 2] > 0).all() == changes.get("trainable_embeddings", False)


@pytest.mark.slow
def test_it_learns(tmp_path):
    """Copying: the target is the source. Far below what predicting the mean embedding gives."""
    rows = [{"source": row["source"], "target": row["source"]} for row in training.rows(60, 1)]
    trainer = training.trainer(tmp_path, run={"steps": 400, "batch_size": 16, "eval_every": 100, "save_every": 400,
                                              "learning_rate": 3e-3}, dropout=0.0)  # fmt: skip
    trainer.texts = trainer.texts._replace(train=rows[:50], validation=rows[50:])
    trainer.run()
    table = [{name: float(value) for name, value in row.items()} for row in read(tmp_path / "validation.csv")]
    losses, mean = [row["loss"] for row in table], table[-1]["mean_loss"]
    assert losses[-1] < losses[0]
    assert losses[-1] < 0.5 * mean


@pytest.mark.slow
def test_killed_and_resumed_is_unbroken(tmp_path):
    """Bit by bit: weights, moving average and optimizer; dropout, self-conditioning and a training table included."""
    options = json.dumps({"trainable_embeddings": True, "loss": {"guidance_dropout": 0.3, "x_0_variance": 0.1}})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, "--options", options).returncode == 0
    assert start(broken, "--options", options, "--die-at", "step:6").returncode == -9
    assert checkpoint.newest(broken).name == "checkpoint-4"
    assert start(broken, "--options", options, "--resume", "--die-at", "write:8").returncode == -9
    assert (broken / ".partial-8").is_dir()  # half a checkpoint, which nobody takes for one
    assert [path.name for path in checkpoint.found(broken)] == ["checkpoint-4"]
    done = start(broken, "--options", options, "--resume")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in checkpoint.found(broken)] == ["checkpoint-8", "checkpoint-12"]
    assert not list(broken.glob(".partial-*"))
    same(training.weights(broken / "checkpoint-12"), training.weights(whole / "checkpoint-12"))
    # The files of a broken run tell the same story.
    for name in ("metrics.csv", "validation.csv"):
        rows = [
            [{k: v for k, v in row.items() if "second" not in k} for row in read(run / name)] for run in (whole, broken)
        ]
        steps = [row["step"] for row in rows[1]]
        assert steps == sorted(set(steps), key=int)
        if name == "validation.csv":
            assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {
            "trainable_embeddings": True,
            "noise_options": {"sigma_max": 3.0},  # at the paper's 200 the input at t = 1 hardly has a spread
            "loss": {"self_conditioning": 1.0, "x_0_variance": 0.1, "guidance_dropout": 0.3},
        },
        {"loss": {"skip_padding": True}, "run": {"micro_batch_size": 1}},
        {"token_head": True},
    ],
    ids=["table", "ragged micro-batches", "tokens"],
)
def test_two_processes_have_the_gradients_of_one(options, tmp_path):
    options = {**options, "dropout": 0.0, "run": {"steps": 1, "eval_every": 1, **options.get("run", {})}}
    found = []
    for processes in (1, 2):
        folder, file = tmp_path / str(processes), tmp_path / f"{processes}.pt"
        if processes == 1:
            training.main([str(folder), "--options", json.dumps(options), "--gradients", str(file)])
        else:
            launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
            done = start(folder, "--options", json.dumps(options), "--gradients", file, launcher=launcher)
            assert done.returncode == 0, done.stderr
        found.append(torch.load(file)["gradients"])
        rows = read(folder / "metrics.csv")[-1], read(folder / "validation.csv")[-1]
        found[-1] |= {f"{name} of the report": torch.tensor(float(rows[0][name])) for name in ("loss", "gradient_norm")}
        found[-1] |= {f"{name} of validation": torch.tensor(float(value)) for name, value in rows[1].items()}
    one, two = found
    assert one.keys() == two.keys()
    assert ("embeddings.weight" in one) == options.get("trainable_embeddings", False)
    for name in one:
        assert float((one[name] - two[name]).norm()) <= 2e-5 * float(one[name].norm()) + 1e-9, name


def test_micro_batches_are_the_batch(tmp_path):
    found = []
    for size in (None, 1, 3):
        trainer = training.trainer(tmp_path / str(size), run={"micro_batch_size": size, "steps": 3}, dropout=0.0)
        trainer.run()
        found.append(read(tmp_path / str(size) / "metrics.csv"))
    for row in found[1:]:
        for name in ("loss", "gradient_norm"):
            assert float(row[0][name]) == pytest.approx(float(found[0][0][name]), rel=1e-4)


def test_checkpoint_is_a_model(tmp_path):
    trainer = training.trainer(tmp_path)
    last = trainer.run()
    assert last == tmp_path / "checkpoint-12"
    loaded = SmoothieModel.from_pretrained(last)
    average = checkpoint.load_state(last)["average"]
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    parameters = dict(loaded.named_parameters())
    for number, name in enumerate(names):
        assert torch.equal(parameters[name], average[f"module.{number}"]), name
    assert torch.equal(loaded.embeddings.weight, trainer.model.embeddings.weight)
    live = dict(trainer.model.named_parameters())
    assert not torch.equal(parameters["output.weight"], live["output.weight"])  # the average, not the last weights


def test_without_a_moving_average(tmp_path):
    trainer = training.trainer(tmp_path, run={"ema": 0.0})
    loaded = SmoothieModel.from_pretrained(trainer.run())
    assert torch.equal(loaded.output.weight, trainer.model.output.weight)


def test_moving_average_is_warmed_up():
    model = training.model(trainable_embeddings=True)
    average, decay = MovingAverage(model, 0.3), 0.3
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert "embeddings.weight" in names
    wanted = None
    for n in range(6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update()
        now = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        d = min(decay, (1 + n) / (10 + n))
        wanted = now if wanted is None else [d * old + (1 - d) * new for old, new in zip(wanted, now, strict=True)]
    with average.applied():
        inside = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for got, exact, live, after in zip(inside, wanted, now, model.parameters(), strict=False):
        torch.testing.assert_close(got, exact)
        assert torch.equal(live, after)


def test_validation_is_about_the_mean(tmp_path):
    trainer = training.trainer(tmp_path, run={"eval_samples": 10})
    metrics = trainer.validate()
    batch = trainer.texts.collate(training.rows(10, 2))
    target, text = trainer.model.embeddings(batch["target"]), batch["target_mask"]
    for name, rows in (("mean_loss", target.flatten(0, 1)), ("mean_text_loss", target[text])):
        assert metrics[name] == pytest.approx(float((rows - rows.mean(0)).square().mean()), rel=1e-5)
    assert 0 <= metrics["accuracy"] <= 1
    assert metrics == trainer.validate()
    eager = training.trainer(tmp_path, run={"eval_samples": 10}, loss={"step": "eager"}).validate()
    assert metrics == pytest.approx(eager, rel=1e-5)
    skipping = training.trainer(tmp_path, run={"eval_samples": 10}, loss={"skip_padding": True}).validate()
    assert skipping["loss"] == skipping["text_loss"]
    assert skipping["mean_loss"] == pytest.approx(metrics["mean_text_loss"])


def test_averaged_weights_are_validated(tmp_path):
    trainer = training.trainer(tmp_path)
    averaged = SmoothieModel.from_pretrained(trainer.run())
    bare = training.trainer(tmp_path / "bare", run={"ema": 0.0})
    bare.model.load_state_dict(averaged.state_dict())
    assert trainer.validate() == bare.validate()
    bare.model.load_state_dict(trainer.model.state_dict())
    assert trainer.validate() != bare.validate()


def test_times_of_validation(tmp_path, monkeypatch):
    seen = []
    inner = SmoothieModel.forward
    monkeypatch.setattr(SmoothieModel, "forward", lambda self, x, t, *rest: seen.append(t) or inner(self, x, t, *rest))
    training.trainer(tmp_path, run={"eval_samples": 10}).validate()
    torch.testing.assert_close(torch.cat(seen), (torch.arange(10) + 0.5) / 10)


def test_rates_and_files(tmp_path):
    training.trainer(tmp_path, run={"steps": 7, "log_every": 2}).run()
    rows = read(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 7]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([2e-2 / 3, 1e-2, 1e-2, 1e-2], rel=1e-5)
    assert [int(row["samples"]) for row in rows] == [8, 16, 24, 28]
    assert all(float(row["tokens_per_second"]) > 0 for row in rows)
    assert [int(row["step"]) for row in read(tmp_path / "validation.csv")] == [5, 7]


def test_trackers_get_what_the_files_get_where_asked(tmp_path, monkeypatch):
    logged, begun = [], []
    monkeypatch.setattr("smoothie_kernels.diffusion.surroundings.get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr("accelerate.Accelerator.log", lambda _, values, step: logged.append((step, values)))
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda _, name, config: begun.append((name, config)))
    training.trainer(tmp_path / "silent", run={"steps": 6}).run()
    assert not logged
    assert not begun
    training.trainer(tmp_path / "loud", run={"steps": 6, "report_to": "tensorboard"}).run()
    assert begun[0][0] == "smoothie"
    assert begun[0][1]["batch_size"] == 4
    rows, validations = (read(tmp_path / "loud" / name) for name in ("metrics.csv", "validation.csv"))
    told = {step: values for step, values in logged if "loss" in values}
    assert [*told] == [int(row["step"]) for row in rows] == [3, 6]
    assert told[3]["loss"] == pytest.approx(float(rows[0]["loss"]), rel=1e-5)
    assert [step for step, values in logged if "validation_loss" in values] == [int(row["step"]) for row in validations]


def test_table_is_not_decayed_nor_vectors(tmp_path):
    trainer = training.trainer(tmp_path, trainable_embeddings=True)
    decayed, others = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    assert any(p is trainer.model.embeddings.weight for p in others["params"])
    assert all(p.dim() == 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(trainer.model.parameters()))


def test_more_steps_of_the_same_run(tmp_path):
    training.trainer(tmp_path / "a", run={"steps": 8}).run()
    training.trainer(tmp_path / "a", run={"steps": 12}).run(resume=True)
    training.trainer(tmp_path / "b", run={"steps": 12}).run()
    same(*(training.weights(tmp_path / name / "checkpoint-12") for name in "ab"))


def test_a_run_that_is_done_stays_so(tmp_path):
    last = training.trainer(tmp_path).run()
    before = training.weights(last)
    assert training.trainer(tmp_path).run(resume=True) == last
    same(before, training.weights(last))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"batch_size": 8}}, "it has batch_size = 4, got 8"),
        ({"loss": {"seed": 3}}, "it has seed = 0, got 3"),
        ({"num_hidden_layers": 3}, "it has model.num_hidden_layers = 2, got 3$"),
        ({"loss": {"self_conditioning": 0.25}, "run": {"ema": 0.5}}, "it has ema = .*; self_conditioning = 0.5, "),
    ],
)  # fmt: skip
def test_checkpoint_of_another_run(changes, message, tmp_path):
    training.trainer(tmp_path, run={"steps": 4}).run()
    with pytest.raises(ValueError, match=f"options must be those of .*checkpoint-4 to resume it: {message}"):
        training.trainer(tmp_path, **changes).run(resume=True)


def test_checkpoint_with_another_table(tmp_path):
    training.trainer(tmp_path, run={"steps": 4}).run()
    trainer = training.trainer(tmp_path)
    other = Trainer(
        training.model().train(), trainer.texts, tmp_path, loss=trainer.loss_options, run=trainer.options
    )  # fmt: skip
    other.run(resume=True)
    with torch.no_grad():
        trainer.model.embeddings.weight[3, 4] += 1e-3
    changed = Trainer(trainer.model, trainer.texts, tmp_path, loss=trainer.loss_options, run=trainer.options)
    with pytest.raises(ValueError, match="it has embeddings_sha256 = "):
        changed.run(resume=True)


def test_messages(tmp_path):
    with pytest.raises(ValueError, match=r"output must hold a checkpoint to resume from, got .*nothing without any"):
        training.trainer(tmp_path / "nothing").run(resume=True)
    training.trainer(tmp_path, run={"steps": 4}).run()
    with pytest.raises(
        ValueError, match=r"output must hold no checkpoint, or resume must be given, got .*checkpoint-4"
    ):
        training.trainer(tmp_path).run()
    trainer = training.trainer(tmp_path)
    with pytest.raises(ValueError, match=r"texts.train must hold a sample or more, got none"):
        Trainer(trainer.model, trainer.texts._replace(train=[]), tmp_path, run=trainer.options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({name: 0}, f"{name} must be at least 1, got 0") for name in (
            "steps", "batch_size", "eval_every", "eval_samples", "save_every", "keep_checkpoints", "log_every",
            "micro_batch_size")],
        *[({name: -1}, f"{name} must be at least 0, got -1") for name in (
            "warmup_steps", "learning_rate", "weight_decay", "workers")],
        ({"ema": 1.5}, "ema must be at least 0 and at most 1, got 1.5"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
    ],
)  # fmt: skip
def test_option_messages(options, message):
    with pytest.raises(ValueError, match=message):
        RunOptions(**options)


def test_only_the_newest_checkpoints_stay(tmp_path):
    for step in (3, 20, 100):
        checkpoint.save(
            tmp_path, step, lambda folder: (folder / "model").write_text("x"), {"step": step}, {"a": 1}, keep=2
        )
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    assert [path.name for path in checkpoint.found(tmp_path)] == ["checkpoint-20", "checkpoint-100"]
    assert checkpoint.load_state(checkpoint.newest(tmp_path)) == {"step": 100}


def test_rows_of_steps_that_come_again_are_dropped(tmp_path):
    table = Table(tmp_path / "t.csv", 0)
    for step in (2, 4, 6):
        table.add({"step": step, "loss": step / 7})
    with (tmp_path / "t.csv").open("a") as file:
        file.write("8,0.1")  # cut off by a kill
    Table(tmp_path / "t.csv", 4).add({"step": 6, "loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read(tmp_path / "t.csv")] == [
        ("2", "0.285714"),
        ("4", "0.571429"),
        ("6", "0.5"),
    ]


def test_loading_workers_change_nothing(tmp_path):
    for workers in (0, 2):
        training.trainer(tmp_path / str(workers), run={"steps": 5, "workers": workers}).run()
    same(*(training.weights(tmp_path / name / "checkpoint-5") for name in "02"))


@pytest.mark.compilers
def test_compiled_is_the_same(tmp_path):
    losses = []
    for compiled in (False, True):
        training.trainer(
            tmp_path / str(compiled), run={"steps": 2, "log_every": 1, "compile": compiled}, dropout=0.0
        ).run()
        losses.append([float(row["loss"]) for row in read(tmp_path / str(compiled) / "metrics.csv")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

"""A tiny training run, for tests and as a program that tests kill and launch several times at once.

python tests/training.py FOLDER [--options JSON] [--resume] [--die-at step:N | write:N] [--gradients FILE]
"""

import argparse
import json
import os
import signal
from pathlib import Path

import torch

from smoothie_kernels.diffusion import checkpoint
from smoothie_kernels.diffusion.batches import Collate
from smoothie_kernels.diffusion.model import SmoothieConfig, SmoothieModel
from smoothie_kernels.diffusion.options import LossOptions, RunOptions
from smoothie_kernels.diffusion.trainer import Texts, Trainer

V, D, L, S = 80, 12, 8, 6
MODEL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "condition_layers": 1,
    "self_condition_layers": 1, "target_length": L, "source_length": S, "dropout": 0.1,
    "initializer_range": 0.1,  # the default is for wide ones
}  # fmt: skip
RUN = {
    "steps": 12, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 3, "ema": 0.9, "eval_every": 5,
    "eval_samples": 6, "save_every": 4, "log_every": 3, "cpu": True,
}  # fmt: skip


def rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Sources of any length, targets that begin with their source's last token."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(1, V, (length,), generator=generator).tolist()

    sources = [tokens(1, S) for _ in range(count)]
    return [{"source": source, "target": source[-1:] + tokens(1, L - 1)} for source in sources]


def model(**changes) -> SmoothieModel:
    torch.manual_seed(0)
    return SmoothieModel(SmoothieConfig(V, D, **MODEL | changes), torch.randn(V, D))


def trainer(output, *, loss=None, run=None, **changes) -> Trainer:
    """A trainer of a tiny model on 30 samples; loss and run replace options."""
    texts = Texts(rows(30, 1), rows(10, 2), Collate(0, L, S))
    return Trainer(
        model(**changes), texts, output, loss=LossOptions(**loss or {}), run=RunOptions(**RUN | (run or {}))
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint that has to be the same after a resumed run, flat."""
    state = checkpoint.load_state(folder)
    flat = {f"weights.{name}": tensor for name, tensor in state["weights"].items()}
    flat |= {f"average.{name}": tensor for name, tensor in state["average"].items()}
    for number, moments in state["optimizer"]["state"].items():
        flat |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
    return flat


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--die-at")
    parser.add_argument("--gradients", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    training = trainer(given.folder, **given.options)
    what, _, when = (given.die_at or "").partition(":")
    if what == "step":
        inner = training._step

        def step(batch):
            if training.done == int(when):
                _die()
            return inner(batch)

        training._step = step
    if what == "write":
        save = torch.save

        def write(state, path):
            save(state, path)
            if state["step"] == int(when):
                with open(path, "r+b") as file:  # as a file looks that was being written
                    file.truncate(1000)
                _die()

        torch.save = write
    if given.gradients:
        clip = training.accelerator.clip_grad_norm_

        def look(parameters, norm):
            if training.accelerator.is_main_process:
                found = {name: p.grad.clone() for name, p in training.model.named_parameters() if p.requires_grad}
                torch.save({"gradients": found, "step": training.done}, given.gradients)
            return clip(parameters, norm)

        training.accelerator.clip_grad_norm_ = look
    training.run(resume=given.resume)
    training.accelerator.end_training()


if __name__ == "__main__":
    main()

"""The training loop, on accelerate: the same run on one process or many, unbroken or resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import get_constant_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from smoothie_kernels import noise
from smoothie_kernels.diffusion import checkpoint, fingerprints, ranks
from smoothie_kernels.diffusion.batches import Stream
from smoothie_kernels.diffusion.ema import MovingAverage
from smoothie_kernels.diffusion.evaluation import evaluate
from smoothie_kernels.diffusion.files import locked
from smoothie_kernels.diffusion.loss import Losses, Place, TrainingLoss
from smoothie_kernels.diffusion.metrics import Clock, Screen, Table
from smoothie_kernels.diffusion.model import SmoothieModel
from smoothie_kernels.diffusion.options import FREE, LossOptions, RunOptions, as_record
from smoothie_kernels.diffusion.surroundings import check_surroundings

Batch = dict[str, Tensor]
BETAS, EPS = (0.9, 0.98), 1e-6


class Texts(NamedTuple):
    """Tokenised data with what makes batches of it."""

    train: Dataset[Any]
    validation: Dataset[Any] | None
    collate: Callable[[list[Any]], Batch]


class Trainer:
    """Trains a model and keeps checkpoints in a folder.

    Every step's samples, times, noise and dropout are functions of (seed, step); the optimizer, the moving average and
    the weights are in the checkpoint. So a run that was killed and resumed has the weights of one that was not, bit by
    bit on a CPU, and several processes have the gradients of one on the whole batch.

    Args:
        model: in float32; moved to the device that accelerate picks.
        texts: `data.tokenize`d, with `data.Collate`.
        output: folder of checkpoints and CSV files.
        loss, run: options.
        record: further options to keep in checkpoints; a resumed run must have the same.
        tokenizer: saved beside the model.

    Raises:
        ValueError: options that do not fit each other, or processes that cannot reach each other.
    """

    def __init__(
        self,
        model: SmoothieModel,
        texts: Texts,
        output: Path | str,
        *,
        loss: LossOptions = LossOptions(),  # noqa: B008  frozen
        run: RunOptions = RunOptions(),  # noqa: B008
        record: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.output, self.texts, self.tokenizer = Path(output), texts, tokenizer
        self.loss_options, self.options = loss, run
        training_loss = TrainingLoss(model, loss)
        state = ranks.join(run.cpu)
        check_surroundings(run, state.num_processes)
        self.accelerator = Accelerator(
            cpu=state.device.type == "cpu", log_with=run.report_to, project_dir=str(output) if run.report_to else None
        )
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if not len(texts.train):  # type: ignore[arg-type]
            raise ValueError("texts.train must hold a sample or more, got none")
        self.share = run.batch_size // self.processes
        self.record = {**as_record(loss, run), **_identity(model), **(record or {})}
        self.model = model.to(self.accelerator.device)
        if run.compile:
            self.model.compile_layers()
        kept = [model.embeddings.weight, getattr(model, "factor", None)]
        matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1 and all(p is not k for k in kept)]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        groups = [{"params": matrices, "weight_decay": run.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=run.learning_rate, betas=BETAS, eps=EPS, fused=True)
        self.rates = get_constant_schedule_with_warmup(self.optimizer, run.warmup_steps)
        self.average = MovingAverage(model, run.ema) if run.ema else None
        self.training_loss = self.accelerator.prepare(training_loss)
        self.done = 0
        # The first step whose loss or gradient was not finite: looked for on the device, read where it waits anyway.
        self.diverged = torch.full((), _NEVER, device=self.accelerator.device)

    def run(self, *, resume: checkpoint.Resume = False) -> Path:
        """Trains up to `steps` and returns the last checkpoint, a folder for `SmoothieModel.from_pretrained`.

        resume goes on from the newest checkpoint in the output folder, which must hold one unless it is "auto"; without
        resume it must hold none. The folder is locked meanwhile. SIGTERM saves a checkpoint after the step and exits.

        Raises:
            ValueError: a checkpoint that is missing, in the way, damaged or another run's; a folder in use.
            FloatingPointError: the loss or the gradient is not finite. The last checkpoint is from before.
            OSError: a file could not be written.
            SystemExit: 143, after SIGTERM.
        """
        with ExitStack() as stack:
            ranks.on_main(lambda: stack.enter_context(locked(self.output)))
            last = ranks.on_main(lambda: checkpoint.start(self.output, resume, self.options.steps))
            if last is not None:
                self._load(last)
            if self.accelerator.is_main_process:
                checkpoint.clean(self.output)
            terminated = stack.enter_context(_sigterm())
            return self._train(last, terminated)

    def _train(self, last: Path | None, terminated: threading.Event) -> Path:
        options = self.options
        reporter = _Reporter(self)
        batches = self._batches()
        self.training_loss.train()
        while self.done < options.steps:
            losses, norm = self._step(next(batches))
            done, at_end = self.done, self.done == options.steps
            validates, saves = (at_end or done % every == 0 for every in (options.eval_every, options.save_every))
            stops = ranks.any_rank(terminated.is_set())
            if validates or saves or stops or at_end or done % options.log_every == 0:
                self._check_finite(last)
            reporter.trained(losses, norm)
            with reporter.clock.paused():
                if validates:
                    reporter.validated(self.validate())
                if saves or stops:
                    last = self._save()
            if stops and not at_end:
                reporter.close()
                reporter.screen.say(f"step {done:,}: stopped by SIGTERM; resume goes on from {last}")
                raise SystemExit(128 + signal.SIGTERM)
        reporter.close()
        return last or checkpoint.newest(self.output)

    def validate(self) -> dict[str, float]:
        """`evaluate`'s metrics of the averaged weights; nothing where there is no validation set."""
        data = self.texts.validation
        if data is None:
            return {}
        samples = min(self.options.eval_samples, len(data))  # type: ignore[arg-type]

        def batches() -> Iterator[tuple[int, Batch]]:
            for k, first in enumerate(range(0, samples, self.share)):
                if k % self.processes == self.rank:
                    rows = range(first, min(first + self.share, samples))
                    yield first, self._moved(self.texts.collate([data[i] for i in rows]))

        with self.average.applied() if self.average else nullcontext():
            sums = evaluate(self.model, batches(), samples, self.loss_options)
        sums.scalars, sums.moments = self.accelerator.reduce((sums.scalars, sums.moments), "sum")
        return sums.metrics()

    def _batches(self) -> Iterator[Batch]:
        """This process's share of every batch from the next step on, endlessly."""
        options = self.options
        order = Stream(
            len(self.texts.train), options.batch_size, self.loss_options.seed,  # type: ignore[arg-type]
            start=self.done, first=self.rank * self.share, count=self.share,
        )  # fmt: skip
        loader = DataLoader(
            self.texts.train, batch_sampler=order, collate_fn=self.texts.collate, num_workers=options.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )  # fmt: skip
        for batch in loader:
            yield self._moved(batch)

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One update of the weights: (losses as a vector, norm of the gradient)."""
        step, size = self.done, self.options.micro_batch_size or self.share
        high, low = noise.noise_key(self.loss_options.seed, step)
        torch.manual_seed((high << 32 | low) ^ self.rank)  # dropout's
        scale = self._scale(batch)
        firsts = range(0, self.share, size)
        losses = torch.zeros(len(Losses._fields), dtype=torch.float32, device=self.accelerator.device)
        for first in firsts:
            part = {name: tensor[first : first + size] for name, tensor in batch.items()}
            place = Place(step, self.rank * self.share + first, self.options.batch_size)
            on_last = first == firsts[-1]
            with nullcontext() if on_last else self.accelerator.no_sync(self.training_loss):
                found = self.training_loss(part, place, scale)
                self.accelerator.backward(found.total)
            losses += torch.stack([value.detach() for value in found])
        norm = self.accelerator.clip_grad_norm_(self.training_loss.parameters(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rates.step()
        if self.average:
            self.average.update()
        self.done += 1
        finite = torch.cat((losses, norm.reshape(1))).isfinite().all()
        self.diverged = torch.where(finite, self.diverged, self.diverged.clamp(max=self.done))
        return losses, norm

    def _check_finite(self, last: Path | None) -> None:
        """Of the steps so far; and of the weights, which a last step may have spoilt."""
        step = int(self.diverged)
        finite = torch.stack([p.detach().isfinite().all() for p in self.model.parameters()]).all()
        if ranks.any_rank(step != _NEVER or not finite):
            kept = "there is no checkpoint" if last is None else f"the last checkpoint is {last}"
            raise FloatingPointError(
                f"loss, gradient and weights must be finite, got NaN or infinity at step {min(step, self.done):,}: "
                f"training stops, {kept}; a lower learning_rate or more warmup_steps may help"
            )

    def _scale(self, batch: Batch) -> Tensor:
        """1 / positions that count in the whole batch, times the processes over which gradients are averaged."""
        counted = batch["target_mask"] if self.loss_options.skip_padding else torch.ones_like(batch["target"])
        total: Tensor = self.accelerator.reduce(counted.sum().float(), "sum")
        scale: Tensor = self.processes / total
        return scale

    def _moved(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}

    def _save(self) -> Path:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return self.output / f"checkpoint-{self.done}"
        state = {
            "step": self.done,
            "weights": {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
            "average": self.average.state_dict() if self.average else None,
        }
        with self.average.applied() if self.average else nullcontext():
            return checkpoint.save(
                self.output, self.done, self._write_model, state, self.record, self.options.keep_checkpoints
            )

    def _write_model(self, folder: Path) -> None:
        transformers_logging.disable_progress_bar()
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def _load(self, folder: Path) -> None:
        checkpoint.check_options(folder, self.record, FREE)
        state = checkpoint.load_state(folder)
        self.model.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.done = state["step"]


_NEVER = 2**62  # no step


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """Set by the first SIGTERM; the second ends the process, as do all where the program handles them already."""
    event = threading.Event()

    def handle(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    handles = threading.current_thread() is threading.main_thread()
    if handles and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, handle)
    try:
        yield event
    finally:
        if handles and signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _identity(model: SmoothieModel) -> dict[str, Any]:
    """What must be the same in a checkpoint: the config, and the table where it does not train."""
    config = {name: value for name, value in model.config.to_dict().items() if name != "transformers_version"}
    table = model.embeddings.weight
    frozen = None if table.requires_grad else fingerprints.of_tensor(table)
    return {"model": config, "embeddings_sha256": frozen}


class _Reporter:
    """Turns what steps give into rows, lines and trackers' values; looks at the device only when it reports."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, options = trainer, trainer.options
        main = trainer.accelerator.is_main_process
        self.screen = Screen(options.steps, trainer.done, silent=not main)
        self.tables = (
            [Table(trainer.output / name, trainer.done) for name in ("metrics.csv", "validation.csv")] if main else []
        )
        self.sums: Tensor | None = None
        self.since, self.clock = trainer.done, Clock()
        if options.report_to:
            flat = {k: v for k, v in trainer.record.items() if isinstance(v, int | float | str | bool)}
            trainer.accelerator.init_trackers("smoothie", flat)

    def trained(self, losses: Tensor, norm: Tensor) -> None:
        trainer, step = self.trainer, self.trainer.done
        values = torch.cat((losses, norm.reshape(1)))
        self.sums = values if self.sums is None else self.sums + values
        self.screen.advance()
        if step % trainer.options.log_every and step < trainer.options.steps:
            return
        means = trainer.accelerator.reduce(self.sums, "mean") / (step - self.since)
        *parts, norm_mean = means.tolist()
        options, steps = trainer.options, step - self.since
        tokens = steps * options.batch_size * trainer.model.config.target_length
        seconds = self.clock.lap()
        row = {
            "step": step,
            "samples": step * options.batch_size,
            **dict(zip(("loss", *Losses._fields[1:]), parts, strict=True)),
            "gradient_norm": norm_mean,
            "learning_rate": trainer.rates.get_last_lr()[0],
            "steps_per_second": steps / seconds,
            "tokens_per_second": tokens / seconds,
        }
        self.sums, self.since = None, step
        self._write(0, row)
        shown = ("loss", "gradient_norm", "tokens_per_second")
        self.screen.report(step, {name: row[name] for name in shown})

    def validated(self, metrics: dict[str, float]) -> None:
        if metrics:
            self._write(1, {"step": self.trainer.done, **metrics})
            text = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
            self.screen.say(f"step {self.trainer.done:,}, validation: {text}")

    def close(self) -> None:
        self.screen.close()
        for tracker in self.trainer.accelerator.trackers:
            tracker.finish()

    def _write(self, table: int, row: dict[str, Any]) -> None:
        if self.tables:
            self.tables[table].add(row)
        if self.trainer.options.report_to:
            prefix = ("", "validation_")[table]
            values = {prefix + name: value for name, value in row.items() if name != "step"}
            self.trainer.accelerator.log(values, step=row["step"])

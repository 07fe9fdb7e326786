"""Whole training steps, fused and eager: the same losses, then time, memory, and what they are spent on.

Nothing here imports transformers before something is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import smoothie_kernels as sk
from benchmarks.common import memory, timing
from benchmarks.common.embeddings import Material
from benchmarks.models import whole
from benchmarks.models.model_report import OURS, Products, with_times
from benchmarks.models.training_cases import CONTESTANTS, TrainingCase
from benchmarks.models.training_report import REFERENCE, Curves, Result, Row
from benchmarks.models.whole import SEED, Progress, Race, counted, flush_denormals, make_model, run_case, stretches
from benchmarks.step.check import CheckFailed, frobenius
from benchmarks.step.suite import WRONG, one_line
from smoothie_kernels.diffusion.noising import smooth

if TYPE_CHECKING:
    from smoothie_kernels.diffusion.loss import Losses

OPTIMIZER = {"lr": 2e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01, "fused": True}  # the trainer's
CLIP = 1.0
PAD = 0  # BERT's
BATCHES = 4  # different ones, in turn
COMPILED_WARM_UP = 2  # steps before any is timed; one of the others
LOSS_MARGIN = 1e-4  # relative
GRADIENT_MARGIN = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative, Frobenius, of every parameter's

Batch = dict[str, Tensor]


class Session:
    """One contestant's model, loss and optimizer. The same case gives the same weights and batches to everybody."""

    def __init__(
        self, case: TrainingCase, name: str, material: Material, device: str = "cpu", batches: int = BATCHES
    ) -> None:
        from smoothie_kernels.diffusion.loss import TrainingLoss

        contestant = CONTESTANTS[name]
        model = make_model(case, material.table, device, trainable_embeddings=case.trainable_embeddings)
        if contestant.compiles:
            model.compile_layers()
        self.loss = TrainingLoss(model, case.options(contestant)).train()
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), **OPTIMIZER)  # type: ignore[arg-type]
        self.batches = [_to(device, batch) for batch in make_batches(case, material.tokens, batches)]
        self.steps = 0

    def step(self, samples: int | None = None) -> Tensor:
        """One update of the weights, by some samples of a batch or all of them; the loss."""
        found = self._forward(self.batches[self.steps % len(self.batches)], samples)
        torch.autograd.backward(found.total)
        clip_grad_norm_(self.parameters.values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return found.total.detach()

    def gradients(self, samples: int | None = None) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of the first batch, without an update."""
        found = self._forward(self.batches[0], samples)
        torch.autograd.backward(found.total)
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        self.optimizer.zero_grad()
        return float(found.total.detach()), gradients

    def _forward(self, batch: Batch, samples: int | None) -> Losses:
        from smoothie_kernels.diffusion.loss import Place

        part = {name: tensor[:samples] for name, tensor in batch.items()}
        found: Losses = self.loss(part, Place(self.steps, 0, len(batch["target"])))
        return found


def make_batches(case: TrainingCase, tokens: Tensor, count: int) -> list[Batch]:
    """Stretches of the text: a source and the target that follows it. Padded where the case skips padding: lengths are
    uniform from 1 on, and the same in all batches."""
    texts = stretches(tokens, count, case.batch, case.source + case.length)
    generator = torch.Generator().manual_seed(SEED)
    masks = {}
    for name, length in (("source", case.source), ("target", case.length)):
        lengths = torch.randint(1, length + 1, (case.batch, 1), generator=generator)
        masks[name] = torch.arange(length) < (lengths if case.skip_padding else length)
        masks[name] = masks[name].expand(case.batch, length)
    batches = []
    for text in texts:
        parts = dict(zip(masks, text.split([case.source, case.length], 1), strict=True))
        padded = {name: part.where(masks[name], PAD) for name, part in parts.items()}
        batches.append(padded | {f"{name}_mask": mask for name, mask in masks.items()})
    return batches


def _to(device: str, batch: Batch) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass
class _Smoothing:
    """A call of `smooth` in a step, and the gradient that came back to it."""

    arguments: tuple[Any, ...]  # x, vocabulary, mu, std
    options: dict[str, Any]
    gradient: Tensor | None = None


@contextmanager
def recorded() -> Iterator[list[_Smoothing]]:
    """The calls of `smooth` that the loss makes inside: for `again`, when one backward pass is done."""
    from smoothie_kernels.diffusion import loss

    calls: list[_Smoothing] = []

    def recording(*arguments: Any, **options: Any) -> Tensor:
        smoothed = smooth(*arguments, **options)
        call = _Smoothing(arguments, options)
        if smoothed.requires_grad:
            smoothed.register_hook(partial(setattr, call, "gradient"))  # type: ignore[no-untyped-call]
        calls.append(call)
        return smoothed

    with mock.patch.object(loss, "smooth", recording):
        yield calls


def again(calls: list[_Smoothing]) -> object:
    """What a step spends on the vocabulary, backward included. As the loss makes the calls: all with the same rows and
    one Vocabulary, which is new where the table trains."""
    x, vocabulary = calls[0].arguments[:2]
    leaves = [tensor.detach().requires_grad_() for tensor in (x, vocabulary.embeddings) if tensor.requires_grad]
    if leaves:
        x, vocabulary = leaves[0], sk.Vocabulary(leaves[1], check_finite=False)
    smoothed = [smooth(x, vocabulary, *call.arguments[2:], **call.options) for call in calls]
    return torch.autograd.grad(smoothed, leaves, [call.gradient for call in calls]) if leaves else smoothed


def measure(result: Result, case: TrainingCase, *given: Any, **options: Any) -> None:
    """`run_case` of this kind."""
    run_case(_Race, Row, result, case, *given, **options)


class _Race(Race[TrainingCase, Row]):
    def __init__(self, case: TrainingCase, material: Material, device: str, rows: dict[str, Row]) -> None:
        super().__init__(case, material, device, rows)
        self.parts: dict[str, Callable[[], object]] = {}  # what each does with the vocabulary in one step
        self.flop, self.vocabulary_flop = 0, 0

    @property
    def dense_tensors(self) -> int:
        return 10 if self.case.trainable_embeddings else 6

    def check(self, *, keep_going: bool) -> None:
        """Counts the products, compares losses and gradients with REFERENCE's, and warms everybody up."""
        case = self.case
        self.checked = self.samples_that_fit()
        try:
            reference = Session(case, REFERENCE, self.material, self.device)
            with recorded() as calls:
                self.flop, (loss, gradients) = counted(lambda: reference.gradients(self.checked))
            self.vocabulary_flop, _ = counted(lambda: again(calls))
        except Exception as error:
            self.failed(OURS, f"has nothing to be compared with: {one_line(error)}", keep_going)
            return
        for name in self.rows:
            session = None
            try:
                if CONTESTANTS[name].options["step"] == "eager":
                    self.expect_room()
                if "torch_noise" not in CONTESTANTS[name].options:
                    session = reference if name == REFERENCE else self._session(name)
                    off = compare(*session.gradients(self.checked), loss, gradients, bf16=case.bf16)
                    self.rows[name] = replace(self.rows[name], error=off)
                session = session or self._session(name)
                for _ in range(COMPILED_WARM_UP if CONTESTANTS[name].compiles else 1):
                    with recorded() as calls:
                        session.step()
                self.sessions[name], self.parts[name] = session, partial(again, calls)
            except CheckFailed as error:
                self.failed(name, error.what, keep_going)
            except Exception as error:
                self.failed(name, one_line(error), keep_going, WRONG if name == OURS else "absent: ")
        if OURS not in self.sessions:
            self.sessions.clear()

    def time(self, repeats: int) -> Products:
        """Steps in turn, then what they are made of in turn."""
        case, clock = self.case, timing.clock_of(self.device)
        steps = {name: session.step for name, session in self.sessions.items()}
        times = timing.race(steps, clock, patience=0, repeats=repeats)
        part_seconds, rates = self.race_parts(self.parts, clock)
        share = case.batch / self.checked
        flop, vocabulary_flop = (round(share * flop) for flop in (self.flop, self.vocabulary_flop))
        products = Products(flop, vocabulary_flop, *rates, self.checked)
        for name, time in times.items():
            row = with_times(self.rows[name], name, times, part_seconds[name], products.seconds)
            self.rows[name] = replace(row, steps_per_s=1 / time.median)
        return products

    def peak(self, name: str, saved: Path, threads: int) -> memory.Peak | str:
        step: Any = self.sessions[name].step
        if self.device == "cuda":
            return memory.peak_on_cuda(step)
        if CONTESTANTS[name].compiles:
            return memory.peak_of(step)
        return peak_in_new_process(self.case, name, saved, threads)

    def _session(self, name: str) -> Session:
        return Session(self.case, name, self.material, self.device)


def compare(
    loss: float, gradients: dict[str, Tensor], true_loss: float, true_gradients: dict[str, Tensor], *, bf16: bool
) -> float:
    """The largest relative error of any parameter's gradient. CheckFailed beyond the margins."""
    off = abs(loss - true_loss) / abs(true_loss)
    if not off <= LOSS_MARGIN:
        raise CheckFailed(f"the loss is off by {off:.3g} relative, {LOSS_MARGIN:.3g} is allowed")
    if gradients.keys() != true_gradients.keys():
        raise CheckFailed(f"gradients are of other parameters: {sorted(gradients.keys() ^ true_gradients.keys())}")
    errors = {name: frobenius(gradients[name], true) for name, true in true_gradients.items() if true.any()}
    allowed = GRADIENT_MARGIN[torch.bfloat16 if bf16 else torch.float32]
    for name, error in errors.items():
        if not error <= allowed:
            raise CheckFailed(f"the gradient of {name} is off by {error:.3g} relative, {allowed:.3g} is allowed")
    return max(errors.values())


def peak_in_new_process(case: TrainingCase, name: str, material: Path, threads: int) -> memory.Peak | str:
    """The peak of one step, or why it was not measured. `material` is a saved Material of the case's size."""
    preload = ("smoothie_kernels.diffusion.loss",)
    return whole.peak_in_new_process(_peak_here, case, name, material, threads, preload=preload)


def _peak_here(case: TrainingCase, name: str, material: Path, threads: int) -> memory.Peak | str:
    flush_denormals()
    torch.set_num_threads(threads)
    session = Session(case, name, Material.load(material), batches=1)
    session.step(1)  # one sample makes the optimizer's state, and loads what a first step loads
    step: Any = session.step
    return memory.peak_of(step)


def train_curves(
    case: TrainingCase,
    steps: int,
    material: Material,
    device: str = "cpu",
    progress: Progress = lambda what, parts: None,
) -> Curves:
    """Trains fused and eager, in turn, from the same weights."""
    sized = material.sized(case.v or len(material.table), case.d)
    sessions = {name: Session(case, name, sized, device, batches=steps) for name in (REFERENCE, OURS)}
    losses: dict[str, list[Tensor]] = {name: [] for name in sessions}
    for step in range(steps):
        progress(f"loss curves: step {step + 1} of {steps}", 1 / steps)
        for name, session in sessions.items():
            losses[name].append(session.step())
    return Curves(asdict(case), {name: torch.stack(of_steps).tolist() for name, of_steps in losses.items()})

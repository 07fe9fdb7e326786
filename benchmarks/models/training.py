"""Whole training steps, fused and eager: the same losses, then time, memory, and what they are spent on.

Nothing here imports transformers before something is measured.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import smoothie_kernels as sk
from benchmarks.common.embeddings import Material
from benchmarks.common.pictures import BLUE, BROWN, GREY, MEMORY, Bars, draw_bars, finish, panels
from benchmarks.common.race import CheckFailed, Suite
from benchmarks.common.report import Report, Section
from benchmarks.common.timing import Call, Timing
from benchmarks.models import cases
from benchmarks.models.cases import CURVES, OURS, REFERENCE, SEED, Contestant, TrainingCase
from benchmarks.models.whole import ModelRace, counted, make_model, stretches
from smoothie_kernels.diffusion.noising import smooth
from smoothie_kernels.testing import relative_error

TITLE, PREFIX, PAGE, CASES, CONTESTANTS = "Training", "training-", "training.md", cases.TRAINING_CASES, cases.TRAINING
OPTIMIZER = {"lr": 2e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01, "fused": True}  # the trainer's
CLIP = 1.0
PAD = 0  # BERT's
BATCHES = 4  # different ones, in turn
COMPILED_WARM_UP = 2  # steps before any is timed; one of the others
LOSS_MARGIN = 1e-4  # relative
GRADIENT_MARGIN = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative, Frobenius, of every parameter's

CURVE_STEPS = 120
COMPARED, CURVE_MARGIN = 50, 1e-4  # the first steps of the loss curves, and what they may differ by, relatively
LEAST_DIFFERENCE = 1e-9  # what is less is drawn here
COLOURS = {"eager": BROWN, REFERENCE: "#d99a6c", OURS: BLUE, "fused + compile": "#08306b"}

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
        made = make_batches(case, material.tokens, batches)
        self.batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in made]
        self.steps = 0

    def step(self, samples: int | None = None) -> Tensor:
        """One update of the weights, by some samples of a batch or all of them; the loss."""
        found = self._forward(self.batches[self.steps % len(self.batches)], samples)
        torch.autograd.backward(found.total)
        clip_grad_norm_(self.parameters.values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        loss: Tensor = found.total.detach()
        return loss

    def gradients(self, samples: int | None = None) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of the first batch, without an update."""
        found = self._forward(self.batches[0], samples)
        torch.autograd.backward(found.total)
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        self.optimizer.zero_grad()
        return float(found.total.detach()), gradients

    def _forward(self, batch: Batch, samples: int | None) -> Any:
        from smoothie_kernels.diffusion.loss import Place

        part = {name: tensor[:samples] for name, tensor in batch.items()}
        return self.loss(part, Place(self.steps, 0, len(batch["target"])))


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


@contextmanager
def recorded() -> Iterator[list[SimpleNamespace]]:
    """The calls of `smooth` that the loss makes inside, and after one backward pass the gradients that came back."""
    from smoothie_kernels.diffusion import loss

    calls: list[SimpleNamespace] = []

    def recording(*arguments: Any, **options: Any) -> Tensor:
        smoothed = smooth(*arguments, **options)
        call = SimpleNamespace(arguments=arguments, options=options, gradient=None)
        if smoothed.requires_grad:
            smoothed.register_hook(partial(setattr, call, "gradient"))  # type: ignore[no-untyped-call]
        calls.append(call)
        return smoothed

    with mock.patch.object(loss, "smooth", recording):
        yield calls


def again(calls: list[SimpleNamespace]) -> object:
    """What a step spends on the vocabulary, backward included. As the loss makes the calls: all with the same rows and
    one Vocabulary, which is new where the table trains."""
    x, vocabulary = calls[0].arguments[:2]
    leaves = [tensor.detach().requires_grad_() for tensor in (x, vocabulary.embeddings) if tensor.requires_grad]
    if leaves:
        x, vocabulary = leaves[0], sk.Vocabulary(leaves[1], check_finite=False)
    smoothed = [smooth(x, vocabulary, *call.arguments[2:], **call.options) for call in calls]
    return torch.autograd.grad(smoothed, leaves, [call.gradient for call in calls]) if leaves else smoothed


def alone(case: TrainingCase, name: str, material: Material) -> Call:
    """A step, for a process that measures its memory."""
    session = Session(case, name, material.of(case), batches=1)
    session.step(1)  # one sample makes the optimizer's state, and loads what a first step loads
    return session.step


class Race(ModelRace[TrainingCase]):
    contestants = CONTESTANTS
    alone = alone

    def __init__(self, suite: Suite, case: TrainingCase) -> None:
        super().__init__(suite, case)
        self.dense_tensors = 10 if case.trainable_embeddings else 6

    def check(self) -> None:
        """Losses and gradients are held to REFERENCE's. Warms everybody up."""
        super().check()
        self.reference: Any = None  # its memory is the others'

    def count(self) -> None:
        self.reference = self._session(REFERENCE)
        with recorded() as calls:
            self.flop, self.truth = counted(lambda: self.reference.gradients(self.checked))
        self.vocabulary_flop, _ = counted(lambda: again(calls))

    def enter(self, contestant: Contestant) -> Call:
        name, session = contestant.name, None
        if "torch_noise" not in contestant.options:
            session = self.reference if name == REFERENCE else self._session(name)
            self.set(name, error=compare(*session.gradients(self.checked), *self.truth, bf16=self.case.bf16))
        session = session or self._session(name)
        for _ in range(COMPILED_WARM_UP if contestant.compiles else 1):
            with recorded() as calls:
                session.step()
        self.parts[name] = partial(again, calls)
        step: Call = session.step
        return step

    def spent(self, name: str, parts: Mapping[str, Timing]) -> float:
        return parts[name].median

    def _session(self, name: str) -> Session:
        return Session(self.case, name, self.material, self.suite.device)


def compare(
    loss: float, gradients: dict[str, Tensor], true_loss: float, true_gradients: dict[str, Tensor], *, bf16: bool
) -> float:
    """The largest relative error of any parameter's gradient. CheckFailed beyond the margins."""
    off = abs(loss - true_loss) / abs(true_loss)
    if not off <= LOSS_MARGIN:
        raise CheckFailed(f"the loss is off by {off:.3g} relative, {LOSS_MARGIN:.3g} is allowed")
    if gradients.keys() != true_gradients.keys():
        raise CheckFailed(f"gradients are of other parameters: {sorted(gradients.keys() ^ true_gradients.keys())}")
    errors = {name: relative_error(gradients[name], true) for name, true in true_gradients.items() if true.any()}
    allowed = GRADIENT_MARGIN[torch.bfloat16 if bf16 else torch.float32]
    for name, error in errors.items():
        if not error <= allowed:
            raise CheckFailed(f"the gradient of {name} is off by {error:.3g} relative, {allowed:.3g} is allowed")
    return max(errors.values())


# Loss curves


@dataclass(frozen=True)
class Curves:
    """Losses of one model trained twice from the same weights on the same batches."""

    case: dict[str, Any]
    losses: dict[str, list[float]]

    def differences(self) -> list[float]:
        """Relative, by step."""
        pairs = zip(self.losses[OURS], self.losses[REFERENCE], strict=True)
        return [abs(ours - theirs) / abs(theirs) for ours, theirs in pairs]

    @property
    def worst(self) -> float:
        """The largest of the first steps."""
        return max(self.differences()[:COMPARED])

    def failures(self) -> list[str]:
        if all(difference < CURVE_MARGIN for difference in self.differences()[:COMPARED]):
            return []
        return [f"loss curves of {OURS!r} and {REFERENCE!r} differ by {self.worst:.2g} within {COMPARED} steps"]

    def section(self) -> Section:
        differences = self.differences()
        marks = [step for step in (1, 10, 20, COMPARED, 100, 200, 400) if step < len(differences)] + [len(differences)]
        cells = [
            (f"{step}", *(f"{losses[step - 1]:.6f}" for losses in self.losses.values()),
             f"{differences[step - 1]:.1e}", f"{max(differences[:step]):.1e}")
            for step in marks
        ]  # fmt: skip
        note = (
            f"{TrainingCase(**self.case).describe()}; the same weights and batches. The largest relative difference "
            f"within {COMPARED} steps is {self.worst:.1e}; {CURVE_MARGIN:.0e} is allowed."
        )
        return Section("Loss curves", note, ("step", *self.losses, "difference", "largest so far"), cells)


def conclude(suite: Suite, report: Report, cases: Iterable[TrainingCase]) -> None:
    """After all cases."""
    curves = train_curves(CURVES[suite.device], CURVE_STEPS, suite)
    report.content["curves"] = [asdict(curves)]
    report.more["curves"] = curves.section()
    report.red += curves.failures()


def train_curves(case: TrainingCase, steps: int, suite: Suite) -> Curves:
    """Trains fused and eager, in turn, from the same weights."""
    material = suite.material.of(case)
    sessions = {name: Session(case, name, material, suite.device, batches=steps) for name in (REFERENCE, OURS)}
    losses: dict[str, list[Tensor]] = {name: [] for name in sessions}
    for step in range(steps):
        suite.progress(f"loss curves: step {step + 1} of {steps}")
        for name, session in sessions.items():
            losses[name].append(session.step())
    return Curves(asdict(case), {name: torch.stack(of_steps).tolist() for name, of_steps in losses.items()})


# Pictures


def draw(report: Report, stem: Path) -> list[Path]:
    """The files drawn."""
    rate = Bars("Training steps per second", lambda row: 1 / (row.seconds or 1), lambda rate: f"{rate:.2f}")
    drawn = draw_bars(report, stem, COLOURS, steps=rate, memory=MEMORY)
    for curves in (Curves(**found) for found in report.content.get("curves", [])):
        figure, (above, below) = panels(2, 1, (7.2, 5), sharex=True, height_ratios=(3, 2))
        differences = curves.differences()
        steps = range(1, len(differences) + 1)
        for name, style, width in ((REFERENCE, "-", 3.0), (OURS, "--", 1.2)):
            above.plot(steps, curves.losses[name], style, color=COLOURS[name], linewidth=width, label=name)
        above.set_ylabel("loss")
        below.plot(steps, [max(difference, LEAST_DIFFERENCE) for difference in differences], ".", color=BLUE)
        below.plot((1, COMPARED), 2 * (CURVE_MARGIN,), "--", color=GREY, linewidth=1.2, label="allowed")
        below.set_yscale("log")
        below.set_ylabel(f"relative difference\n(none: at {LEAST_DIFFERENCE:.0e})")
        below.set_xlabel("training step")
        drawn.append(finish(figure, stem.with_name(f"{stem.name}-curves.png")))
    return drawn

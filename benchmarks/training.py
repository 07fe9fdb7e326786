"""Whole training steps, fused and eager: the same losses, then time, memory, and what they are spent on.

Nothing here imports transformers before something is measured.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

import smoothie_kernels as sk
from benchmarks import memory, timing
from benchmarks.check import CheckFailed, frobenius
from benchmarks.embeddings import Material
from benchmarks.machine import Machine
from benchmarks.suite import USABLE, WRONG
from benchmarks.training_cases import CONTESTANTS, SEED, TrainingCase
from benchmarks.training_report import OURS, REFERENCE, Curves, Products, Result, Row
from smoothie_kernels.diffusion.noising import smooth

if TYPE_CHECKING:
    from smoothie_kernels.diffusion.loss import Losses

OPTIMIZER = {"lr": 2e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01, "fused": True}  # the trainer's
CLIP = 1.0
PAD = 0  # BERT's
BATCHES = 4  # different ones, in turn
COMPILED_WARM_UP = 2  # steps before any is timed; one of the others
PART_REPEATS = 2  # timed runs of a step's parts
LOSS_MARGIN = 1e-4  # relative
GRADIENT_MARGIN = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative, Frobenius, of every parameter's
MEMORY_SECONDS = 180  # for one process that measures

Batch = dict[str, Tensor]
Progress = Callable[[str, float], None]  # what is being done, and how many parts of `Plan.parts` are done


class Session:
    """One contestant's model, loss and optimizer. The same case gives the same weights and batches to everybody."""

    def __init__(
        self, case: TrainingCase, name: str, material: Material, device: str = "cpu", batches: int = BATCHES
    ) -> None:
        from smoothie_kernels.diffusion.loss import TrainingLoss
        from smoothie_kernels.diffusion.model import SmoothieConfig, SmoothieModel

        contestant = CONTESTANTS[name]
        config = SmoothieConfig(
            *material.table.shape, hidden_size=case.hidden, num_hidden_layers=case.layers,
            num_attention_heads=case.heads, condition_layers=case.condition_layers,
            self_condition_layers=case.self_condition_layers, target_length=case.length, source_length=case.source,
            trainable_embeddings=case.trainable_embeddings,
        )  # fmt: skip
        torch.manual_seed(SEED)
        model = SmoothieModel(config, material.table).to(device)
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
    size = count * case.batch * (case.source + case.length)
    texts = tokens.repeat(-(-size // len(tokens)))[:size].view(count, case.batch, case.source + case.length)
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


def flush_denormals() -> None:
    """Denormal numbers are zero from now on: cross-entropy's gradient is full of them, and processors crawl over each.

    Only before PyTorch has started its threads: they take this over from the one that starts them, and never again.
    """
    torch.set_flush_denormal(True)


def with_transformers(machine: Machine) -> Machine:
    """The version among its versions."""
    try:
        found = {"transformers": version("transformers")}
    except PackageNotFoundError:
        found = {}
    return replace(machine, versions=machine.versions | found)


def measure(
    result: Result,
    case: TrainingCase,
    material: Material,
    folder: Path,
    device: str = "cpu",
    repeats: int | None = None,
    *,
    keep_going: bool = False,
    progress: Progress = lambda what, parts: None,
) -> None:
    """Checks and measures one case, and adds it to the result. `folder` is for what other processes read.

    CheckFailed where ours is wrong; with keep_going the case's rows say so instead, and have no times.
    """
    torch.compiler.reset()
    sized = material.sized(case.v or len(material.table), case.d)
    result.tables[case.name], result.cases[case.name] = sized.note, asdict(case)
    rows = {name: _row(result.machine, case, name, sized) for name in case.contestants}
    race = _Race(case, sized, device, rows)
    progress(f"{case.name}: checking", 1)
    race.check(keep_going=keep_going)
    progress(f"{case.name}: timing", 1)
    if race.sessions:
        result.products[case.name] = race.time(repeats or case.repeats)
    progress(f"{case.name}: memory", 1)
    race.measure_memory(folder, result.machine.threads)
    result.rows.extend(rows.values())
    del race  # the next case needs the room
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class _Race:
    """Runs one case, and fills its rows. `sessions` are those of all who take part."""

    def __init__(self, case: TrainingCase, material: Material, device: str, rows: dict[str, Row]) -> None:
        self.case, self.material, self.device, self.rows = case, material, device, rows
        self.sessions: dict[str, Session] = {}
        self.parts: dict[str, Callable[[], object]] = {}  # what each does with the vocabulary in one step
        self.flop, self.vocabulary_flop, self.checked = 0, 0, case.batch

    def check(self, *, keep_going: bool) -> None:
        """Counts the products, compares losses and gradients with REFERENCE's, and warms everybody up."""
        case = self.case
        self.checked = self._samples_that_fit()
        try:
            reference = Session(case, REFERENCE, self.material, self.device)
            with recorded() as calls:
                self.flop, (loss, gradients) = counted(lambda: reference.gradients(self.checked))
            self.vocabulary_flop, _ = counted(lambda: again(calls))
        except Exception as error:
            self._failed(OURS, f"has nothing to be compared with: {_one_line(error)}", keep_going)
            return
        for name in self.rows:
            session = None
            try:
                self._expect_room(name)
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
                self._failed(name, error.what, keep_going)
            except Exception as error:
                self._failed(name, _one_line(error), keep_going, WRONG if name == OURS else "absent: ")
        if OURS not in self.sessions:
            self.sessions.clear()

    def time(self, repeats: int) -> Products:
        """Steps in turn, then what they are made of in turn."""
        case, clock = self.case, timing.clock_of(self.device)
        steps = {name: session.step for name, session in self.sessions.items()}
        times = timing.race(steps, clock, patience=0, repeats=repeats)
        gemms = {str(dtype): self._product(dtype) for dtype in {torch.float32, self._network_type}}
        part_times = timing.race(self.parts | gemms, clock, patience=0, repeats=PART_REPEATS)
        v, d = self.material.table.shape
        rate, network_rate = (
            2 * case.n * v * d / part_times[str(dtype)].median for dtype in (torch.float32, self._network_type)
        )
        share = case.batch / self.checked
        flop, vocabulary_flop = (round(share * flop) for flop in (self.flop, self.vocabulary_flop))
        products = Products(flop, vocabulary_flop, rate, network_rate, self.checked)
        for name in times:
            self.rows[name] = with_times(self.rows[name], name, times, part_times[name].median, products.seconds)
        return products

    def measure_memory(self, folder: Path, threads: int) -> None:
        saved = folder / "training.pt"
        if self.device == "cpu":
            self.material.save(saved)
        for name, session in self.sessions.items():
            step: Any = session.step
            if self.device == "cuda":
                peak: memory.Peak | str = memory.peak_on_cuda(step)
            elif CONTESTANTS[name].compiles:
                peak = memory.peak_of(step)
            else:
                peak = peak_in_new_process(self.case, name, saved, threads)
            if isinstance(peak, str):
                self.rows[name] = replace(self.rows[name], note=f"memory: {peak}")
            else:
                self.rows[name] = replace(
                    self.rows[name], peak_extra_bytes=peak.extra, peak_process_bytes=peak.process
                )  # fmt: skip

    @property
    def _network_type(self) -> torch.dtype:
        return torch.bfloat16 if self.case.bf16 else torch.float32

    def _session(self, name: str) -> Session:
        return Session(self.case, name, self.material, self.device)

    def _expect_room(self, name: str) -> None:
        """For the eager step's tensors of rows x vocabulary, instead of a process that the system kills."""
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what it keeps does not look free
        free = memory.available(self.device)
        needed = self._eager_bytes(self.case.batch)
        if CONTESTANTS[name].options["step"] == "eager" and free is not None and needed > USABLE * free:
            raise MemoryError(f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")

    def _samples_that_fit(self) -> int:
        """The check needs the eager step, if not of the whole batch."""
        samples, free = self.case.batch, memory.available(self.device)
        while free is not None and samples > 1 and self._eager_bytes(samples) > USABLE * free:
            samples //= 2
        return samples

    def _eager_bytes(self, samples: int) -> int:
        tensors = 10 if self.case.trainable_embeddings else 6  # of rows x vocabulary at once, measured
        return 4 * tensors * samples * self.case.length * len(self.material.table)

    def _product(self, dtype: torch.dtype) -> Callable[[], object]:
        """One N x V x D product, into a tensor that exists."""
        table = self.material.table.to(self.device, dtype)
        rows = table[torch.arange(self.case.n) % len(table)]
        out = torch.empty(len(rows), len(table), device=self.device, dtype=dtype)
        return lambda: torch.mm(rows, table.T, out=out)

    def _failed(self, name: str, what: str, keep_going: bool, kind: str = WRONG) -> None:
        if name == OURS and not keep_going:
            raise CheckFailed(f"case {self.case.name!r}, contestant {name!r}: {what}", what)
        self.rows[name] = replace(self.rows[name], error=None, note=f"{kind}{what}")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def _row(machine: Machine, case: TrainingCase, name: str, material: Material) -> Row:
    versions = " ".join(f"{name}={number}" for name, number in machine.versions.items())
    v, d = material.table.shape
    return Row(case.name, name, case.n, v, d, commit=machine.commit, machine=machine.processor, versions=versions)


def counted(call: Callable[[], Any]) -> tuple[int, Any]:
    """Floating point operations of a call's matrix products, and what the call gives.

    Attention is taken apart into its products: of the library's own kernels some are not counted, and some of them
    make products again.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        found = call()
    return counter.get_total_flops(), found


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


def with_times(
    row: Row, name: str, times: Mapping[str, timing.Timing], vocabulary_seconds: float, floor_seconds: float
) -> Row:
    time = times[name]
    return replace(
        row,
        seconds=time.median,
        quartiles=time.quartiles,
        runs=time.runs,
        steps_per_s=1 / time.median,
        tokens_per_s=row.n / time.median,
        ratios={other: each.median / time.median for other, each in times.items() if other != name},
        floor_seconds=floor_seconds,
        efficiency=floor_seconds / time.median,
        vocabulary_seconds=vocabulary_seconds,
        vocabulary_share=vocabulary_seconds / time.median,
    )


def peak_in_new_process(case: TrainingCase, name: str, material: Path, threads: int) -> memory.Peak | str:
    """The peak of one step, or why it was not measured. `material` is a saved Material of the case's size."""
    if not memory.RESET.exists():
        return memory.NO_MARK
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.training", "torch._dynamo", "smoothie_kernels.diffusion.loss"])
    with context.Pool(1) as pool:
        try:
            return pool.apply_async(_peak_here, (case, name, material, threads)).get(MEMORY_SECONDS)
        except multiprocessing.TimeoutError:
            return f"no answer within {MEMORY_SECONDS} s (out of memory?)"
        except Exception as error:
            return _one_line(error)


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

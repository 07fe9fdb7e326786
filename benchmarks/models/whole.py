"""What the benchmarks of whole models share: cases, models, text, the count of products, and how one case is run.

Nothing here imports transformers before something is measured.
"""

from __future__ import annotations

import gc
import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import memory
from benchmarks.common.embeddings import Material
from benchmarks.common.machine import Machine
from benchmarks.common.timing import Clock, race
from benchmarks.models.model_report import OURS, Products, Result, Row
from benchmarks.step.check import CheckFailed
from benchmarks.step.suite import USABLE, WRONG, one_line

if TYPE_CHECKING:
    from smoothie_kernels.diffusion.model import SmoothieModel

SEED = 0
PART_REPEATS = 2  # timed runs of a step's parts
MEMORY_SECONDS = 180  # for one process that measures

Progress = Callable[[str, float], None]  # what is being done, and how many parts of `Plan.parts` are done


@dataclass(frozen=True)
class ModelCase:
    name: str
    why: str
    batch: int = 32
    length: int = 32  # of a target
    source: int = 32  # of a source
    v: int | None = None  # None: the table's
    d: int = 384
    layers: int = 4
    hidden: int = 384
    heads: int = 12
    condition_layers: int = 2
    self_condition_layers: int = 1
    bf16: bool = False
    contestants: tuple[str, ...] = ("eager", OURS)
    repeats: int = 3
    groups: tuple[str, ...] = ("cpu",)

    @property
    def n(self) -> int:
        return self.batch * self.length

    @property
    def network_type(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


Case = TypeVar("Case", bound=ModelCase)
OneRow = TypeVar("OneRow", bound=Row)


def select(
    kind: str, cases: Mapping[str, Case], device: str, *, full: bool, patterns: Iterable[str]
) -> tuple[Case, ...]:
    """The cases of a device, or those of all that match a pattern. ValueError where a pattern fits none."""
    wanted = tuple(patterns)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in cases):
            raise ValueError(f"no {kind} case is named {pattern!r}; there are: {', '.join(cases)}")
    groups = {device, f"{device} full"} if full else {device}
    return tuple(
        case
        for case in cases.values()
        if (any(fnmatchcase(case.name, pattern) for pattern in wanted) if wanted else groups & {*case.groups})
    )


def make_model(case: ModelCase, table: Tensor, device: str, **options: Any) -> SmoothieModel:
    """The same case gives the same weights to everybody; options are more of the config."""
    from smoothie_kernels.diffusion.model import SmoothieConfig, SmoothieModel

    config = SmoothieConfig(
        *table.shape, hidden_size=case.hidden, num_hidden_layers=case.layers, num_attention_heads=case.heads,
        condition_layers=case.condition_layers, self_condition_layers=case.self_condition_layers,
        target_length=case.length, source_length=case.source, **options,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model: SmoothieModel = SmoothieModel(config, table).to(device)
    return model


def stretches(tokens: Tensor, *shape: int) -> Tensor:
    """The text in order, from its beginning, and again where it is too short."""
    size = int(torch.Size(shape).numel())
    return tokens.repeat(-(-size // len(tokens)))[:size].view(shape)


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


def counted(call: Callable[[], Any]) -> tuple[int, Any]:
    """Floating point operations of a call's matrix products, and what the call gives.

    Attention is taken apart into its products: of the library's own kernels some are not counted, and some of them
    make products again.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        found = call()
    return counter.get_total_flops(), found


class Race(ABC, Generic[Case, OneRow]):
    """Runs one case, and fills its rows. `sessions` are of all who take part."""

    ours: ClassVar[tuple[str, ...]] = Result.ours

    def __init__(self, case: Case, material: Material, device: str, rows: dict[str, OneRow]) -> None:
        self.case, self.material, self.device, self.rows = case, material, device, rows
        self.sessions: dict[str, Any] = {}
        self.checked = case.batch  # samples that check and count have seen

    @property
    @abstractmethod
    def dense_tensors(self) -> int:
        """How many tensors of rows x vocabulary the eager step holds at once, measured."""

    @abstractmethod
    def check(self, *, keep_going: bool) -> None:
        """Fills `sessions` with those that were found right, and warms them up."""

    @abstractmethod
    def time(self, repeats: int) -> Products:
        """Fills in the times."""

    @abstractmethod
    def peak(self, name: str, saved: Path, threads: int) -> memory.Peak | str:
        """The memory of one contestant; `saved` is the material, on a CPU."""

    def measure_memory(self, folder: Path, threads: int) -> None:
        saved = folder / "model.pt"
        if self.device == "cpu":
            self.material.save(saved)
        for name in self.sessions:
            peak = self.peak(name, saved, threads)
            if isinstance(peak, str):
                self.rows[name] = replace(self.rows[name], note=f"memory: {peak}")
            else:
                self.rows[name] = replace(
                    self.rows[name], peak_extra_bytes=peak.extra, peak_process_bytes=peak.process
                )  # fmt: skip

    def expect_room(self) -> None:
        """For the eager step's tensors of rows x vocabulary, instead of a process that the system kills."""
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what it keeps does not look free
        free, needed = memory.available(self.device), self._dense_bytes(self.case.batch)
        if free is not None and needed > USABLE * free:
            raise MemoryError(f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")

    def samples_that_fit(self) -> int:
        """The check needs the eager step, if not of the whole batch."""
        samples, free = self.case.batch, memory.available(self.device)
        while free is not None and samples > 1 and self._dense_bytes(samples) > USABLE * free:
            samples //= 2
        return samples

    def race_parts(
        self, parts: Mapping[str, Callable[[], object]], clock: Clock
    ) -> tuple[dict[str, float], tuple[float, float]]:
        """The seconds of parts; and flop/s of N x V x D in float32 and in the network's type, in turn with them."""
        types = (torch.float32, self.case.network_type)
        gemms = {str(dtype): self._product(dtype) for dtype in set(types)}
        times = race({**parts, **gemms}, clock, patience=0, repeats=PART_REPEATS)
        v, d = self.material.table.shape
        rate, network_rate = (2 * self.case.n * v * d / times[str(dtype)].median for dtype in types)
        return {name: times[name].median for name in parts}, (rate, network_rate)

    def failed(self, name: str, what: str, keep_going: bool, kind: str = WRONG) -> None:
        if name in self.ours and not keep_going:
            raise CheckFailed(f"case {self.case.name!r}, contestant {name!r}: {what}", what)
        self.rows[name] = replace(self.rows[name], error=None, note=f"{kind}{what}")

    def _dense_bytes(self, samples: int) -> int:
        return 4 * self.dense_tensors * samples * self.case.length * len(self.material.table)

    def _product(self, dtype: torch.dtype) -> Callable[[], object]:
        """One N x V x D product, into a tensor that exists."""
        table = self.material.table.to(self.device, dtype)
        rows = table[torch.arange(self.case.n) % len(table)]
        out = torch.empty(len(rows), len(table), device=self.device, dtype=dtype)
        return lambda: torch.mm(rows, table.T, out=out)


def run_case(
    kind: type[Race[Case, OneRow]],
    row: type[OneRow],
    result: Result[OneRow],
    case: Case,
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
    machine, (v, d) = result.machine, sized.table.shape
    versions = " ".join(f"{name}={number}" for name, number in machine.versions.items())
    made: dict[str, Any] = {"commit": machine.commit, "machine": machine.processor, "versions": versions}
    rows = {name: row(case.name, name, case.n, v, d, **made) for name in case.contestants}
    running = kind(case, sized, device, rows)
    progress(f"{case.name}: checking", 1)
    running.check(keep_going=keep_going)
    progress(f"{case.name}: timing", 1)
    if running.sessions:
        result.products[case.name] = running.time(repeats or case.repeats)
    progress(f"{case.name}: memory", 1)
    running.measure_memory(folder, machine.threads)
    result.rows.extend(rows.values())
    del running  # the next case needs the room
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def peak_in_new_process(
    measure: Callable[..., memory.Peak | str], *arguments: Any, preload: tuple[str, ...]
) -> memory.Peak | str:
    """What `measure` of a new process says, or why it was not measured."""
    if not memory.RESET.exists():
        return memory.NO_MARK
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([measure.__module__, "torch._dynamo", *preload])
    with context.Pool(1) as pool:
        try:
            return pool.apply_async(measure, arguments).get(MEMORY_SECONDS)
        except multiprocessing.TimeoutError:
            return f"no answer within {MEMORY_SECONDS} s (out of memory?)"
        except Exception as error:
            return one_line(error)

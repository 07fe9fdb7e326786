"""How one case is run, whatever is measured: everybody is checked, timed in turn, and measured for memory."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic

import torch

from benchmarks.common import memory
from benchmarks.common.case import Contestant, SomeCase
from benchmarks.common.embeddings import Material
from benchmarks.common.machine import Machine
from benchmarks.common.memory import Alone
from benchmarks.common.report import WRONG, Report, Row
from benchmarks.common.timing import Call, Timing

USABLE = 0.8  # of the free memory


class CheckFailed(Exception):
    """What is wrong with a result."""


class Absent(Exception):
    """Why a contestant does not take part."""


def ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Suite:
    """What all cases of one run share."""

    material: Material
    machine: Machine
    folder: Path  # for what other processes read
    device: str = "cpu"
    repeats: int | None = None
    keep_going: bool = False  # where a result of ours is wrong, that row says so, instead of CheckFailed
    without: Mapping[str, str] = field(default_factory=dict)  # contestants that do not run, and why
    on_row: Callable[[Row], None] = ignore  # every row, each time that something is added to it
    on_turn: Callable[[str], None] = ignore  # the contestant that runs next
    progress: Callable[[str], None] = ignore  # what is being done


class Race(ABC, Generic[SomeCase]):
    """One case: `check`, then `time`, then `measure_memory`, all under `mode`."""

    contestants: ClassVar[Mapping[str, Any]]  # by name
    alone: ClassVar[Alone[Any]]  # what a process of its own measures the memory of

    def __init__(self, suite: Suite, case: SomeCase) -> None:
        torch.compiler.reset()  # beyond eight shapes of one function it would quietly run the function as it is
        self.suite, self.case = suite, case
        self.material = suite.material.of(case)
        self.rows: dict[str, Row] = {}
        self.calls: dict[str, Call] = {}  # what is timed, of those who were found right

    def mode(self) -> AbstractContextManager[Any]:
        """What everything of this case runs under."""
        return nullcontext()

    @abstractmethod
    def new_row(self) -> Row:
        """What all rows of the case have."""

    @abstractmethod
    def admit(self, contestant: Any) -> Call:
        """Checks a contestant; what is to be timed. CheckFailed where a result is wrong, Absent."""

    @abstractmethod
    def time(self) -> None:
        """Fills in the times of `calls`."""

    def memory_call(self, name: str) -> Call:
        return self.calls[name]

    def run(self, report: Report) -> None:
        """Adds the case to the report. CheckFailed where ours is wrong."""
        with self.mode():
            self.check()
            self.time()
            self.measure_memory()
        report.tables[self.case.name] = self.material.note
        report.rows.extend(self.rows.values())

    def check(self) -> None:
        for name in self.case.contestants:
            self.begin("checking", name)
            contestant: Contestant = self.contestants[name]
            self.join(contestant)
            try:
                if how := self.suite.without.get(name):
                    raise CheckFailed(how) if contestant.ours else Absent(how)
                self.calls[name] = self.admit(contestant)
            except Absent as reason:
                self.set(name, note=f"absent: {reason}")
            except CheckFailed as error:
                self.fail(contestant, str(error), error)
            except Exception as error:
                self.fail(contestant, one_line(error), error, "absent: ")
            if self.suite.device == "cuda":
                torch.cuda.empty_cache()  # for the other workers that check now

    def measure_memory(self) -> None:
        saved = self.suite.folder / "material.pt"
        if self.suite.device == "cpu" and not saved.exists():
            self.suite.material.save(saved)
        for name in self.calls:
            self.begin("memory", name)
            call = self.memory_call(name)
            if self.suite.device == "cuda":
                peak: memory.Peak | str = memory.peak_on_cuda(call)
            elif self.contestants[name].compiles:
                peak = memory.peak_of(call)
            else:
                threads = self.suite.machine.threads
                peak = memory.peak_in_new_process(type(self).alone, self.case, name, saved, threads)
            if isinstance(peak, str):
                self.set(name, note=f"memory: {peak}")
            else:
                self.set(name, peak_extra_bytes=peak.extra, peak_process_bytes=peak.process)

    def join(self, contestant: Contestant) -> None:
        machine = self.suite.machine
        self.rows[contestant.name] = replace(
            self.new_row(), contestant=contestant.name, ours=contestant.ours, commit=machine.commit,
            machine=machine.processor, versions=machine.versions_line,
        )  # fmt: skip
        self.suite.on_row(self.rows[contestant.name])

    def set(self, name: str, **changes: Any) -> None:
        self.rows[name] = replace(self.rows[name], **changes)
        self.suite.on_row(self.rows[name])

    def set_times(self, times: Mapping[str, Timing], floor_seconds: float | None) -> None:
        for name, time in times.items():
            others = {other: each.median for other, each in times.items() if other != name and other in self.calls}
            self.set(
                name, seconds=time.median, quartiles=time.quartiles, runs=time.runs, floor_seconds=floor_seconds,
                efficiency=floor_seconds and floor_seconds / time.median,
                ratios={other: seconds / time.median for other, seconds in others.items()},
            )  # fmt: skip

    def fail(self, contestant: Contestant, what: str, cause: Exception | None, if_theirs: str = WRONG) -> None:
        """A competitor's mistake is not ours to time, nor to die of."""
        if contestant.ours and not self.suite.keep_going:
            raise CheckFailed(f"case {self.case.name!r}, contestant {contestant.name!r}: {what}") from cause
        self.set(contestant.name, error=None, note=f"{WRONG if contestant.ours else if_theirs}{what}")

    def lacks(self, tensors: int, rows: int) -> str:
        """Why there is no room for that many tensors of rows x vocabulary: else the system might kill the process."""
        free, needed = memory.available(self.suite.device), 4 * tensors * rows * len(self.material.table)
        if free is None or needed <= USABLE * free:
            return ""
        return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"

    def begin(self, what: str, name: str) -> None:
        """Another contestant of a stage."""
        self.suite.on_turn(name)
        self.suite.progress(f"{self.case.name}: {what} {name}")


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]

"""Runs cases: inputs, check, race, memory, rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import inputs, memory, timing
from benchmarks.check import CheckFailed, Referee
from benchmarks.contestants import CONTESTANTS, FLOAT_FLOOR, FLOOR, Contestant
from benchmarks.embeddings import Material
from benchmarks.inputs import Call, Inputs
from benchmarks.machine import Machine
from benchmarks.registry import Case
from benchmarks.report import Row

PATIENCE = {"sweep": 0.7, "gpu": 0.5}  # seconds of timed runs for each contestant of a case, by group
USUAL_PATIENCE = 1.5
USABLE = 0.8  # of the free memory
WRONG = "wrong: "  # begins the note of a row without time whose results were wrong
STAGES = 3  # of every contestant in every case, for the progress bar: check, race, memory

Progress = Callable[[str, float], None]  # what is being done, and how many stages are done since last time


@dataclass(frozen=True)
class Suite:
    """What all cases of one run share."""

    material: Material
    saved_material: Path
    machine: Machine
    device: str
    repeats: int | None = None
    keep_going: bool = False  # where a result of ours is wrong, that row says so, instead of CheckFailed

    def run(self, case: Case, progress: Progress = lambda what, stages: None) -> tuple[str, list[Row]]:
        """What the table was, and one row per contestant. CheckFailed where a result is wrong."""
        torch.compiler.reset()  # beyond eight shapes of one function it would quietly run the function as it is
        with inputs.grad_mode(case):
            return self._run(case, progress)

    def _run(self, case: Case, progress: Progress) -> tuple[str, list[Row]]:
        given = inputs.build(case, self.material, self.device)
        rows, calls = self._check_all(given, progress)
        rows = self._race(given, rows, calls, progress)
        for name in case.contestants:
            progress(f"{case.name}: memory of {name}", 1)
            if name in calls:
                rows[name] = self._with_memory(rows[name], case, calls[name])
        return given.note, list(rows.values())

    def _check_all(self, given: Inputs, progress: Progress) -> tuple[dict[str, Row], dict[str, Call]]:
        """A row for everybody; a call for those who can take part, and were found right."""
        case, referee = given.case, Referee(given)
        rows: dict[str, Row] = {}
        calls: dict[str, Call] = {}
        for name in case.contestants:
            progress(f"{case.name}: checking {name}", 1)
            contestant = CONTESTANTS[name]
            rows[name] = self._row(given, contestant)
            reason = contestant.absent(given) or self._does_not_fit(contestant, given)
            if not reason:
                try:
                    call = contestant.prepare[case.op](given)
                    rows[name] = replace(rows[name], error=referee.check(contestant, call))
                    calls[name] = call
                except CheckFailed as error:
                    if contestant.ours and not self.keep_going:
                        raise
                    reason = f"{WRONG}{error.what}"  # a competitor's mistake is not ours to time, nor to die of
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
                    if contestant.ours and not self.keep_going:
                        raise CheckFailed(f"case {case.name!r}, contestant {name!r} raised {reason}") from error
                    reason = f"{WRONG}{reason}" if contestant.ours else reason
            if reason:
                rows[name] = replace(rows[name], note=reason if reason.startswith(WRONG) else f"absent: {reason}")
        return rows, calls

    def _race(self, given: Inputs, rows: dict[str, Row], calls: dict[str, Call], progress: Progress) -> dict[str, Row]:
        """The rows with their times; those of the floor join them."""
        case = given.case
        floors = [FLOOR] if self.device == "cuda" or case.dtype == torch.float32 else [FLOOR, FLOAT_FLOOR]
        floors = [floor for floor in floors if not self._does_not_fit(floor, given)]
        times = timing.race(
            calls | {floor.name: floor.prepare[case.op](given) for floor in floors},
            timing.clock_of(self.device),
            patience=PATIENCE.get(case.group, USUAL_PATIENCE),
            repeats=self.repeats,
            progress=lambda part: progress(f"{case.name}: timing", part * len(case.contestants)),
        )
        rows = rows | {floor.name: self._row(given, floor) for floor in floors}
        fastest_floor = min((times[floor.name].median for floor in floors), default=None)
        competitors = [name for name in calls if not CONTESTANTS[name].ours]
        for name, time in times.items():
            rows[name] = replace(
                rows[name],
                seconds=time.median,
                quartiles=time.quartiles,
                runs=time.runs,
                floor_seconds=fastest_floor,
                efficiency=fastest_floor and fastest_floor / time.median,
                ratios={other: times[other].median / time.median for other in competitors if rows[name].ours},
                gflop_per_s=given.flop / time.median / 1e9,
                gb_per_s=given.bytes / time.median / 1e9,
            )
        return rows

    def _with_memory(self, row: Row, case: Case, call: Call) -> Row:
        if self.device == "cuda":
            peak: memory.Peak | str = memory.peak_on_cuda(call)
        elif CONTESTANTS[row.contestant].compiles:
            peak = memory.peak_of(call)
        else:
            peak = memory.peak_in_new_process(case, row.contestant, self.saved_material, self.machine.threads)
        if isinstance(peak, str):
            return replace(row, note=f"memory: {peak}")
        return replace(row, peak_extra_bytes=peak.extra, peak_process_bytes=peak.process)

    def _does_not_fit(self, contestant: Contestant, given: Inputs) -> str | None:
        n, v, _ = given.sizes
        needed, free = 4 * n * v * contestant.tensors_of_n_v, memory.available(self.device)
        if free is None or needed <= USABLE * free:
            return None
        return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"

    def _row(self, given: Inputs, contestant: Contestant) -> Row:
        case, (n, v, d) = given.case, given.sizes
        return Row(
            case=case.name,
            contestant=contestant.name,
            op=case.op,
            n=n,
            v=v,
            d=d,
            dtype=str(case.dtype).removeprefix("torch."),
            noise=given.noisy,
            k=given.k if case.op == "topk" else None,
            ours=contestant.ours,
            commit=self.machine.commit,
            machine=self.machine.processor,
            versions=" ".join(f"{name}={number}" for name, number in self.machine.versions.items()),
        )

"""What the GPU results are held to: each bar with its goal, and what a report says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from benchmarks.common.report import Report, Row, Section, share, size
from benchmarks.hopper import plans, rates
from benchmarks.step.cases import EPILOGUE

PAGE = "hopper.md"  # in the folder of the docs: its table "bars"
STEP, QUIET, TRAIN = (f"gpu-{op}-n16384-v28996-d768-bf16" for op in ("step", "step-quiet", "train"))
STATISTICS, FLOAT32 = "gpu-statistics-n16384-v28996-d768-bf16", "gpu-step-n16384-v28996-d768-fp32"
GRAPHS = tuple(f"gpu-graph-n{n}-v28996-d768-bf16" for n in (1, 8, 64))
CUDA, TRITON, PASS = "fused[cuda]", "fused[triton]", "statistics[cuda]"
SQUARE = rates.product_of(torch.bfloat16)
WORKSPACE_AND_MORE = 2**28 + 64 * 2**20  # bytes that a step may take beyond inputs and outputs

Find = Callable[[str, str], Row | None]  # of a case and a contestant, a row that has a time


@dataclass(frozen=True)
class Bar:
    what: str
    bar: float
    goal: float
    found: Callable[[Find, list[Row]], float | None]
    form: Callable[[float], str] = "{:.2f}".format
    at_most: bool = False

    def cells(self, find: Find, rows: list[Row]) -> tuple[str, ...] | None:
        found = self.found(find, rows)
        if found is None:
            return None
        sign, better = ("≤", float.__le__) if self.at_most else ("≥", float.__ge__)
        verdict = "goal" if better(found, self.goal) else "met" if better(found, self.bar) else "**missed**"
        return self.what, f"{sign} {self.form(self.bar)}", f"{sign} {self.form(self.goal)}", self.form(found), verdict


def of_gemm_rate(case: str, who: str) -> Callable[[Find, list[Row]], float | None]:
    """Flop of the case's products a second, over those of the square product."""

    def found(find: Find, rows: list[Row]) -> float | None:
        of = [row.gflop_per_s for row in (find(case, who), find(rates.CASE, SQUARE)) if row and row.gflop_per_s]
        return of[0] / of[1] if len(of) == 2 else None

    return found


def over(case: str, ours: Iterable[str], theirs: str) -> Callable[[Find, list[Row]], float | None]:
    """Their time over that of the fastest of ours."""

    def found(find: Find, rows: list[Row]) -> float | None:
        of_ours = [row.seconds for name in ours if (row := find(case, name)) and row.seconds]
        other = find(case, theirs)
        return other.seconds / min(of_ours) if of_ours and other and other.seconds else None

    return found


def cost_of_noise(find: Find, rows: list[Row]) -> float | None:
    loud, quiet = find(STEP, CUDA), find(QUIET, CUDA)
    return loud.seconds / quiet.seconds - 1 if loud and quiet and loud.seconds and quiet.seconds else None


def of_memory_rate(find: Find, rows: list[Row]) -> float | None:
    """The least of N = 1 to 64: bytes that the best of ours must read and write a second, over the machine's copy."""
    copy = find(rates.CASE, rates.COPY)
    best = [
        max((row.gb_per_s for row in rows if row.case == case and row.ours and row.gb_per_s), default=0.0)
        for case in GRAPHS
    ]
    return min(best) / copy.gb_per_s if copy and copy.gb_per_s and all(best) else None


def extra_memory(find: Find, rows: list[Row]) -> float | None:
    row = find(STEP, CUDA)
    return float(row.peak_extra_bytes) if row and row.peak_extra_bytes else None


OURS = (CUDA, TRITON, *plans.named(plans.ONE_KERNEL))
BARS = (
    Bar("cuda, step, of the measured GEMM rate", 0.60, 0.75, of_gemm_rate(STEP, CUDA), share),
    Bar("cuda, statistics, of the measured GEMM rate", 0.65, 0.80, of_gemm_rate(STATISTICS, PASS), share),
    Bar("cuda, what noise adds", 0.15, 0.10, cost_of_noise, share, at_most=True),
    Bar("best of ours, eager float32 over it", 12, 15, over(STEP, OURS, "eager, float32")),
    Bar("best of ours, eager bfloat16 over it", 3, 5, over(STEP, OURS, "eager")),
    Bar("best of ours, chunked with compiled epilogue over it", 1.1, 1.3, over(STEP, OURS, EPILOGUE)),
    Bar("triton, eager bfloat16 over it", 3, 4, over(STEP, [TRITON], "eager")),
    Bar("float32, eager without TF32 over it", 2, 3, over(FLOAT32, OURS, "eager")),
    Bar("forward and backward, compiled over it", 2, 3, over(TRAIN, OURS, "compiled")),
    Bar("N = 1 to 64 in a graph, of the copy's rate", 0.5, 0.8, of_memory_rate, share),
    Bar("cuda, step, peak extra memory", *2 * (WORKSPACE_AND_MORE,), extra_memory, size, at_most=True),
)


def section(report: Report) -> Section:
    """Of the bars that the report has something to say of."""
    timed = {(row.case, row.contestant): row for row in report.rows if row.seconds}

    def find(case: str, who: str) -> Row | None:
        return timed.get((case, who))

    cells = [found for bar in BARS if (found := bar.cells(find, report.rows))]
    note = "N = 16,384, V = 28,996, D = 768, bfloat16, noise, where nothing else is said."
    return Section("Bars", note, ("", "bar", "goal", "found", ""), cells)

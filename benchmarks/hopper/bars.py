"""What the GPU results are held to: each bar with its goal, and what a report says of it."""

from collections.abc import Callable, Iterable

import torch

from benchmarks.common.report import Report, Row, Section, share, size
from benchmarks.hopper import plans, rates
from benchmarks.step import cases
from benchmarks.step.cases import EPILOGUE

PAGE = "hopper.md"  # in the folder of the docs: its table "bars"
STEP, QUIET, TRAIN = (f"gpu-{op}-n16384-v28996-d768-bf16" for op in ("step", "step-quiet", "train"))
STATISTICS, FLOAT32 = "gpu-statistics-n16384-v28996-d768-bf16", "gpu-step-n16384-v28996-d768-fp32"
GRAPHS = tuple(f"gpu-graph-n{n}-v28996-d768-bf16" for n in (1, 8, 64))
CUDA, TRITON, PASS = "fused[cuda]", "fused[triton]", "statistics[cuda]"
SQUARE = rates.product_of(torch.bfloat16)
WORKSPACE_AND_MORE = 2**28 + 64 * 2**20  # bytes that a step may take beyond inputs and outputs

Find = Callable[[str, str], Row | None]  # of a case and a contestant, a row that has a time
Found = Callable[[Find], float | None]


def of_gemm_rate(case: str, who: str) -> Found:
    """Flop of the case's products a second, over those of the square product."""

    def found(find: Find) -> float | None:
        of = [row.gflop_per_s for row in (find(case, who), find(rates.CASE, SQUARE)) if row and row.gflop_per_s]
        return of[0] / of[1] if len(of) == 2 else None

    return found


def over(case: str, ours: Iterable[str], theirs: str) -> Found:
    """Their time over that of the fastest of ours."""

    def found(find: Find) -> float | None:
        of_ours = [row.seconds for name in ours if (row := find(case, name)) and row.seconds]
        other = find(case, theirs)
        return other.seconds / min(of_ours) if of_ours and other and other.seconds else None

    return found


def cost_of_noise(find: Find) -> float | None:
    loud, quiet = find(STEP, CUDA), find(QUIET, CUDA)
    return loud.seconds / quiet.seconds - 1 if loud and quiet and loud.seconds and quiet.seconds else None


def of_memory_rate(find: Find) -> float | None:
    """The least of N = 1 to 64: bytes that the best of ours must read and write a second, over the machine's copy."""
    copy = find(rates.CASE, rates.COPY)
    rows = [[find(case, who) for who in cases.CASES[case].contestants if "[" in who] for case in GRAPHS]
    best = [max((row.gb_per_s for row in of if row and row.gb_per_s), default=0.0) for of in rows]
    return min(best) / copy.gb_per_s if copy and copy.gb_per_s and all(best) else None


def extra_memory(find: Find) -> float | None:
    row = find(STEP, CUDA)
    return row.peak_extra_bytes if row else None


OURS = (CUDA, TRITON, *plans.named(plans.ONE_KERNEL))
TWO_DIGITS = "{:.2f}".format
AT_LEAST = (  # what, bar, goal, what a report has of it, how that is written
    ("cuda, step, of the measured GEMM rate", 0.60, 0.75, of_gemm_rate(STEP, CUDA), share),
    ("cuda, statistics, of the measured GEMM rate", 0.65, 0.80, of_gemm_rate(STATISTICS, PASS), share),
    ("best of ours, eager float32 over it", 12, 15, over(STEP, OURS, "eager, float32"), TWO_DIGITS),
    ("best of ours, eager bfloat16 over it", 3, 5, over(STEP, OURS, "eager"), TWO_DIGITS),
    ("best of ours, chunked with compiled epilogue over it", 1.1, 1.3, over(STEP, OURS, EPILOGUE), TWO_DIGITS),
    ("triton, eager bfloat16 over it", 3, 4, over(STEP, [TRITON], "eager"), TWO_DIGITS),
    ("float32, eager without TF32 over it", 2, 3, over(FLOAT32, OURS, "eager"), TWO_DIGITS),
    ("forward and backward, compiled over it", 2, 3, over(TRAIN, OURS, "compiled"), TWO_DIGITS),
    ("N = 1 to 64 in a graph, of the copy's rate", 0.5, 0.8, of_memory_rate, share),
)
AT_MOST = (
    ("cuda, what noise adds", 0.15, 0.10, cost_of_noise, share),
    ("cuda, step, peak extra memory", WORKSPACE_AND_MORE, WORKSPACE_AND_MORE, extra_memory, size),
)


def section(report: Report) -> Section:
    """Of the bars that the report has something to say of."""
    timed = {(row.case, row.contestant): row for row in report.rows if row.seconds}
    cells = []
    for sign, bars in (("≥", AT_LEAST), ("≤", AT_MOST)):
        for what, bar, goal, of, text in bars:
            found = of(lambda case, who: timed.get((case, who)))
            if found is None:
                continue
            reached = [found >= mark if sign == "≥" else found <= mark for mark in (goal, bar)]
            verdict = "goal" if reached[0] else "met" if reached[1] else "**missed**"
            cells.append((what, f"{sign} {text(bar)}", f"{sign} {text(goal)}", text(found), verdict))
    note = "N = 16,384, V = 28,996, D = 768, bfloat16, noise, where nothing else is said."
    return Section("Bars", note, ("", "bar", "goal", "found", ""), cells)

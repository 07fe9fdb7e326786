"""What `roofline` found: rates, stages, losses, targets; as tables on the screen, JSON, Markdown, and in the docs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.compare import ROOFLINE
from benchmarks.machine import Machine
from benchmarks.registry import EPILOGUE
from benchmarks.report import duration, size
from benchmarks.sections import Page, Section
from benchmarks.sections import fill as fill_page
from benchmarks.suite import WRONG

PAGE = "hopper.md"  # in the folder of the docs; see `fill`
NOT_YET = "not yet measured"

# What stands in the rows, in the order of the tables.
SCORES, GATHER, BOTH = "product x.E", "product W.E", "both products"  # the floor; BOTH with all scores at once
SQUARE, COPY, COPY_L2 = "square product", "copy", "copy in L2"
NEAREST, QUIET, STATISTICS = "nearest", "statistics, no noise", "statistics"
QUIET_WEIGHTS, WEIGHTS, WEIGHTED = "weights, no noise", "weights", "weights and product"
STEP, QUIET_STEP, GRAPH, KEEP = "fused[cuda]", "step, no noise", "step, one graph", "statistics, keep 4"
STAGES = (NEAREST, QUIET, STATISTICS, WEIGHTS, WEIGHTED, STEP)  # each has one thing more than the one before
ONE_PASS, TWO_PASSES = "both products in one pass", "score, then the library"  # of few rows, or of narrow ones
TRITON, ONE_KERNEL, EAGER = "fused[triton]", "fused, one kernel", "eager, float32"
TRITON_STATISTICS = "statistics[triton]"
COMPETITORS = (TRITON, ONE_KERNEL, EPILOGUE, EAGER)
LOSSES = {  # a stage, and what it has beyond the one before
    NEAREST: "product, bias, one argmax",
    QUIET: "logits, exp, second argmax",
    STATISTICS: "noise",
    WEIGHTS: "weights written, in blocks",
    WEIGHTED: "second product",
    STEP: "references, merging, far rows, launches",
}
EFFICIENCY, GOAL, STATISTICS_EFFICIENCY, NOISE_SHARE, EAGER_RATIO = 0.60, 0.75, 0.65, 0.15, 12.0


@dataclass(frozen=True)
class Shape:
    n: int
    d: int
    dtype: str = "bfloat16"
    v: int = 28_996

    @property
    def name(self) -> str:
        return f"n{self.n}-d{self.d}-{'bf16' if self.dtype == 'bfloat16' else 'fp16'}"


@dataclass(frozen=True)
class Plan:
    """Cases in the order in which they run: what is wanted first comes first."""

    many: tuple[Shape, ...] = (
        *(Shape(16_384, d) for d in (768, 384, 512, 1024)), Shape(16_384, 768, "float16"),
    )  # fmt: skip
    few: tuple[Shape, ...] = tuple(Shape(n, 768) for n in (1, 8, 32, 64, 512))
    crossing: tuple[Shape, ...] = (
        *(Shape(n, 768) for n in (32, 64, 128, 256)), *(Shape(16_384, d) for d in (128, 256)),
    )  # fmt: skip
    variants: tuple[Shape, ...] = (Shape(16_384, 768),)
    residents: tuple[int, ...] = (0, 4, 8, 10)
    clusters: tuple[int, ...] = (1, 2, 4)
    chunks: tuple[int, ...] = (1, 2, 4, 8)
    workspaces: tuple[int, ...] = tuple(2**bits for bits in (25, 26, 27, 28, 30))
    square: int = 8192
    copied: tuple[int, int] = (2**32, 2**24)  # bytes: more than L2, and less
    rotated: int = 2**28  # bytes of tables that a graph of few rows goes through: several times L2
    patience: float = 0.7  # seconds of timed runs of everybody

    @property
    def widths(self) -> list[Shape]:
        """As the tables have them."""
        return sorted(self.many, key=lambda shape: (shape.dtype, shape.d))

    @property
    def cases(self) -> list[tuple[str, Shape | None]]:
        """Their names, and what they are of."""
        first, *rest = [(f"many-{shape.name}", shape) for shape in self.many]
        few = [(f"few-{shape.name}", shape) for shape in self.few]
        crossing = [(f"crossing-{shape.name}", shape) for shape in self.crossing]
        variants = [(f"variants-{shape.name}", shape) for shape in self.variants]
        return [("machine", None), first, *rest[:1], *variants, *few, *rest[1:2], *crossing, *rest[2:]]


@dataclass(frozen=True)
class Row:
    """One thing that was timed in one case. Seconds and bytes; None where it was not measured."""

    case: str
    what: str
    n: int = 0
    v: int = 0
    d: int = 0
    dtype: str = ""
    seconds: float | None = None  # median
    quartiles: tuple[float, float] | None = None
    runs: int = 0
    launched_seconds: float | None = None  # few rows: of a call as it is; `seconds` are those of a graph's
    floor_seconds: float | None = None  # the products that it cannot do without, by the library, in the same run
    efficiency: float | None = None  # floor time over this time
    ratios: dict[str, float] = field(default_factory=dict)  # of ours: a competitor's time over this time
    flop_per_s: float | None = None  # of these products
    bytes_per_s: float | None = None  # of what must be read and written at least
    peak_extra_bytes: int | None = None
    error: float | None = None  # of the mean embedding: the largest, relative to float64
    note: str = ""  # why it is absent
    commit: str = ""
    machine: str = ""
    versions: str = ""


@dataclass(frozen=True)
class Result:
    machine: Machine | None
    tables: dict[str, str] = field(default_factory=dict)  # what the table of a case was
    rows: list[Row] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)

    def find(self, case: str, what: str) -> Row | None:
        return next((row for row in self.rows if (row.case, row.what) == (case, what)), None)

    def seconds(self, case: str, what: str) -> float | None:
        row = self.find(case, what)
        return row.seconds if row else None

    def of(self, case: str) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def failures(self) -> list[str]:
        """A target that is missed is no failure."""
        return [f"case {row.case!r}, {row.what!r}: {row.note}" for row in self.rows if row.note.startswith(WRONG)]


def load(path: Path) -> Result:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**(row | {"quartiles": row["quartiles"] and tuple(row["quartiles"])})) for row in content["rows"]]
    plan: dict[str, Any] = {
        name: tuple(Shape(**each) if isinstance(each, dict) else each for each in value)
        if isinstance(value, list)
        else value
        for name, value in content["plan"].items()
    }
    return Result(Machine(**content["machine"]), content["tables"], rows, Plan(**plan))


def stem_of(result: Result) -> str:
    return f"{ROOFLINE}{result.machine.stem if result.machine else ''}"


def page_of(result: Result) -> Page:
    machine = result.machine
    assert machine is not None
    return Page(
        f"The step on Hopper: {machine.processor}, commit {machine.commit}",
        machine,
        ["How numbers are taken: [README](../README.md). What the stages are: [docs](../../docs/hopper.md)."],
        result.failures(),
        [*sections(result), *(every_row(result, case) for case, _ in result.plan.cases if result.of(case))],
        STEP,
    )


def save(result: Result, folder: Path) -> list[Path]:
    """Writes the JSON and Markdown files; where they are."""
    return page_of(result).save(folder / stem_of(result), asdict(result))


def show(result: Result, console: Console) -> None:
    page_of(result).show(console)


def draw(result: Result, stem: Path) -> list[Path]:
    return []


def fill(result: Result, drawn: list[Path], docs: Path) -> list[Path]:
    """Puts the tables into the page; of what was not measured they say so."""
    tables = {name: section.markdown() for name, section in named_sections(result).items()}
    return fill_page(docs / PAGE, tables, result.machine, drawn, stem_of(result))


# Targets


@dataclass(frozen=True)
class Target:
    what: str
    wanted: float
    found: float | None
    form: Callable[[float], str]
    at_most: bool = False
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.found is None else (self.found <= self.wanted) == self.at_most or self.found == self.wanted

    def cells(self) -> tuple[str, ...]:
        wanted = f"{'≤' if self.at_most else '≥'} {self.form(self.wanted)}"
        if self.goal is not None:
            wanted += f" (goal {self.form(self.goal)})"
        if self.found is None:
            return self.what, wanted, NOT_YET, NOT_YET
        verdict = "met" if self.met else "missed"
        if self.met and self.goal is not None and self.found >= self.goal:
            verdict = "met, with its goal"
        return self.what, wanted, self.form(self.found), verdict


def targets(result: Result) -> list[Target]:
    main = next((shape for shape in result.plan.many if shape.d == 768), result.plan.many[0])
    case = f"many-{main.name}"

    def efficiency(what: str) -> float | None:
        row = result.find(case, what)
        return row.efficiency if row else None

    def percent(share: float) -> str:
        return f"{share:.0%}"

    def times(ratio: float) -> str:
        return f"{ratio:.2f}"

    with_noise, without = result.seconds(case, STEP), result.seconds(case, QUIET_STEP)
    share = (with_noise - without) / with_noise if with_noise and without else None
    found = [
        Target(f"step, D = {main.d}, of the GEMM rate", EFFICIENCY, efficiency(STEP), percent, goal=GOAL),
        Target(f"statistics, D = {main.d}, of the GEMM rate", STATISTICS_EFFICIENCY, efficiency(STATISTICS), percent),
        Target(f"noise, D = {main.d}, of the step", NOISE_SHARE, share, percent, at_most=True),
    ]
    for shape in result.plan.widths:
        if shape.dtype != main.dtype or shape.d > 768:
            continue
        row = result.find(f"many-{shape.name}", STEP)
        for other in (TRITON, ONE_KERNEL, EPILOGUE):
            ratio = row.ratios.get(other) if row else None
            found.append(Target(f"{other} over step, D = {shape.d}", 1.0, ratio, times))
    row = result.find(case, STEP)
    ratio = row.ratios.get(EAGER) if row else None
    return [*found, Target(f"{EAGER} over step, D = {main.d}", EAGER_RATIO, ratio, times)]


# Tables


def sections(result: Result) -> list[Section]:
    return list(named_sections(result).values())


def named_sections(result: Result) -> dict[str, Section]:
    """By the names of the tables in the page of the docs."""
    plan = result.plan
    return {
        "targets": Section(
            "Targets", "", ("target", "wanted", "found", ""), [target.cells() for target in targets(result)]
        ),
        "machine": Section("The machine", "", ("", "time", "rate"), [*machine_cells(result)]),
        "stages": Section("Stages", "Time, efficiency.", _columns(plan), [*stage_cells(result)]),
        "losses": Section(
            "Where the time goes", "Differences of stages, and their share of the step.", _columns(plan),
            [*loss_cells(result)],
        ),
        "competitors": Section(
            "Competitors", "Their time over that of the step; peak extra memory.", _columns(plan),
            [*competitor_cells(result)],
        ),
        "variants": Section(
            "Variants", "Of the plan, over what the backend picks.", ("variant", "time", "x picked"),
            [*variant_cells(result)],
        ),
        "few": Section(
            "Few rows", "Seconds of a graph's call; of a call as it is.",
            ("N", "step", "launched", "GB/s", "efficiency", *(f"x {name}" for name in COMPETITORS)),
            [*few_cells(result)],
        ),
        "crossing": Section(
            "Which kernel", "", ("N", "D", ONE_PASS, TWO_PASSES), [*crossing_cells(result)],
        ),
    }  # fmt: skip


def _columns(plan: Plan) -> tuple[str, ...]:
    return ("", *(f"D = {shape.d}{', fp16' if shape.dtype == 'float16' else ''}" for shape in plan.widths))


def machine_cells(result: Result) -> Iterable[tuple[str, ...]]:
    plan = result.plan
    for what in (SQUARE, COPY, COPY_L2):
        yield _rate(f"{what}, {_detail(plan, what)}", result.find("machine", what))
    for shape in plan.widths:
        for what in (SCORES, GATHER, BOTH):
            yield _rate(f"{what}, {shape.name}", result.find(f"many-{shape.name}", what))


def _detail(plan: Plan, what: str) -> str:
    return f"{plan.square:,}" if what == SQUARE else size(plan.copied[what == COPY_L2])


def _rate(name: str, row: Row | None) -> tuple[str, ...]:
    if row is None or row.seconds is None:
        return name, row.note if row else NOT_YET, "" if row else NOT_YET
    rate = f"{row.flop_per_s / 1e12:.0f} TFLOP/s" if row.flop_per_s else f"{(row.bytes_per_s or 0) / 1e12:.2f} TB/s"
    return name, duration(row.seconds), rate


def stage_cells(result: Result) -> Iterable[tuple[str, ...]]:
    rows = (NEAREST, QUIET, STATISTICS, KEEP, QUIET_WEIGHTS, WEIGHTS, WEIGHTED, QUIET_STEP, STEP, GRAPH)
    for what in rows:
        found = [result.find(f"many-{shape.name}", what) for shape in result.plan.widths]
        yield (what, *(_timed(row, lambda row: f", {row.efficiency:.2f}" if row.efficiency else "") for row in found))


def loss_cells(result: Result) -> Iterable[tuple[str, ...]]:
    for before, what in zip((None, *STAGES), STAGES, strict=False):
        cells = []
        for shape in result.plan.widths:
            case = f"many-{shape.name}"
            found = [result.seconds(case, name) if name else 0.0 for name in (before, what, STEP)]
            if any(seconds is None for seconds in found):
                cells.append(NOT_YET)
                continue
            first, last, whole = (seconds or 0.0 for seconds in found)
            cells.append(f"{(last - first) * 1e3:.3f} ms, {(last - first) / whole:.0%}")
        yield LOSSES[what], *cells


def competitor_cells(result: Result) -> Iterable[tuple[str, ...]]:
    for what in (STEP, *COMPETITORS):
        cells = []
        for shape in result.plan.widths:
            row, ours = (result.find(f"many-{shape.name}", name) for name in (what, STEP))
            memory = f", {size(row.peak_extra_bytes)}" if row and row.peak_extra_bytes is not None else ""
            ratio = "1.00" if what == STEP else f"{ours.ratios[what]:.2f}" if ours and what in ours.ratios else ""
            cells.append(f"{ratio}{memory}" if row and row.seconds else row.note if row else NOT_YET)
        yield what, *cells
    cells = []
    for shape in result.plan.widths:
        row = result.find(f"many-{shape.name}", STATISTICS)
        ratio_of = row.ratios.get(TRITON_STATISTICS) if row else None
        cells.append(f"{ratio_of:.2f}" if ratio_of else NOT_YET)
    yield f"{TRITON_STATISTICS} over statistics", *cells


def variant_cells(result: Result) -> Iterable[tuple[str, ...]]:
    plan = result.plan
    for shape in plan.variants:
        case = f"variants-{shape.name}"
        for what in variant_names(plan):
            row, picked = result.find(case, what), result.seconds(case, picked_for(what))
            ratio = f"{row.seconds / picked:.2f}" if row and row.seconds and picked else ""
            name = f"{what}, {shape.name}"
            yield (name, _timed(row), ratio or (NOT_YET if row is None else ""))


def variant_names(plan: Plan) -> list[str]:
    return [
        f"{STATISTICS}, as picked",
        *(f"{STATISTICS}, resident {number}" for number in plan.residents),
        *(f"{STATISTICS}, cluster {number}" for number in plan.clusters),
        *(f"{STATISTICS}, chunks {number}" for number in plan.chunks),
        "step, as picked",
        *(f"step, resident {number}" for number in plan.residents),
        *(f"step, cluster {number}" for number in plan.clusters),
        *(f"step, chunks {number}" for number in plan.chunks),
        *(f"step, workspace {number / 2**20:.0f} MiB" for number in plan.workspaces),
    ]


def picked_for(variant: str) -> str:
    return f"{variant.partition(',')[0]}, as picked"


def few_cells(result: Result) -> Iterable[tuple[str, ...]]:
    for shape in result.plan.few:
        row = result.find(f"few-{shape.name}", STEP)
        if row is None or row.seconds is None:
            yield (f"{shape.n}", *[row.note if row else NOT_YET] * 8)
            continue
        launched = duration(row.launched_seconds) if row.launched_seconds else ""
        numbers = (f"{(row.bytes_per_s or 0) / 1e9:,.0f}", f"{row.efficiency:.2f}" if row.efficiency else "")
        ratios = (f"{row.ratios[name]:.2f}" if name in row.ratios else "" for name in COMPETITORS)
        yield (f"{shape.n}", duration(row.seconds), launched, *numbers, *ratios)


def crossing_cells(result: Result) -> Iterable[tuple[str, ...]]:
    for shape in result.plan.crossing:
        case = f"crossing-{shape.name}"
        yield (
            f"{shape.n:,}",
            f"{shape.d}",
            *(_timed(result.find(case, what)) for what in (ONE_PASS, TWO_PASSES)),
        )


def every_row(result: Result, case: str) -> Section:
    header = ("what", "time", "spread", "runs", "efficiency", "rate", "memory", "error")
    cells = []
    for row in result.of(case):
        if row.seconds is None or row.quartiles is None:
            cells.append((row.what, row.note, *[""] * (len(header) - 2)))
            continue
        rate = f"{row.flop_per_s / 1e12:.0f} TFLOP/s" if row.flop_per_s else ""
        cells.append((
            row.what, duration(row.seconds), f"{(row.quartiles[1] - row.quartiles[0]) / row.seconds:.0%}",
            f"{row.runs}", f"{row.efficiency:.2f}" if row.efficiency else "", rate,
            "" if row.peak_extra_bytes is None else size(row.peak_extra_bytes),
            "" if row.error is None else f"{row.error:.1e}",
        ))  # fmt: skip
    return Section(case, f"Table: {result.tables[case]}." if case in result.tables else "", header, cells)


def _timed(row: Row | None, more: Callable[[Row], str] = lambda row: "") -> str:
    if row is None:
        return NOT_YET
    return row.note if row.seconds is None else f"{duration(row.seconds)}{more(row)}"

"""What the results of whole models share: rows, products, their files, and bars."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from benchmarks.common.machine import Machine
from benchmarks.common.report import size
from benchmarks.common.sections import Page, Section
from benchmarks.common.timing import Timing
from benchmarks.step.recall_report import GREY
from benchmarks.step.suite import WRONG

OURS = "fused"


@dataclass(frozen=True)
class Row:
    """One contestant in one case. Seconds and bytes; None where it was not measured."""

    case: str
    contestant: str
    n: int
    v: int
    d: int
    seconds: float | None = None  # of a step, or of a call; median
    quartiles: tuple[float, float] | None = None
    runs: int = 0
    tokens_per_s: float | None = None  # positions of targets, padding included
    ratios: dict[str, float] = field(default_factory=dict)  # another contestant's time over this time
    floor_seconds: float | None = None  # the matrix products at the rate of the machine's GEMM, in the same run
    efficiency: float | None = None  # floor time over this time
    vocabulary_seconds: float | None = None  # of `seconds`, what is spent on the vocabulary
    vocabulary_share: float | None = None
    peak_extra_bytes: int | None = None  # beyond what is there before: weights, table, optimizer state, batch
    peak_process_bytes: int | None = None  # on a GPU: of the allocator
    error: float | None = None  # the largest, relative to the eager step with our noise
    note: str = ""  # why it is absent, or why something was not measured
    commit: str = ""
    machine: str = ""
    versions: str = ""


OneRow = TypeVar("OneRow", bound=Row)


def with_times(
    row: OneRow, name: str, times: Mapping[str, Timing], vocabulary_seconds: float, floor_seconds: float
) -> OneRow:
    time = times[name]
    return replace(
        row,
        seconds=time.median,
        quartiles=time.quartiles,
        runs=time.runs,
        tokens_per_s=row.n / time.median,
        ratios={other: each.median / time.median for other, each in times.items() if other != name},
        floor_seconds=floor_seconds,
        efficiency=floor_seconds / time.median,
        vocabulary_seconds=vocabulary_seconds,
        vocabulary_share=vocabulary_seconds / time.median,
    )


@dataclass(frozen=True)
class Products:
    """Matrix products of a case, and what they are held against."""

    flop: int  # of a step, or of a call
    vocabulary_flop: int  # of these, those with the table
    flop_per_s: float  # of N x V x D in float32, in the same run
    network_flop_per_s: float  # in the network's type
    checked: int  # samples of the batch that check and count have seen

    @property
    def seconds(self) -> float:
        """The products alone."""
        network = (self.flop - self.vocabulary_flop) / self.network_flop_per_s
        return network + self.vocabulary_flop / self.flop_per_s


@dataclass(frozen=True)
class Result(Generic[OneRow]):
    ours: ClassVar[tuple[str, ...]] = (OURS,)  # contestants that may not be wrong

    machine: Machine
    tables: dict[str, str] = field(default_factory=dict)  # what the table of a case was
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    products: dict[str, Products] = field(default_factory=dict)
    rows: list[OneRow] = field(default_factory=list)

    def of(self, case: str) -> list[OneRow]:
        return [row for row in self.rows if row.case == case]

    def failures(self) -> list[str]:
        return [
            f"case {row.case!r}, contestant {row.contestant!r}: {row.note}"
            for row in self.rows
            if row.contestant in self.ours and row.note.startswith(WRONG)
        ]


def page(title: str, result: Result[Any], sections: list[Section]) -> Page:
    title = f"{title}: {result.machine.processor}, commit {result.machine.commit}"
    about = ["How numbers are taken: [README](../README.md)."]
    return Page(title, result.machine, about, result.failures(), sections, OURS)


def read(path: Path, row: type[OneRow]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of a result's file; and what all results have, as arguments."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        row(**(found | {"quartiles": found["quartiles"] and tuple(found["quartiles"])})) for found in content["rows"]
    ]
    products = {name: Products(**found) for name, found in content["products"].items()}
    given = {name: content[name] for name in ("tables", "cases")}
    return content, given | {"machine": Machine(**content["machine"]), "products": products, "rows": rows}


# Tables


def spread(row: Row) -> str:
    low, high = row.quartiles or (0.0, 0.0)
    return f"{(high - low) / row.seconds:.0%}" if row.seconds else ""


def slower(row: Row) -> str:
    """Its time over ours."""
    ratio = 1.0 if row.contestant == OURS else row.ratios.get(OURS) and 1 / row.ratios[OURS]
    return f"{ratio:.2f}" if ratio else ""


def of_memory(count: int | None) -> str:
    return "" if count is None else size(count)


def describe_model(case: Mapping[str, Any]) -> str:
    positions = f"{case['batch']} x {case['length']} positions after sources of {case['source']}"
    return f"{case['layers']} layers of width {case['hidden']}, {positions}"


# Pictures


def draw_bars(
    rows: list[OneRow],
    stem: Path,
    quantity: str,
    title: str,
    value_of: Callable[[OneRow], float | None],
    text_of: Callable[[float], str],
    colours: Mapping[str, str],
) -> Path:
    """A group of bars per case, one for every contestant in it."""
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row.case for row in rows))
    figure, axes = pyplot.subplots(figsize=(7.2, 1.2 + 0.22 * (len(rows) + len(cases))), dpi=150, layout="constrained")
    place, ticks = 0.0, []
    for case in cases:
        group = [row for row in rows if row.case == case]
        ticks.append(place + (len(group) - 1) / 2)
        for row in group:
            value = value_of(row)
            text = "not measured" if value is None else text_of(value)
            axes.barh(place, value or 0, color=colours.get(row.contestant, GREY), height=0.85)
            axes.annotate(text, (value or 0, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
            place += 1
        place += 1
    for name in dict.fromkeys(row.contestant for row in rows):
        axes.barh(0, 0, color=colours.get(name, GREY), label=name)
    axes.set_yticks(ticks, cases, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: text_of(value))
    axes.set_title(title, loc="left", fontsize=10)
    return finish(figure, [axes], stem, quantity, grid="x")


def finish(figure: Any, all_axes: list[Any], stem: Path, quantity: str, *, grid: str = "both") -> Path:
    from matplotlib import pyplot

    for axes in all_axes:
        axes.grid(which="major", axis=grid, color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    path = stem.with_name(f"{stem.name}-{quantity}.png")
    figure.savefig(path)
    pyplot.close(figure)
    return path


def matplotlib_missing() -> str | None:
    """Why there can be no pictures; else matplotlib is set up to draw into files."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed"
    matplotlib.use("agg")
    return None

"""What `training` found: rows and loss curves, as tables on the screen, JSON, Markdown, pictures, and in the docs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.compare import TRAINING
from benchmarks.machine import Machine
from benchmarks.recall_report import BLUE, BROWN, GREY
from benchmarks.report import duration, size
from benchmarks.sections import Page, Section
from benchmarks.sections import fill as fill_page
from benchmarks.suite import WRONG

PAGE = "training.md"  # in the folder of the docs; see `fill`
REFERENCE, OURS = "eager, our noise", "fused"
COMPARED, CURVE_MARGIN = 50, 1e-4  # the first steps of the loss curves, and what they may differ by, relatively
COLOURS = {"eager": BROWN, REFERENCE: "#d99a6c", OURS: BLUE, "fused + compile": "#08306b"}
LEAST_DIFFERENCE = 1e-9  # what is less is drawn here


@dataclass(frozen=True)
class Row:
    """One contestant in one case. Seconds and bytes; None where it was not measured."""

    case: str
    contestant: str
    n: int
    v: int
    d: int
    seconds: float | None = None  # of a step, median
    quartiles: tuple[float, float] | None = None
    runs: int = 0
    steps_per_s: float | None = None
    tokens_per_s: float | None = None  # positions of targets, padding included
    ratios: dict[str, float] = field(default_factory=dict)  # another contestant's time over this time
    floor_seconds: float | None = None  # the step's matrix products at the rate of the machine's GEMM, in the same run
    efficiency: float | None = None  # floor time over this time
    vocabulary_seconds: float | None = None  # the `smooth` calls of a step with their backward, alone
    vocabulary_share: float | None = None  # of the step
    peak_extra_bytes: int | None = None  # beyond weights, optimizer state and batch
    peak_process_bytes: int | None = None  # on a GPU: of the allocator
    error: float | None = None  # of the gradients, the largest of any parameter, relative to REFERENCE
    note: str = ""  # why it is absent, or why something was not measured
    commit: str = ""
    machine: str = ""
    versions: str = ""


@dataclass(frozen=True)
class Products:
    """Matrix products of a case, and what they are held against."""

    flop: int  # of a step
    vocabulary_flop: int  # of these, those of the `smooth` calls
    flop_per_s: float  # of N x V x D in float32, in the same run
    network_flop_per_s: float  # in the network's type
    checked: int  # samples of the batch that check and count have seen

    @property
    def seconds(self) -> float:
        """The products alone."""
        network = (self.flop - self.vocabulary_flop) / self.network_flop_per_s
        return network + self.vocabulary_flop / self.flop_per_s


@dataclass(frozen=True)
class Curves:
    """Losses of one model trained twice from the same weights on the same batches."""

    case: dict[str, Any]
    losses: dict[str, list[float]]

    def differences(self) -> list[float]:
        """Relative, by step."""
        return [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(*self._pair(), strict=True)]

    @property
    def worst(self) -> float:
        """The largest of the first steps."""
        return max(self.differences()[:COMPARED])

    def failures(self) -> list[str]:
        if all(difference < CURVE_MARGIN for difference in self.differences()[:COMPARED]):
            return []
        return [f"loss curves of {OURS!r} and {REFERENCE!r} differ by {self.worst:.2g} within {COMPARED} steps"]

    def _pair(self) -> tuple[list[float], list[float]]:
        return self.losses[OURS], self.losses[REFERENCE]


@dataclass(frozen=True)
class Result:
    machine: Machine
    tables: dict[str, str] = field(default_factory=dict)  # what the table of a case was
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    products: dict[str, Products] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)  # one, when it is done

    def of(self, case: str) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def failures(self) -> list[str]:
        wrong = [
            f"case {row.case!r}, contestant {row.contestant!r}: {row.note}"
            for row in self.rows
            if row.contestant == OURS and row.note.startswith(WRONG)
        ]
        return wrong + [failure for curves in self.curves for failure in curves.failures()]


def load(path: Path) -> Result:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**(row | {"quartiles": row["quartiles"] and tuple(row["quartiles"])})) for row in content["rows"]]
    products = {name: Products(**found) for name, found in content["products"].items()}
    curves = [Curves(**found) for found in content["curves"]]
    return Result(Machine(**content["machine"]), content["tables"], content["cases"], products, rows, curves)


def stem_of(result: Result) -> str:
    return f"{TRAINING}{result.machine.stem}"


def page_of(result: Result) -> Page:
    return Page(
        f"Training steps: {result.machine.processor}, commit {result.machine.commit}",
        result.machine,
        ["How numbers are taken: [README](../README.md)."],
        result.failures(),
        sections(result),
        OURS,
    )


def save(result: Result, folder: Path) -> list[Path]:
    """Writes the JSON and Markdown files; where they are."""
    return page_of(result).save(folder / stem_of(result), asdict(result))


def show(result: Result, console: Console) -> None:
    page_of(result).show(console)


# Tables


def sections(result: Result) -> list[Section]:
    return [*(case_section(result, name) for name in result.cases), *map(curve_section, result.curves)]


def case_section(result: Result, name: str) -> Section:
    header = (
        "contestant", "step", "spread", "steps/s", "tokens/s", f"x {OURS}", "efficiency", "vocabulary", "memory",
        "process", "error",
    )  # fmt: skip
    products = result.products.get(name)
    counted = f" {products.flop / 1e9:,.0f} Gflop of products a step." if products else ""
    note = f"{describe(result.cases[name])}.{counted} Table: {result.tables[name]}."
    return Section(name, note, header, [cells_of(row, len(header)) for row in result.of(name)])


def cells_of(row: Row, columns: int) -> tuple[str, ...]:
    if row.seconds is None or row.quartiles is None:
        return (row.contestant, row.note, *[""] * (columns - 2))
    slower = 1.0 if row.contestant == OURS else row.ratios.get(OURS) and 1 / row.ratios[OURS]
    return (
        row.contestant,
        duration(row.seconds),
        f"{(row.quartiles[1] - row.quartiles[0]) / row.seconds:.0%}",
        f"{row.steps_per_s:.3g}",
        f"{row.tokens_per_s:,.0f}",
        f"{slower:.2f}" if slower else "",
        f"{row.efficiency:.2f}",
        f"{row.vocabulary_share:.0%}",
        "" if row.peak_extra_bytes is None else size(row.peak_extra_bytes),
        "" if row.peak_process_bytes is None else size(row.peak_process_bytes),
        "" if row.error is None else f"{row.error:.1e}",
    )


def describe(case: dict[str, Any]) -> str:
    options = [
        text
        for name, text in (
            ("trainable_embeddings", "the table trains"),
            ("skip_padding", "half the positions padding, skipped"),
            ("bf16", "the network in bfloat16"),
        )
        if case[name]
    ]
    if case["self_conditioning"]:
        options.append(f"self-conditioning in {case['self_conditioning']:.0%} of the steps")
    return ", ".join(
        [
            f"{case['layers']} layers of width {case['hidden']}, {case['batch']} x {case['length']} positions after "
            f"sources of {case['source']}",
            *options,
        ]
    )


def curve_section(curves: Curves) -> Section:
    differences = curves.differences()
    marks = [step for step in (1, 10, 20, COMPARED, 100, 200, 400) if step < len(differences)] + [len(differences)]
    cells = [
        (f"{step}", *(f"{losses[step - 1]:.6f}" for losses in curves.losses.values()),
         f"{differences[step - 1]:.1e}", f"{max(differences[:step]):.1e}")
        for step in marks
    ]  # fmt: skip
    note = (
        f"{describe(curves.case)}; the same weights and batches. The largest relative difference within {COMPARED} "
        f"steps is {curves.worst:.1e}; {CURVE_MARGIN:.0e} is allowed."
    )
    return Section("Loss curves", note, ("step", *curves.losses, "difference", "largest so far"), cells)


# Pictures


def draw(result: Result, stem: Path) -> list[Path] | str:
    """The files drawn, or why there are none."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed"
    matplotlib.use("agg")
    timed = [row for row in result.rows if row.seconds]
    drawn = [_draw_bars(timed, stem, quantity) for quantity in ("steps", "memory") if timed]
    return drawn + [_draw_curves(curves, stem) for curves in result.curves]


def _draw_bars(rows: list[Row], stem: Path, quantity: str) -> Path:
    """A group of bars per case, one for every contestant in it."""
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row.case for row in rows))
    figure, axes = pyplot.subplots(figsize=(7.2, 1.2 + 0.22 * (len(rows) + len(cases))), dpi=150, layout="constrained")
    place, ticks = 0.0, []
    for case in cases:
        group = [row for row in rows if row.case == case]
        ticks.append(place + (len(group) - 1) / 2)
        for row in group:
            value = row.steps_per_s if quantity == "steps" else row.peak_extra_bytes
            text = "not measured" if value is None else f"{value:.2f}" if quantity == "steps" else size(int(value))
            axes.barh(place, value or 0, color=COLOURS.get(row.contestant, GREY), height=0.85)
            axes.annotate(text, (value or 0, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
            place += 1
        place += 1
    for name in dict.fromkeys(row.contestant for row in rows):
        axes.barh(0, 0, color=COLOURS.get(name, GREY), label=name)
    axes.set_yticks(ticks, cases, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    if quantity == "memory":
        axes.xaxis.set_major_formatter(lambda count, _: size(int(count)))
    axes.set_title(
        "Training steps per second" if quantity == "steps" else "Peak memory of a training step, beyond the weights",
        loc="left", fontsize=10,
    )  # fmt: skip
    return _finish(figure, [axes], stem, quantity)


def _draw_curves(curves: Curves, stem: Path) -> Path:
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7.2, 5), dpi=150, layout="constrained", sharex=True, height_ratios=(3, 2)
    )
    differences = curves.differences()
    steps = range(1, len(differences) + 1)
    for name, style, width in ((REFERENCE, "-", 3.0), (OURS, "--", 1.2)):
        above.plot(steps, curves.losses[name], style, color=COLOURS[name], linewidth=width, label=name)
    above.set_ylabel("loss")
    above.set_title(describe(curves.case), loc="left", fontsize=8)
    below.plot(steps, [max(difference, LEAST_DIFFERENCE) for difference in differences], ".", color=BLUE)
    below.plot((1, COMPARED), 2 * (CURVE_MARGIN,), "--", color=GREY, linewidth=1.2, label="allowed")
    below.set_yscale("log")
    below.set_ylabel(f"relative difference\n(none: at {LEAST_DIFFERENCE:.0e})")
    below.set_xlabel("training step")
    return _finish(figure, [above, below], stem, "curves")


def _finish(figure: Any, all_axes: list[Any], stem: Path, quantity: str) -> Path:
    from matplotlib import pyplot

    for axes in all_axes:
        axes.grid(which="major", axis="both" if quantity == "curves" else "x", color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    path = stem.with_name(f"{stem.name}-{quantity}.png")
    figure.savefig(path)
    pyplot.close(figure)
    return path


# The page of the docs


def fill(result: Result, drawn: list[Path], docs: Path) -> list[Path]:
    """Puts pictures and the tables of the cases and "curves" into the page; what was written."""
    tables = {name: case_section(result, name).markdown() for name in result.cases}
    if result.curves:
        tables["curves"] = curve_section(result.curves[0]).markdown()
    return fill_page(docs / PAGE, tables, result.machine, drawn, stem_of(result))

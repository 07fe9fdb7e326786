"""What `training` found: rows and loss curves, as tables on the screen, JSON, Markdown, pictures, and in the docs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.compare import TRAINING
from benchmarks.common.report import duration, size
from benchmarks.common.sections import Page, Section
from benchmarks.common.sections import fill as fill_page
from benchmarks.models import model_report
from benchmarks.models.model_report import (
    OURS,
    describe_model,
    draw_bars,
    finish,
    matplotlib_missing,
    of_memory,
    slower,
    spread,
)
from benchmarks.step.recall_report import BLUE, BROWN, GREY

PAGE = "training.md"  # in the folder of the docs; see `fill`
REFERENCE = "eager, our noise"
COMPARED, CURVE_MARGIN = 50, 1e-4  # the first steps of the loss curves, and what they may differ by, relatively
COLOURS = {"eager": BROWN, REFERENCE: "#d99a6c", OURS: BLUE, "fused + compile": "#08306b"}
LEAST_DIFFERENCE = 1e-9  # what is less is drawn here


@dataclass(frozen=True)
class Row(model_report.Row):
    """`seconds` are those of a step."""

    steps_per_s: float | None = None


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
class Result(model_report.Result[Row]):
    curves: list[Curves] = field(default_factory=list)  # one, when it is done

    def failures(self) -> list[str]:
        return super().failures() + [failure for curves in self.curves for failure in curves.failures()]


def load(path: Path) -> Result:
    content, given = model_report.read(path, Row)
    return Result(**given, curves=[Curves(**found) for found in content["curves"]])


def stem_of(result: Result) -> str:
    return f"{TRAINING}{result.machine.stem}"


def page_of(result: Result) -> Page:
    return model_report.page("Training steps", result, sections(result))


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
    return (
        row.contestant,
        duration(row.seconds),
        spread(row),
        f"{row.steps_per_s:.3g}",
        f"{row.tokens_per_s:,.0f}",
        slower(row),
        f"{row.efficiency:.2f}",
        f"{row.vocabulary_share:.0%}",
        of_memory(row.peak_extra_bytes),
        of_memory(row.peak_process_bytes),
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
    return ", ".join([describe_model(case), *options])


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
    if missing := matplotlib_missing():
        return missing
    timed = [row for row in result.rows if row.seconds]
    drawn = [_draw_bars(timed, stem, quantity) for quantity in ("steps", "memory") if timed]
    return drawn + [_draw_curves(curves, stem) for curves in result.curves]


def _draw_bars(rows: list[Row], stem: Path, quantity: str) -> Path:
    if quantity == "steps":
        title = "Training steps per second"
        return draw_bars(rows, stem, quantity, title, lambda row: row.steps_per_s, lambda rate: f"{rate:.2f}", COLOURS)
    title = "Peak memory of a training step, beyond the weights"
    return draw_bars(rows, stem, quantity, title, lambda row: row.peak_extra_bytes, lambda b: size(int(b)), COLOURS)


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
    return finish(figure, [above, below], stem, "curves")


# The page of the docs


def fill(result: Result, drawn: list[Path], docs: Path) -> list[Path]:
    """Puts pictures and the tables of the cases and "curves" into the page; what was written."""
    tables = {name: case_section(result, name).markdown() for name in result.cases}
    if result.curves:
        tables["curves"] = curve_section(result.curves[0]).markdown()
    return fill_page(docs / PAGE, tables, result.machine, drawn, stem_of(result))

"""What all pictures share. matplotlib is imported when one is drawn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.report import Report, Row, duration, size

BLUE, BROWN, GREY = "#1d6fb8", "#b3541e", "#6b6b6b"


def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.2, 4.4), **options: Any) -> tuple[Any, Any]:
    """A figure and its axes. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, dpi=150, layout="constrained", **options)
    return figure, axes


def finish(figure: Any, path: Path, *, grid: str = "both", font: int = 9, columns: int = 1) -> Path:
    from matplotlib import pyplot

    for axes in figure.axes:
        axes.grid(which="major", axis=grid, color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=font, ncols=columns)
    figure.savefig(path)
    pyplot.close(figure)
    return path


@dataclass(frozen=True)
class Bars:
    """Of what a group of bars per case is, one for every contestant in it that was timed."""

    title: str
    value: Callable[[Row], float | None]
    text: Callable[[float], str]


TIME = Bars("Time", lambda row: row.seconds, duration)
MEMORY = Bars("Peak memory beyond what is there before", lambda row: row.peak_extra_bytes, size)


def draw_bars(report: Report, stem: Path, colours: Mapping[str, str], **quantities: Bars) -> list[Path]:
    """One picture for each quantity; none where nothing was timed."""
    rows = [row for row in report.rows if row.seconds]
    cases, drawn = list(dict.fromkeys(row.case for row in rows)), []
    for quantity, bars in quantities.items() if rows else ():
        figure, axes = panels(size=(7.2, 1.2 + 0.22 * (len(rows) + len(cases))))
        y, ticks = 0, []
        for case in cases:
            timed = [row for row in rows if row.case == case]
            ticks.append(y + (len(timed) - 1) / 2)
            for row in timed:
                value = bars.value(row)
                text = "not measured" if value is None else bars.text(value)
                axes.barh(y, value or 0, color=colours.get(row.contestant, GREY), height=0.85)
                axes.annotate(text, (value or 0, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
                y += 1
            y += 1
        for name in dict.fromkeys(row.contestant for row in rows):
            axes.barh(0, 0, color=colours.get(name, GREY), label=name)
        axes.set_yticks(ticks, cases, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.xaxis.set_major_formatter(lambda value, _, text=bars.text: text(value))
        axes.set_title(bars.title, loc="left", fontsize=10)
        drawn.append(finish(figure, stem.with_name(f"{stem.name}-{quantity}.png"), grid="x"))
    return drawn

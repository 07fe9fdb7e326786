"""What all pictures share. matplotlib is imported when one is drawn."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.report import Report, Row

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


def bars(
    report: Report, path: Path, title: str, value_of: Callable[[Row], float | None], text_of: Callable[[float], str],
    colours: Mapping[str, str],
) -> list[Path]:  # fmt: skip
    """A group of bars per case, one for every contestant in it that was timed."""
    rows = [row for row in report.rows if row.seconds]
    cases = list(dict.fromkeys(row.case for row in rows))
    if not rows:
        return []
    figure, axes = panels(size=(7.2, 1.2 + 0.22 * (len(rows) + len(cases))))
    y, ticks = 0.0, []
    for case in cases:
        group = [row for row in rows if row.case == case]
        ticks.append(y + (len(group) - 1) / 2)
        for row in group:
            value = value_of(row)
            text = "not measured" if value is None else text_of(value)
            axes.barh(y, value or 0, color=colours.get(row.contestant, GREY), height=0.85)
            axes.annotate(text, (value or 0, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
            y += 1
        y += 1
    for name in dict.fromkeys(row.contestant for row in rows):
        axes.barh(0, 0, color=colours.get(name, GREY), label=name)
    axes.set_yticks(ticks, cases, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: text_of(value))
    axes.set_title(title, loc="left", fontsize=10)
    return [finish(figure, path, grid="x")]

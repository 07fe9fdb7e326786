"""Two pictures of the sweep over V: time and peak memory."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.report import Row, duration, size

COLOURS = {"eager": "#b3541e", "chunked": "#6b6b6b", "fused": "#1d6fb8", "products": "#a0a0a0"}
LABELS = {
    "eager": "eager PyTorch",
    "chunked": "chunked PyTorch",
    "fused": "smoothie_kernels",
    "products": "the two matrix products alone",
}


def draw(rows: list[Row], stem: Path) -> list[Path] | str:
    """The files drawn, or why there are none."""
    sweep = [row for row in rows if row.case.startswith("sweep-") and row.seconds]
    if len({row.v for row in sweep}) < 2:
        return "the sweep over V was not run"
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed"
    matplotlib.use("agg")
    return [_draw(sweep, stem, quantity) for quantity in ("time", "memory")]


def _draw(rows: list[Row], stem: Path, quantity: str) -> Path:
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    def value(row: Row) -> float | None:
        return row.seconds if quantity == "time" else row.peak_extra_bytes

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    ends = {}
    for name, label in LABELS.items():
        points = sorted((row.v, y) for row in rows if row.contestant == name and (y := value(row)))
        if points:
            style = "--" if name == "products" else "o-"
            axes.plot(*zip(*points, strict=True), style, color=COLOURS[name], markersize=4, linewidth=1.6, label=label)
            ends[name] = points[-1]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [2**k for k in range(10, 19, 2)]
    axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    text = (lambda y, _: duration(y)) if quantity == "time" else (lambda y, _: size(int(y)))
    axes.yaxis.set_major_formatter(FuncFormatter(text))
    axes.set_xlabel("vocabulary V")
    axes.set_ylabel("time of one step" if quantity == "time" else "peak memory beyond the inputs")
    first = rows[0]
    axes.set_title(f"One noisy step, N = {first.n}, D = {first.d}, {first.dtype}", loc="left", fontsize=10)
    axes.grid(which="major", color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    path = stem.with_name(f"{stem.name}-{quantity}.png")
    figure.savefig(path)
    pyplot.close(figure)
    return path

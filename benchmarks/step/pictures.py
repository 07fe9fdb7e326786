"""Two pictures of the sweep over V: time and peak memory."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.pictures import BLUE, BROWN, GREY, finish, panels
from benchmarks.common.report import Report, Row, duration, size

LINES = {  # contestants: label, colour, style
    "eager": ("eager PyTorch", BROWN, "o-"),
    "chunked": ("chunked PyTorch", GREY, "o-"),
    "fused": ("smoothie_kernels", BLUE, "o-"),
    "products": ("the two matrix products alone", "#a0a0a0", "--"),
}


def draw(report: Report, stem: Path) -> list[Path]:
    """The files drawn; none where the sweep was not run."""
    sweep = [row for row in report.rows if row.case.startswith("sweep-") and row.seconds]
    if len({row.v for row in sweep}) < 2:
        return []
    return [_draw(sweep, stem.with_name(f"{stem.name}-{quantity}.png"), quantity) for quantity in ("time", "memory")]


def _draw(rows: list[Row], path: Path, quantity: str) -> Path:
    in_time = quantity == "time"
    figure, axes = panels()
    for name, (label, colour, style) in LINES.items():
        values = {row.v: row.seconds if in_time else row.peak_extra_bytes for row in rows if row.contestant == name}
        if points := sorted((v, value) for v, value in values.items() if value):
            axes.plot(*zip(*points, strict=True), style, color=colour, markersize=4, linewidth=1.6, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [2**k for k in range(10, 19, 2)]
    axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: duration(value) if in_time else size(value))
    axes.set_xlabel("vocabulary V")
    axes.set_ylabel("time of one step" if in_time else "peak memory beyond the inputs")
    first = rows[0]
    axes.set_title(f"One noisy step, N = {first.n}, D = {first.d}, {first.dtype}", loc="left", fontsize=10)
    return finish(figure, path)

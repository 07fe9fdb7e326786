"""What `recall.measure` found, as tables on the screen, JSON, Markdown, pictures, and tables in a page of the docs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from benchmarks.common.compare import RECALL
from benchmarks.common.sections import Page, Section
from benchmarks.common.sections import fill as fill_page
from benchmarks.step.recall import DEVIATIONS, SLACK, BucketRecall, Result
from smoothie_kernels.recall import expected_recall, pick_buckets

PAGE = "topk.md"  # in the folder of the docs; see `fill`
PAGE_K = 64  # whose buckets the page shows
T = TypeVar("T")
BLUE, BROWN, GREY = "#1d6fb8", "#b3541e", "#6b6b6b"
TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
LEAST_ERROR = 1e-3  # what is less is not drawn
LINE = {"markersize": 3.5, "linewidth": 1.4}
SHADES = ("#9ecae9", "#6baed6", "#3787c0", "#1460a8", "#08306b")  # of more and more tokens


def stem_of(result: Result) -> str:
    return f"{RECALL}{result.machine.stem}"


def page_of(result: Result) -> Page:
    return Page(
        f"Top-k: recall, weight, error. {result.machine.processor}, commit {result.machine.commit}",
        result.machine,
        [
            f"{result.plan.rows} rows at every time; how numbers are taken: [README](../README.md).",
            *(f"V = {v:,}: {note}" for v, note in result.tables.items()),
        ],
        result.failures(),
        sections(result),
    )


def save(result: Result, folder: Path) -> list[Path]:
    """Writes the JSON and Markdown files; where they are."""
    return page_of(result).save(folder / stem_of(result), asdict(result))


def show(result: Result, console: Console) -> None:
    page_of(result).show(console)


# Pictures


def draw(result: Result, stem: Path) -> list[Path] | str:
    """The files drawn, or why there are none."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed"
    matplotlib.use("agg")
    return [_draw(result, stem, quantity) for quantity in ("recall", "mass", "error")]


def _draw(result: Result, stem: Path, quantity: str) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    {"recall": _draw_recall, "mass": _draw_mass, "error": _draw_errors}[quantity](axes, result)
    axes.set_xscale("function", functions=(lambda t: abs(t) ** 0.5, lambda root: root**2))
    axes.set_xlim(0, 1.02)
    axes.set_xticks(TICKS, [f"{t:g}" for t in TICKS])
    axes.set_xlabel("time t of the schedule")
    axes.grid(which="major", color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, ncols=2 if quantity == "error" else 1)
    path = stem.with_name(f"{stem.name}-{quantity}.png")
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _draw_recall(axes: Any, result: Result) -> None:
    for (buckets, keep), marker in zip(in_order((row.buckets, row.keep) for row in result.curve), "so", strict=False):
        rows = [row for row in result.curve if (row.buckets, row.keep) == (buckets, keep)]
        name = f"{buckets} buckets, {keep} of each"
        for what, style, colour in (
            ("strided", f"{marker}-", BLUE),
            ("expected", "--", GREY),
            ("contiguous", f"{marker}-", BROWN),
        ):
            recall = [getattr(row, what) for row in rows]
            axes.plot([row.t for row in rows], recall, style, color=colour, label=f"{what}, {name}", **LINE)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of the exact top-k that is found")
    _title(axes, result, f"Recall of buckets of tokens, K = {result.plan.recall_k}")


def _draw_mass(axes: Any, result: Result) -> None:
    for k, colour in zip(in_order(row.k for row in result.mass), SHADES, strict=False):
        rows = [row for row in result.mass if row.k == k]
        axes.plot([row.t for row in rows], [row.kept for row in rows], "o-", color=colour, label=f"K = {k:,}", **LINE)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_ylabel("softmax weight of the top-k tokens")
    _title(axes, result, "What the top-k hold")


def _draw_errors(axes: Any, result: Result) -> None:
    for smooth, style in (("topk", "--"), ("topk+mean", "-")):
        ks = in_order(row.k for row in result.errors if row.smooth == smooth)
        for k, colour in zip(ks, SHADES, strict=False):
            points = [(row.t, row.error) for row in result.errors if (row.smooth, row.k) == (smooth, k)]
            label = f"{smooth}, K = {k:,}"
            axes.plot(*zip(*points, strict=True), f"o{style}", color=colour, label=label, **LINE)
    axes.set_yscale("log")
    axes.set_ylim(LEAST_ERROR, 4)
    axes.yaxis.set_major_formatter(lambda error, _: f"{error:g}")
    axes.set_ylabel('relative distance from smooth="full"')
    _title(axes, result, "Error of the mean embedding")


def _title(axes: Any, result: Result, title: str) -> None:
    v = result.v
    axes.set_title(f"{title}; V = {v:,}, {result.plan.rows} rows", loc="left", fontsize=10)


# Tables


def sections(result: Result) -> list[Section]:
    by_size = [section for v in result.tables for section in (library_section(result, v), bucket_section(result, v))]
    return [*by_size, mass_section(result), error_section(result)]


def library_section(result: Result, v: int) -> Section:
    """One line per K and target."""
    rows = [row for row in result.library if row.v == v]
    times = in_order(row.t for row in rows)
    found = {(row.k, row.target, row.t): row.recall for row in rows}
    cells = []
    for k, target in dict.fromkeys((row.k, row.target) for row in rows):
        buckets, expected = picked(v, k, target)
        recall = (f"{found[k, target, t]:.4f}" for t in times)
        cells.append((f"{k}", f"{target}", buckets, f"{expected:.4f}", *recall))
    note = (
        "Share of the library's exact top-k that its approximate top-k finds, at these times of the schedule. Buckets "
        f"x how many logits each keeps. Red: below recall_target by more than {SLACK}, or {DEVIATIONS} standard errors "
        "where these are more."
    )
    return Section(
        f"The library, V = {v:,}", note, ("K", "recall_target", "buckets", "expected", *labels(times)), cells
    )


def lowest_section(result: Result, v: int) -> Section:
    """What the page shows of `library_section`: one line per K, a column per target, the lowest of all times."""
    rows = [row for row in result.library if row.v == v]
    targets = in_order(row.target for row in rows)

    def cell(k: int, target: float) -> str:
        buckets, expected = picked(v, k, target)
        found = min(row.recall for row in rows if (row.k, row.target) == (k, target))
        return f"{buckets}: {expected:.3f}, {found:.3f}"

    cells = [(f"{k}", *(cell(k, target) for target in targets)) for k in in_order(row.k for row in rows)]
    return Section("The library", "", ("K", *(f"recall_target {target}" for target in targets)), cells)


def picked(v: int, k: int, target: float) -> tuple[str, float]:
    """The library's buckets x how many logits each keeps, and what share they are expected to find."""
    found = pick_buckets(v, k, target)
    if found is None:
        return "exact", 1.0
    return f"{found.buckets} x {found.keep}", expected_recall(v, k, *found)


def bucket_section(result: Result, v: int, only_k: int | None = None) -> Section:
    """One line per K and buckets."""
    rows = [row for row in result.buckets if row.v == v and only_k in (None, row.k)]
    times = in_order(row.t for row in rows)
    found = {(row.k, row.buckets, row.keep, row.t): row for row in rows}

    def cell(row: BucketRecall) -> str:
        return f"{row.strided:.3f}, {row.contiguous:.3f}"

    cells = [
        (f"{k}", f"{buckets} x {keep}", f"{expected_recall(v, k, buckets, keep):.3f}",
         *(cell(found[k, buckets, keep, t]) for t in times))
        for k, buckets, keep in dict.fromkeys((row.k, row.buckets, row.keep) for row in rows)
    ]  # fmt: skip
    note = (
        "Share of the exact top-k that buckets find: strided ones (token j in bucket j mod B), then contiguous ones. "
        f"Red: strided ones below what is expected by more than {SLACK}, or {DEVIATIONS} standard errors."
    )
    return Section(f"Buckets, V = {v:,}", note, ("K", "buckets", "expected", *labels(times)), cells)


def mass_section(result: Result) -> Section:
    ks, kept = in_order(row.k for row in result.mass), {(row.t, row.k): row.kept for row in result.mass}
    cells = [(f"{t:g}", *(percent(kept[t, k]) for k in ks)) for t in marked(result, (row.t for row in result.mass))]
    note = f"Softmax weight of the K largest of {result.v:,} logits: 1 - tail_mass, the mean over rows."
    return Section("Weight of the top-k", note, ("t", *(f"K = {k:,}" for k in ks)), cells)


def error_section(result: Result) -> Section:
    error = {(row.t, row.smooth, row.k): row.error for row in result.errors}
    columns = in_order((row.smooth, row.k) for row in result.errors)
    cells = [
        (f"{t:g}", *(significant(error[t, smooth, k]) for smooth, k in columns))
        for t in marked(result, (row.t for row in result.errors))
    ]
    note = (
        'Distance of the mean embeddings from those of smooth="full": relative, Frobenius, over all rows. Exact top-k.'
    )
    return Section("Error of the mean", note, ("t", *(f"{smooth}, {k:,}" for smooth, k in columns)), cells)


def marked(result: Result, times: Iterable[float]) -> list[float]:
    return [t for t in in_order(times) if t in result.plan.marks]


def in_order(values: Iterable[T]) -> list[T]:
    """Every value once."""
    return list(dict.fromkeys(values))


def labels(times: list[float]) -> list[str]:
    return [f"t = {t:g}" for t in times]


def percent(share: float) -> str:
    return f"{min(share, 1):.1%}"


def significant(error: float) -> str:
    return "< 0.0001" if error < 1e-4 else f"{error:.3g}"


# The page of the docs


def fill(result: Result, drawn: list[Path], docs: Path) -> list[Path]:
    """Puts pictures and tables into the page; what was written."""
    v = result.v
    tables = {
        "library": lowest_section(result, v).markdown(),
        "buckets": bucket_section(result, v, PAGE_K).markdown(),
        "mass": mass_section(result).markdown(),
        "error": error_section(result).markdown(),
    }
    return fill_page(docs / PAGE, tables, result.machine, drawn, stem_of(result))

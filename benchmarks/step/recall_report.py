"""What `recall.measure` found: tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common.machine import Machine
from benchmarks.common.pictures import BLUE, BROWN, GREY, finish, panels
from benchmarks.common.report import Report, Section
from benchmarks.step.recall import DEVIATIONS, SLACK, Result
from smoothie_kernels.recall import expected_recall, pick_buckets

PAGE = "topk.md"
SHOWN_K = 64  # whose buckets are shown; the JSON has all
T = TypeVar("T")
TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
LEAST_ERROR = 1e-3  # what is less is not drawn
LINE = {"markersize": 3.5, "linewidth": 1.4}
SHADES = ("#9ecae9", "#6baed6", "#3787c0", "#1460a8", "#08306b")  # of more and more tokens


def report_of(result: Result, machine: Machine) -> Report:
    facts = [f"{result.plan.rows} rows at every time.", *(f"V = {v:,}: {note}." for v, note in result.tables.items())]
    sections: dict[str, Section] = {}
    for v in result.tables:
        more = "" if v == result.v else f"-{v}"  # the page of the docs has those of the table itself
        sections |= {f"library{more}": library_section(result, v), f"buckets{more}": bucket_section(result, v)}
    sections |= {"mass": mass_section(result), "error": error_section(result)}
    title = "Top-k: recall, weight, error"
    return Report(
        machine, title, "recall-", facts, more=sections, content=asdict(result), red=result.failures()
    )  # fmt: skip


# Tables


def library_section(result: Result, v: int) -> Section:
    """One line per K, a column per target."""
    rows = [row for row in result.library if row.v == v]
    targets = in_order(row.target for row in rows)

    def cell(k: int, target: float) -> str:
        lowest = min(row.recall for row in rows if (row.k, row.target) == (k, target))
        found = pick_buckets(v, k, target)
        if found is None:
            return f"exact: 1.000, {lowest:.3f}"
        return f"{found.buckets} x {found.keep}: {expected_recall(v, k, *found):.3f}, {lowest:.3f}"

    cells = [(f"{k}", *(cell(k, target) for target in targets)) for k in in_order(row.k for row in rows)]
    note = (
        "Buckets x how many logits each keeps: the share of the library's exact top-k that is expected, and the lowest "
        f"that was found at any time of the schedule. Red: below recall_target by more than {SLACK}, or {DEVIATIONS} "
        "standard errors where these are more."
    )
    return Section(f"The library, V = {v:,}", note, ("K", *(f"recall_target {target}" for target in targets)), cells)


def bucket_section(result: Result, v: int) -> Section:
    """One line per number of buckets."""
    rows = [row for row in result.buckets if (row.v, row.k) == (v, SHOWN_K)]
    times, found = in_order(row.t for row in rows), {(row.buckets, row.keep, row.t): row for row in rows}
    cells: list[tuple[str, ...]] = []
    for buckets, keep in in_order((row.buckets, row.keep) for row in rows):
        shares = (f"{found[buckets, keep, t].strided:.3f}, {found[buckets, keep, t].contiguous:.3f}" for t in times)
        expected = expected_recall(v, SHOWN_K, buckets, keep)
        cells.append((f"{SHOWN_K}", f"{buckets} x {keep}", f"{expected:.3f}", *shares))
    note = (
        "Share of the exact top-k that buckets find: strided ones (token j in bucket j mod B), then contiguous ones. "
        f"Red: strided ones below what is expected by more than {SLACK}, or {DEVIATIONS} standard errors."
    )
    header = ("K", "buckets", "expected", *(f"t = {t:g}" for t in times))
    return Section(f"Buckets, V = {v:,}", note, header, cells)


def mass_section(result: Result) -> Section:
    kept, ks = {(row.t, row.k): row.kept for row in result.mass}, in_order(row.k for row in result.mass)
    cells = [(f"{t:g}", *(f"{min(kept[t, k], 1):.1%}" for k in ks)) for t in marked(result)]
    note = f"Softmax weight of the K largest of {result.v:,} logits: 1 - tail_mass, the mean over rows."
    return Section("Weight of the top-k", note, ("t", *(f"K = {k:,}" for k in ks)), cells)


def error_section(result: Result) -> Section:
    error = {(row.t, row.smooth, row.k): row.error for row in result.errors}
    columns = in_order((row.smooth, row.k) for row in result.errors)

    def cell(found: float) -> str:
        return "< 0.0001" if found < 1e-4 else f"{found:.3g}"

    cells = [(f"{t:g}", *(cell(error[t, smooth, k]) for smooth, k in columns)) for t in marked(result)]
    note = (
        'Distance of the mean embeddings from those of smooth="full": relative, Frobenius, over all rows. Exact top-k.'
    )
    return Section("Error of the mean", note, ("t", *(f"{smooth}, {k:,}" for smooth, k in columns)), cells)


def marked(result: Result) -> list[float]:
    return [t for t in in_order(row.t for row in result.mass) if t in result.plan.marks]


def in_order(values: Iterable[T]) -> list[T]:
    """Every value once."""
    return list(dict.fromkeys(values))


# Pictures


def draw(result: Result, stem: Path) -> list[Path]:
    """The files drawn."""
    quantities = {"recall": _draw_recall, "mass": _draw_mass, "error": _draw_errors}
    drawn = []
    for quantity, draw_lines in quantities.items():
        figure, axes = panels()
        title = draw_lines(axes, result)
        axes.set_title(f"{title}; V = {result.v:,}, {result.plan.rows} rows", loc="left", fontsize=10)
        axes.set_xscale("function", functions=(lambda t: abs(t) ** 0.5, lambda root: root**2))
        axes.set_xlim(0, 1.02)
        axes.set_xticks(TICKS, [f"{t:g}" for t in TICKS])
        axes.set_xlabel("time t of the schedule")
        path = stem.with_name(f"{stem.name}-{quantity}.png")
        drawn.append(finish(figure, path, columns=2 if quantity == "error" else 1))
    return drawn


def _draw_recall(axes: Any, result: Result) -> str:
    for (buckets, keep), marker in zip(in_order((row.buckets, row.keep) for row in result.curve), "so", strict=False):
        rows = [row for row in result.curve if (row.buckets, row.keep) == (buckets, keep)]
        for what, style, colour in (
            ("strided", f"{marker}-", BLUE), ("expected", "--", GREY), ("contiguous", f"{marker}-", BROWN),
        ):  # fmt: skip
            label = f"{what}, {buckets} buckets, {keep} of each"
            points = zip(*((row.t, getattr(row, what)) for row in rows), strict=True)
            axes.plot(*points, style, color=colour, label=label, **LINE)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of the exact top-k that is found")
    return f"Recall of buckets of tokens, K = {result.plan.recall_k}"


def _draw_mass(axes: Any, result: Result) -> str:
    for k, colour in zip(in_order(row.k for row in result.mass), SHADES, strict=False):
        rows = [row for row in result.mass if row.k == k]
        axes.plot([row.t for row in rows], [row.kept for row in rows], "o-", color=colour, label=f"K = {k:,}", **LINE)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_ylabel("softmax weight of the top-k tokens")
    return "What the top-k hold"


def _draw_errors(axes: Any, result: Result) -> str:
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
    return "Error of the mean embedding"

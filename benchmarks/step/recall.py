"""What an approximate top-k finds on real embeddings, how much weight the top-k hold, how far their mean is off."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import smoothie_kernels as sk
from benchmarks.common.embeddings import Material
from benchmarks.common.pictures import BLUE, BROWN, GREY, finish, panels
from benchmarks.common.race import Suite
from benchmarks.common.report import Report, Section
from benchmarks.step import inputs
from benchmarks.step.cases import Case
from benchmarks.step.contestants import options_of, without_mean
from benchmarks.step.inputs import Inputs
from smoothie_kernels.recall import Buckets, expected_recall, pick_buckets

SLACK = 0.01  # recall may be below its target by this, or by DEVIATIONS of its standard error where that is more
DEVIATIONS = 4
TITLE, PREFIX, PAGE = "Top-k: recall, weight, error", "recall-", "topk.md"
SHOWN_K = 64  # whose buckets are shown; the JSON has all
LIBRARY, STRIDED, CONTIGUOUS = "library", "strided", "contiguous"
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    rows: int = 256
    sizes: tuple[int | None, ...] = (None, 128_256, 256_000)  # V; None: the table's
    ks: tuple[int, ...] = (8, 16, 64, 256)
    targets: tuple[float, ...] = (0.9, 0.95, 0.99)
    times: tuple[float, ...] = (5e-4, 0.05, 0.25, 0.5, 0.9995)  # of the schedule
    # Over the whole schedule, on the table itself: in tables at `marks`, in pictures at all of the curve's times.
    marks: tuple[float, ...] = (5e-4, 0.02, 0.05, 0.1, 0.25, 0.5, 0.9, 0.9995)
    between: int = 17  # more times, evenly spaced in sqrt(t)
    mass_ks: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    error_ks: tuple[int, ...] = (16, 64, 256, 1024)
    recall_k: int = 64  # of the curves of recall
    recall_target: float = 0.99

    @property
    def curve(self) -> list[float]:
        return sorted({*self.marks, *(((i + 1) / (self.between + 1)) ** 2 for i in range(self.between))})


@dataclass(frozen=True)
class Recall:
    """The share of the exact top-k that is found. By the library; or by buckets, from the exact top-k alone: token j in
    bucket j mod B (strided), or in bucket j // ceil(V / B) (contiguous)."""

    way: str
    v: int
    k: int
    t: float
    buckets: int  # 0: all logits are searched
    keep: int  # logits of each
    wanted: float  # of the library its recall_target, of buckets what is expected of random ones
    found: float
    error: float  # standard error of it, over rows

    @property
    def red(self) -> bool:
        return self.way != CONTIGUOUS and not self.found >= self.wanted - max(SLACK, DEVIATIONS * self.error)

    def __str__(self) -> str:
        of = f"V = {self.v:,}, K = {self.k}, t = {self.t}, {self.way}, {self.buckets} buckets that keep {self.keep}"
        return f"{of}: {self.found:.4f} found, {self.wanted:.4f} wanted"


@dataclass(frozen=True)
class Point:
    """At one time, for one K: the "mass", softmax weight of the K largest logits, the mean over rows; or the error of
    the mean embeddings of a `smooth`, from those of smooth="full": relative, Frobenius, over all rows."""

    what: str
    t: float
    k: int
    value: float


@dataclass(frozen=True)
class Result:
    plan: Plan
    tables: dict[int, str] = field(default_factory=dict)  # what the table of V tokens was; the table itself is first
    found: list[Recall] = field(default_factory=list)
    # On the table itself, over the whole schedule:
    curve: list[Recall] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    @property
    def v(self) -> int:
        """Of the table itself."""
        return next(iter(self.tables), 0)

    def of(self, *what: str) -> dict[tuple[str, int], dict[float, float]]:
        """Values by time, of points."""
        found: dict[tuple[str, int], dict[float, float]] = {}
        for point in self.points:
            if point.what in what:
                found.setdefault((point.what, point.k), {})[point.t] = point.value
        return found


def measure(suite: Suite, plan: Plan) -> Result:
    material, device, result = suite.material, suite.device, Result(plan)
    with torch.inference_mode():
        for size in plan.sizes:
            sized = material.sized(size or len(material.table), material.table.shape[1])
            table = sk.Vocabulary(sized.table.to(device))
            result.tables[len(table)] = sized.note
            for given in inputs_at(plan.times, sized, plan.rows, device):
                suite.progress(f"recall: V = {len(table):,}, t = {given.case.t}")
                _measure_recall(result, given, table)
        table = sk.Vocabulary(material.table.to(device))
        for given in inputs_at(plan.curve, material, plan.rows, device):
            suite.progress(f"mass and error: t = {given.case.t:.3g}")
            _measure_curves(result, given, table)
    return result


def inputs_at(times: Iterable[float], material: Material, rows: int, device: str) -> Iterator[Inputs]:
    for t in times:
        yield inputs.build(Case("recall", "", n=rows, op="topk", t=t), material, device)


def _measure_recall(result: Result, given: Inputs, table: sk.Vocabulary) -> None:
    v, t, plan, offset = len(table), given.case.t or 0.0, result.plan, offset_of(given)
    ks = [k for k in plan.ks if k <= v]
    exact = without_mean(given, table, topk=max(ks), offset=offset).top_tokens
    for k in ks:
        for target in plan.targets:
            found = without_mean(given, table, topk=k, recall_target=target, offset=offset).top_tokens
            both = torch.cat((found, exact[:, :k]), 1).sort(1).values  # neither holds a token twice
            shared = (both.diff(dim=1) == 0).sum(1).double() / k
            picked = pick_buckets(v, k, target) or Buckets(0, 0)
            result.found.append(Recall(LIBRARY, v, k, t, *picked, target, *mean_and_error(shared)))
        for picked in compared_buckets(v, k, plan.targets):
            result.found.extend(recall_of(picked, exact[:, :k], v, t))


def _measure_curves(result: Result, given: Inputs, table: sk.Vocabulary) -> None:
    v, t, plan, offset = len(table), given.case.t or 0.0, result.plan, offset_of(given)
    exact = without_mean(given, table, topk=min(v, max(*plan.mass_ks, plan.recall_k)), offset=offset)
    weights = (exact.top_logits - exact.log_sum[:, None]).double().exp()
    result.points.extend(Point("mass", t, k, float(weights[:, :k].sum(1).mean())) for k in plan.mass_ks if k <= v)
    winners = exact.top_tokens[:, : plan.recall_k]
    for picked in compared_buckets(v, winners.shape[1], (plan.recall_target,)):
        result.curve.extend(recall_of(picked, winners, v, t))

    def smoothed(k: int | None, smooth: str) -> Tensor:
        options = options_of(given) | {"offset": offset, "topk": k, "smooth": smooth}
        return sk.fused_smoothie_step(given.x, table, given.mu, **options).smoothed.double()

    full = smoothed(None, "full")
    for smooth in ("topk", "topk+mean"):
        for k in plan.error_ks:
            if k <= v:
                error = (smoothed(k, smooth) - full).norm() / full.norm()
                result.points.append(Point(smooth, t, k, float(error)))


def offset_of(given: Inputs) -> int:
    """Every time has its own noise."""
    return round(1e6 * (given.case.t or 0.0))


def compared_buckets(v: int, k: int, targets: tuple[float, ...]) -> list[Buckets]:
    """What the library takes for these targets, and where these keep more than one: as many that keep one."""
    picked = [found for target in targets if (found := pick_buckets(v, k, target))]
    return in_order(each for found in picked for each in (Buckets(found.buckets, 1), found))


def recall_of(picked: Buckets, winners: Tensor, v: int, t: float) -> list[Recall]:
    """Strided and contiguous, of the exact top-k tokens [R, K]."""
    k, (buckets, keep) = winners.shape[1], picked
    expected, width = expected_recall(v, k, buckets, keep), -(-v // buckets)
    return [
        Recall(way, v, k, t, buckets, keep, expected, *mean_and_error(found_by_buckets(of_winners, keep)))
        for way, of_winners in ((STRIDED, winners % buckets), (CONTIGUOUS, winners // width))
    ]


def found_by_buckets(buckets: Tensor, keep: int) -> Tensor:
    """Share of every row's winners that are found, [R], where the winners lie in these buckets, [R, K].

    Buckets keep their largest logits, and nothing is larger than a winner but a winner: so a bucket that holds more
    than `keep` of them loses all but `keep`. No other logit matters.
    """
    in_order = buckets.sort(1).values
    lost = (in_order[:, keep:] == in_order[:, :-keep]).sum(1)
    return 1 - lost.double() / buckets.shape[1]


def mean_and_error(of_rows: Tensor) -> tuple[float, float]:
    return float(of_rows.mean()), float(of_rows.std() / len(of_rows) ** 0.5)


def in_order(values: Iterable[T]) -> list[T]:
    """Every value once."""
    return list(dict.fromkeys(values))


# Tables


def report_of(result: Result, suite: Suite) -> Report:
    facts = [f"{result.plan.rows} rows at every time.", *(f"V = {v:,}: {note}." for v, note in result.tables.items())]
    sections: dict[str, Section] = {}
    for i, v in enumerate(result.tables):
        more = f"-{v}" if i else ""  # the page of the docs has those of the table itself
        sections |= {f"library{more}": library_section(result, v), f"buckets{more}": bucket_section(result, v)}
    sections |= {"mass": mass_section(result), "error": error_section(result)}
    red = [str(row) for row in (*result.found, *result.curve) if row.red]
    return Report(suite.machine, TITLE, PREFIX, facts, more=sections, content=asdict(result), red=red)


def library_section(result: Result, v: int) -> Section:
    """One line per K, a column per target."""
    found: dict[tuple[int, float], list[Recall]] = {}
    for row in result.found:
        if (row.way, row.v) == (LIBRARY, v):
            found.setdefault((row.k, row.wanted), []).append(row)

    def cell(rows: list[Recall]) -> str:
        (buckets, keep), lowest = (rows[0].buckets, rows[0].keep), min(row.found for row in rows)
        expected = expected_recall(v, rows[0].k, buckets, keep) if buckets else 1.0
        return f"{f'{buckets} x {keep}' if buckets else 'exact'}: {expected:.3f}, {lowest:.3f}"

    targets = result.plan.targets
    cells = [(f"{k}", *(cell(found[k, target]) for target in targets)) for k in in_order(k for k, _ in found)]
    note = (
        "Buckets x how many logits each keeps: the share of the library's exact top-k that is expected, and the lowest "
        f"that was found at any time of the schedule. Red: below recall_target by more than {SLACK}, or {DEVIATIONS} "
        "standard errors where these are more."
    )
    return Section(f"The library, V = {v:,}", note, ("K", *(f"recall_target {target}" for target in targets)), cells)


def bucket_section(result: Result, v: int) -> Section:
    """One line per number of buckets."""
    rows = [row for row in result.found if (row.v, row.k) == (v, SHOWN_K) and row.way != LIBRARY]
    found = {(row.buckets, row.keep, row.t, row.way): row for row in rows}
    cells: list[tuple[str, ...]] = []
    for buckets, keep, wanted in in_order((row.buckets, row.keep, row.wanted) for row in rows):
        shares = (
            ", ".join(f"{found[buckets, keep, t, way].found:.3f}" for way in (STRIDED, CONTIGUOUS))
            for t in result.plan.times
        )
        cells.append((f"{SHOWN_K}", f"{buckets} x {keep}", f"{wanted:.3f}", *shares))
    note = (
        "Share of the exact top-k that buckets find: strided ones (token j in bucket j mod B), then contiguous ones. "
        f"Red: strided ones below what is expected by more than {SLACK}, or {DEVIATIONS} standard errors."
    )
    header = ("K", "buckets", "expected", *(f"t = {t:g}" for t in result.plan.times))
    return Section(f"Buckets, V = {v:,}", note, header, cells)


def mass_section(result: Result) -> Section:
    found = result.of("mass")
    cells = [(f"{t:g}", *(f"{min(at[t], 1):.1%}" for at in found.values())) for t in result.plan.marks]
    note = f"Softmax weight of the K largest of {result.v:,} logits: 1 - tail_mass, the mean over rows."
    return Section("Weight of the top-k", note, ("t", *(f"K = {k:,}" for _, k in found)), cells)


def error_section(result: Result) -> Section:
    found = result.of("topk", "topk+mean")
    cells = [
        (f"{t:g}", *("< 0.0001" if at[t] < 1e-4 else f"{at[t]:.3g}" for at in found.values()))
        for t in result.plan.marks
    ]  # fmt: skip
    note = 'Distance of the mean embeddings from those of smooth="full": relative, Frobenius, all rows. Exact top-k.'
    return Section("Error of the mean", note, ("t", *(f"{smooth}, {k:,}" for smooth, k in found)), cells)


# Pictures

TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
LEAST_ERROR = 1e-3  # what is less is not drawn
LINE = {"markersize": 3.5, "linewidth": 1.4}
SHADES = dict(zip((16, 64, 256, 1024, 4096), ("#9ecae9", "#6baed6", "#3787c0", "#1460a8", "#08306b"), strict=True))


def draw(result: Result, stem: Path) -> list[Path]:
    """The files drawn."""
    drawn, plan = [], result.plan
    for quantity, title, label, draw_lines in (
        (
            "recall",
            f"Recall of buckets of tokens, K = {plan.recall_k}",
            "share of the exact top-k that is found",
            _recall,
        ),
        ("mass", "What the top-k hold", "softmax weight of the top-k tokens", _mass),
        ("error", "Error of the mean embedding", 'relative distance from smooth="full"', _errors),
    ):
        figure, axes = panels()
        axes.set_ylim(0, 1.02)
        draw_lines(axes, result)
        of = f"V = {result.v:,}, {plan.rows} rows"
        axes.set_title(f"{title}; {of}", loc="left", fontsize=10)
        axes.set_ylabel(label)
        axes.set_xscale("function", functions=(lambda t: abs(t) ** 0.5, lambda root: root**2))
        axes.set_xlim(0, 1.02)
        axes.set_xticks(TICKS, [f"{t:g}" for t in TICKS])
        axes.set_xlabel("time t of the schedule")
        path = stem.with_name(f"{stem.name}-{quantity}.png")
        drawn.append(finish(figure, path, columns=2 if quantity == "error" else 1))
    return drawn


def _recall(axes: Any, result: Result) -> None:
    for (buckets, keep), marker in zip(in_order((row.buckets, row.keep) for row in result.curve), "so", strict=False):
        rows = [row for row in result.curve if (row.buckets, row.keep) == (buckets, keep)]
        strided, contiguous = ([(row.t, row.found) for row in rows if row.way == way] for way in (STRIDED, CONTIGUOUS))
        expected = [(row.t, row.wanted) for row in rows if row.way == STRIDED]
        for what, points, style, colour in (
            (STRIDED, strided, f"{marker}-", BLUE), ("expected", expected, "--", GREY),
            (CONTIGUOUS, contiguous, f"{marker}-", BROWN),
        ):  # fmt: skip
            label = f"{what}, {buckets} buckets, {keep} of each"
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, **LINE)


def _mass(axes: Any, result: Result) -> None:
    for (_, k), points in result.of("mass").items():
        axes.plot(*zip(*points.items(), strict=True), "o-", color=SHADES.get(k, GREY), label=f"K = {k:,}", **LINE)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def _errors(axes: Any, result: Result) -> None:
    for (smooth, k), points in result.of("topk", "topk+mean").items():
        style, label = "o--" if smooth == "topk" else "o-", f"{smooth}, K = {k:,}"
        axes.plot(*zip(*points.items(), strict=True), style, color=SHADES.get(k, GREY), label=label, **LINE)
    axes.set_yscale("log")
    axes.set_ylim(LEAST_ERROR, 4)
    axes.yaxis.set_major_formatter(lambda error, _: f"{error:g}")

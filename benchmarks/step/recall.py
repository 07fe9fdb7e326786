"""What an approximate top-k finds on real embeddings, how much weight the top-k hold, how far their mean is off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import smoothie_kernels as sk
from benchmarks.common.embeddings import Material
from benchmarks.common.race import Suite
from benchmarks.step import inputs
from benchmarks.step.cases import Case
from benchmarks.step.contestants import SEED, without_mean
from benchmarks.step.inputs import SIGMA_MIN, Inputs
from smoothie_kernels.recall import Buckets, expected_recall, pick_buckets

SLACK = 0.01  # recall below what is wanted; or DEVIATIONS of its own standard error, where these are more
DEVIATIONS = 4


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

    @property
    def parts(self) -> int:
        return len(self.sizes) * len(self.times) + len(self.curve)


@dataclass(frozen=True)
class LibraryRecall:
    """What the library finds of its own exact top-k."""

    v: int
    k: int
    target: float
    t: float
    recall: float
    error: float  # standard error of it, over rows

    @property
    def red(self) -> bool:
        return too_low(self.recall, self.target, self.error)


@dataclass(frozen=True)
class BucketRecall:
    """What buckets find, by the exact top-k alone."""

    v: int
    k: int
    buckets: int
    keep: int
    t: float
    expected: float
    strided: float  # token j in bucket j mod buckets
    contiguous: float  # in bucket j // ceil(V / buckets)
    error: float  # standard error of strided, over rows

    @property
    def red(self) -> bool:
        return too_low(self.strided, self.expected, self.error)


@dataclass(frozen=True)
class Mass:
    """Softmax weight of the K largest logits, the mean over rows."""

    t: float
    k: int
    kept: float


@dataclass(frozen=True)
class MeanError:
    """Distance of the mean embeddings from those of smooth="full": relative, Frobenius, over all rows."""

    t: float
    k: int
    smooth: str
    error: float


@dataclass(frozen=True)
class Result:
    plan: Plan
    tables: dict[int, str] = field(default_factory=dict)  # what the table of V tokens was
    library: list[LibraryRecall] = field(default_factory=list)
    buckets: list[BucketRecall] = field(default_factory=list)
    # On the table itself, over the whole schedule:
    curve: list[BucketRecall] = field(default_factory=list)
    mass: list[Mass] = field(default_factory=list)
    errors: list[MeanError] = field(default_factory=list)

    @property
    def v(self) -> int:
        """Of the table itself."""
        return self.curve[0].v

    def failures(self) -> list[str]:
        """The cells that are red."""
        return [
            f"V = {row.v:,}, K = {row.k}, recall_target {row.target}, t = {row.t}: the library finds {row.recall:.4f}"
            for row in self.library
            if row.red
        ] + [
            f"V = {row.v:,}, K = {row.k}, {row.buckets} strided buckets that keep {row.keep}, t = {row.t}: "
            f"{row.strided:.4f} found, {row.expected:.4f} expected"
            for row in (*self.buckets, *self.curve)
            if row.red
        ]


def too_low(recall: float, wanted: float, error: float) -> bool:
    return not recall >= wanted - max(SLACK, DEVIATIONS * error)


def measure(suite: Suite, plan: Plan) -> Result:
    material, device, result = suite.material, suite.device, Result(plan)
    with torch.inference_mode():
        for size in plan.sizes:
            sized = material.sized(size or len(material.table), material.table.shape[1])
            table = sk.Vocabulary(sized.table.to(device))
            result.tables[len(table)] = sized.note
            for given in inputs_at(plan.times, sized, plan.rows, device):
                suite.progress(f"recall: V = {len(table):,}, t = {given.case.t}", 1)
                _measure_recall(result, given, table)
        table = sk.Vocabulary(material.table.to(device))
        for given in inputs_at(plan.curve, material, plan.rows, device):
            suite.progress(f"mass and error: t = {given.case.t:.3g}", 1)
            _measure_curves(result, given, table)
    return result


def inputs_at(times: tuple[float, ...] | list[float], material: Material, rows: int, device: str) -> Iterator[Inputs]:
    for t in times:
        yield inputs.build(Case("recall", "", n=rows, op="topk", t=t), material, device)


def _measure_recall(result: Result, given: Inputs, table: sk.Vocabulary) -> None:
    v, t, plan = len(table), given.case.t or 0.0, result.plan
    ks = [k for k in plan.ks if k <= v]
    exact = without_mean(given, table, topk=max(ks), offset=offset_of(given)).top_tokens
    for k in ks:
        for target in plan.targets:
            found = without_mean(given, table, topk=k, recall_target=target, offset=offset_of(given)).top_tokens
            recall, error = mean_and_error(shared(found, exact[:, :k]))
            result.library.append(LibraryRecall(v, k, target, t, recall, error))
        result.buckets.extend(recall_of(picked, exact[:, :k], v, t) for picked in compared_buckets(v, k, plan.targets))


def _measure_curves(result: Result, given: Inputs, table: sk.Vocabulary) -> None:
    v, t, offset, plan = len(table), given.case.t or 0.0, offset_of(given), result.plan
    exact = without_mean(given, table, topk=min(v, max(*plan.mass_ks, plan.recall_k)), offset=offset)
    weights = (exact.top_logits - exact.log_sum[:, None]).double().exp()
    result.mass.extend(Mass(t, k, float(weights[:, :k].sum(1).mean())) for k in plan.mass_ks if k <= v)
    winners = exact.top_tokens[:, : plan.recall_k]
    for picked in compared_buckets(v, winners.shape[1], (plan.recall_target,)):
        result.curve.append(recall_of(picked, winners, v, t))

    def smoothed(k: int | None, smooth: str) -> Tensor:
        return sk.fused_smoothie_step(
            given.x, table, given.mu, given.std, sigma_min=SIGMA_MIN, seed=SEED, offset=offset, topk=k, smooth=smooth
        ).smoothed.double()

    full = smoothed(None, "full")
    for smooth in ("topk", "topk+mean"):
        for k in plan.error_ks:
            if k <= v:
                error = (smoothed(k, smooth) - full).norm() / full.norm()
                result.errors.append(MeanError(t, k, smooth, float(error)))


def offset_of(given: Inputs) -> int:
    """Every time has its own noise."""
    return round(1e6 * (given.case.t or 0.0))


def compared_buckets(v: int, k: int, targets: tuple[float, ...]) -> list[Buckets]:
    """What the library takes for these targets, and where these keep more than one: as many that keep one."""
    picked = [found for target in targets if (found := pick_buckets(v, k, target))]
    return list(dict.fromkeys(each for found in picked for each in (Buckets(found.buckets, 1), found)))


def recall_of(picked: Buckets, winners: Tensor, v: int, t: float) -> BucketRecall:
    """Of the exact top-k tokens [R, K]."""
    k, (buckets, keep) = winners.shape[1], picked
    strided, error = mean_and_error(found_by_buckets(winners % buckets, keep))
    contiguous, _ = mean_and_error(found_by_buckets(winners // -(-v // buckets), keep))
    return BucketRecall(v, k, buckets, keep, t, expected_recall(v, k, buckets, keep), strided, contiguous, error)


def found_by_buckets(buckets: Tensor, keep: int) -> Tensor:
    """Share of every row's winners that are found, [R], where the winners lie in these buckets, [R, K].

    Buckets keep their largest logits, and nothing is larger than a winner but a winner: so a bucket that holds more
    than `keep` of them loses all but `keep`. No other logit matters.
    """
    in_order = buckets.sort(1).values
    lost = (in_order[:, keep:] == in_order[:, :-keep]).sum(1)
    return 1 - lost.double() / buckets.shape[1]


def shared(found: Tensor, exact: Tensor) -> Tensor:
    """Share of every row's exact tokens [R, K] that are among those found [R, K], [R]."""
    both = torch.cat((found, exact), 1).sort(1).values  # neither holds a token twice
    return (both.diff(dim=1) == 0).sum(1).double() / exact.shape[1]


def mean_and_error(of_rows: Tensor) -> tuple[float, float]:
    return float(of_rows.mean()), float(of_rows.std() / len(of_rows) ** 0.5)

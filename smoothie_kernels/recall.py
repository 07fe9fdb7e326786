"""How many buckets an approximate top-k needs: its expected recall, beforehand."""

import math
from functools import lru_cache
from typing import NamedTuple

from smoothie_kernels import checks

KEEPS = (1, 2, 4)
STEP = 128  # buckets come in so many: what one tile of tokens fills
FEW = 1024  # buckets, before each keeps more: all that they keep is written down and merged


class Buckets(NamedTuple):
    """Token j belongs to bucket j mod buckets, which keeps its `keep` largest logits; the K largest of all kept win."""

    buckets: int
    keep: int


def expected_recall(V: int, K: int, buckets: int, keep: int) -> float:
    """Share of the K largest of V logits that is found where V tokens lie in buckets that keep their largest ones.

    Equal to, for K winners at random places::

        winners = torch.rand(repeats, V).topk(K).indices % buckets
        found = torch.nn.functional.one_hot(winners, buckets).sum(1).clamp(max=keep).sum(1) / K
        expected_recall = found.mean()

    A winner is lost only behind `keep` larger ones of its own bucket. Winners in one bucket are hypergeometric, so

        E[recall] = (1 / K) sum over buckets of (keep - sum_{r < keep} (keep - r) P(r winners in the bucket))

    Args:
        V: tokens, fewer than 2**31. K: how many are wanted, in [1, V].
        buckets: in [1, V]; token j is in bucket j mod buckets. keep: how many logits a bucket keeps, >= 1.

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Exact, but for rounding (1e-12 V, relatively), where the winners lie at random. Token ids do not: neighbours are
    alike, and contiguous buckets find less. Strided ones find as much as by chance: docs/topk.md has both.

    arXiv 2206.14286 (keep = 1), arXiv 2506.04165 (any).
    """
    V, keep = checks.integer("V", V), checks.integer("keep", keep)
    for name, value in (("V", V), ("keep", keep)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if V >= 2**31:
        raise ValueError(f"V must be below 2**31, got {V}")
    K, buckets = checks.one_to_v("K", K, V), checks.one_to_v("buckets", buckets, V)
    small, larger = V // buckets, V % buckets  # so many buckets have one token more
    found = (buckets - larger) * expected_found(V, K, small, keep)
    if larger:
        found += larger * expected_found(V, K, small + 1, keep)
    return min(1.0, found / K)


def expected_found(v: int, k: int, size: int, keep: int) -> float:
    """Of the K largest of V logits, how many a bucket of this size keeps, in expectation."""
    if keep >= min(k, size):
        return k * size / v
    missing = 0.0
    for r in range(keep):
        ways = _log_choose(size, r) + _log_choose(v - size, k - r) - _log_choose(v, k)
        missing += (keep - r) * math.exp(ways)
    return keep - missing


def _log_choose(n: int, k: int) -> float:
    if not 0 <= k <= n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@lru_cache(maxsize=256)
def pick_buckets(v: int, k: int, recall_target: float) -> Buckets | None:
    """The smallest `keep` that needs few buckets for the target, and as few as do; None: only exact will do."""
    if recall_target >= 1.0:
        return None
    for keep in KEEPS:
        most = min(v, FEW if keep < KEEPS[-1] else v // (2 * keep)) // STEP  # beyond half of V nothing is saved
        enough = next((b for b in range(1, most + 1) if _reaches(v, k, b * STEP, keep, recall_target)), None)
        if enough:
            return Buckets(enough * STEP, keep)
    return None


def _reaches(v: int, k: int, buckets: int, keep: int, recall_target: float) -> bool:
    kept = sum(
        n * min(keep, size) for n, size in ((buckets - v % buckets, v // buckets), (v % buckets, v // buckets + 1))
    )
    return kept >= k and expected_recall(v, k, buckets, keep) >= recall_target

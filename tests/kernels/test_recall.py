"""The recall of strided buckets, known before a search."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smoothie_kernels import expected_recall
from smoothie_kernels.recall import Buckets, pick_buckets


@pytest.mark.parametrize(
    ("v", "k", "buckets", "keep", "wanted"),
    [  # of the closed form, to four digits
        (30464, 10, 238, 1, 0.9814), (30464, 10, 238, 2, 0.9998), (30464, 32, 238, 1, 0.9380),
        (30464, 64, 238, 1, 0.8792), (30464, 64, 238, 2, 0.9901), (30464, 64, 238, 4, 1.0),
        (30464, 64, 476, 1, 0.9375), (128256, 64, 1002, 1, 0.9694), (250112, 64, 1954, 2, 0.9998),
        (100, 1, 7, 1, 1.0), (100, 30, 100, 1, 1.0), (100, 100, 50, 2, 1.0), (100, 100, 10, 1, 0.1), (1, 1, 1, 1, 1.0),
    ],
)  # fmt: skip
def test_expected_recall(v, k, buckets, keep, wanted):
    assert expected_recall(v, k, buckets, keep) == pytest.approx(wanted, abs=5.1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.data())
def test_expected_recall_by_simulation(v, data):
    """Buckets of two sizes among them."""
    k, buckets = data.draw(st.integers(1, v)), data.draw(st.integers(1, v))
    keep = data.draw(st.sampled_from([1, 2, 3, 4]))
    repeats = 2000
    winners = torch.rand(repeats, v, generator=torch.Generator().manual_seed(v)).topk(k).indices % buckets
    in_bucket = torch.zeros(repeats, buckets).scatter_add_(1, winners, torch.ones(repeats, k))
    found = in_bucket.clamp(max=keep).sum(1) / k
    # Of the mean of the simulation; losses so rare that it may have seen none.
    allowed = 4.5 * float(found.std()) / repeats**0.5 + 10 / (repeats * k)
    assert abs(expected_recall(v, k, buckets, keep) - float(found.mean())) <= allowed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1, 1, 1), ValueError, "V must be at least 1, got 0"),
        ((10, 11, 1, 1), ValueError, r"K must be in \[1, V\] with V = 10, got 11"),
        ((10, 0, 1, 1), ValueError, r"K must be in \[1, V\] with V = 10, got 0"),
        ((10, 1, 11, 1), ValueError, r"buckets must be in \[1, V\] with V = 10, got 11"),
        ((10, 1, 5, 0), ValueError, "keep must be at least 1, got 0"),
        ((10.0, 1, 5, 1), TypeError, "V must be an int, got float"),
        ((10, True, 5, 1), TypeError, "K must be an int, got bool"),
    ],
)
def test_expected_recall_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        expected_recall(*arguments)


def test_buckets_reach_their_target():
    shapes = itertools.product((128, 300, 30522, 256000), (1, 8, 64, 256, 1024), (0.3, 0.9, 0.95, 0.99, 0.999))
    for v, k, target in shapes:
        picked = pick_buckets(v, k, target) if k <= v else None
        if picked:
            assert expected_recall(v, k, *picked) >= target
            assert picked.buckets % 128 == 0
            assert picked.buckets * picked.keep >= k
        assert pick_buckets(v, min(k, v), 1.0) is None
    assert pick_buckets(30522, 64, 0.95) == Buckets(640, 1)
    assert pick_buckets(30522, 64, 0.99) == Buckets(256, 2)

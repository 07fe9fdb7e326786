"""Some cases of the registry under pytest-benchmark: pytest benchmarks/test_speed.py (not part of the test suite)."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.common.embeddings import Material, load_material, synthetic
from benchmarks.step import inputs
from benchmarks.step.cases import CASES
from benchmarks.step.check import Referee
from benchmarks.step.contestants import CONTESTANTS

NAMES = ("step", "step-quiet", "nearest", "topk", "step-n1", "step-n8", "train", "train-x")
PAIRS = [(case, name) for case in NAMES for name in CASES[case].contestants if not CONTESTANTS[name].compiles]


@pytest.fixture(scope="session")
def material() -> Material:
    try:
        return load_material(None)
    except ValueError:
        return synthetic(30_522, 384)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_speed(benchmark: Any, material: Material, case: str, name: str) -> None:
    given, contestant = inputs.build(CASES[case], material), CONTESTANTS[name]
    if reason := contestant.absent(given):
        pytest.skip(reason)
    benchmark.group = case
    with inputs.grad_mode(given.case):
        call = contestant.prepare[given.case.op](given)
        benchmark.extra_info["error"] = Referee(given).check(contestant, call)  # raises where a result is wrong
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)

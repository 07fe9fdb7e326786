"""The noise schedules: known answers, the formulas in plain float64, properties, messages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smoothie_kernels.diffusion import SCHEDULES, Arctan, make_schedule


@pytest.mark.parametrize(
    ("t", "mu", "std"),
    [
        (0.0, 0.684, 0.730), (5e-4, 0.684, 0.730), (0.05, 0.101, 0.995), (0.1, 0.0590, 0.998), (0.25, 0.0244, 0.9997),
        (0.5, 9.39e-3, 1.000), (0.9, 1.27e-3, 1.000), (0.9995, 7.36e-5, 1.000), (1.0, 7.36e-5, 1.000),
    ],
)  # fmt: skip
def test_smoothie_in_numbers(t, mu, std):
    found = Arctan().marginal(t)
    assert float(found[0]) == pytest.approx(mu, rel=6e-3)
    assert float(found[1]) == pytest.approx(std, abs=6e-4)


def arctan(t, sigma_min=1.5, sigma_max=200.0, d=9.0, root=True):
    t = min(max(t, 5e-4), 0.9995)
    r = math.sqrt(t / (1 - t)) if root else t / (1 - t)
    return 1 / ((sigma_max / sigma_min - 1) * 2 / math.pi * math.atan(r / d) + 1) ** 2


def tess(t):
    def cos(t):
        return math.cos((t + 1e-4) / (1 + 1e-4) * math.pi / 2)

    return cos(t) / cos(0)


FORMULAS = [
    ("arctan", {}, arctan),
    ("arctan", {"root": False}, lambda t: arctan(t, root=False)),
    ("arctan", {"sigma_min": 0.1, "sigma_max": 20, "sharpness": 5}, lambda t: arctan(t, 0.1, 20.0, 5.0)),
    ("cosine", {}, lambda t: math.exp(-0.25 * t**2 * 19.9 - 0.05 * t)),
    ("cosine", {"beta_min": 1.0, "beta_max": 3.0}, lambda t: math.exp(-0.5 * t**2 - 0.5 * t)),
    ("sd", {}, lambda t: 1 / math.sqrt(1 + (9 * math.tan(math.pi * t / 2)) ** 2)),
    ("sd", {"sharpness": 1.0}, lambda t: math.cos(math.pi * t / 2)),
    ("sqrt", {}, lambda t: math.sqrt(max(0.0, 1 - math.sqrt(t + 1e-4)))),
    ("tess", {}, tess),
]


@pytest.mark.parametrize(
    ("name", "options", "mu"), FORMULAS, ids=[f"{name} {options}" for name, options, _ in FORMULAS]
)
@pytest.mark.parametrize("delta", [0.0, 0.25, 1.0])
def test_formulas(name, options, mu, delta):
    times = torch.tensor([0.0, 1e-3, 0.1, 0.3, 0.5, 0.77, 0.999, 1.0], dtype=torch.float64)
    found = make_schedule(name, delta=delta, **options).marginal(times)
    scale = delta * (5 if name == "tess" else 1)
    for t, a, b in zip(times.tolist(), *found, strict=True):
        assert float(a) == pytest.approx(mu(t), rel=1e-9, abs=1e-15)
        assert float(b) == pytest.approx(scale * math.sqrt(max(0.0, 1 - mu(t) ** 2)), abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0, 1), st.floats(0, 1))
def test_less_is_left_as_time_goes_on(name, early, late):
    early, late = sorted((early, late))
    (mu, later_mu), (std, later_std) = make_schedule(name).marginal(torch.tensor([early, late], dtype=torch.float64))
    assert 0 <= later_mu <= mu <= 1
    assert 0 <= std <= later_std <= (5 if name == "tess" else 1)


def test_the_first_digits_of_a_small_std():
    """1 - mu^2 itself would have lost them."""
    t = 1e-13
    std = make_schedule("cosine").marginal(torch.tensor(t, dtype=torch.float64))[1]
    assert float(std) == pytest.approx(math.sqrt(0.1 * t), rel=1e-9)


def test_shapes_and_types():
    schedule = make_schedule("arctan")
    for t, shape, dtype in (
        (0.5, (), torch.float32),
        (1, (), torch.float32),
        (torch.rand(3, 1), (3, 1), torch.float32),
        (torch.rand(0), (0,), torch.float32),
        (torch.rand(2).bfloat16(), (2,), torch.float32),
        (torch.rand(2).double(), (2,), torch.float64),
    ):
        for value in schedule.marginal(t):
            assert (value.shape, value.dtype) == (shape, dtype)
    half = torch.tensor([0.1, 0.4])
    assert torch.equal(schedule.marginal(half)[0], schedule.marginal(half.double())[0].float())
    assert schedule.marginal(torch.rand(2, device="meta"))[1].device.type == "meta"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make_schedule("linear"), ValueError, "schedule must be one of 'arctan', .* got 'linear'"),
        (lambda: make_schedule("sd", root=True), TypeError, "options of schedule 'sd' must be among delta, sharpness"),
        (lambda: make_schedule("arctan", root=1), TypeError, "root must be a bool, got int"),
        (lambda: make_schedule("arctan", sigma_min="1"), TypeError, "sigma_min must be a float, got str"),
        (lambda: make_schedule("arctan", sigma_max=True), TypeError, "sigma_max must be a float, got bool"),
        (lambda: make_schedule("arctan", sigma_min=0), ValueError, "sigma_min must be positive and finite, got 0"),
        (lambda: make_schedule("sqrt", delta=-1.0), ValueError, "delta must be positive and finite, got -1.0"),
        (lambda: make_schedule("tess", simplex=math.inf), ValueError, "simplex must be positive and finite, got inf"),
        (lambda: Arctan().marginal(1.5), ValueError, r"t must be in \[0, 1\], got 1.5 to 1.5"),
        (lambda: Arctan().marginal(torch.tensor([0.5, -0.1])), ValueError, r"t must be in \[0, 1\], got -0.1"),
        (lambda: Arctan().marginal(float("nan")), ValueError, r"t must be in \[0, 1\], got nan"),
        (lambda: Arctan().marginal(torch.tensor([1])), TypeError, "t must be a number or a floating.* got torch.int64"),
        (lambda: Arctan().marginal("now"), TypeError, "t must be a number or a floating-point tensor, got str"),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""Solvers: every rule against the published one, and the noise of whole sequences against the law of the rules."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smoothie_kernels import Vocabulary
from smoothie_kernels.diffusion import SCHEDULES, make_schedule
from smoothie_kernels.diffusion.sampling import sample
from smoothie_kernels.diffusion.solvers import (
    ACCUMULATE,
    SOLVERS,
    Marginal,
    Route,
    Update,
    bridge,
    chain,
    make_route,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SUMS = ("ddpm", "sde")  # solvers whose noise is a sum of the noise of all steps


# --- The rules as they are published: logits x at time t, distances x0 of the answer, fresh normals; std has the delta


def re_noise(x, x0, eps, mu_t, std_t, mu_s, std_s):
    return mu_s * x0 + std_s * eps


def ddim(x, x0, eps, mu_t, std_t, mu_s, std_s):
    e = (x - mu_t * x0) / std_t
    return mu_s * x0 + std_s * e


def ddpm(x, x0, eps, mu_t, std_t, mu_s, std_s):
    abar_t, abar_s = mu_t**2, mu_s**2
    a = abar_t / abar_s
    mean = a**0.5 * (1 - abar_s) / (1 - abar_t) * x + abar_s**0.5 * (1 - a) / (1 - abar_t) * x0
    return mean + (std_s**2 * (1 - a) / (1 - abar_t)) ** 0.5 * eps


def sde(x, x0, eps, mu_t, std_t, mu_s, std_s):
    beta_dt = 2 * math.log(mu_s / mu_t)
    score = -(x - mu_t * x0) / (1 - mu_t**2)
    loudness = std_t / (1 - mu_t**2) ** 0.5
    return x + (x / 2 + score) * beta_dt + loudness * beta_dt**0.5 * eps


PUBLISHED = {"re-noise": re_noise, "ddim": ddim, "ddpm": ddpm, "sde": sde}


def marginals(schedule, times) -> list[tuple[float, float]]:
    """(mu, std) of every time, float64."""
    mu, std = schedule.marginal(torch.tensor(times, dtype=torch.float64))
    return list(zip(mu.tolist(), std.tolist(), strict=True))


def linspace(steps: int) -> list[float]:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


def first_time(name: str, solver: str) -> float:
    """The sde needs some of the signal at first; the square root has none at 1, "sd" and TESS next to none."""
    return 0.99 if solver == "sde" and name in ("sqrt", "sd", "tess") else 1.0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("delta", [0.25, 1.0, 1.05])
def test_rules_are_the_published_ones(solver, name, delta):
    torch.manual_seed(1)
    times = [first_time(name, solver), 0.9, 0.7, 0.65, 0.3, 0.05, 0.0]
    schedule = make_schedule(name, delta=delta)
    route = make_route(schedule, times, solver)
    assert route.times == tuple(times[:-1])
    assert len(route.updates) == len(times) - 2
    for update, t, s in zip(route.updates, *zip(*pairwise(marginals(schedule, times[:-1])), strict=True), strict=True):
        x, x0, eps = torch.randn(3, 50, dtype=torch.float64)
        found = update.keep * x + update.answer * x0 + update.fresh * eps
        torch.testing.assert_close(found, PUBLISHED[solver](x, x0, eps, *t, *s), rtol=1e-11, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(("re-noise", "ddim", "ddpm")), st.sampled_from(sorted(SCHEDULES)), st.floats(0.01, 1),
       st.floats(0, 0.99), st.sampled_from((0.25, 1.0, 1.05)))  # fmt: skip
def test_what_has_the_law_of_the_forward_process_keeps_it(solver, name, t, share, delta):
    """If the answer is right, logits at t of mean mu_t D and deviation std_t become those of s."""
    schedule = make_schedule(name, delta=delta)
    (mu_t, std_t), (mu_s, std_s) = marginals(schedule, [t, share * t])
    if mu_s == 0:  # the square root's, next to 1
        return
    keep, answer, fresh = SOLVERS[solver](Marginal(mu_t, std_t), Marginal(mu_s, std_s))
    assert keep * mu_t + answer == pytest.approx(mu_s, rel=1e-12)
    assert math.hypot(keep * std_t, fresh) == pytest.approx(std_s, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("delta", [0.25, 1.0])
@pytest.mark.parametrize("name", ["arctan", "cosine", "tess"])
def test_many_steps_of_the_sde_keep_the_law_too(name, delta):
    schedule = make_schedule(name, delta=delta)
    states = [Marginal(*state) for state in marginals(schedule, [0.95 - 0.9 * i / 4000 for i in range(4001)])]
    mu, variance = states[0].mu, states[0].std ** 2
    for t, s in pairwise(states):
        keep, answer, fresh = SOLVERS["sde"](t, s)
        mu, variance = keep * mu + answer, keep**2 * variance + fresh**2
    assert math.sqrt(variance) == pytest.approx(states[-1].std, rel=0.02)
    assert mu == pytest.approx(states[-1].mu, rel=0.02)


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_noise_there_is_none(solver):
    route = make_route(make_schedule("arctan", delta=0.0), linspace(9), solver)
    assert not any(weight for fields in route.fields for weight in fields.values())
    assert all(update.fresh == 0 for update in route.updates)
    if solver == "ddim":  # nothing says what noise the logits hold
        assert all(update.keep == 0 for update in route.updates)


# --- Routes


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_weights_are_what_all_answers_weigh(solver, accumulate):
    """By following every answer through all later updates by itself."""
    route = make_route(make_schedule("arctan"), linspace(12), solver, accumulate)
    assert [len(part) for part in (route.times, route.weights, route.fields, route.updates)] == [12, 12, 12, 11]
    for i, weight in enumerate(route.weights):
        of_answers = [
            route.updates[j].answer * math.prod(update.keep for update in route.updates[j + 1 : i]) for j in range(i)
        ]
        assert weight == pytest.approx(math.fsum(of_answers), rel=1e-12)
    assert route.weights[0] == 0


@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_offsets_of_one_field_solvers(accumulate, name, steps):
    """A contract: offset 0 is the prior's, offset i + 1 that of the step from times[i]."""
    schedule, times = make_schedule(name, delta=0.25), linspace(steps)
    stds = [std for _, std in marginals(schedule, times)]
    for solver in ("re-noise", "ddim"):
        fields = make_route(schedule, times, solver, accumulate).fields
        assert [[*of_time] for of_time in fields] == [[i if solver == "re-noise" else 0] for i in range(steps)]
        prior = 0.25 * (5 if name == "tess" else 1)
        wanted = stds if solver == "re-noise" else [prior * std / stds[0] for std in stds]
        found = [weight for of_time in fields for weight in of_time.values()]
        assert found[0] == prior
        assert found[1:] == pytest.approx(wanted[1:-1], rel=1e-12)


@pytest.mark.parametrize("solver", SUMS)
def test_offsets_of_sums(solver):
    schedule = make_schedule("arctan", delta=0.25)
    fields = make_route(schedule, linspace(6), solver, "sum").fields
    assert [[*of_time] for of_time in fields] == [[*range(i + 1)] for i in range(6)]
    updates = make_route(schedule, linspace(6), solver).updates
    for i, of_time in enumerate(fields):
        for offset, weight in of_time.items():
            own = updates[offset - 1].fresh if offset else 0.25
            assert weight == pytest.approx(own * math.prod(u.keep for u in updates[offset:i]), rel=1e-12)


def test_a_route_of_two_steps_has_nothing_to_bridge():
    first, second = (make_route(make_schedule("cosine"), linspace(2), "ddpm", how) for how in ACCUMULATE)
    assert first == second


# --- The noise of whole sequences


def covariance(updates, prior) -> torch.Tensor:
    """Of all times, by the rule alone: n_s = keep n_t + fresh eps."""
    found = torch.zeros(len(updates) + 1, len(updates) + 1, dtype=torch.float64)
    found[0, 0] = prior**2
    for i, update in enumerate(updates, 1):
        found[i, :i] = update.keep * found[i - 1, :i]
        found[:i, i] = found[i, :i]
        found[i, i] = update.keep**2 * found[i - 1, i - 1] + update.fresh**2
    return found


def coefficients(fields) -> torch.Tensor:
    """(times, fields): what every field weighs at every time."""
    found = torch.zeros(len(fields), len(fields), dtype=torch.float64)
    for i, of_time in enumerate(fields):
        for offset, weight in of_time.items():
            found[i, offset] = weight
    return found


def check_covariance(fields, updates, prior, tolerance=1e-12):
    matrix, wanted = coefficients(fields), covariance(updates, prior)
    scale = wanted.diagonal().sqrt()
    error = (matrix @ matrix.T - wanted).abs()
    assert bool((error <= tolerance * scale[:, None] * scale).all()), float(error.max())


def most(steps: int) -> int:
    return 2 + math.ceil(math.log2(steps))


HALF = Update(0.5, 0.1, 0.7)
UPDATES = {
    "none": ([], 1.0),
    "one": ([HALF], 1.0),
    "equal": ([HALF] * 20, 1.0),
    "walk": ([Update(1.0, 0.0, 1.0)] * 33, 0.3),
    "all is forgotten": ([*[HALF] * 5, Update(0.0, 1.0, 0.5), *[HALF] * 7], 1.0),
    "all is forgotten, twice": ([Update(0.0, 1.0, 0.5)] * 2 + [HALF] * 4 + [Update(0.0, 1.0, 0.2)], 1.0),
    "nothing is new": ([Update(0.9, 0.1, 0.0)] * 11, 0.25),
    "nothing is new in the middle": ([*[HALF] * 3, *[Update(0.9, 0.1, 0.0)] * 5, *[HALF] * 3], 1.0),
    "nothing is left": ([HALF, HALF, Update(0.0, 1.0, 0.0), Update(0.3, 1.0, 0.0), HALF, HALF], 1.0),
    "negative": ([Update(-0.8, 0.1, 0.4), HALF] * 6, 1.0),
    "growing": ([Update(-2.5, 0.1, 0.4), Update(1.5, 0.1, 3.0)] * 10, 1.0),
    "no prior": ([HALF] * 9, 0.0),
    "no prior, at first nothing": ([Update(0.9, 0.1, 0.0)] * 3 + [HALF] * 4, 0.0),
    "no noise": ([Update(0.9, 0.1, 0.0)] * 6, 0.0),
}


@pytest.mark.parametrize("make", [chain, bridge])
@pytest.mark.parametrize("name", UPDATES)
def test_covariance_of_sequences(make, name):
    updates, prior = UPDATES[name]
    fields = make(updates, prior)
    check_covariance(fields, updates, prior)
    assert make is chain or max(map(len, fields)) <= most(len(updates) + 1)
    assert fields[0] == ({0: prior} if prior else {})


updates_of_any_kind = st.lists(
    st.builds(
        Update,
        st.one_of(st.sampled_from((0.0, 1.0, -1.0)), st.floats(1e-3, 2), st.floats(-2, -1e-3)),
        st.just(0.5),
        st.one_of(st.just(0.0), st.floats(1e-3, 3)),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(updates_of_any_kind, st.one_of(st.just(0.0), st.floats(1e-3, 3)))
def test_covariance_of_sequences_of_any_kind(updates, prior):
    check_covariance(chain(updates, prior), updates, prior)
    fields = bridge(updates, prior)
    check_covariance(fields, updates, prior)
    assert max(map(len, fields)) <= most(len(updates) + 1)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(SUMS), st.sampled_from(sorted(SCHEDULES)), st.integers(1, 300), st.sampled_from((0.25, 1.05)))
@example("ddpm", "arctan", 200, 0.25)
@example("sde", "arctan", 200, 0.25)
@example("ddpm", "cosine", 300, 1.05)
def test_bridges_of_solvers(solver, name, steps, delta):
    """Whole sequences have the law of the sum, of few fields at a time."""
    schedule = make_schedule(name, delta=delta)
    times = [first_time(name, solver) * t for t in linspace(steps)]
    route, sums = (make_route(schedule, times, solver, how) for how in ACCUMULATE)
    assert max(map(len, route.fields)) <= most(steps)
    assert max(offset for of_time in route.fields for offset in of_time) < steps
    assert (route.times, route.updates, route.weights) == (sums.times, sums.updates, sums.weights)
    check_covariance(sums.fields, route.updates, schedule.prior_std)
    check_covariance(route.fields, route.updates, schedule.prior_std)


def test_number_of_fields():
    """Of every number of steps, and that so many are needed: the bound is met."""
    for steps in range(1, 301):
        fields = bridge([HALF] * (steps - 1), 1.0)
        assert len(fields) == steps
        assert max(map(len, fields)) <= most(steps), steps
    assert max(map(len, bridge([HALF] * 255, 1.0))) >= 9


# --- The law itself, through the sampler

DRAWS, TOKENS, STEPS_OF_LAW = 4000, 6, 5


def exact_law(schedule, times, solver, distances) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (times, V) and covariance (times, times) of the logits, following the published rule: it is linear."""
    states, rule = marginals(schedule, times[:-1]), PUBLISHED[solver]
    mean = [torch.zeros(distances.shape[1], dtype=torch.float64)]
    factor = torch.zeros(len(states), len(states), dtype=torch.float64)  # of the noise: (time, step that drew it)
    factor[0, 0] = schedule.prior_std
    drawn = torch.eye(len(states), dtype=torch.float64)
    for i, (t, s) in enumerate(pairwise(states)):
        mean.append(rule(mean[i], distances[i], 0.0, *t, *s))
        factor[i + 1] = rule(factor[i], 0.0, drawn[i + 1], *t, *s)
    return torch.stack(mean), factor @ factor.T


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("name", ["arctan", "cosine"])
def test_law_of_the_logits(solver, accumulate, name):
    """Of 4,000 samples that answer the same: mean and covariance over all times together, within 5 deviations.

    The table is the identity, so the logarithm of the model's input is the logits, but for their mean over tokens.
    """
    times = linspace(STEPS_OF_LAW)
    schedule, table = make_schedule(name), torch.eye(TOKENS, dtype=torch.float64)
    answers = torch.randn(STEPS_OF_LAW, TOKENS, dtype=torch.float64)
    seen = []

    def model(smoothed, t, condition, answer):
        seen.append(smoothed[:, 0].log())
        return answers[len(seen) - 1].expand(smoothed.shape)

    sample(model, Vocabulary(table), schedule, length=1, sample_ids=range(DRAWS), times=times, solver=solver,
           accumulate=accumulate, seed=11)  # fmt: skip
    logits = torch.stack(seen, 1)
    logits = logits - logits.mean(2, keepdim=True)  # (draws, times, V)
    mean, wanted = exact_law(schedule, times, solver, -torch.cdist(answers, table).square() / (2 * 1.5**2))
    mean = mean - mean.mean(1, keepdim=True)
    deviation = wanted.diagonal().sqrt()[:, None] * math.sqrt((1 - 1 / TOKENS) / DRAWS)
    assert bool(((logits.mean(0) - mean).abs() <= 5 * deviation).all())
    free = DRAWS * (TOKENS - 1)  # the normals of a sample, less their mean
    noise = logits - mean
    found = torch.einsum("niv,njv->ij", noise, noise) / free
    variances = wanted.diagonal()
    error = ((variances[:, None] * variances + wanted.square()) / free).sqrt()
    assert bool(((found - wanted).abs() <= 5 * error + 1e-9).all())


# --- Messages

TIMES = r"times must be two numbers or more that fall, in \[0, 1\], got "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "euler"}, "solver must be one of 're-noise', 'ddim', 'ddpm', 'sde', got 'euler'"),
        ({"accumulate": "tree"}, "accumulate must be one of 'bridge', 'sum', got 'tree'"),
        ({"times": []}, TIMES + r"\[\]"),
        ({"times": [1.0]}, TIMES + r"\[1.0\]"),
        ({"times": [1.0, 0.5, 0.5]}, TIMES + r"\[1.0, 0.5, 0.5\]"),
        ({"times": [0.5, 1.0]}, TIMES + r"\[0.5, 1.0\]"),
        ({"times": [1.1, 0.5]}, TIMES + r"\[1.1, 0.5\]"),
        ({"times": [1.0, -0.5]}, TIMES + r"\[1.0, -0.5\]"),
        ({"times": [1.0, math.nan, 0.0]}, TIMES + r"\[1.0, nan, 0.0\]"),
        ({"solver": "sde", "schedule": make_schedule("sqrt")}, "times must begin where mu is positive .* 'sde'"),
    ],
    ids=str,
)  # fmt: skip
def test_messages(change, message):
    call = {"schedule": make_schedule("arctan"), "times": [1.0, 0.5, 0.0], "solver": "ddpm"} | change
    with pytest.raises(ValueError, match=message):
        make_route(**call)


@pytest.mark.parametrize("solver", ["re-noise", "ddim", "ddpm"])
def test_two_times_without_any_signal(solver):
    """The square root's schedule has mu = 0 from 0.9999 on."""
    route = make_route(make_schedule("sqrt"), [1.0, 0.99995, 0.5, 0.0], solver)
    assert isinstance(route, Route)
    assert all(math.isfinite(number) for update in route.updates for number in update)

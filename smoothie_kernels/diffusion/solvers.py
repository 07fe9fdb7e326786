"""Solvers of the reverse process, as numbers: what a step keeps of the logits, of the answer and of fresh noise.

Every solver here is one linear rule, from time t to an earlier time s:

    logits_s = keep * logits_t + answer * D(predicted embedding) + fresh * eps

with D the distances to all tokens, of which the predicted embedding alone decides. So the logits never have to be held:
they are the distances of a weighted mean of the answers so far, and a weighted sum of fields that can be made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from smoothie_kernels.diffusion.schedules import Schedule


class Marginal(NamedTuple):
    """Of the forward process at one time: logits = mu D + std eps."""

    mu: float
    std: float

    @property
    def variance(self) -> float:
        """std^2 over that of the process with noise of size one: 1 - mu^2, "1 - alpha bar" of other papers."""
        return (1 - self.mu) * (1 + self.mu)


class Update(NamedTuple):
    """The rule above, for one step."""

    keep: float
    answer: float
    fresh: float


def re_noise(t: Marginal, s: Marginal) -> Update:
    """Smoothie's: the answer, with new noise. arXiv 2505.18853, its sampling algorithm."""
    return Update(0.0, s.mu, s.std)


def ddim(t: Marginal, s: Marginal) -> Update:
    """The answer, with the noise that the logits hold if it is right. arXiv 2010.02502, equation 12 with sigma = 0."""
    keep = s.std / t.std if t.std else 0.0
    return Update(keep, s.mu - keep * t.mu, 0.0)


def ddpm(t: Marginal, s: Marginal) -> Update:
    """A draw from the forward process at s, given its state at t and the answer. arXiv 2006.11239, equations 6, 7."""
    ratio = t.mu / s.mu if s.mu else 1.0
    keep = ratio * s.variance / t.variance
    return Update(keep, s.mu - keep * t.mu, s.std * math.sqrt((1 - ratio) * (1 + ratio) / t.variance))


def sde(t: Marginal, s: Marginal) -> Update:
    """Euler-Maruyama of the reverse SDE; beta dt is its integral over the step, 2 log(mu_s / mu_t). arXiv 2011.13456.

    dx = -(x / 2 + score) beta dt + sqrt(beta) dw backwards, score = -(x - mu D) / (1 - mu^2), all noise as loud as
    the schedule's.
    """
    if t.mu <= 0:
        raise ValueError("times must begin where mu is positive for solver 'sde', got mu = 0 at the first")
    beta_dt, pull = 2 * math.log(s.mu / t.mu), 2 * math.log(s.mu / t.mu) / t.variance
    return Update(1 + beta_dt / 2 - pull, pull * t.mu, t.std / math.sqrt(t.variance) * math.sqrt(beta_dt))


Solver = Callable[[Marginal, Marginal], Update]
SOLVERS: dict[str, Solver] = {"re-noise": re_noise, "ddim": ddim, "ddpm": ddpm, "sde": sde}

Fields = dict[int, float]  # offset of the noise field to its weight


class Route(NamedTuple):
    """All that is known of a run before the model answers; entry i is the state at times[i]."""

    times: tuple[float, ...]  # of the model's calls, falling
    updates: tuple[Update, ...]  # from each time to the next; one less
    weights: tuple[float, ...]  # of the distances of the mean answer: the sum of what all answers weigh
    fields: tuple[Fields, ...]  # the noise


ACCUMULATE = ("bridge", "sum")


def make_route(schedule: Schedule, times: Sequence[float], solver: str, accumulate: str = "bridge") -> Route:
    """The numbers of a run over `times`, of which the last is where its last step leads.

    Args:
        schedule: of the forward process, with the sampler's delta.
        times: falling, in [0, 1].
        solver: one of SOLVERS.
        accumulate: how the noise of "ddpm" and "sde", a sum of the noise of all steps so far, is made.
            "sum": of the fields of all those steps: offset 0 for the prior, i + 1 for the step from times[i].
            "bridge": of at most 2 + log2(steps) fields, from the law of the same process (`bridge`).
            The two agree for the other solvers, whose noise is one field.

    Raises:
        ValueError: a bad argument, by name.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
    if accumulate not in ACCUMULATE:
        raise ValueError(f"accumulate must be one of {', '.join(map(repr, ACCUMULATE))}, got {accumulate!r}")
    if len(times) < 2 or not all(1 >= t > s >= 0 for t, s in pairwise(times)):
        raise ValueError(f"times must be two numbers or more that fall, in [0, 1], got {[float(t) for t in times]}")
    mu, std = schedule.marginal(torch.tensor(times, dtype=torch.float64, device="cpu"))
    states = [Marginal(*both) for both in zip(mu.tolist(), std.tolist(), strict=True)]
    updates = tuple(SOLVERS[solver](t, s) for t, s in pairwise(states[:-1]))
    weights = [0.0]
    for update in updates:
        weights.append(update.keep * weights[-1] + update.answer)
    fields = chain(updates, schedule.prior_std)
    if accumulate == "bridge" and max(map(len, fields)) > 2:
        fields = bridge(updates, schedule.prior_std)
    return Route(tuple(map(float, times[:-1])), updates, tuple(weights), tuple(fields))


def chain(updates: Sequence[Update], prior: float) -> list[Fields]:
    """The noise in the logits at every time: of field 0 the prior; then keep of all, fresh of the next."""
    fields = [_mix((prior, {0: 1.0}))]
    for offset, update in enumerate(updates, 1):
        fields.append(_mix((update.keep, fields[-1]), (update.fresh, {offset: 1.0})))
    return fields


def bridge(updates: Sequence[Update], prior: float) -> list[Fields]:
    """The noise of `chain` in law, all times together, of few fields at each: Levy's construction.

    The process is Gaussian and Markov. So it can be drawn at the first time, then at the last, then in the middle given
    both, and so on: field i is what is new at times[i]. At most 2 + log2(steps) are met on the way to a time, where the
    chain has i. Whole sequences have the chain's covariance exactly; given the noise alone nobody can tell them apart.
    """
    fields: list[Fields] = [_mix((prior, {0: 1.0})), *({} for _ in updates)]

    def draw(i: int, first: int, last: int | None) -> None:
        """Time i given `first` before it, and `last` behind it where that is drawn."""
        keep, variance = _between(updates[first:i])
        if last is None:
            fields[i] = _mix((keep, fields[first]), (math.sqrt(variance), {i: 1.0}))
            return
        onward, rest = _between(updates[i:last])
        seen = onward**2 * variance + rest
        share = onward * variance / seen if seen else 0.0
        new = math.sqrt(variance * rest / seen if seen else variance)
        fields[i] = _mix((keep * (1 - share * onward), fields[first]), (share, fields[last]), (new, {i: 1.0}))

    def halve(first: int, last: int) -> None:
        if last - first > 1:
            middle = (first + last) // 2
            draw(middle, first, last)
            halve(first, middle)
            halve(middle, last)

    if updates:
        draw(len(updates), 0, None)
        halve(0, len(updates))
    return fields


def _between(updates: Sequence[Update]) -> tuple[float, float]:
    """What is kept of the noise through these updates, and the variance that joins it."""
    keep, variance = 1.0, 0.0
    for update in updates:
        keep, variance = update.keep * keep, update.keep**2 * variance + update.fresh**2
    return keep, variance


def _mix(*parts: tuple[float, Fields]) -> Fields:
    mixed: Fields = {}
    for weight, fields in parts:
        for offset, of_field in fields.items():
            mixed[offset] = mixed.get(offset, 0.0) + weight * of_field
    return {offset: weight for offset, weight in sorted(mixed.items()) if weight}

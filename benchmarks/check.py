"""Correctness before speed: every contestant against the dense step in float64, on some of the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.competitors import dense_distances
from benchmarks.contestants import SEED, Contestant
from benchmarks.inputs import SIGMA_MIN, Call, Inputs, Outputs
from smoothie_kernels import noise

ROWS, ROWS_IF_LARGE, LARGE = 32, 8, 2**16  # as many rows are compared, evenly spread; fewer where V is large
CHUNK = 8192  # tokens of the table in float64 at a time


@dataclass(frozen=True)
class Tolerance:
    """What is allowed beside twice the error of the dense step in the inputs' own type."""

    smoothed: float  # relative, Frobenius
    tie: float  # tokens that are further away by less than this times ||x||^2 count as nearest
    lse: float = 1e-5  # relative, absolute below 1


OURS = {
    torch.float32: Tolerance(2e-6, 1e-5),
    torch.bfloat16: Tolerance(4e-3, 1e-5),  # the rounding of the output alone is up to 2^-9 an entry
    torch.float16: Tolerance(5e-4, 1e-5),
}
THEIRS = {
    torch.float32: Tolerance(1e-4, 1e-4),
    torch.bfloat16: Tolerance(3e-2, 2e-2),  # scores around ||x||^2 / 2 are rounded to 8 bits before the softmax
    torch.float16: Tolerance(1e-2, 5e-3),
}
NOISE_TIE = 1e-4  # backends may differ by 5e-5 in a normal


class CheckFailed(Exception):
    """Which contestant gave what wrong result."""

    def __init__(self, message: str, what: str = "") -> None:
        super().__init__(message)
        self.what = what or message  # without the names of case and contestant


@dataclass(frozen=True)
class Truth:
    """The step in float64 on the compared rows."""

    rows: Tensor  # [R] indices into x
    squares: Tensor  # [R] ||x||^2
    squared_distances: Tensor  # [R, V]
    logits: Tensor  # [R, V]
    smoothed: Tensor  # [R, D]
    lse: Tensor  # [R]
    scale_of_lse: Tensor  # [R]
    naive_smoothed: float  # relative error of the dense step in the inputs' type, with the same noise
    naive_lse: float


def truth(inputs: Inputs, *, noisy: bool) -> Truth:
    n, v, d = inputs.sizes
    rows = torch.linspace(0, n - 1, min(n, ROWS if v < LARGE else ROWS_IF_LARGE), device=inputs.x.device).round().long()
    x, mu, std = inputs.x[rows], inputs.mu[rows, None].double(), inputs.std[rows, None].double()
    parts = torch.split(inputs.table, CHUNK)
    squares = x.double().square().sum(1, keepdim=True)
    scores = torch.cat([x.double() @ part.double().T - part.double().square().sum(1) / 2 for part in parts], 1)
    squared_distances = squares - 2 * scores
    logits = -mu * squared_distances / (2 * SIGMA_MIN**2)
    if noisy:
        eps = noise.gaussian(len(rows), v, seed=SEED, row_ids=rows, backend="reference")
        logits += std * eps
    naive_logits = inputs.mu[rows, None] * dense_distances(x, inputs.table)
    if noisy:
        naive_logits += inputs.std[rows, None] * eps
    weights, smoothed, lse = logits.softmax(1), x.new_zeros(len(rows), d, dtype=torch.float64), logits.logsumexp(1)
    for part, weight in zip(parts, torch.split(weights, CHUNK, 1), strict=True):
        smoothed.addmm_(weight, part.double())
    naive = naive_logits.softmax(1).to(x.dtype) @ inputs.table
    scale = lse.abs().clamp_min(1)
    return Truth(
        rows, squares[:, 0], squared_distances, logits, smoothed, lse, scale,
        naive_smoothed=frobenius(naive, smoothed), naive_lse=largest(naive_logits.logsumexp(1), lse, scale),
    )  # fmt: skip


def frobenius(value: Tensor, true: Tensor) -> float:
    return float((value.double() - true).norm() / true.norm())


def largest(value: Tensor, true: Tensor, scale: Tensor) -> float:
    """The largest error over its scale."""
    return float(((value.double() - true).abs() / scale).max())


class Referee:
    """Compares the contestants of one case; a truth is computed once."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._truths: dict[bool, Truth] = {}

    def check(self, contestant: Contestant, call: Call) -> float | None:
        """Runs the call once; the relative error of smoothed. CheckFailed where anything is off.

        Contestants with random numbers of their own are run with std = 0, which takes them the same way.
        """
        noisy = self.inputs.noisy and contestant.ours
        if noisy or not self.inputs.noisy:
            outputs = call()
        else:
            with self.inputs.silenced():
                outputs = call()
        return self._compare(contestant, outputs, noisy)

    def _compare(self, contestant: Contestant, outputs: Outputs, noisy: bool) -> float | None:
        if noisy not in self._truths:
            self._truths[noisy] = truth(self.inputs, noisy=noisy)
        true = self._truths[noisy]
        allowed = (OURS if contestant.ours else THEIRS)[self.inputs.x.dtype]

        def expect(what: str, error: float, bound: float) -> float:
            if not error <= bound:
                wrong = f"{what} is off by {error:.3g}, {bound:.3g} is allowed"
                raise CheckFailed(f"case {self.inputs.case.name!r}, contestant {contestant.name!r}: {wrong}", wrong)
            return error

        if outputs.tokens is not None:
            found = true.squared_distances.gather(1, outputs.tokens[true.rows, None])[:, 0]
            gap = (found - true.squared_distances.amin(1)) / true.squares
            expect("tokens (distance beyond the nearest's, over ||x||^2)", float(gap.max()), allowed.tie)
        if outputs.distance is not None:
            error = largest(outputs.distance[true.rows], true.squared_distances.amin(1), true.squares)
            expect("distance (over ||x||^2)", error, allowed.tie)
        if outputs.noisy_tokens is not None:
            gap = true.logits.amax(1) - true.logits.gather(1, outputs.noisy_tokens[true.rows, None])[:, 0]
            expect("noisy_tokens (logit below the largest)", float(gap.max()), NOISE_TIE)
        if outputs.lse is not None:
            error = largest(outputs.lse[true.rows], true.lse, true.scale_of_lse)
            expect("lse", error, max(allowed.lse, 2 * true.naive_lse))
        if outputs.smoothed is None:
            return None
        error = frobenius(outputs.smoothed[true.rows], true.smoothed)
        return expect("smoothed", error, max(allowed.smoothed, 2 * true.naive_smoothed))

"""Correctness before speed: every contestant against the dense step in float64, on some of the rows."""

import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.race import CheckFailed
from benchmarks.step.competitors import dense_distances, dense_mean
from benchmarks.step.contestants import SEED, Contestant
from benchmarks.step.inputs import SIGMA_MIN, Call, Inputs, Outputs, zeroed
from smoothie_kernels import noise
from smoothie_kernels.testing import relative_error

ROWS, ROWS_IF_LARGE, LARGE = 32, 8, 2**16  # as many rows are compared, evenly spread; fewer where V is large


@dataclass(frozen=True)
class Tolerance:
    """What is allowed next to twice the error of the dense step in the inputs' own type."""

    smoothed: float  # relative, Frobenius; of gradients too
    tie: float  # tokens that are further away by less than this times ||x||^2 count as nearest
    # Relative, absolute below 1. In 16-bit types, what truncation in matrix units leaves (testing.truncation) is less
    # than this or than twice the naive error: at D = 768, mu = 0.0244 it is 7e-5, and that 3e-3.
    lse: float = 1e-5


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
MISSED = 0.05  # by so much may recall be below its target; `python -m benchmarks recall` has the narrow bound
NOISE_TIE = 1e-4  # backends may differ by 5e-5 in a normal
ROUNDING = 0.21  # root mean square of the relative error of a rounded number, over eps of its type


@dataclass(frozen=True)
class Truth:
    """The step in float64 on the compared rows."""

    squares: Tensor  # [R] ||x||^2
    squared_distances: Tensor  # [R, V]
    logits: Tensor  # [R, V]
    naive_logits: Tensor  # [R, V]: of the dense step in the inputs' type, with the same noise
    means: dict[str, tuple[Tensor, float]]  # smoothed [R, D] and gradients, each with the relative error of naive's


def truth(inputs: Inputs, rows: Tensor, *, noisy: bool) -> Truth:
    x, mu, std = inputs.x[rows], inputs.mu[rows, None], inputs.std[rows, None]
    table, squares = inputs.table.double(), x.double().square().sum(1, keepdim=True)
    squared_distances = squares + table.square().sum(1) - 2 * x.double() @ table.T
    logits = mu.double() * squared_distances / (-2 * SIGMA_MIN**2)
    naive_logits = mu * dense_distances(x, inputs.table)
    eps = None
    if noisy:
        eps = noise.gaussian(*logits.shape, seed=SEED, row_ids=rows, backend="reference", **inputs.fields)
        logits += std.double() * eps
        naive_logits += std * eps
    smoothed = logits.softmax(1) @ table
    means = {"smoothed": (smoothed, relative_error(naive_logits.softmax(1).to(x.dtype) @ inputs.table, smoothed))}
    if inputs.op.trains:
        exact, naive = (gradients(inputs, rows, eps, dtype) for dtype in (torch.float64, x.dtype))
        means |= {name: (exact[name], relative_error(naive[name], exact[name])) for name in exact}
    return Truth(squares[:, 0], squared_distances, logits, naive_logits, means)


def gradients(inputs: Inputs, rows: Tensor, eps: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """By autograd of the dense step in one type, where the other rows have no gradient; x's for all rows."""
    x, table, grad = (given.detach().to(dtype) for given in (inputs.x[rows], inputs.table, inputs.grad[rows]))
    leaves = {"grad_x": x.requires_grad_()}
    if inputs.op.trains_table:
        leaves["grad_embeddings"] = table.requires_grad_()
    distances = dense_distances(x, table)
    smoothed = dense_mean(
        distances, table, inputs.mu[rows], inputs.std[rows], None if eps is None else lambda logits: eps
    )  # fmt: skip
    found = dict(zip(leaves, torch.autograd.grad(smoothed, tuple(leaves.values()), grad), strict=True))
    found["grad_x"] = torch.zeros_like(inputs.x, dtype=dtype).index_copy_(0, rows, found["grad_x"])
    return found


def mean_of_top(inputs: Inputs, rows: Tensor, true: Truth, indices: Tensor, smooth: str) -> tuple[Tensor, float]:
    """The mean embedding that goes with these top-k tokens [R, K], in float64, and the relative error of naive's."""
    x, table, exact, naive = inputs.x[rows], inputs.table, true.logits, true.naive_logits
    if smooth == "topk":
        mean, of_naive = (
            (logits.gather(1, indices).softmax(1).to(dtype)[:, None] @ table[indices].to(dtype))[:, 0]
            for logits, dtype in ((exact, torch.float64), (naive, x.dtype))
        )
        return mean, relative_error(of_naive, mean)
    weights = exact.softmax(1).gather(1, indices)
    kept = (weights[:, None] @ table[indices].double())[:, 0]
    quiet = inputs.mu[rows, None].double() * true.squared_distances / (-2 * SIGMA_MIN**2)
    others = (1 + quiet - quiet.mean(1, keepdim=True)) @ table.double() / len(table)  # mean(E) + cov(E, quiet)
    return kept + (1 - weights.sum(1, keepdim=True)) * others, true.means["smoothed"][1]


def largest(value: Tensor, true: Tensor, scale: Tensor) -> float:
    """The largest error over its scale."""
    return float(((value.double() - true).abs() / scale).max())


class Referee:
    """Compares the contestants of one case; a truth is computed once."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, (n, v, _) = inputs, inputs.sizes
        count = min(n, ROWS if v < LARGE else ROWS_IF_LARGE)
        self.rows = torch.linspace(0, n - 1, count, device=inputs.x.device).round().long()
        self._truths: dict[bool, Truth] = {}

    def check(self, contestant: Contestant, call: Call) -> float | None:
        """Runs the call once; the largest relative error of smoothed and gradients. CheckFailed where anything is off.

        Contestants with random numbers of their own are run with std = 0, which takes them the same way. Gradients
        are those of the compared rows: the others are given none.
        """
        noisy = self.inputs.noisy and contestant.ours
        with ExitStack() as stack:
            if self.inputs.noisy and not noisy:
                stack.enter_context(zeroed(self.inputs.std))
            if self.inputs.op.trains:
                stack.enter_context(zeroed(self.inputs.grad, but=self.rows))
            outputs = call()
            if noisy not in self._truths:
                self._truths[noisy] = truth(self.inputs, self.rows, noisy=noisy)
        error = self._compare(contestant, outputs, self._truths[noisy])
        if self.inputs.noisy and not noisy and self.inputs.op.trains_table:
            self._compare_noise(call())
        return error

    def _compare_noise(self, outputs: Outputs) -> None:
        """Its own noise must be the same in the backward pass as in the forward pass.

        Moving x and table by one vector moves `smoothed` by it, whatever the noise: so all gradients of x and table
        together are the sum of those that came in. Another noise changes the sum of a row's weights: by 1e-2 at
        V = 30,522 if all weights are equal, sqrt(2 (exp(std^2) - 1) / V), and by more if they are not.
        """
        if outputs.grad_x is not None and outputs.grad_embeddings is not None:
            given = [each.double() for each in (self.inputs.grad, outputs.grad_x, outputs.grad_embeddings)]
            total, *parts = (each.sum(0) for each in given)
            error = relative_error(parts[0] + parts[1], total)
            # A weight is rounded once before it takes its row's gradient to the table; gradients of x and table up to
            # three times: as products, in their sum, at the end. The errors are independent, so their squares add up.
            of_grad, of_x, of_table = (float(each.square().sum()) for each in given)
            rounded = ROUNDING * torch.finfo(self.inputs.x.dtype).eps * math.sqrt(of_grad + 3 * of_x + 3 * of_table)
            of_sums = len(self.inputs.table) * torch.finfo(torch.float32).eps / 2  # at most, of V positive weights
            allowed = 2 * rounded / float(total.norm()) + of_sums
            expect("noise of the backward (sum of all gradients)", error, allowed)

    def _compare(self, contestant: Contestant, outputs: Outputs, true: Truth) -> float | None:
        allowed = (OURS if contestant.ours else THEIRS)[self.inputs.x.dtype]
        if outputs.tokens is not None:
            found = true.squared_distances.gather(1, outputs.tokens[self.rows, None])[:, 0]
            gap = (found - true.squared_distances.amin(1)) / true.squares
            expect("tokens (distance beyond the nearest's, over ||x||^2)", float(gap.max()), allowed.tie)
        if outputs.distance is not None:
            error = largest(outputs.distance[self.rows], true.squared_distances.amin(1), true.squares)
            expect("distance (over ||x||^2)", error, allowed.tie)
        if outputs.noisy_tokens is not None:
            gap = true.logits.amax(1) - true.logits.gather(1, outputs.noisy_tokens[self.rows, None])[:, 0]
            expect("noisy_tokens (logit below the largest)", float(gap.max()), NOISE_TIE)
        if outputs.lse is not None:
            lse = true.logits.logsumexp(1)
            scale = lse.abs().clamp_min(1)
            naive = largest(true.naive_logits.logsumexp(1), lse, scale)
            expect("lse", largest(outputs.lse[self.rows], lse, scale), max(allowed.lse, 2 * naive))
        means = true.means
        if outputs.top_values is not None and outputs.top_indices is not None:
            values, indices = outputs.top_values[self.rows].double(), outputs.top_indices[self.rows]
            self._compare_top(contestant, values, indices, true, allowed.tie)
            means = {"smoothed": mean_of_top(self.inputs, self.rows, true, indices, contestant.smooth)}
        errors = []
        for what, (exact, naive) in means.items():
            value = getattr(outputs, what)
            if value is not None:
                error = relative_error(value[self.rows] if what == "smoothed" else value, exact)
                errors.append(expect(what, error, max(allowed.smoothed, 2 * naive)))
        return max(errors, default=None)

    def _compare_top(self, contestant: Contestant, values: Tensor, indices: Tensor, true: Truth, tie: float) -> None:
        """There are K, each value is its token's logit, no token comes twice, none or few of the largest are missed."""
        expect("top_values (their number)", float(abs(values.shape[1] - self.inputs.k)), 0.0)
        # What a logit may be off by: its noise, and its distance.
        allowed = NOISE_TIE + tie * true.squares * self.inputs.mu[self.rows].double() / (2 * SIGMA_MIN**2)
        of_indices, of_largest = true.logits.gather(1, indices), true.logits.topk(values.shape[1]).values
        error = largest(values, of_indices, allowed[:, None])
        expect("top_values (from the logits of top_indices, over what is allowed)", error, 1.0)
        expect("top_values (rise within a row)", float(values.diff(dim=1).amax()) if values.shape[1] > 1 else 0.0, 0.0)
        repeated = indices.sort(1).values.diff(dim=1) == 0
        expect("top_indices (tokens that come twice)", float(repeated.sum()), 0.0)
        if contestant.recall_target == 1:
            error = largest(values, of_largest, allowed[:, None])
            expect("top_values (from the largest logits, over what is allowed)", error, 1.0)
            return
        missed = (of_indices < (of_largest[:, -1] - allowed)[:, None]).double().mean()
        may_miss = 1 - contestant.recall_target
        deviation = math.sqrt(may_miss * (1 - may_miss) / values.numel())
        expect("top_indices (share that is not of the largest)", float(missed), may_miss + max(MISSED, 4 * deviation))


def expect(what: str, error: float, bound: float) -> float:
    if not error <= bound:
        raise CheckFailed(f"{what} is off by {error:.3g}, {bound:.3g} is allowed")
    return error

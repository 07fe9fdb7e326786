"""The step as one reads it in the paper, dense, and how close results and gradients have to come to it."""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple, ParamSpec

import torch
from torch import Tensor

from smoothie_kernels.ops import SmoothieStep
from smoothie_kernels.topk import TopK

# Largest relative (Frobenius) error of `smoothed` that needs no comparison with naive arithmetic: a few float32
# roundings, or the one rounding of a 16-bit result.
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
NAIVE_MARGIN = 2.0
TIE = 1e-5  # tokens whose distance (or logit) differs by less, relatively, count as tied


def dense_logits(
    x: Tensor, embeddings: Tensor, mu: Tensor, std: Tensor, eps: Tensor, sigma_min: float = 1.5
) -> tuple[Tensor, Tensor]:
    """Distances D and logits, [N, V] each, by ||x||^2 - 2 x.E + ||E||^2 in the tensors' own type; float64 directly."""
    if x.dtype == torch.float64:
        squared = torch.cdist(x, embeddings, compute_mode="donot_use_mm_for_euclid_dist").square()
    else:
        squared = x.square().sum(1)[:, None] - 2 * x @ embeddings.T + embeddings.square().sum(1)
    distances = -squared / (2 * sigma_min**2)
    return distances, mu[:, None] * distances + std[:, None] * eps


def dense_step(
    x: Tensor, embeddings: Tensor, mu: Tensor, std: Tensor, eps: Tensor, sigma_min: float = 1.5
) -> SmoothieStep:
    """The whole step with its [N, V] tensors. x [N, D], embeddings [V, D], mu and std [N], eps [N, V]: one type."""
    return _step_of(*dense_logits(x, embeddings, mu, std, eps, sigma_min), embeddings)


def _step_of(distances: Tensor, logits: Tensor, embeddings: Tensor) -> SmoothieStep:
    return SmoothieStep(logits.softmax(-1) @ embeddings, distances.argmax(-1), logits.argmax(-1), logits.logsumexp(-1))


def truncation(x: Tensor, embeddings: Tensor, mu: Tensor, sigma_min: float = 1.5) -> Tensor:
    """By how much matrix units may move the logits of a row against each other, [N] float64; zero but for 16-bit types.

    They truncate instead of rounding (Fasi et al., PeerJ CS 330; Khattak and Mikaitis, arXiv 2512.07004). A step aligns
    sixteen products and the sum so far to the largest of them, truncates each at least one bit below the last of
    float32, adds them, and truncates the new sum to float32. Each truncation loses half a unit in the mean, so a step
    loses (16 / 2 + 1) / 2 = 4.5 times 2^-23 of the sum, which grows evenly over D / 16 steps to ||x|| ||E|| at most:
    half of that in the mean. Sums of one sign all lose to one side, so differences are off by no more. Measured with a
    model of such units, one extra bit, float16, D from 16 to 1,024: 0.63 of this between logits, 0.5 in lse.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)
    largest: Tensor = x.double().norm(dim=1) * embeddings.double().norm(dim=1).max()
    lost = 4.5 / 2 * 2**-23 * math.ceil(x.shape[1] / 16)
    return largest * (mu.double().abs() * (lost / sigma_min**2))


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact|| in float64."""
    return float((value.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))


class Compared(NamedTuple):
    """One result, held against float64."""

    name: str
    error: float  # of its elements the one nearest to its bound, or farthest beyond it
    bound: float
    off: Tensor  # bool: which elements are beyond their bound

    @property
    def wrong(self) -> bool:
        return bool(self.off.any())

    def __str__(self) -> str:
        return f"{self.name}: off by {self.error:.2e}, {self.bound:.2e} is allowed"


def compare(name: str, error: Tensor, bound: Tensor | float) -> Compared:
    """Element by element; an error that is not a number is beyond any bound."""
    bound = torch.as_tensor(bound, dtype=torch.float64, device=error.device).expand_as(error)
    off = ~(error <= bound)
    if not error.numel():
        return Compared(name, 0.0, 0.0, off)
    worst = (error / bound.clamp_min(1e-300)).nan_to_num(nan=torch.inf).argmax()
    return Compared(name, float(error.flatten()[worst]), float(bound.flatten()[worst]), off)


def _compare_norm(name: str, difference: Tensor, bound: float, unit: float = 1.0) -> Compared:
    """||difference||, in units. Where it is beyond the bound, those elements are off that are not finite; or else, that
    are far beyond the bound's root-mean-square; or else, beyond it."""
    error = float(difference.norm())
    off = ~difference.isfinite()
    if not error <= bound:
        for times in (4, 1):
            if not off.any():
                off = difference.abs() > times * bound / difference.numel() ** 0.5
    return Compared(name, error / unit, bound / unit, off)


_Given = ParamSpec("_Given")


def _what_is_wrong(comparison: Callable[_Given, list[Compared]]) -> Callable[_Given, list[str]]:
    """The same in words; an empty list where nothing is wrong."""

    @wraps(comparison)
    def check(*args: _Given.args, **kwargs: _Given.kwargs) -> list[str]:
        return [str(compared) for compared in comparison(*args, **kwargs) if compared.wrong]

    return check


def _gather(values: Tensor, indices: Tensor) -> Tensor:
    """values [N, V] at indices [N, K]; NaN where an index is none, as in memory that was never written."""
    inside = (indices >= 0) & (indices < values.shape[1])
    return values.gather(1, indices.where(inside, 0)).where(inside, torch.nan)


def compare_step(
    step: SmoothieStep,
    x: Tensor,
    embeddings: Tensor,
    mu: Tensor,
    std: Tensor,
    eps: Tensor,
    sigma_min: float = 1.5,
    *,
    loudness: float = 1.0,
) -> list[Compared]:
    """`step` against the dense step in float64.

    smoothed: relative error at most FLOOR of its type (times std * loudness where that is above 1: the float32 field is
    good to 2e-6, a sum of fields to that times `loudness`, the sum of |field_weights|) or twice that of the naive
    float32 step on the same inputs. lse: 1e-5 relative, FLOOR likewise times std * loudness, or twice the naive error,
    and for 16-bit types `truncation` times the weight of all tokens but the nearest: that one's distance is taken
    directly.
    tokens and noisy_tokens: equal but for ties.
    """

    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return x.to(dtype), embeddings.to(dtype), mu.to(dtype), std.to(dtype), eps.to(dtype)

    distances, logits = dense_logits(*inputs(torch.float64), sigma_min)
    exact = _step_of(distances, logits, embeddings.double())
    naive = dense_step(*inputs(torch.float64 if x.dtype == torch.float64 else torch.float32), sigma_min)

    size = max(float(exact.smoothed.norm()), 1e-300)
    bound = max(
        FLOOR[x.dtype] * max(1.0, loudness * float(std.max())),
        NAIVE_MARGIN * relative_error(naive.smoothed, exact.smoothed),
    )
    compared = [_compare_norm("smoothed", step.smoothed.double() - exact.smoothed, bound * size, size)]
    lse_error = (step.lse.double() - exact.lse).abs()
    lse_bound = (1e-5 * exact.lse.abs()).clamp_min(float(NAIVE_MARGIN * (naive.lse.double() - exact.lse).abs().max()))
    floor = FLOOR[torch.float32] if x.dtype != torch.float64 else FLOOR[x.dtype]
    lse_bound = lse_bound.clamp_min(floor).maximum(floor * loudness * std.double())
    of_others = 1 - logits.softmax(1).gather(1, exact.tokens[:, None])[:, 0]
    lse_bound += truncation(x, embeddings, mu, sigma_min) * of_others
    compared.append(compare("lse", lse_error, lse_bound))
    for name, scores in (("tokens", distances), ("noisy_tokens", logits)):
        got, best = getattr(step, name), scores.max(1).values
        behind = best - _gather(scores, got[:, None])[:, 0]
        compared.append(compare(name, behind, TIE * best.abs().clamp_min(1.0)))
    return compared


check_step = _what_is_wrong(compare_step)


def compare_topk(
    topk: TopK,
    x: Tensor,
    embeddings: Tensor,
    mu: Tensor,
    std: Tensor,
    eps: Tensor,
    sigma_min: float = 1.5,
    *,
    recall: float = 1.0,
    loudness: float = 1.0,
) -> list[Compared]:
    """`topk` against the dense logits in float64.

    values: 1e-5 of max(|logit|, std * loudness, 1), or twice the error of the naive float32 logits, and for 16-bit
    types `truncation`; descending.
    indices: distinct, each with its value; together at least `recall` of the largest logits, in the mean over rows,
    but for ties.
    tail_mass: the bound of values, as that is a weight's relative error.
    """

    def logits_in(dtype: torch.dtype) -> Tensor:
        return dense_logits(x.to(dtype), embeddings.to(dtype), mu.to(dtype), std.to(dtype), eps.to(dtype), sigma_min)[1]

    logits, n, k = logits_in(torch.float64), *topk.values.shape
    naive = (logits_in(torch.float64 if x.dtype == torch.float64 else torch.float32) - logits).abs()
    of_tokens = _gather(logits, topk.indices)
    relative = 1e-5 if x.dtype != torch.float64 else 1e-7  # float64 reference, float32 field
    bound = (relative * of_tokens.abs().maximum(loudness * std.double()[:, None]).clamp_min(1)).clamp_min(
        NAIVE_MARGIN * float(naive.max())
    )
    bound += truncation(x, embeddings, mu, sigma_min)[:, None]
    compared = [
        compare("values", (topk.values.double() - of_tokens).abs(), bound),
        compare("order of values", topk.values.diff(dim=1).clamp_min(0), 0.0),
    ]
    twice = k - torch.tensor([len(row.unique()) for row in topk.indices])
    compared.append(compare("indices that come twice", twice.double(), 0.0))
    smallest = logits.topk(k).values[:, -1:]
    lost = ~(of_tokens >= smallest - 2 * bound)
    share = float(lost.double().mean()) if n else 0.0
    compared.append(Compared("share of the largest that is lost", share, 1 - recall, lost & (1 - share < recall)))
    tail = 1 - _gather(logits.softmax(1), topk.indices).sum(1)
    compared.append(compare("tail_mass", (topk.tail_mass.double() - tail).abs(), 2 * bound.amax(1)))
    return compared


check_topk = _what_is_wrong(compare_topk)


def dense_gradients(
    x: Tensor,
    embeddings: Tensor,
    mu: Tensor,
    std: Tensor,
    eps: Tensor,
    grad_smoothed: Tensor,
    grad_lse: Tensor,
    sigma_min: float = 1.5,
) -> tuple[Tensor, Tensor]:
    """Gradients for x and embeddings of sum(smoothed grad_smoothed) + sum(lse grad_lse), by autograd. One type."""
    x, embeddings = x.detach().requires_grad_(), embeddings.detach().requires_grad_()
    distances = _distances_to_differentiate(x, embeddings) / (-2 * sigma_min**2)
    logits = mu[:, None] * distances + std[:, None] * eps
    outputs = logits.softmax(-1) @ embeddings, logits.logsumexp(-1)
    grad_x, grad_embeddings = torch.autograd.grad(outputs, (x, embeddings), (grad_smoothed, grad_lse))
    return grad_x, grad_embeddings


def _distances_to_differentiate(x: Tensor, embeddings: Tensor) -> Tensor:
    """Squared; the root that torch.cdist takes has no derivative at zero."""
    return x.square().sum(1)[:, None] - 2 * x @ embeddings.T + embeddings.square().sum(1)


def compare_gradients(
    grads: Sequence[Tensor | None],
    x: Tensor,
    embeddings: Tensor,
    mu: Tensor,
    std: Tensor,
    eps: Tensor,
    grad_smoothed: Tensor,
    grad_lse: Tensor,
    sigma_min: float = 1.5,
    *,
    cancelled: float = 0.0,
    loudness: float = 1.0,
) -> list[Compared]:
    """The gradients of x and embeddings (None: not asked for) against float64.

    Relative error at most twice that of naive float32 autograd on the same inputs, or FLOOR of the coarser of the two
    types (times std * loudness where that is above 1). Where terms may cancel by chance: or the share `cancelled` of
    that FLOOR, of the sizes of all terms. 0.25 of it is 5e-7, what float32 keeps of a weight: roundings of log_sum,
    noise and exp.
    """

    def dense(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return dense_gradients(
            x.to(dtype), embeddings.to(dtype), mu.to(dtype), std.to(dtype), eps.to(dtype),
            grad_smoothed.to(dtype), grad_lse.to(dtype), sigma_min,
        )  # fmt: skip

    exact = dense(torch.float64)
    naive = dense(torch.float64 if x.dtype == torch.float64 else torch.float32)
    floor = max(FLOOR[x.dtype], FLOOR[embeddings.dtype]) * max(1.0, loudness * float(std.max()))
    sizes = _sizes_of_terms(
        x.double(), embeddings.double(), mu.double(), std.double(), eps.double(),
        grad_smoothed.double(), grad_lse.double(), sigma_min,
    )  # fmt: skip
    compared = []
    for name, grad, truth, by_naive, size in zip(("x", "embeddings"), grads, exact, naive, sizes, strict=True):
        if grad is None:
            continue
        bound = max(
            floor * float(truth.norm()),
            NAIVE_MARGIN * float((by_naive - truth).norm()),
            floor * cancelled * float(size.norm()),
        )
        compared.append(_compare_norm(f"gradient of {name}", grad.double() - truth, bound))
    return compared


check_gradients = _what_is_wrong(compare_gradients)


def _sizes_of_terms(
    x: Tensor,
    embeddings: Tensor,
    mu: Tensor,
    std: Tensor,
    eps: Tensor,
    grad_smoothed: Tensor,
    grad_lse: Tensor,
    sigma_min: float,
) -> tuple[Tensor, Tensor]:
    """The gradients' sums with every term's absolute value. All float64."""
    weights = dense_logits(x, embeddings, mu, std, eps, sigma_min)[1].softmax(-1)
    x, embeddings, grad_smoothed = x.abs(), embeddings.abs(), grad_smoothed.abs()
    incoming = grad_smoothed @ embeddings.T + (grad_smoothed * (weights @ embeddings)).sum(1, keepdim=True)
    scores = (mu.abs() / sigma_min**2)[:, None] * weights * (incoming + grad_lse.abs()[:, None])
    of_x = scores @ embeddings + scores.sum(1, keepdim=True) * x
    of_embeddings = weights.T @ grad_smoothed + scores.T @ x + scores.sum(0)[:, None] * embeddings
    return of_x, of_embeddings

"""The step as one reads it in the paper, dense, and how close results and gradients have to come to it."""

import math
from collections.abc import Sequence

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
    distances, logits = dense_logits(x, embeddings, mu, std, eps, sigma_min)
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


def check_step(
    step: SmoothieStep,
    x: Tensor,
    embeddings: Tensor,
    mu: Tensor,
    std: Tensor,
    eps: Tensor,
    sigma_min: float = 1.5,
    *,
    loudness: float = 1.0,
) -> list[str]:
    """What is wrong with `step`, held against the dense step in float64; an empty list where nothing is.

    smoothed: relative error at most FLOOR of its type (times std * loudness where that is above 1: the float32 field is
    good to 2e-6, a sum of fields to that times `loudness`, the sum of |field_weights|) or twice that of the naive
    float32 step on the same inputs. lse: 1e-5 relative, or twice the naive error, and
    for 16-bit types `truncation` times the weight of all tokens but the nearest: that one's distance is taken directly.
    tokens and noisy_tokens: equal but for ties.
    """

    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return x.to(dtype), embeddings.to(dtype), mu.to(dtype), std.to(dtype), eps.to(dtype)

    exact = dense_step(*inputs(torch.float64), sigma_min)
    distances, logits = dense_logits(*inputs(torch.float64), sigma_min)
    naive = dense_step(*inputs(torch.float64 if x.dtype == torch.float64 else torch.float32), sigma_min)

    wrong = []
    error = relative_error(step.smoothed, exact.smoothed)
    bound = max(
        FLOOR[x.dtype] * max(1.0, loudness * float(std.max())),
        NAIVE_MARGIN * relative_error(naive.smoothed, exact.smoothed),
    )
    if not error <= bound:
        wrong.append(f"smoothed: relative error {error:.2e} > {bound:.2e}")
    lse_error = (step.lse.double() - exact.lse).abs()
    lse_bound = (1e-5 * exact.lse.abs()).clamp_min(float(NAIVE_MARGIN * (naive.lse.double() - exact.lse).abs().max()))
    lse_bound = lse_bound.clamp_min(FLOOR[torch.float32] if x.dtype != torch.float64 else FLOOR[x.dtype])
    of_others = 1 - logits.softmax(1).gather(1, exact.tokens[:, None])[:, 0]
    lse_bound += truncation(x, embeddings, mu, sigma_min) * of_others
    if not bool((lse_error <= lse_bound).all()):
        wrong.append(f"lse: error {float(lse_error.max()):.2e} > {float(lse_bound.max()):.2e}")
    for name, scores in (("tokens", distances), ("noisy_tokens", logits)):
        got, best = getattr(step, name), scores.max(1).values
        behind = best - scores.gather(1, got[:, None])[:, 0]
        if not bool((behind <= TIE * best.abs().clamp_min(1.0)).all()):
            wrong.append(f"{name}: behind the best by up to {float(behind.max()):.2e}")
    return wrong


def check_topk(
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
) -> list[str]:
    """What is wrong with `topk`, held against the dense logits in float64; an empty list where nothing is.

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
    of_tokens = logits.gather(1, topk.indices)
    relative = 1e-5 if x.dtype != torch.float64 else 1e-7  # float64 reference, float32 field
    bound = (relative * of_tokens.abs().maximum(loudness * std.double()[:, None]).clamp_min(1)).clamp_min(
        NAIVE_MARGIN * float(naive.max())
    )
    bound += truncation(x, embeddings, mu, sigma_min)[:, None]
    wrong = []
    if bool(((topk.values.double() - of_tokens).abs() > bound).any()) or bool(topk.values.isnan().any()):
        wrong.append(f"values: off by up to {float((topk.values.double() - of_tokens).abs().max()):.2e}")
    if bool((topk.values.diff(dim=1) > 0).any()):
        wrong.append("values: not descending")
    if any(len(row.unique()) != k for row in topk.indices):
        wrong.append("indices: not distinct")
    smallest = logits.topk(k).values[:, -1:]
    found = float((of_tokens >= smallest - 2 * bound).double().mean()) if n else 1.0
    if found < recall:
        wrong.append(f"indices: recall {found:.4f} < {recall}")
    tail = 1 - logits.softmax(1).gather(1, topk.indices).sum(1)
    if bool(((topk.tail_mass.double() - tail).abs() > 2 * bound.amax(1)).any()):
        wrong.append(f"tail_mass: off by up to {float((topk.tail_mass.double() - tail).abs().max()):.2e}")
    return wrong


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


def check_gradients(
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
) -> list[str]:
    """What is wrong with the gradients of x and embeddings (None: not asked for), held against float64.

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
    wrong = []
    for name, grad, truth, by_naive, size in zip(("x", "embeddings"), grads, exact, naive, sizes, strict=True):
        if grad is None:
            continue
        error, norm = float((grad.double() - truth).norm()), float(truth.norm())
        bound = max(
            floor * norm, NAIVE_MARGIN * float((by_naive - truth).norm()), floor * cancelled * float(size.norm())
        )
        if not error <= bound:
            wrong.append(f"gradient of {name}: error {error:.2e} > {bound:.2e}, of {norm:.2e}")
    return wrong


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

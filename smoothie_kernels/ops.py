"""The public operators: contract, then check, pick, call, and nothing else."""

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smoothie_kernels import checks, library, metric
from smoothie_kernels.stream import Request
from smoothie_kernels.topk import TopK, largest, smooth_topk, smooth_topk_and_mean
from smoothie_kernels.vocabulary import Vocabulary, as_vocabulary


class SmoothieStep(NamedTuple):
    """What one step gives for every row."""

    smoothed: Tensor  # (..., D) in x.dtype: softmax(logits) @ embeddings
    tokens: Tensor  # (...) int64: the nearest token
    noisy_tokens: Tensor  # (...) int64: the token of the largest noisy logit
    lse: Tensor  # (...) float32: logsumexp of the noisy logits
    topk: TopK | None = None  # the largest noisy logits, where they were asked for


class NearestToken(NamedTuple):
    """The nearest token of every row."""

    tokens: Tensor  # (...) int64
    distance: Tensor  # (...) float32: squared Euclidean distance to that token's embedding


def fused_smoothie_step(
    x: Tensor,
    embeddings: Tensor | Vocabulary,
    mu: float | Tensor,
    std: float | Tensor,
    *,
    sigma_min: float = 1.5,
    seed: int | Tensor | None = None,
    offset: int | Sequence[int] | Tensor = 0,
    field_weights: Sequence[float] | Tensor | None = None,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    topk: int | None = None,
    recall_target: float = 1.0,
    smooth: str = "full",
    workspace: int = 2**28,
    backend: str = "auto",
) -> SmoothieStep:
    """One step of Smoothie: distances to all tokens, noise, softmax over the vocabulary, mean embedding.

    Equal to, without ever holding a tensor of rows x vocabulary::

        D = -torch.cdist(x.double(), E.double()).square() / (2 * sigma_min**2)
        where = dict(seed=seed, offset=offset, field_weights=field_weights, row_offset=row_offset, row_ids=row_ids)
        eps = noise.gaussian(N, V, **where)
        logits = mu[:, None] * D + std[:, None] * eps
        smoothed, lse = logits.softmax(-1) @ E.double(), logits.logsumexp(-1)
        tokens, noisy_tokens = D.argmax(-1), logits.argmax(-1)

    Args:
        x: (..., D) float32, bfloat16, float16 (float64 with the reference backend). All leading dimensions are rows.
        embeddings: (V, D) table of any of these types on x's device, or a `Vocabulary` of it, which checks the table
            and computes what depends on it alone once.
        mu: weight of the distances; a number or a tensor that broadcasts to `x.shape[:-1]`.
        std: standard deviation of the noise, not negative; likewise. The number 0 leaves the noise out. In float32 at
            most 2**24, times the sum of |field_weights|: louder noise has no digits for the distances.
        sigma_min: scale of the distances, in [2**-63, 2**63].
        seed: 64 bits that name the noise field. None draws one from torch's default generator, so that
            `torch.manual_seed` rules. An int, or a 0-d int64 tensor.
        offset: 64 bits, the caller's step counter: every offset has a fresh field. An int, or a 0-d int64 tensor.
            Several of them, F ints or int64 (F,): the noise is the sum of their fields, times `field_weights`.
        field_weights: F finite numbers, or a float tensor (F,) on x's device; None where offset is one.
        row_offset: row i of x (in order of the flattened leading dimensions) has the row id `row_offset + i`.
        row_ids: int64, shape `x.shape[:-1]`: the row ids themselves, in [0, 2**32), instead of `row_offset`.
        topk: how many of the largest noisy logits, in [1, V], or None. They come with the same pass.
        recall_target: in (0, 1]: the share of them that is found, in expectation over rows. 1.0 is exact. Less lets a
            backend keep the largest logits of strided buckets of tokens (`expected_recall` says how many it takes);
            it finds at least that share where the largest lie at random places in the table, and may find all. Which
            ones are missed depends on the backend. On a GPU exact top-k makes the host wait, to ask which rows need
            another look, unless a CUDA graph is captured.
        smooth: what `smoothed` is a mean of; without the table's second product unless "full".
            "full": all tokens.
            "topk": the top-k tokens, their weights adding up to 1. What they leave out is `topk.tail_mass`.
            "topk+mean": the top-k tokens with their weights in the full softmax, and `tail_mass` times the mean of the
            table under the weights without noise, to first order in the logits l = mu * D::

                smoothed = exp(values - lse) @ E[indices] + tail_mass * (mean(E) + cov(E, l))

            Biased: it takes the noise of the other tokens for its mean, near tokens among them for a Gaussian tail,
            and counts the top-k tokens as well. docs/topk.md has its error over the schedule. mean(E) and what makes
            the covariance are computed once per `Vocabulary`; with a bare table every call pays for them, V D^2.
        workspace: bytes that a GPU may take for the weights of some rows and tokens at a time, beside inputs and
            outputs; 256 MiB. With 0 the forward keeps them in registers; the backward takes what one tile needs.
        backend: "auto", or "reference", "cpu", "triton", "cuda" by name.

    Returns:
        SmoothieStep(smoothed, tokens, noisy_tokens, lse, topk). Ties go to the lowest token. A row with a
        non-finite x has NaN in smoothed and lse. topk is TopK(values, indices, tail_mass), None where topk is:
        lse is that of all tokens, so tail_mass is exact, to about 1e-6 max(1, std); the first index is noisy_tokens.

    Raises:
        TypeError, ValueError: a bad argument, by name, with what was wanted and what came.
        RuntimeError: the named backend cannot run here, and why.

    Sums are float32 (float64 for float64 input). The noise is a function of (seed, offset, row id, token) alone: it
    does not depend on backend, device, threads, or on how rows are split into calls. The same call on the same machine,
    with the same number of threads, gives the same bits, forward and backward.

    Gradients flow to x and embeddings from smoothed, lse, topk.values and topk.tail_mass; the weights are made again,
    never stored, and the choice of the top-k tokens is taken for constant. mu, std and field_weights take none, and
    there is no second derivative. A Vocabulary passes its gradient on to the table that it was made of.

    Under torch.autocast the inputs keep their types: bfloat16 rows with a float32 table are fine; call backward outside
    of it, as PyTorch asks, or the gradients of smooth="topk+mean" are rounded to 16 bits. torch.compile makes no graph
    break; it reads NumPy's numbers as arrays, so give it Python's. Load a program of torch.export after `import
    smoothie_kernels`, which registers its operators. torch.func.vmap over x, mu, std or row_ids gives
    every sample the noise of the same row ids; the table, seed, offset and field_weights cannot be batched, and
    torch.func.grad does not take PyTorch's custom operators (pytorch/pytorch#170834): use torch.autograd.grad. A CUDA
    graph replays what it captured: pass seed, offset or field_weights as a tensor on the GPU, and change it between
    replays for new noise.

    Equations 4, 5 of arXiv 2505.18853 and its sampling step.
    """
    vocabulary = as_vocabulary(embeddings, backend)
    checks.check_backend(backend)
    checks.check_x(x, vocabulary.embeddings)
    checks.check_can_be_saved(x, vocabulary.embeddings, vocabulary.metric)
    k = checks.check_topk(topk, recall_target, smooth, len(vocabulary))
    workspace = checks.count("workspace", workspace)
    ids, row_offset = checks.check_row_ids(row_ids, row_offset, x)
    checks.check_smooth(smooth, vocabulary.metric)
    flat, scale = _rows(x), checks.scale(mu, sigma_min, x)
    rows, lacks = metric.rows(vocabulary.metric, flat)
    request = Request(
        rows,
        vocabulary.embeddings,
        vocabulary.bias,
        scale,
        None if isinstance(std, Real) and std == 0 else checks.per_row("std", std, x),
        ids,
        row_offset,
        checks.word("seed", _draw_seed() if seed is None else seed),
        *checks.noise_fields(offset, field_weights, x),
        workspace,
        smooth == "full",
        True,
        k,
        float(recall_target),
        torch.is_grad_enabled() and (rows.requires_grad or vocabulary.embeddings.requires_grad),
        backend,
        None if lacks is None else lacks.detach(),
        vocabulary.col,
        None if vocabulary.col is None else vocabulary.embeddings,
    )
    smoothed, tokens, noisy_tokens, lse, _, log_sum, *top, _ = library.step_fwd(*request)
    if lacks is not None:
        lacks = scale * lacks
        smoothed, lse = smoothed.to(x.dtype), lse - lacks
        top[0] = top[0] - (lacks - lacks.detach())[:, None]
    found = None
    if topk is not None:
        top_logits, top_tokens = top
        found, weights = largest(lse, log_sum, top_logits, top_tokens)
        if smooth == "topk":
            smoothed = smooth_topk(top_logits, top_tokens, vocabulary, x.dtype, backend)
        elif smooth == "topk+mean":
            smoothed = smooth_topk_and_mean(found, weights, flat, scale, vocabulary, backend)
        found = TopK(*_like(x, found))
    smoothed, tokens, noisy_tokens, lse = _like(x, (smoothed, tokens, noisy_tokens, lse))
    return SmoothieStep(smoothed, tokens, noisy_tokens, lse, found)


def nearest_token(x: Tensor, embeddings: Tensor | Vocabulary, *, backend: str = "auto") -> NearestToken:
    """The nearest token of every row, and how far it is.

    Equal to, without ever holding a tensor of rows x vocabulary::

        distance, tokens = torch.cdist(x.double(), E.double()).square().min(-1)

    Args:
        x: (..., D) float32, bfloat16, float16 (float64 with the reference backend).
        embeddings: (V, D) table on x's device, or a `Vocabulary`, of whose metric distance is.
        backend: "auto", or "reference", "cpu", "triton", "cuda" by name.

    Returns:
        NearestToken(tokens, distance). Ties go to the lowest token; distance is computed directly from the winner's
        embedding, so it does not suffer from cancellation. Tokens nearer to each other than float32 rounding of
        the scores (relative 1e-6 of ||x||^2) count as ties.

    Raises:
        TypeError, ValueError: a bad argument. RuntimeError: the named backend cannot run here, and why.

    Gradients flow to x and embeddings from distance; the choice of the token is taken for constant.
    """
    vocabulary = as_vocabulary(embeddings, backend)
    checks.check_backend(backend)
    checks.check_x(x, vocabulary.embeddings)
    checks.check_can_be_saved(x, vocabulary.embeddings, vocabulary.metric)
    flat = _rows(x)
    if isinstance(vocabulary.metric, str) and vocabulary.metric == "euclidean":
        found = library.nearest_fwd(flat, vocabulary.embeddings, vocabulary.bias, None, backend)
        return NearestToken(*_like(x, found))
    with torch.no_grad():
        given = metric.rows(vocabulary.metric, flat).x, vocabulary.embeddings, vocabulary.bias, vocabulary.col, backend
        tokens, _ = library.nearest_fwd(*given)
    return NearestToken(*_like(x, (tokens, metric.distance(vocabulary.metric, flat, tokens, vocabulary.embeddings))))


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _like(x: Tensor, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """With the leading dimensions of x; a call of plain rows saves its views."""
    return outputs if x.dim() == 2 else tuple(o.view((*x.shape[:-1], *o.shape[1:])) for o in outputs)


def _draw_seed() -> Tensor:
    try:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")
    except RuntimeError as error:  # torch.func.vmap draws nothing unless it is told how
        raise ValueError(f"seed must be given where PyTorch draws no numbers, got None: {error}") from error

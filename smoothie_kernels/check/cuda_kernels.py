"""The kernels of backend "cuda", one by one: what they write, held against integers that must come out bit for bit.

Scores of integers are exact, and with these two scales so are the weights, once they are rounded to 16 bits, and their
products with the table:

    0       all weights are exp(0): they add up to V, and their products with the table to the sums of its columns
    8,192   exp(0) where a score is the best of its row, exp(-4,096) or less elsewhere, which is 0

exp is approximate: sums of weights, which are not rounded before, are exact but for that. No public call has these
results apart from each other.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from smoothie_kernels import noise
from smoothie_kernels.backends import cuda
from smoothie_kernels.backends.blocks import HEADROOM, cdiv
from smoothie_kernels.backends.cuda import Parts, Refs
from smoothie_kernels.backends.largest import of_keys
from smoothie_kernels.check.findings import Findings
from smoothie_kernels.check.probes import NAMES, Shapes, Target, inputs, integers
from smoothie_kernels.stream import Request

ONE, OWN = 0.0, 2.0**13  # scale, by the weights that are one; both leave scores exact
EXP = 2.0**-21  # relative error of ex2.approx, twice
NOT_WRITTEN = 0  # a key of no token


class Problem(NamedTuple):
    given: Request
    refs: Refs
    scores: Tensor  # [N, V] float64, on the CPU: exact


def problem(on: Target, n: int, v: int, d: int, dtype: torch.dtype, scale: float, biased: bool = True) -> Problem:
    x, table = integers(on, n, v, d, dtype)
    bias = -table.double().square().sum(1) / 2 * biased
    scores = x.double().cpu() @ table.double().cpu().T + bias.cpu()
    number = torch.tensor(0, device=on.device)
    given = Request(
        x, table, bias.float(), torch.full((n,), scale, device=on.device), None, None, 0, number, number[None], None,
        2**28,
    )  # fmt: skip
    zeros = torch.zeros(n, device=on.device)
    fields = torch.zeros(1, 3, dtype=torch.int32, device=on.device)
    return Problem(given, Refs(fields, scores.amax(1).float().to(on.device), zeros), scores)


@contextmanager
def plan(cluster: int, chunks: int, resident: int = cuda.RESIDENT) -> Iterator[None]:
    """Launches share tiles between so many blocks, take the table in so many chunks, keep so many tiles of x."""
    usual = {name: getattr(cuda, name) for name in ("pick_cluster", "pick_chunks", "RESIDENT")}
    cuda.pick_cluster = lambda row_blocks: cluster
    cuda.pick_chunks = lambda row_blocks, tiles, processors, most=0: min(tiles, chunks)
    cuda.RESIDENT = resident
    try:
        yield
    finally:
        for name, value in usual.items():
            setattr(cuda, name, value)


def prepare(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes) -> None:
    for n, v, d in shapes:
        found.case(NAMES[dtype], f"N {n} D {d}")
        x, _ = inputs(on, n, v, d, dtype)
        std, weights = torch.rand(n).to(on.device), torch.tensor([0.6, -0.8]).to(on.device)
        offsets, seed = torch.tensor([2**40 + 1, -5]), torch.tensor(-3)
        given = Request(
            x, x, x[:, 0].float(), std, std, None, 0, seed.to(on.device), offsets.to(on.device), weights, 2**28
        )
        refs = cuda._prepare(given)
        squares = x.double().square().sum(1) / 2
        found.within("half of ||x||^2", refs.ref_score, squares, 2**-23 * squares)
        highest = noise.MAX_ABS_NORMAL * 1.4 * std.double() - HEADROOM
        found.within("highest logit", refs.highest, highest, 2**-19)
        words = torch.tensor([noise.noise_key(int(seed), int(offset)) for offset in offsets])
        found.equal("noise key", refs.fields[:, :2].long() % 2**32, words)
        found.equal("weight of a field", refs.fields[:, 2].contiguous().view(torch.float32), weights)


# --- the score kernel


def raw_products(
    found: Findings, on: Target, shapes: Shapes, cluster: int, resident: int, all_chunks: Iterable[int] = (1, 2, 3)
) -> None:
    """Every product of a row and a token, as the keys of logits have it."""
    for dtype in on.dtypes:
        for n, v, d in shapes:
            for chunks in all_chunks:
                found.case(NAMES[dtype], f"N {n} V {v} D {d}, {chunks} chunks")
                given, refs, scores = problem(on, n, v, d, dtype, 1.0, biased=False)
                keys = torch.full((n, cdiv(v, 128) * 128), NOT_WRITTEN, dtype=torch.int64, device=on.device)
                zeros = torch.zeros_like(refs.highest)
                with plan(cluster, chunks, resident):
                    cuda._score(cuda.KEYS, given, refs._replace(ref_score=zeros), slice(0, v), keys=keys)
                logits, tokens = of_keys(keys[:, :v])
                found.equal("products", logits, scores)
                found.equal("tokens of products", tokens, torch.arange(v).expand(n, v))


def modes(
    found: Findings, on: Target, shapes: Shapes, cluster: int, resident: int, all_chunks: Iterable[int] = (1, 3)
) -> None:
    """The nearest token, the statistics, the weights, the largest of buckets."""
    for dtype in on.dtypes:
        for n, v, d in shapes:
            for chunks in all_chunks:
                label = f"{NAMES[dtype]} N {n} V {v} D {d}, {chunks} chunks"
                with plan(cluster, chunks, resident):
                    found.case(label, "nearest")
                    given, _, scores = problem(on, n, v, d, dtype, OWN)
                    hold_best(found, cuda._score(cuda.NEAREST, given, None, slice(0, v)), scores)
                    for scale in (ONE, OWN):
                        statistics_and_weights(found, label, problem(on, n, v, d, dtype, scale))
                    for keep in cuda.KEEP:
                        found.case(label, f"keep {keep}")
                        hold_kept(found, problem(on, n, v, d, dtype, 1.0), keep, min(chunks, cdiv(v, 128)))


def statistics_and_weights(found: Findings, label: str, of: Problem) -> None:
    given, refs, scores = of
    (n, v), scale, x = scores.shape, float(given.scale[0]), given.x
    found.case(label, f"statistics, scale {scale:g}")
    hold_parts(found, cuda._score(cuda.STATISTICS, given, refs, slice(0, v)), scores, scale)
    found.case(label, f"weights, scale {scale:g}")
    weights = torch.full((cuda.whole_tiles(n), cdiv(v, 128) * 128), torch.nan).to(x.device, x.dtype)
    hold_parts(found, cuda._score(cuda.WEIGHTS, given, refs, slice(0, v), weights=weights), scores, scale)
    found.equal("weights", weights[:n, :v], weights_of(scores, scale))


def weights_of(scores: Tensor, scale: float) -> Tensor:
    return torch.ones_like(scores) if scale == ONE else (scores == scores.amax(1, keepdim=True)).double()


def hold_best(found: Findings, parts: Parts, scores: Tensor, plane: int = 0) -> None:
    """The best score of all chunks, and of equal ones the first token."""
    best, token = parts.numbers[plane].cpu(), parts.tokens[plane].cpu()
    highest = best.amax(0)
    first = token.where(best == highest, 2**31 - 1).amin(0)
    name = ("best score", "best logit")[plane]
    wanted, index = scores.sort(dim=1, stable=True, descending=True)
    found.equal(name, highest, wanted[:, 0])
    found.equal(f"token of the {name}", first, index[:, 0])


def hold_parts(found: Findings, parts: Parts, scores: Tensor, scale: float) -> None:
    hold_best(found, parts, scores)
    hold_best(found, parts, scale * (scores - scores.amax(1, keepdim=True)), plane=1)
    total = weights_of(scores, scale).sum(1)
    found.within("sum of weights", parts.numbers[2].sum(0).cpu(), total, EXP * total)


def hold_kept(found: Findings, of: Problem, keep: int, parts: int) -> None:
    """What is kept has its token's logit, and the `keep` largest of a row are never dropped."""
    given, refs, scores = of
    n, v = scores.shape
    keys = torch.full((n, parts, keep, cuda.BUCKETS_OF_PART), NOT_WRITTEN, device=given.x.device)
    hold_best(found, cuda._score(cuda.KEEP[keep], given, refs, slice(0, v), parts=parts, keys=keys), scores)
    logits, tokens = (each.cpu().double() for each in of_keys(keys.flatten(1).sort(dim=1, descending=True).values))
    relative = scores - scores.amax(1, keepdim=True)
    inside = (tokens >= 0) & (tokens < v)
    known = relative.gather(1, tokens.long().where(inside, 0)).where(inside, -torch.inf)
    is_token = logits > -torch.inf  # of a bucket with fewer tokens than it keeps the rest has -inf
    found.within("kept logits", logits.where(is_token, 0), known.where(is_token, 0), EXP * known.abs().clamp_min(1))
    most = min(keep, v)
    largest = relative.sort(dim=1, stable=True, descending=True).indices[:, :most]
    found.equal("token of the largest kept", tokens[:, :most], largest)


# --- both products in one pass


def gathered(found: Findings, on: Target, kernel: str, shapes: Shapes, cluster: int = 1) -> None:
    """The stream kernel or the narrow one: the statistics, and the sums of weights times the table."""
    for dtype in on.dtypes:
        for n, v, d in shapes:
            for chunks in sorted({1, min(3, cdiv(v, 64))}):
                for scale in (ONE, OWN):
                    found.case(NAMES[dtype], f"N {n} V {v} D {d}, {chunks} chunks, scale {scale:g}")
                    given, refs, scores = problem(on, n, v, d, dtype, scale)
                    acc = torch.full((chunks, n, d), torch.nan, device=on.device)
                    if kernel == "stream":
                        parts = cuda._stream(given, refs, acc, chunks)
                    else:
                        parts = cuda._narrow(given, refs, acc, chunks, cluster)
                    hold_parts(found, parts, scores, scale)
                    wanted = weights_of(scores, scale) @ given.embeddings.double().cpu()
                    found.equal("sums of the table", acc.cpu().sum(0), wanted)

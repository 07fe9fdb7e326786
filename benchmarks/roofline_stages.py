"""The parts of one step that `roofline` times, variants of its plan, and CUDA graphs.

This is the one place outside the package that calls its private functions: what a stage leaves out no public one does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import smoothie_kernels as sk
from benchmarks.contestants import CONTESTANTS, SEED, Contestant, fused, statistics
from benchmarks.inputs import SIGMA_MIN, Call, Inputs, Outputs
from benchmarks.roofline_report import (
    GATHER,
    KEEP,
    NEAREST,
    QUIET,
    QUIET_STEP,
    QUIET_WEIGHTS,
    SCORES,
    STATISTICS,
    STEP,
    WEIGHTED,
    WEIGHTS,
)
from smoothie_kernels.backends import StepInputs, cuda
from smoothie_kernels.backends.blocks import add_product, cdiv, noise_on_device, rows_of, slices
from smoothie_kernels.backends.largest import certifying_buckets

WORKSPACE = 2**28
TOP_K = 64
WARM_UP = 2  # calls before a graph is captured


class Stages:
    """The parts of one step, with all that comes before them done."""

    block_n: int
    block_v: int

    def __init__(self, given: Inputs) -> None:
        bias = cuda.column_bias(given.table)
        made = StepInputs(
            given.x, given.table, bias, given.mu, given.std, None, 0, torch.tensor(SEED), torch.tensor([0]), None,
            SIGMA_MIN, WORKSPACE,
        )  # fmt: skip
        self.given, self.step = given, noise_on_device(made)
        self.all = slice(0, len(given.table))
        with recorded("pick_block") as found:
            cuda.step_fwd(self.step)
        # Where the step takes one pass there are no blocks: then everything is one.
        n, v = len(given.x), cdiv(len(given.table), cuda.SCORE.v) * cuda.SCORE.v
        self.block_n, self.block_v = found[0] if found else (n, v)
        self.weights = given.x.new_empty(min(self.block_n, len(given.x)), self.block_v)
        self.blocks = [rows_of(self.step, rows) for rows in slices(len(given.x), self.block_n)]

    def floor(self) -> dict[str, Callable[[], object]]:
        """Both products of exactly these blocks, by the library."""
        given = self.given
        rows = list(slices(len(given.x), self.block_n))
        acc = given.x.new_zeros(len(self.weights), given.x.shape[1], dtype=torch.float32)

        def block(of: slice, tokens: slice) -> Tensor:
            return self.weights[: of.stop - of.start, : tokens.stop - tokens.start]

        def scores() -> None:
            for of in rows:
                for tokens in slices(len(given.table), self.block_v):
                    torch.mm(given.x[of], given.table[tokens].T, out=block(of, tokens))

        def gather() -> None:
            for of in rows:
                for tokens in slices(len(given.table), self.block_v):
                    add_product(acc[: of.stop - of.start], block(of, tokens), given.table[tokens])

        self.weights.normal_(0, 0.01)
        return {SCORES: scores, GATHER: gather}

    def calls(self) -> dict[str, Callable[[], object]]:
        step, quiet = self.step, self.step._replace(std=None)
        refs, quiet_refs = cuda._prepare(step), cuda._prepare(quiet)
        tokens = self.all
        tiles = cdiv(len(self.given.table), cuda.SCORE.v)
        buckets = certifying_buckets(len(self.given.table), TOP_K)
        parts = min(tiles, cdiv(buckets.buckets, cuda.BUCKETS_OF_PART) if buckets else 1)
        keys = step.x.new_empty(len(step.x), parts, 4, cuda.BUCKETS_OF_PART, dtype=torch.int64)
        quiet_given = replace(self.given, case=replace(self.given.case, std=0.0))
        return {
            NEAREST: lambda: cuda._score(cuda.NEAREST, step, None, tokens),
            QUIET: lambda: cuda._score(cuda.STATISTICS, quiet, quiet_refs, tokens),
            STATISTICS: lambda: cuda._score(cuda.STATISTICS, step, refs, tokens),
            KEEP: lambda: cuda._score(cuda.KEEP[4], step, refs, tokens, parts=parts, keys=keys),
            QUIET_WEIGHTS: self._weights(noise=False),
            WEIGHTS: self._weights(noise=True),
            WEIGHTED: self._weighted(),
            QUIET_STEP: fused("cuda", workspace=WORKSPACE)["step"](quiet_given),
        }

    def _weights(self, *, noise: bool) -> Callable[[], object]:
        blocks = self.blocks if noise else [block._replace(std=None) for block in self.blocks]
        refs = [cuda._prepare(block) for block in blocks]

        def call() -> None:
            for of, its in zip(blocks, refs, strict=True):
                for tokens in slices(len(of.embeddings), self.block_v):
                    cuda._score(cuda.WEIGHTS, of, its, tokens, weights=self.weights[: len(of.x)])

        return call

    def _weighted(self) -> Callable[[], object]:
        refs = [cuda._prepare(block) for block in self.blocks]

        def call() -> None:
            for of, its in zip(self.blocks, refs, strict=True):
                cuda._gather_by_blocks(of, its, self.block_v, self.weights[: len(of.x)])

        return call


def top_k(given: Inputs) -> Call:
    """The exact top-k that rides on four logits of every bucket."""
    table, k = sk.Vocabulary(given.table, backend="cuda"), min(TOP_K, len(given.table))
    given = replace(given, case=replace(given.case, k=k))

    def call() -> Outputs:
        y = sk.fused_smoothie_step(
            given.x, table, given.mu, given.std, sigma_min=SIGMA_MIN, seed=SEED, topk=k, backend="cuda"
        )  # fmt: skip
        assert y.topk is not None
        # Without the mean: it would be compared with that of the top-k.
        return Outputs(None, y.tokens, y.noisy_tokens, y.lse, top_values=y.topk.values, top_indices=y.topk.indices)

    return call


# --- variants of the plan


def variant(what: str, given: Inputs) -> tuple[Contestant, Call]:
    """A name of `variant_names`: its contestant for the check, and its call."""
    pass_, _, change = what.partition(", ")
    quantity, _, number = change.partition(" ")
    workspace = WORKSPACE
    changes: dict[str, object] = {}
    if quantity == "resident":
        changes = {"RESIDENT": int(number)}
    elif quantity == "cluster":
        changes = {"pick_cluster": lambda row_blocks: int(number)}
    elif quantity == "chunks":
        changes = {"pick_chunks": lambda row_blocks, tiles, processors, most=2**31: min(int(number), tiles, most)}
    elif quantity == "workspace":
        workspace = int(number.partition(" ")[0]) * 2**20
    prepare = fused("cuda", workspace=workspace)["step"] if pass_ == "step" else statistics("cuda")["topk"]
    return CONTESTANTS[STEP], patched(changes, prepare(given))


def patched(changes: Mapping[str, object], call: Call) -> Call:
    """The same call with other numbers or functions in the backend's plan."""

    def run() -> Outputs:
        kept = {name: getattr(cuda, name) for name in changes}
        try:
            for name, value in changes.items():
                setattr(cuda, name, value)
            return call()
        finally:
            for name, value in kept.items():
                setattr(cuda, name, value)

    return run if changes else call


def patched_prepare(changes: Mapping[str, object], prepare: Callable[[Inputs], Call], given: Inputs) -> Call:
    return patched(changes, prepare(given))


@contextmanager
def recorded(name: str) -> Iterator[list[Any]]:
    """What a function of the backend gives while this lasts."""
    found: list[Any] = []
    real = getattr(cuda, name)

    def record(*arguments: Any, **named: Any) -> Any:
        found.append(real(*arguments, **named))
        return found[-1]

    setattr(cuda, name, record)
    try:
        yield found
    finally:
        setattr(cuda, name, real)


# --- graphs


def graph(calls: list[Callable[[], object]], device: str) -> tuple[Callable[[], object] | None, str]:
    """All calls as one graph; or None, and why not."""
    if device != "cuda":
        return None, "absent: there are no graphs here"
    try:
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        kept = []  # what the calls allocate stays theirs
        with torch.cuda.graph(captured):
            kept += [call() for call in calls]
    except Exception as error:
        torch.cuda.synchronize()
        return None, f"absent: {first_line(error)}"

    def replay() -> object:
        captured.replay()
        return kept

    return replay, ""


def first_line(error: Exception) -> str:
    """Of an operator of ours without the place in its source."""
    text = re.sub(r"^check, \S+, ", "", str(error))
    return f"{type(error).__name__}: {text}".splitlines()[0][:100]

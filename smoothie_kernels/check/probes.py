"""What a probe is, and the probes that every backend has: public calls, held against float64.

All take the same first arguments: what is found goes into `Findings`, `Target` says where calls run.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smoothie_kernels import Vocabulary, dispatch, fused_smoothie_step, nearest_token, noise, testing
from smoothie_kernels.check.findings import Findings
from smoothie_kernels.ops import NearestToken, SmoothieStep
from smoothie_kernels.stream import Request
from smoothie_kernels.topk import TopK

KEY: dict[str, Any] = {"seed": 3, "offset": 1}
MAX_ERROR, RMS_ERROR = 5e-5, 2e-6  # of the noise field: noise.gaussian's contract
NEXT_TO_ONE, SMALL_RADIUS = 1e-3, 0.03  # of backend "cuda", for pairs of a radius below
# Offsets and weights of sums of fields: words of 64 bits, negative and equal ones; weights of either sign, zero.
FIELDS = (
    ((2**40 + 1,), (0.7,)),
    ((1, 2**32 + 1), (0.6, -0.8)),
    ((-5, 0, 2**64 - 7, 3, 3, -(2**63), 2**32), (0.3, 0.0, -0.9, 0.5, 0.5, 1.1, -0.2)),
)
LEVELS: dict[str, tuple[float, float]] = {
    "usual": (0.05, 0.99),
    "peaked": (0.684, 0.73),
    "flat": (7e-5, 1.0),
    "no noise": (0.1, 0.0),
}  # mu, std
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
Shapes = Iterable[tuple[int, int, int]]  # N, V, D


@dataclass(frozen=True)
class Target:
    """A backend, and where its calls run."""

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...]  # that it takes, its usual one first
    size: str  # "gpu"; "cpu"; "tiny" where kernels are interpreted or emulated
    gradients: bool = True
    emulated: Path | None = None  # the library of backend "cuda" that runs on a CPU

    def width(self, d: int) -> int:
        """The width next to D that it takes."""
        return -(-d // 8) * 8 if self.backend == "cuda" else d


@dataclass(frozen=True)
class Probe:
    """One process, one outcome."""

    name: str
    target: Target
    function: Callable[..., None]  # of a module, so that another process finds it: (findings, target, **arguments)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    as_used: bool = False  # launches do not wait for their end, and there is no watchdog: graphs, streams, real sizes
    seconds: float = 60.0  # at most


def inputs(on: Target, n: int, v: int, d: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """x [N, D], near to tokens of the table [V, D]."""
    table = torch.randn(v, d)
    x = table[torch.randint(v, (n,))] + 0.3 * torch.randn(n, d)
    return (scale * x).to(on.device, dtype), table.to(on.device, dtype)


def integers(on: Target, n: int, v: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In [-8, 8]: every product and every sum is exact in any type, in any order."""
    x, table = (torch.randint(-8, 9, (rows, d)).to(on.device, dtype) for rows in (n, v))
    return x, table


def of_types(
    found: Findings, on: Target, function: Callable[..., None], dtypes: Iterable[torch.dtype], **arguments: Any
) -> None:
    """One probe of several types."""
    for dtype in dtypes:
        function(found, on, dtype, **arguments)


class Given(NamedTuple):
    """What testing.py takes."""

    x: Tensor
    embeddings: Tensor
    mu: Tensor
    std: Tensor
    eps: Tensor

    def double(self) -> "Given":
        return Given(*(each.double() for each in self))


def noisy(x: Tensor, table: Tensor, mu: float | Tensor, std: float | Tensor, **key: Any) -> Given:
    # A kernel is given the numbers mu and std in the type of its sums.
    rows = torch.ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return Given(x, table, mu * rows, std * rows, exact_field(len(x), len(table), **{**KEY, **key}).to(x.device))


def exact_field(
    n: int, v: int, *, seed: int, offset: int | tuple[int, ...] = 0, field_weights: tuple[float, ...] = (1.0,),
    row_offset: int = 0, row_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """In float64, on the CPU: independent of the device that is checked."""
    ids = torch.arange(row_offset, row_offset + n) if row_ids is None else row_ids.cpu()
    offsets = offset if isinstance(offset, tuple) else (offset,)
    field = torch.zeros(n, v, dtype=torch.float64)
    for weight, each in zip(field_weights, offsets, strict=True):
        field += weight * noise.normals(ids, 0, v, seed, each)
    return field


# --- the field, the bias


def noise_field(found: Findings, on: Target, shapes: Iterable[tuple[int, int]]) -> None:
    for rows, cols in shapes:
        for seed, offset, ids in (
            (1, 0, torch.arange(rows)),
            (2**64 - 3, 2**40 + 1, torch.arange(2**32 - rows, 2**32)),
            (-(2**63), -1, torch.randint(2**32, (rows,))),
        ):
            found.case(f"rows {rows} columns {cols} seed {seed} offset {offset}")
            got = noise.gaussian(rows, cols, seed=seed, offset=offset, row_ids=ids.to(on.device), backend=on.backend)
            exact = noise.normals(ids, 0, cols + cols % 2, seed, offset)
            bound = torch.full_like(exact, MAX_ERROR)
            if on.backend == "cuda":
                radius = exact.view(rows, -1, 2).norm(dim=2)
                bound[(radius < SMALL_RADIUS).repeat_interleave(2, 1)] = NEXT_TO_ONE
            exact, bound = exact[:, :cols], bound[:, :cols]
            found.within("field", got.cpu(), exact, bound)
            usual = (got.cpu().double() - exact)[bound == MAX_ERROR]
            if len(usual) > 1000:
                found.take(testing.compare("field, rms", usual.square().mean().sqrt(), RMS_ERROR))


def sums_of_fields(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes) -> None:
    """Alone, and in the step."""
    for offsets, weights in FIELDS:
        loudness = sum(map(abs, weights))
        how: dict[str, Any] = {"offset": offsets, "field_weights": weights, "row_offset": 2**32 - 200}
        for n, v, d in shapes:
            found.case(NAMES[dtype], f"N {n} V {v} D {d}, {len(offsets)} fields")
            got = noise.gaussian(n, v, seed=3, **how, device=on.device, backend=on.backend)
            largest = NEXT_TO_ONE if on.backend == "cuda" else MAX_ERROR
            found.within("sum of fields", got.cpu(), exact_field(n, v, seed=3, **how), largest * loudness)
            x, table = inputs(on, n, v, d, dtype)
            step = fused_smoothie_step(x, table, 0.1, 0.99, seed=3, **how, backend=on.backend)
            found.take(*testing.compare_step(step, *noisy(x, table, 0.1, 0.99, **how), loudness=loudness))


def column_bias(found: Findings, on: Target, dtype: torch.dtype, shapes: Iterable[tuple[int, int]]) -> None:
    for v, d in shapes:
        found.case(NAMES[dtype], f"V {v} D {d}")
        table = (100 * torch.randn(v, on.width(d))).to(on.device, dtype)
        exact = -table.double().square().sum(1) / 2
        bias = Vocabulary(table, backend=on.backend).bias
        found.within("bias", bias, exact, (2**-52 if dtype == torch.float64 else 2**-23) * exact.abs())


# --- integers, whose products are exact


def integer_tokens(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes) -> None:
    """The nearest token and its distance, bit for bit; then its embedding, all others' weights being exp(-220) at most,
    and the mean of the table, all weights being equal."""
    for n, v, d in shapes:
        found.case(NAMES[dtype], f"N {n} V {v} D {d}")
        x, table = integers(on, n, v, d, dtype)
        distances = torch.cdist(x.double().cpu(), table.double().cpu()).square().round()
        least, tokens = distances.sort(dim=1, stable=True)
        got = nearest_token(x, table, backend=on.backend)
        found.equal("nearest", got.tokens, tokens[:, 0])
        found.equal("distance", got.distance, least[:, 0])
        for name, rows, mu in (("peaked", table[torch.arange(n) % v], 1e3), ("flat", x, 0.0)):
            step = fused_smoothie_step(rows, table, mu, 0.0, backend=on.backend)
            compared = testing.compare_step(step, *noisy(rows, table, mu, 0.0))
            found.take(*(each._replace(name=f"{each.name}, {name}") for each in compared))


def integer_topk(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes, k: int) -> None:
    """The largest logits' tokens, ties in order, bit for bit: all logits go by."""
    for n, v, d in shapes:
        found.case(NAMES[dtype], f"N {n} V {v} D {d}")
        x, table = integers(on, n, v, d, dtype)
        distances = torch.cdist(x.double().cpu(), table.double().cpu()).square().round()
        step = fused_smoothie_step(x, table, 1.0, 0.0, sigma_min=1.0, topk=min(k, v), backend=on.backend)
        assert step.topk is not None
        found.equal("indices", step.topk.indices, distances.sort(dim=1, stable=True).indices[:, :k])
        found.take(*testing.compare_topk(step.topk, *noisy(x, table, 1.0, 0.0), sigma_min=1.0))


# --- the step


def step(
    found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes, *, levels: Iterable[str] = ("usual",),
    scales: Iterable[float] = (1.0,), far: float = 0.0, topk: int = 0, recall: float = 1.0, **how: Any,
) -> None:  # fmt: skip
    """far is added to every third row. recall is what the top-k must reach in these few rows."""
    for n, v, d in shapes:
        for level in levels:
            for scale in scales:
                mu, std = LEVELS[level]
                found.case(NAMES[dtype], f"N {n} V {v} D {d} {level}", *([f"x {scale:g} times"] if scale != 1 else []))
                x, table = inputs(on, n, v, d, dtype, scale)
                x[::3] += far
                got = fused_smoothie_step(
                    x, table, mu, std, **KEY, **how, topk=min(topk, v) or None, backend=on.backend
                )
                hold(found, got, noisy(x, table, mu, std), recall)


def hold(found: Findings, got: SmoothieStep, given: Given, recall: float = 1.0) -> None:
    found.take(*testing.compare_step(got, *given))
    if got.topk is not None:
        found.take(*testing.compare_topk(got.topk, *given, recall=recall))


def statistics(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes) -> None:
    """Without a mean. No public call does just that."""
    backend = dispatch.load(on.backend)
    for n, v, d in shapes:
        found.case(NAMES[dtype], f"N {n} V {v} D {d}")
        x, table = inputs(on, n, v, d, dtype)
        bias = Vocabulary(table, backend=on.backend).bias
        given = noisy(x, table, *LEVELS["usual"])
        seed, offsets = torch.tensor(KEY["seed"]), torch.tensor([KEY["offset"]])
        mu, std = (each.to(bias.dtype) for each in given[2:4])
        got = backend.step_fwd(
            Request(x, table, bias, mu / 1.5**2, std, None, 0, seed, offsets, None, 2**28, mean=False)
        )
        exact = testing.dense_step(*given.double()).smoothed
        found.take(*testing.compare_step(SmoothieStep(exact.to(x.dtype), *got[1:4]), *given)[1:])


def nearest(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes) -> None:
    for n, v, d in shapes:
        found.case(NAMES[dtype], f"N {n} V {v} D {d}")
        x, table = inputs(on, n, v, d, dtype)
        hold_nearest(found, nearest_token(x, table, backend=on.backend), x, table)
        found.case(NAMES[dtype], f"V {v} D {d}, the table's own rows")
        own = nearest_token(table, table, backend=on.backend)
        found.equal("own token", own.tokens, torch.arange(v))
        found.equal("own distance", own.distance, torch.zeros(v))


def hold_nearest(found: Findings, got: NearestToken, x: Tensor, table: Tensor) -> None:
    """Scores are rounded as coarsely as ||x||^2; the distance is that of the token, directly."""
    distances = torch.cdist(x.double(), table.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = (x.double() - table[got.tokens.clamp(0, len(table) - 1)].double()).square().sum(1)
    found.within("nearest, too far by", chosen, distances.amin(1), 1e-5 * distances.amin(1).clamp_min(1))
    found.equal("nearest, in the table", got.tokens, got.tokens.clamp(0, len(table) - 1))
    found.within("distance", got.distance, chosen, 1e-6 * chosen)


def means_of_largest(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes, k: int) -> None:
    for n, v, d in shapes:
        found.case(NAMES[dtype], f"N {n} V {v} D {d} K {k}")
        x, table = inputs(on, n, v, d, dtype)
        got = fused_smoothie_step(x, table, 0.1, 0.9, **KEY, topk=k, smooth="topk", backend=on.backend)
        given = noisy(x, table, 0.1, 0.9)
        assert got.topk is not None
        found.take(*testing.compare_topk(got.topk, *given))
        logits = testing.dense_logits(*given.double())[1]
        indices = got.topk.indices.clamp(0, v - 1)
        exact = (logits.gather(1, indices).softmax(1)[:, None] @ table[indices].double())[:, 0]
        error = testing.relative_error(got.smoothed, exact)
        found.take(testing.compare("smoothed, relative", torch.tensor(error), testing.FLOOR[dtype]))


def gradients(
    found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes, levels: Iterable[str] = ("usual", "peaked"),
    common: float = 0.0,
) -> None:  # fmt: skip
    """common is added to all of x and the table."""
    for n, v, d in shapes:
        for level in levels:
            found.case(NAMES[dtype], f"N {n} V {v} D {d} {level}")
            mu, std = LEVELS[level]
            x, table = ((leaf + common).requires_grad_() for leaf in inputs(on, n, v, d, dtype))
            got = fused_smoothie_step(x, table, mu, std, **KEY, backend=on.backend)
            incoming = torch.randn_like(got.smoothed), torch.randn_like(got.lse)
            grads = torch.autograd.grad((got.smoothed, got.lse), (x, table), incoming)
            cancelled = 0.25 if dtype == torch.bfloat16 else 0.0  # weights of that type: terms that cancel leave it
            given = noisy(x.detach(), table.detach(), mu, std)
            found.take(*testing.compare_gradients(grads, *given, *incoming, cancelled=cancelled))


def mixed_types(found: Findings, on: Target, shapes: Shapes) -> None:
    """Of rows and table."""
    for n, v, d in shapes:
        for x_type in on.dtypes:
            for table_type in on.dtypes:
                if x_type != table_type and torch.float64 not in (x_type, table_type):
                    found.case(f"N {n} V {v} D {d}, rows", NAMES[x_type], "table", NAMES[table_type])
                    x, table = inputs(on, n, v, d, x_type)
                    table = table.to(table_type)
                    got = fused_smoothie_step(x, table, *LEVELS["usual"], **KEY, topk=5, backend=on.backend)
                    hold(found, got, noisy(x, table, *LEVELS["usual"]))


# --- what must not change a result


def row_values(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes) -> None:
    """mu, std and row ids of every row: mu of either sign, std with zeros, ids from both ends."""
    for n, v, d in shapes:
        found.case(NAMES[dtype], f"N {n} V {v} D {d}")
        x, table = inputs(on, n, v, d, dtype)
        mu, std = (0.2 * torch.randn(n)).clamp(-0.1, 0.4).to(on.device), torch.rand(n).to(on.device)
        std[::4] = 0.0
        ids = torch.cat((torch.arange(n // 2), 2**32 - 1 - torch.arange(n - n // 2)))
        key: dict[str, Any] = {"seed": -(2**63) + 1, "offset": 2**64 - 1, "row_ids": ids.to(on.device)}
        got = fused_smoothie_step(x, table, mu, std, **key, topk=min(5, v), backend=on.backend)
        hold(found, got, noisy(x, table, mu, std, **key))


def strides(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes) -> None:
    """Rows within wider ones, transposed, repeated, at odd addresses; around them is NaN, which must not get in."""
    for n, v, d in shapes:
        x, table = inputs(on, n, v, d, dtype)

        def within(values: Tensor, first: int, width: int) -> Tensor:
            wide = torch.full((len(values) + 2, width), torch.nan).to(on.device, dtype)
            inside = wide[1:-1, first : first + values.shape[1]]
            return inside.copy_(values)

        for name, rows, tokens in (
            ("aligned", within(x, 8, d + 16), within(table, 8, d + 16)),
            ("not aligned", within(x, 3, d + 7), within(table, 1, d + 5)),
            ("transposed", x.T.contiguous().T, table.T.contiguous().T),
            ("all rows one", x[:1].expand(n, d), table),
            ("all tokens one", x, table[:1].expand(v, d)),
        ):
            found.case(NAMES[dtype], f"N {n} V {v} D {d} {name}")
            got = fused_smoothie_step(rows, tokens, *LEVELS["usual"], **KEY, topk=min(5, v), backend=on.backend)
            hold(found, got, noisy(rows, tokens, *LEVELS["usual"]))
            hold_nearest(found, nearest_token(rows, tokens, backend=on.backend), rows, tokens)


def same_bits(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes, times: int = 5) -> None:
    for n, v, d in shapes:
        x, table = inputs(on, n, v, d, dtype)
        x[::5] += 30  # rows that are done again
        first = results_of(fused_smoothie_step(x, table, 0.1, 0.9, **KEY, topk=min(9, v), backend=on.backend))
        for again in range(times):
            found.case(NAMES[dtype], f"N {n} V {v} D {d}, call {again + 2}")
            other = results_of(fused_smoothie_step(x, table, 0.1, 0.9, **KEY, topk=min(9, v), backend=on.backend))
            for name, value in other.items():
                found.equal(f"{name} of two calls", value, first[name])


def results_of(got: SmoothieStep) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(zip(got._fields[:4], got[:4], strict=True))
    return found if got.topk is None else found | got.topk._asdict()


def threads(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes) -> None:
    usual = torch.get_num_threads()
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        found.case(f"{count} threads")
        step(found, on, dtype, shapes, topk=9)
        gradients(found, on, dtype, shapes)
    torch.set_num_threads(usual)


# --- on a GPU


def graph(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes) -> None:
    """Replayed with other rows and another seed."""
    for n, v, d in shapes:
        found.case(NAMES[dtype], f"N {n} V {v} D {d}")
        x, table = inputs(on, n, v, d, dtype)
        vocabulary, seed = Vocabulary(table, backend=on.backend), torch.tensor(3).to(on.device)
        call = partial(fused_smoothie_step, x, vocabulary, *LEVELS["usual"], seed=seed, topk=5, backend=on.backend)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            call()  # loads, or compiles, the kernels
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            got = call()
        for change in (0, 1, 5):
            found.case(NAMES[dtype], f"N {n} V {v} D {d}, seed {3 + change}")
            seed.fill_(3 + change)
            x.copy_(x.roll(1, 0))
            captured.replay()
            torch.cuda.synchronize()
            hold(found, got, noisy(x, table, *LEVELS["usual"], seed=3 + change, offset=0))


def side_stream(found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes) -> None:
    """x is written late on the stream of the call: on any other, the step would read what was there before."""
    for n, v, d in shapes:
        found.case(NAMES[dtype], f"N {n} V {v} D {d}")
        x, table = inputs(on, n, v, d, dtype)
        vocabulary, late = Vocabulary(table, backend=on.backend), torch.zeros_like(x)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
            late.copy_(x)
            got = fused_smoothie_step(late, vocabulary, 0.05, 0.99, **KEY, topk=5, backend=on.backend)
            near = nearest_token(late, vocabulary, backend=on.backend)
        side.synchronize()
        hold(found, got, noisy(x, table, 0.05, 0.99))
        hold_nearest(found, near, x, table)


def real_shape(
    found: Findings, on: Target, dtype: torch.dtype, shapes: Shapes, checked: int, recall: float = 1.0, **how: Any
) -> None:
    """Held against float64 are rows of three blocks of 64, the last one among them; of all that none is NaN."""
    mu, std = LEVELS["usual"]
    for n, v, d in shapes:
        found.case(NAMES[dtype], f"N {n} V {v} D {d}")
        x, table = inputs(on, n, v, d, dtype)
        vocabulary = Vocabulary(table, backend=on.backend)
        got = fused_smoothie_step(x, vocabulary, mu, std, **KEY, **how, backend=on.backend)
        found.equal("NaN", got.smoothed.isnan(), torch.zeros_like(got.smoothed, dtype=torch.bool))
        for first in sorted({0, n // 2 // 64 * 64, (n - 1) // 64 * 64}):
            rows = slice(first, first + checked)
            part = SmoothieStep(got.smoothed[rows], got.tokens[rows], got.noisy_tokens[rows], got.lse[rows])
            if got.topk is not None:
                part = part._replace(topk=TopK(*(each[rows] for each in got.topk)))
            hold(found, part, noisy(x[rows], table, mu, std, row_offset=first), recall)
        few = x[-checked:]
        hold_nearest(found, nearest_token(few, vocabulary, backend=on.backend), few, table)

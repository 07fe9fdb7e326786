"""Models, tables and a dense sampler for the tests of the sampler."""

import math

import torch
from test_solvers import PUBLISHED, marginals

from smoothie_kernels import noise
from smoothie_kernels.diffusion import make_schedule
from smoothie_kernels.diffusion.sampling import sample

ARCTAN = make_schedule("arctan")
V, D, L = 41, 8, 6
IDS = [3, 0, 12]
F32, F64 = torch.float32, torch.float64


# --- Models


class Mix:
    """A pure function of all that a model gets, other positions among it; it keeps what it got."""

    def __init__(self, width: int = D, positions: int = L) -> None:
        generator = torch.Generator().manual_seed(7)

        def weights(rows: int) -> torch.Tensor:
            return torch.randn(rows, width, generator=generator, dtype=F64) / math.sqrt(rows)

        self.smoothed, self.answer, self.others = (weights(width) for _ in range(3))
        self.position = weights(positions)
        self.calls = []

    def __call__(self, smoothed, t, condition=None, self_condition=None, mask=None):
        assert t.shape == smoothed.shape[:1]
        assert t.dtype == F32
        self.calls.append((smoothed, t, condition, self_condition, mask))
        there = torch.ones(smoothed.shape[:2]) if mask is None else mask
        there = there[..., None].to(smoothed)
        seen = smoothed if self_condition is None else smoothed + self_condition / 2
        mean = (seen * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
        x = smoothed @ self.smoothed.to(smoothed) + mean @ self.others.to(smoothed)
        x = x + (1 + t.to(smoothed)[:, None, None]) * self.position[: smoothed.shape[1]].to(smoothed) / 4
        if self_condition is not None:
            x = x + self_condition @ self.answer.to(smoothed) / 2
        if condition is not None:
            x = x + condition[:, None].to(smoothed) / 4
        return 2 * torch.tanh(x)


def table_of(v: int = V, d: int = D, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(v, d, generator=torch.Generator().manual_seed(3), dtype=F64).to(dtype)


def condition_of(count: int = 3, d: int = D) -> torch.Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(5), dtype=F64)


class Scripted:
    """Answers the embeddings of tokens of a script (B, steps, L). The condition is the sample's place in it."""

    def __init__(self, script: torch.Tensor, table: torch.Tensor) -> None:
        self.script, self.table, self.calls = script, table, []

    def __call__(self, smoothed, t, condition, self_condition, mask=None):
        self.calls.append((condition.tolist(), smoothed.shape[1], mask, self_condition))
        return self.table[self.script[condition, len(self.calls) - 1, : smoothed.shape[1]]]

    @property
    def places(self) -> torch.Tensor:
        return torch.arange(len(self.script))


def play(script, *, table=None, steps=None, **options):
    """Samples of a script, and the model that read it."""
    script = torch.as_tensor(script)
    table = table_of() if table is None else table
    model = Scripted(script, table)
    options = {"length": script.shape[2], "sample_ids": range(len(script)), "end": 1, "pad": 0} | options
    return sample(model, table, ARCTAN, steps=steps or script.shape[1], condition=model.places, **options), model


# --- The sampler as it is published, dense


def normals(ids, length, v, seed, offset, max_length=None) -> torch.Tensor:
    """The float64 field of samples' rows, (B, L, V)."""
    rows = torch.as_tensor(ids)[:, None] * (max_length or length) + torch.arange(length)
    return noise.normals(rows.flatten(), 0, v, seed, offset).view(*rows.shape, v)


def dense(model, table, schedule, times, solver, eps, *, condition=None, sigma_min=1.5, shape=(3, L)):
    """The last answer; eps(i) are the normals of offset i. In the table's type."""
    answer = table.new_zeros(*shape, table.shape[1])
    logits = schedule.prior_std * eps(0).to(table)
    states = marginals(schedule, times)
    for i, time in enumerate(times[:-1]):
        smoothed = logits.softmax(-1) @ table
        answer = model(smoothed, torch.full(shape[:1], time, dtype=F32), condition, answer)
        squares = (answer[..., None, :] - table).square().sum(-1) if answer.dtype == F64 else (
            answer.square().sum(-1, keepdim=True) - 2 * answer @ table.T + table.square().sum(1)
        )  # fmt: skip
        if i + 2 < len(times):
            distances, fresh = -squares / (2 * sigma_min**2), eps(i + 1).to(table)
            logits = PUBLISHED[solver](logits, distances, fresh, *states[i], *states[i + 1])
    return answer


def own_normals(route, offsets):
    """The fresh normals of every step by themselves, of a route whose fields are offsets(i): a step's noise is what is
    new in the logits' since the step before."""

    def total(i):
        return sum(weight * offsets(offset) for offset, weight in route.fields[i].items())

    def eps(i):
        if i == 0:
            return total(0) / route.fields[0][0]
        update = route.updates[i - 1]
        return (total(i) - update.keep * total(i - 1)) / update.fresh

    return eps


CASES = {
    "re-noise": ("re-noise", "bridge"),
    "ddim": ("ddim", "bridge"),
    "ddpm, sum": ("ddpm", "sum"),
    "ddpm, bridge": ("ddpm", "bridge"),
    "sde, sum": ("sde", "sum"),
    "sde, bridge": ("sde", "bridge"),
}


# --- What is around a sample

BATCH = 16
VARIANTS = {
    "re-noise": {},
    "ddim": {"solver": "ddim"},
    "ddpm": {"solver": "ddpm"},
    "sde, sum": {"solver": "sde", "accumulate": "sum"},
    "eager": {"step": "eager"},
    "end": {"end": 3, "stop_after": 2, "shrink_after": 2},
}
LENGTHS_16 = [L, 3, 1, L, 5, 4, L, 2, 6, 6, 1, 3, L, L, 5, 4]


def batch(ids=range(BATCH), *, table=None, **options):
    """Samples of ids among 16, each with its own condition."""
    ids = list(ids)
    condition = condition_of(BATCH)[ids]
    return sample(
        Mix(), table_of() if table is None else table, ARCTAN, length=L, sample_ids=ids, steps=10, condition=condition,
        **{"seed": 4} | options,
    )  # fmt: skip


def check_same(some, others):
    """Tokens equal, embeddings but for rounding."""
    assert torch.equal(some.tokens, others.tokens)
    assert torch.equal(some.lengths, others.lengths)
    assert torch.equal(some.steps, others.steps)
    torch.testing.assert_close(some.embeddings, others.embeddings, rtol=1e-4, atol=2e-5)


def part(samples, rows):
    return samples._replace(**{
        name: value[rows] for name, value in samples._asdict().items() if value is not None
    })  # fmt: skip


def fixed_of(count, length=L, share=0.3, v=V) -> torch.Tensor:
    generator = torch.Generator().manual_seed(13)
    tokens = torch.randint(v, (count, length), generator=generator)
    return tokens.where(torch.rand(count, length, generator=generator) < share, -1)


def up_to(end, tokens):
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens

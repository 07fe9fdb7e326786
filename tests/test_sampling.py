"""The sampler against the published rules, dense in float64; what may be around a sample; what a caller may choose."""

import math
from collections import namedtuple
from functools import cache

import pytest
import torch
from conftest import device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solvers import PUBLISHED, linspace, marginals
from torch.utils._python_dispatch import TorchDispatchMode

from smoothie_kernels import Vocabulary, fused_smoothie_step, nearest_token, noise
from smoothie_kernels.diffusion import make_schedule
from smoothie_kernels.diffusion.sampling import MAX_ROW_ID, sample
from smoothie_kernels.diffusion.solvers import ACCUMULATE, SOLVERS, make_route
from smoothie_kernels.diffusion.states import as_noise
from smoothie_kernels.testing import FLOOR, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(ARCTAN, 50), (make_schedule("cosine", delta=0.25), 50), (make_schedule("tess", delta=0.25), 9)],
    ids=["arctan", "cosine", "tess"],
)
def test_is_the_published_sampler(name, schedule, steps):
    """To 1e-12 in float64; in float32 twice what the dense sampler is off by, or the floor of the type."""
    solver, accumulate = CASES[name]
    times = [0.98 * t for t in linspace(steps)] if solver == "sde" else linspace(steps)
    route = make_route(schedule, times, solver, accumulate)

    @cache
    def offsets(offset):
        return normals(IDS, L, V, 9, offset, max_length=11)

    eps = own_normals(route, offsets) if accumulate == "bridge" and solver in ("ddpm", "sde") else offsets
    model, condition = Mix(), condition_of()
    exact = dense(model, table_of(dtype=F64), schedule, times, solver, eps, condition=condition, sigma_min=1.3)
    naive = dense(model, table_of(dtype=F32), schedule, times, solver, eps, condition=condition, sigma_min=1.3)
    for dtype, bound in ((F64, 1e-12), (F32, max(FLOOR[F32], 2 * relative_error(naive, exact)))):
        samples = sample(
            model, table_of(dtype=dtype), schedule, length=L, sample_ids=IDS, times=times, solver=solver,
            accumulate=accumulate, seed=9, max_length=11, sigma_min=1.3, condition=condition,
            backend="reference" if dtype == F64 else "auto",
        )  # fmt: skip
        assert samples.embeddings.dtype == dtype
        assert relative_error(samples.embeddings, exact) <= bound
        assert torch.equal(samples.tokens, torch.cdist(exact, table_of(dtype=F64)).argmin(-1))
        assert samples.steps.tolist() == [steps] * 3
        assert samples.lengths.tolist() == [L] * 3
        assert samples.history is None


@pytest.mark.parametrize("name", ["re-noise", "ddpm, bridge"])
def test_real_sizes(name):
    """Lengths, ids, vocabulary, width: everything ragged."""
    solver, accumulate = CASES[name]
    v, d, length, ids, lengths, steps = 5003, 47, 13, [31, 2, 7, 4000, 11], [13, 1, 9, 12, 5], 6
    route = make_route(ARCTAN, linspace(steps), solver, accumulate)
    there = torch.arange(length) < torch.tensor(lengths)[:, None]
    model = Mix(d, length)

    @cache
    def offsets(offset):
        return normals(ids, length, v, 2, offset, max_length=17)

    def masked(smoothed, t, condition, answer):
        return model(smoothed, t, condition, answer, there)

    table = table_of(v, d, F64)
    eps = offsets if solver == "re-noise" else own_normals(route, offsets)
    # In float32, whose squares are products; a difference for every entry of the table would take 1 GB.
    wanted = dense(masked, table.float(), ARCTAN, linspace(steps), solver, eps, shape=(5, length))
    samples = sample(model, table.float(), ARCTAN, length=length, sample_ids=ids, steps=steps, solver=solver, seed=2,
                     max_length=17, lengths=lengths, pad=4)  # fmt: skip
    assert relative_error(samples.embeddings[there], wanted[there]) <= 2e-5
    assert torch.equal(samples.tokens[there], torch.cdist(wanted, table.float()).argmin(-1)[there])
    assert bool((samples.tokens[~there] == 4).all())
    assert bool((samples.embeddings[~there] == 0).all())


@pytest.mark.parametrize(
    "fields", [{}, {3: 0.5}, {3: -0.5}, {0: 0.0}, {0: 0.3, 2: -0.7}, {1: -0.3, 2: 0.7, 5: 0.2}], ids=str
)
def test_fields_as_the_step_takes_them(fields):
    x, table = table_of(5, dtype=F64), table_of(dtype=F64)
    rows = torch.arange(5)
    logits = sum(
        (weight * noise.normals(rows, 0, V, 6, offset) for offset, weight in fields.items()), torch.zeros(5, V)
    )
    found = fused_smoothie_step(x, table, 0.0, seed=6, **as_noise(fields), backend="reference").smoothed
    torch.testing.assert_close(found, logits.double().softmax(-1) @ table)


def test_times_are_what_the_model_sees():
    model = Mix()
    sample(model, table_of(), ARCTAN, length=L, sample_ids=[1, 2], times=[0.9, 0.5, 0.2, 0.1])
    assert [call[1].tolist() for call in model.calls] == [pytest.approx([t, t]) for t in (0.9, 0.5, 0.2)]
    model.calls.clear()
    sample(model, table_of(), ARCTAN, length=L, sample_ids=[1, 2], steps=4)
    assert [call[1].tolist() for call in model.calls] == [[t, t] for t in (1.0, 0.75, 0.5, 0.25)]


def test_default_is_two_hundred_steps_of_the_paper_s():
    samples = sample(Mix(), table_of(), ARCTAN, length=2, sample_ids=[1])
    wanted = sample(Mix(), table_of(), ARCTAN, length=2, sample_ids=[1], times=linspace(200), solver="re-noise", seed=0)
    assert torch.equal(samples.embeddings, wanted.embeddings)
    assert samples.steps.tolist() == [200]


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


@pytest.mark.parametrize("lengths", [None, LENGTHS_16], ids=["full", "ragged"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_rest_of_the_batch_does_not_matter(name, lengths):
    def run(ids):
        chosen = None if lengths is None else [lengths[i] for i in ids]
        return batch(ids, lengths=chosen, **VARIANTS[name])

    together = run(range(BATCH))
    assert len(together.tokens.unique(dim=0)) > 10
    for ids in ([0], [7], [15], [5, 2, 9], [*range(8, 16)], [*range(15, -1, -1)]):
        check_same(run(ids), part(together, ids))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_call_gives_the_same_bits(name):
    some, others = (batch(lengths=LENGTHS_16, **VARIANTS[name]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(some[:4], others[:4], strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_seeds_of_samples(name):
    seeds = [(3, 2**40, -5)[i % 3] for i in range(BATCH)]
    together = batch(seed=seeds, **VARIANTS[name])
    for seed in set(seeds):
        rows = [i for i in range(BATCH) if seeds[i] == seed]
        check_same(batch(rows, seed=seed, **VARIANTS[name]), part(together, rows))
    check_same(batch(seed=[4] * BATCH, **VARIANTS[name]), batch(seed=4, **VARIANTS[name]))


def test_samples_of_one_id_and_seed_are_one():
    samples = batch([3, 3, 5, 3], seed=[4, 5, 4, 4])
    torch.testing.assert_close(samples.embeddings[0], samples.embeddings[3])
    assert (samples.embeddings[0] - samples.embeddings[1]).abs().max() > 0.1
    assert (samples.embeddings[0] - samples.embeddings[2]).abs().max() > 0.1


def first_smoothed(ids, max_length=None, seed=0, length=L):
    """What the model sees at first: noise alone."""
    model = Mix()
    sample(model, table_of(), ARCTAN, length=length, sample_ids=ids, steps=1, max_length=max_length, seed=seed)
    return model.calls[0][0]


@pytest.mark.parametrize(
    ("ids", "max_length"),
    [([0, 1, 9], None), ([0, 1, 9], L), ([2, 1], 17), ([MAX_ROW_ID // L - 1, 5], None), ([2**26 - 1], 64)],
    ids=str,
)
def test_rows_of_the_noise_field(ids, max_length):
    wanted = normals(ids, L, V, 0, 0, max_length).softmax(-1) @ table_of(dtype=F64)
    torch.testing.assert_close(first_smoothed(ids, max_length).double(), wanted, rtol=1e-5, atol=1e-5)


def test_length_may_be_any_up_to_max_length():
    """A shorter sample sees the same noise at the positions that it has."""
    torch.testing.assert_close(first_smoothed(IDS, 9, length=4), first_smoothed(IDS, 9)[:, :4])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("step", ["fused", "eager"])
def test_no_seed_asks_torch(solver, step):
    def run(state):
        torch.manual_seed(state)
        return batch(seed=None, solver=solver, step=step)

    first, again, other = run(1), run(1), run(2)
    assert torch.equal(first.embeddings, again.embeddings)
    assert (first.embeddings - other.embeddings).abs().max() > 0.1
    assert (first.embeddings - batch(seed=None, solver=solver, step=step).embeddings).abs().max() > 0.1


@pytest.mark.parametrize("lengths", [None, [L, 2, 4]], ids=["full", "ragged"])
def test_no_seed_is_one_seed_for_the_whole_run(lengths):
    """The noise of ddim's logits stays: with mu next to nothing the model sees the same in every step."""
    model, faint = Mix(), make_schedule("arctan", sigma_max=1e9, sharpness=1e-3)
    torch.manual_seed(0)
    sample(model, table_of(), faint, length=L, sample_ids=IDS, times=[1.0, 0.9, 0.8, 0.7], solver="ddim", seed=None,
           lengths=lengths)  # fmt: skip
    for call in model.calls[1:]:
        torch.testing.assert_close(call[0], model.calls[0][0], rtol=1e-3, atol=1e-3)


def test_eager_without_a_seed_draws_torch_s_normals():
    """The prior, then one tensor a step, in the table's type: as the authors do."""
    torch.manual_seed(8)
    drawn = [torch.randn(len(IDS) * L, V, dtype=F64).view(len(IDS), L, V) for _ in range(6)]
    exact = dense(Mix(), table_of(dtype=F64), ARCTAN, linspace(6), "re-noise", drawn.__getitem__)
    torch.manual_seed(8)
    samples = sample(Mix(), table_of(dtype=F64), ARCTAN, length=L, sample_ids=IDS, steps=6, seed=None, step="eager")
    torch.testing.assert_close(samples.embeddings, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_eager_is_fused(solver, accumulate):
    """Where noise is a sum of all steps' fields; the eager step carries that sum itself, and knows no bridges."""
    eager = batch(step="eager", solver=solver, accumulate=accumulate, lengths=LENGTHS_16, end=3)
    fused = batch(step="fused", solver=solver, accumulate="sum", lengths=LENGTHS_16, end=3)
    check_same(eager, fused)


# --- Fixed positions


def fixed_of(count, length=L, share=0.3, v=V) -> torch.Tensor:
    generator = torch.Generator().manual_seed(13)
    tokens = torch.randint(v, (count, length), generator=generator)
    return tokens.where(torch.rand(count, length, generator=generator) < share, -1)


@pytest.mark.parametrize("name", VARIANTS)
def test_fixed_positions_come_out_as_they_are(name):
    fixed = fixed_of(BATCH)
    samples = batch(fixed=fixed, **VARIANTS[name] | {"end": None})
    assert 0.2 < float((fixed >= 0).float().mean()) < 0.4
    assert torch.equal(samples.tokens[fixed >= 0], fixed[fixed >= 0])
    assert torch.equal(samples.embeddings[fixed >= 0], table_of()[fixed[fixed >= 0]])
    free = batch(**VARIANTS[name] | {"end": None})
    assert (samples.embeddings - free.embeddings)[fixed < 0].abs().max() > 0.1
    rows = [4, 11, 2]
    check_same(batch(rows, fixed=fixed[rows], **VARIANTS[name] | {"end": None}), part(samples, rows))


def test_other_positions_see_what_is_fixed():
    """A model whose answer is its left neighbour's: what is fixed at the left end walks to the right."""
    fixed = torch.full((2, L), -1)
    fixed[:, 0] = torch.tensor([17, 23])
    seen = []

    def neighbour(smoothed, t, condition, answer):
        seen.append((smoothed, answer))
        return answer.roll(1, 1)

    samples = sample(neighbour, table_of(), ARCTAN, length=L, sample_ids=[0, 1], steps=L, fixed=fixed)
    assert samples.tokens.tolist() == [[17] * L, [23] * L]
    assert all(torch.equal(answer[:, 0], table_of()[fixed[:, 0]]) for _, answer in seen[1:])
    # Near the end the step's smoothed embeddings say the same.
    late = make_schedule("cosine", delta=0.0)
    sample(neighbour, table_of(), late, length=L, sample_ids=[0, 1], times=[1.0, 1e-3, 0.0], sigma_min=0.3, fixed=fixed)
    torch.testing.assert_close(seen[-1][0][:, 0], table_of()[fixed[:, 0]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "fixed", "text"),
    [
        ([7, 1, 8, 1, 9], [-1, -1, -1, -1, -1], [7, 1]),
        ([7, 1, 8, 1, 9], [-1, -1, 6, -1, -1], [7, 1, 6, 1]),
        ([7, 1, 8, 1, 9], [-1, -1, 1, -1, -1], [7, 1, 1]),
        ([7, 1, 8, 1, 9], [-1, -1, -1, -1, 4], [7, 1, 8, 1, 4]),
        ([7, 1, 8, 1, 9], [-1, -1, -1, -1, 1], [7, 1, 8, 1, 1]),
        ([7, 1, 8, 1, 9], [1, -1, -1, -1, -1], [1]),
        ([7, 1, 8, 1, 9], [6, -1, -1, -1, -1], [6, 1]),
        ([7, 2, 8, 3, 9], [6, -1, -1, -1, -1], [6, 2, 8, 3, 9]),
        ([7, 1, 8, 1, 9], [-1, -1, -1, 40, 40], [7, 1]),
        ([7, 1, 8, 1, 9], [-1, 40, 6, -1, 40], [7, 40, 6, 1]),
    ],
    ids=str,
)
def test_a_text_ends_where_nothing_but_padding_is_fixed_behind(tokens, fixed, text):
    samples, _ = play([[tokens] * 3], fixed=torch.tensor([fixed]), pad=40)
    assert samples.lengths.tolist() == [len(text)]
    assert samples.tokens.tolist() == [text + [40] * (5 - len(text))]


# --- Lengths


@pytest.mark.parametrize("solver", ["re-noise", "ddpm"])
def test_positions_behind_the_lengths(solver):
    """Each comes out as alone, without any padding."""
    lengths = [5, 2, 1, 3]
    model = Mix()
    options = {"steps": 8, "solver": solver, "max_length": 9, "pad": 33}
    samples = sample(model, table_of(), ARCTAN, length=7, sample_ids=range(4), lengths=lengths, **options)
    for i, length in enumerate(lengths):
        alone = sample(Mix(), table_of(), ARCTAN, length=length, sample_ids=[i], **options)
        assert torch.equal(samples.tokens[i, :length], alone.tokens[0])
        torch.testing.assert_close(samples.embeddings[i, :length], alone.embeddings[0], rtol=1e-4, atol=2e-5)
        assert samples.tokens[i, length:].tolist() == [33] * (7 - length)
        assert bool((samples.embeddings[i, length:] == 0).all())
    assert samples.lengths.tolist() == lengths
    for smoothed, _, _, answer, mask in model.calls:
        assert smoothed.shape == answer.shape == (4, 5, D)
        assert torch.equal(mask, torch.arange(5) < torch.tensor(lengths)[:, None])
        assert bool((smoothed[~mask] == 0).all())


@pytest.mark.parametrize("lengths", [[4, 4, 4], torch.tensor([4, 4, 4])], ids=["list", "tensor"])
def test_equal_lengths_are_a_shorter_length(lengths):
    model = Mix()
    samples = sample(model, table_of(), ARCTAN, length=L, sample_ids=IDS, steps=6, lengths=lengths, pad=2)
    shorter = sample(Mix(), table_of(), ARCTAN, length=4, sample_ids=IDS, steps=6, max_length=L)
    assert all(call[4] is None for call in model.calls)
    assert torch.equal(samples.embeddings[:, :4], shorter.embeddings)
    assert torch.equal(samples.tokens[:, :4], shorter.tokens)
    assert samples.tokens[:, 4:].tolist() == [[2, 2]] * 3
    full = sample(Mix(), table_of(), ARCTAN, length=L, sample_ids=IDS, steps=6, lengths=[L] * 3)
    assert torch.equal(full.tokens, sample(Mix(), table_of(), ARCTAN, length=L, sample_ids=IDS, steps=6).tokens)


@pytest.mark.parametrize("longest", [L, L - 2])
def test_lengths_with_fixed_positions(longest):
    """Also where no sample is as long as the call."""
    lengths = torch.tensor([longest, 2, 3])
    fixed = torch.tensor([[8, -1, 9, -1, -1, -1], [-1, 7, -1, -1, -1, -1], [-1, -1, -1, -1, -1, -1]])
    samples = sample(Mix(), table_of(), ARCTAN, length=L, sample_ids=IDS, steps=6, lengths=lengths, fixed=fixed, pad=2)
    assert torch.equal(samples.tokens[fixed >= 0], fixed[fixed >= 0])
    assert bool((samples.tokens[torch.arange(L) >= lengths[:, None]] == 2).all())
    alone = sample(
        Mix(), table_of(), ARCTAN, length=2, sample_ids=IDS[1:2], steps=6, fixed=fixed[1:2, :2], max_length=L
    )  # fmt: skip
    assert torch.equal(samples.tokens[1, :2], alone.tokens[0])


# --- Samples that are done, positions that leave


def up_to(end, tokens):
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def follow(script, *, end, stop_after=None, shrink_after=None, length=None):
    """One sample's (steps, length at the end, lengths that its model calls had), as the contract says it.

    script[i] are the tokens that call i answers; before call i the text so far is looked at.
    """
    length = len(script[0]) if length is None else length
    text, had = None, []
    same_text = same_end = 0
    for i in range(len(script)):
        if i and (stop_after or shrink_after):
            tokens, before = script[i - 1][:length], text
            text = tokens if end is None else up_to(end, tokens) if end in tokens else None
            same_text = same_text + 1 if text is not None and text == before else 0
            same_end = same_end + 1 if text is not None and before and len(text) == len(before) else 0
            if stop_after and same_text >= stop_after:
                return i, length, had
            if shrink_after and same_end >= shrink_after:
                length = len(text)
        had.append(length)
    return len(script), length, had


def check_play(script, *, end=1, stop_after=None, shrink_after=None, lengths=None):
    count, steps, length = len(script), len(script[0]), len(script[0][0])
    progress = []
    samples, model = play(
        script, end=end, stop_after=stop_after, shrink_after=shrink_after, lengths=lengths, pad=40,
        output_history=True, progress=lambda *now: progress.append(now),
    )  # fmt: skip
    all_lengths = lengths or [length] * count
    stories = [
        follow(story, end=end, stop_after=stop_after, shrink_after=shrink_after, length=own)
        for story, own in zip(script, all_lengths, strict=True)
    ]
    assert samples.steps.tolist() == [done for done, _, _ in stories]
    assert progress == [(i + 1, steps) for i in range(max(samples.steps.tolist(), default=0))]
    for i, (done, left, _) in enumerate(stories):
        texts = []
        for then in range(steps):
            tokens = script[i][min(then, done - 1)][:left]
            texts.append(up_to(end, tokens))
        assert samples.lengths[i] == len(texts[-1])
        assert samples.tokens[i].tolist() == texts[-1] + [40] * (length - len(texts[-1]))
        assert samples.history[i].tolist() == [text + [40] * (length - len(text)) for text in texts]
        assert torch.equal(samples.embeddings[i, :left], table_of()[script[i][done - 1][:left]])
        assert bool((samples.embeddings[i, left:] == 0).all())
    for i, (places, seen, mask, _) in enumerate(model.calls):
        assert places == [place for place, (done, _, _) in enumerate(stories) if done > i]
        then = [stories[place][2][i] for place in places]
        assert seen == max(then)
        assert (mask is None) == (min(then) == max(then))
        assert mask is None or mask.sum(1).tolist() == then
    return samples


STORIES = {
    "settles at once": [[5, 1, 6, 7]] * 8,
    "settles": [[5, 6, 7, 8], [5, 6, 7, 1], [5, 6, 1, 8], *([5, 9, 1, last] for last in (8, 7, 4, 3)), [2, 2, 2, 2]],
    "never ends": [[5, 6, 7, 8]] * 8,
    "ends with its last position": [[5, 6, 7, 1]] * 8,
    "comes and goes": [[5, 1, 6, 7], [5, 6, 6, 7]] * 4,
    "another end": [[5, 6, 1, 7]] * 3 + [[5, 1, 1, 7]] * 5,
    "the end is lost": [[5, 6, 1, 7]] * 3 + [[5, 6, 8, 9]] * 5,
}  # fmt: skip


@pytest.mark.parametrize("shrink_after", [None, 1, 3])
@pytest.mark.parametrize("stop_after", [None, 1, 3, 20])
def test_stopping_and_shrinking(stop_after, shrink_after):
    check_play([*STORIES.values()], stop_after=stop_after, shrink_after=shrink_after)


@pytest.mark.parametrize(
    ("name", "patience", "steps"),
    [
        ("settles at once", 1, 2), ("settles at once", 3, 4), ("settles at once", 7, 8), ("settles at once", 8, 8),
        ("settles", 2, 6), ("never ends", 1, 8), ("ends with its last position", 1, 2), ("comes and goes", 1, 8),
        ("another end", 3, 7), ("the end is lost", 3, 8), ("the end is lost", 2, 3),
    ],
)  # fmt: skip
def test_number_of_steps(name, patience, steps):
    """By hand: steps are how often the model was called."""
    samples, model = play([STORIES[name]], stop_after=patience)
    assert samples.steps.tolist() == [steps]
    assert len(model.calls) == steps


def test_without_an_end_token_all_is_text():
    samples = check_play([STORIES["never ends"], STORIES["comes and goes"]], end=None, stop_after=2)
    assert samples.steps.tolist() == [3, 8]
    check_play([*STORIES.values()], end=None, stop_after=1, shrink_after=1)


def of(size, elements):
    return st.lists(elements, min_size=size, max_size=size)


stories = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 5)).flatmap(
    lambda shape: of(shape[0], of(shape[1], of(shape[2], st.integers(1, 3))))
)


@settings(max_examples=80, deadline=None)
@given(stories, st.one_of(st.none(), st.integers(1, 3)), st.one_of(st.none(), st.integers(1, 3)), st.data())
def test_stopping_and_shrinking_of_any_kind(script, stop_after, shrink_after, data):
    lengths = data.draw(st.one_of(st.none(), of(len(script), st.integers(1, len(script[0][0])))))
    end = data.draw(st.sampled_from((1, 1, 1, None)))
    check_play(script, stop_after=stop_after, shrink_after=shrink_after, lengths=lengths, end=end)


def test_the_longest_may_leave_first():
    """What is left is shorter than the call, without shrink_after."""
    quick, slow = [[5, 6, 1, 7]] * 8, [[5, 6, 7, 7], [6, 5, 7, 7]] * 4
    samples = check_play([quick, slow], stop_after=1, lengths=[4, 2])
    assert samples.steps.tolist() == [2, 8]


def test_those_that_leave_change_nothing_for_others():
    """Of a real model: what has no end yet comes out as without patience, in the steps that it takes."""
    plain = batch(end=3)
    impatient = batch(end=3, stop_after=1)
    assert impatient.steps.min() < 10
    full = impatient.steps == 10
    assert 0 < full.sum() < BATCH
    assert torch.equal(plain.tokens[full], impatient.tokens[full])
    torch.testing.assert_close(plain.embeddings[full], impatient.embeddings[full], rtol=1e-4, atol=2e-5)


def test_mean_answers_are_looked_at():
    """With ddim the text that settles is that of the mean of all answers."""
    samples, _ = play([STORIES["settles at once"]], stop_after=2, solver="ddim")
    assert samples.steps.tolist() == [3]


def test_fixed_text_ends_too():
    """The end token has to come behind what is fixed."""
    fixed = torch.tensor([[-1, -1, 6, -1], [-1, -1, -1, -1]])
    samples, model = play([[[5, 1, 7, 8]] * 6] * 2, fixed=fixed, stop_after=2, shrink_after=1)
    assert samples.steps.tolist() == [6, 3]
    assert samples.tokens.tolist() == [[5, 1, 6, 8], [5, 1, 0, 0]]
    assert model.calls[2][2].tolist() == [[True] * 4, [True, True, False, False]]


# --- What is done to answers


def test_guidance():
    """f + c (f - f_empty), and two calls of the model."""
    full, empty = condition_of(), condition_of().flip(0)
    inner = Mix()

    def by_hand(smoothed, t, condition, answer):
        f, f_empty = inner(smoothed, t, full, answer), inner(smoothed, t, empty, answer)
        return f + 1.7 * (f - f_empty)

    options = {"length": L, "sample_ids": IDS, "steps": 6}
    model = Mix()
    guided = sample(model, table_of(), ARCTAN, condition=full, empty_condition=empty, guidance=1.7, **options)
    torch.testing.assert_close(guided.embeddings, sample(by_hand, table_of(), ARCTAN, **options).embeddings)
    assert len(model.calls) == 12
    assert all(torch.equal(a, b) for one, other in zip(model.calls[::2], model.calls[1::2], strict=True)
               for a, b in ((one[0], other[0]), (one[1], other[1]), (one[3], other[3])))  # fmt: skip
    unguided = sample(Mix(), table_of(), ARCTAN, condition=full, **options)
    without = sample(Mix(), table_of(), ARCTAN, condition=full, empty_condition=empty, guidance=0.0, **options)
    assert torch.equal(unguided.embeddings, without.embeddings)
    assert (unguided.embeddings - guided.embeddings).abs().max() > 0.1


@pytest.mark.parametrize("gradients", [False, True])
def test_guide(gradients):
    """Changes answers after guidance; with gradients of its own where it enables them."""
    times, goal = [], table_of()[7]

    def guide(answer, time):
        times.append(time)
        assert not torch.is_grad_enabled()
        if not gradients:
            return answer - 0.3 * (answer - goal)
        with torch.enable_grad():
            answer = answer.clone().requires_grad_()
            (slope,) = torch.autograd.grad((answer - goal).square().sum(), answer)
            return answer - 0.15 * slope

    def by_hand(*inputs):
        answer = Mix()(*inputs)
        return answer - 0.3 * (answer - goal)

    options = {"length": L, "sample_ids": IDS, "steps": 6, "condition": condition_of()}
    guided = sample(Mix(), table_of(), ARCTAN, guide=guide, **options)
    torch.testing.assert_close(guided.embeddings, sample(by_hand, table_of(), ARCTAN, **options).embeddings)
    assert times == linspace(6)[:-1]
    assert not guided.embeddings.requires_grad


def test_clamp():
    """Every answer that the model sees is the embedding of the token that was nearest."""
    table, model = table_of(), Mix()
    answers = []

    def remembering(*inputs):
        answers.append(model(*inputs))
        return answers[-1]

    samples = sample(remembering, table, ARCTAN, length=L, sample_ids=IDS, steps=6, clamp=True)
    clamped = [*(call[3] for call in model.calls[1:]), samples.embeddings]
    for answer, other in zip(answers, clamped, strict=True):
        assert torch.equal(other, table[torch.cdist(answer, table).argmin(-1)])
    assert torch.equal(samples.embeddings, table[samples.tokens])


def test_order_of_what_is_done():
    """Guidance, guide, clamp, fixed."""
    table, fixed = table_of(), fixed_of(3)
    seen = []

    def guide(answer, time):
        seen.append(answer)
        return table[7].expand_as(answer) + 1e-3

    samples = sample(Mix(), table, ARCTAN, length=L, sample_ids=IDS, steps=2, condition=condition_of(), guidance=2.0,
                     empty_condition=condition_of().flip(0), guide=guide, clamp=True, fixed=fixed)  # fmt: skip
    assert torch.equal(samples.embeddings, table[fixed.where(fixed >= 0, 7)])
    assert len(seen) == 2


@pytest.mark.parametrize("self_conditioning", [True, False])
def test_self_conditioning(self_conditioning):
    model = Mix()
    answers = []

    def remembering(*inputs):
        answers.append(model(*inputs))
        return answers[-1]

    sample(remembering, table_of(), ARCTAN, length=L, sample_ids=IDS, steps=4, self_conditioning=self_conditioning)
    seen = [call[3] for call in model.calls]
    if not self_conditioning:
        assert seen == [None] * 4
    else:
        assert torch.equal(seen[0], torch.zeros(3, L, D))
        assert all(torch.equal(a, b) for a, b in zip(seen[1:], answers, strict=False))


Pair = namedtuple("Pair", "states more")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, x + 100), lambda x: Pair(x, (x[:, None], None)), lambda x: {"a": x, "b": [x, None]},
        lambda x: [Pair({"x": x}, ()), "name", 3],
    ],
    ids=["tuple", "named tuple", "dict", "list"],
)  # fmt: skip
def test_conditions_follow_their_samples(wrap):
    """Kind by kind, also the empty one; what is no tensor stays."""
    script = torch.tensor([[[5, 1]] * 4, [[5, 6], [6, 5]] * 2, [[4, 5], [5, 1], [5, 1], [5, 1]], [[7, 8]] * 4])
    table, places = table_of(), torch.arange(4)
    seen = []

    def model(smoothed, t, condition, answer):
        seen.append(condition)
        first = condition
        while not isinstance(first, torch.Tensor):
            first = next(iter(first.values() if isinstance(first, dict) else first))
        return table[script[first % 10, (len(seen) - 1) // 2]]

    sample(model, table, ARCTAN, length=2, sample_ids=range(4), steps=4, end=1, stop_after=1, guidance=0.5,
           condition=wrap(places), empty_condition=wrap(places + 10))  # fmt: skip
    there = [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3], [1, 3]]

    def check(tree, wanted):
        assert type(tree) is type(wanted)
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(tree, wanted)
        elif isinstance(wanted, dict):
            assert tree.keys() == wanted.keys()
            check([*tree.values()], [*wanted.values()])
        elif isinstance(wanted, tuple | list):
            for some, other in zip(tree, wanted, strict=True):
                check(some, other)
        else:
            assert tree == wanted

    for i, rows in enumerate(there):
        check(seen[2 * i], wrap(torch.tensor(rows)))
        check(seen[2 * i + 1], wrap(torch.tensor(rows) + 10))
    assert len(seen) == 8


# --- What comes back


def test_history_is_what_was_nearest_after_every_step():
    answers = []

    def remembering(*inputs):
        answers.append(Mix()(*inputs))
        return answers[-1]

    progress = []
    samples = sample(remembering, table_of(), ARCTAN, length=L, sample_ids=IDS, steps=7, output_history=True, end=3,
                     pad=2, progress=lambda *now: progress.append(now))  # fmt: skip
    assert samples.history.shape == (3, 7, L)
    assert torch.equal(samples.history[:, -1], samples.tokens)
    for i, answer in enumerate(answers):
        nearest = nearest_token(answer, table_of()).tokens.tolist()
        texts = [up_to(3, tokens) for tokens in nearest]
        assert samples.history[:, i].tolist() == [text + [2] * (L - len(text)) for text in texts]
    assert progress == [(i, 7) for i in range(1, 8)]
    again = sample(Mix(), table_of(), ARCTAN, length=L, sample_ids=IDS, steps=7, end=3, pad=2)
    assert torch.equal(again.tokens, samples.tokens)


@pytest.mark.parametrize("step", ["fused", "eager"])
@pytest.mark.parametrize(
    ("options", "count", "length", "v"),
    [
        ({"sample_ids": []}, 0, L, V), ({"sample_ids": torch.empty(0, dtype=torch.int64), "lengths": []}, 0, L, V),
        ({"sample_ids": range(0), "seed": []}, 0, L, V),
        ({"sample_ids": [], "output_history": True, "fixed": torch.empty(0, L, dtype=torch.int64)}, 0, L, V),
        ({"sample_ids": [4], "length": 1}, 1, 1, V), ({"sample_ids": IDS, "length": 1, "lengths": [1, 1, 1]}, 3, 1, V),
        ({"sample_ids": IDS}, 3, L, 1), ({"sample_ids": [0], "length": 1, "steps": 1}, 1, 1, 1),
    ],
    ids=str,
)  # fmt: skip
def test_small_sizes(step, options, count, length, v):
    for solver in SOLVERS:
        options = {"length": L, "steps": 5} | options
        samples = sample(Mix(), table_of(v), ARCTAN, solver=solver, step=step, **options)
        assert samples.tokens.shape == (count, length)
        assert samples.embeddings.shape == (count, length, D)
        assert samples.lengths.tolist() == [length] * count
        assert samples.steps.tolist() == [options["steps"]] * count
        assert (samples.tokens.dtype, samples.lengths.dtype, samples.steps.dtype) == (torch.int64,) * 3
        if "output_history" in options:
            assert samples.history.shape == (count, 5, length)
        if v == 1:
            assert bool((samples.tokens == 0).all())


@pytest.mark.parametrize("step", ["fused", "eager"])
@pytest.mark.parametrize("options", [{}, {"clamp": True}, {"solver": "ddpm", "fixed": fixed_of(3)}], ids=str)
def test_16_bit_table(step, options):
    """Answers stay in float32; results are those of the same table in float32, but for rounding."""
    table = table_of(dtype=torch.bfloat16)
    some, others = (
        sample(Mix(), each, ARCTAN, length=L, sample_ids=IDS, steps=6, step=step, accumulate="sum", **options)
        for each in (table, table.float())
    )
    assert some.embeddings.dtype == F32
    assert relative_error(some.embeddings, others.embeddings) < 1e-4


def test_answers_may_be_of_another_type():
    model = Mix()
    samples = sample(lambda *inputs: model(*inputs).bfloat16(), table_of(), ARCTAN, length=L, sample_ids=IDS, steps=3)
    assert samples.embeddings.dtype == F32
    assert torch.equal(samples.embeddings, samples.embeddings.bfloat16().float())


def test_table_or_vocabulary():
    some, others = (batch(table=table) for table in (table_of(), Vocabulary(table_of())))
    assert torch.equal(some.embeddings, others.embeddings)


def test_backends(backend):
    device = device_of(backend)
    options = {"length": 2, "sample_ids": [4, 1], "steps": 4, "solver": "ddpm"}
    found = sample(Mix(), table_of().to(device), ARCTAN, **options, backend=backend)
    wanted = sample(Mix(), table_of(), ARCTAN, **options, backend="reference")
    check_same(wanted._make(None if value is None else value.cpu() for value in found), wanted)


def test_tables_that_take_gradients():
    table = table_of().requires_grad_()
    assert not batch(table=table).embeddings.requires_grad


# --- Memory


class Largest(TorchDispatchMode):
    """The most elements that a result of an operator has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_the_size_of_the_vocabulary(name):
    """Beyond the table itself: rows x vocabulary is seven times as large."""
    solver, accumulate = CASES[name]
    vocabulary, count, length, width = Vocabulary(table_of(3001, 8)), 7, 8, 8

    def largest(step):
        with Largest() as mode:
            sample(Mix(8, length), vocabulary, ARCTAN, length=length, sample_ids=range(count), steps=5, solver=solver,
                   accumulate=accumulate, step=step, lengths=[8, 7, 8, 3, 8, 8, 1], stop_after=3)  # fmt: skip
        return mode.elements

    assert largest("fused") <= max(count * length * width, 3001 * 8)
    with pytest.raises(ValueError, match="stop_after"):
        largest("eager")


def test_what_would_be_of_the_size_of_the_vocabulary():
    with Largest() as mode:
        sample(Mix(8, 8), Vocabulary(table_of(3001, 8)), ARCTAN, length=8, sample_ids=range(7), steps=2, step="eager")
    assert mode.elements == 56 * 3001


# --- Messages


def returning(answer):
    return lambda *inputs: answer


WRONG = [
    ({"length": 0}, "length must be positive, got 0"),
    ({"steps": 0}, "steps must be positive, got 0"),
    ({"times": [0.5, 0.7]}, r"times must be two numbers or more that fall, .* got \[0.5, 0.7\]"),
    ({"solver": "euler"}, "solver must be one of 're-noise', .* got 'euler'"),
    ({"accumulate": "all"}, "accumulate must be one of 'bridge', 'sum', got 'all'"),
    ({"step": "dense"}, "step must be one of 'fused', 'eager', got 'dense'"),
    ({"max_length": 3}, "max_length must be at least length = 4, got 3"),
    ({"sample_ids": [0, -1]}, r"sample_ids must be in \[0, 1073741824\), .* of 4 positions .* got -1 to 0"),
    ({"sample_ids": [0, 2**30]}, r"sample_ids must be in \[0, 1073741824\), .* got 0 to 1073741824"),
    ({"sample_ids": [0, 2**29], "max_length": 8}, r"sample_ids must be in \[0, 536870912\), so that row"),
    ({"sample_ids": [0.5, 1.0]}, r"sample_ids must be whole numbers, .* torch.float32 of shape \[2\]"),
    ({"sample_ids": [[0, 1]]}, r"sample_ids must be whole numbers, .* got torch.int64 of shape \[1, 2\]"),
    ({"seed": [1, 2, 3]}, "seed must be one number or 2, one for each sample, got 3"),
    ({"condition": torch.ones(3)}, "condition must hold tensors of 2 samples, got one of 3"),
    ({"condition": ({"a": torch.ones(2)}, [torch.ones(1, 2)])}, "condition must hold .* got one of 1"),
    ({"condition": torch.ones(())}, "condition must hold tensors of 2 samples, got one of 0"),
    ({"empty_condition": torch.ones(5)}, "empty_condition must hold tensors of 2 samples, got one of 5"),
    ({"guidance": 0.5}, "empty_condition must be given with guidance = 0.5, got None"),
    ({"lengths": [3]}, r"lengths must be 2 whole numbers, .* got torch.int64 of shape \[1\]"),
    ({"lengths": [3.0, 2.0]}, r"lengths must be 2 whole numbers, .* got torch.float32 of shape \[2\]"),
    ({"lengths": [3, 0]}, r"lengths must be in \[1, 4\], got 0 to 3"),
    ({"lengths": [3, 5]}, r"lengths must be in \[1, 4\], got 3 to 5"),
    ({"fixed": [[1] * 4] * 2}, r"fixed must be torch.int64 of shape \[2, 4\], got list"),
    ({"fixed": torch.ones(2, 4)}, r"fixed must be torch.int64 of shape \[2, 4\], got torch.float32 of"),
    ({"fixed": torch.ones(2, 3).long()}, r"fixed must be torch.int64 .* got torch.int64 of shape \[2, 3\]"),
    ({"fixed": torch.full((2, 4), V)}, r"fixed must be tokens in \[0, V\) with V = 41, or -1 .* got 41"),
    ({"fixed": torch.full((2, 4), -2)}, r"fixed must be tokens in \[0, V\) with V = 41, or -1 .* got -2"),
    ({"fixed": torch.ones(2, 4).long(), "lengths": [4, 3]}, "fixed must be free behind the lengths"),
    ({"stop_after": 0}, "stop_after must be positive, got 0"),
    ({"shrink_after": -1}, "shrink_after must be positive, got -1"),
    ({"shrink_after": 2, "step": "eager"}, "shrink_after must be None with step 'eager', .* got 2"),
    ({"stop_after": 2, "step": "eager"}, "stop_after must be None with step 'eager', .* got 2"),
    ({"sigma_min": 0.0}, "sigma_min must be positive"),
    ({"sigma_min": 0.0, "step": "eager"}, "sigma_min must be positive"),
    ({"backend": "tpu"}, "backend must be one of .* got 'tpu'"),
    ({"embeddings": torch.ones(3)}, r"embeddings must have shape \[V, D\], got \[3\]"),
    ({"model": returning(None)}, r"model must return embeddings of shape \[2, 4, 8\], got NoneType"),
    ({"model": returning(torch.ones(2, 4, 7))}, r"model must return .* got torch.float32 of shape \[2, 4, 7\]"),
    ({"model": returning(torch.ones(2, 4, 8).long())}, r"model must return .* got torch.int64 of shape"),
    ({"guide": returning(torch.ones(4, 8))}, r"guide must return embeddings .* got torch.float32 of shape \[4, 8\]"),
    ({"guide": returning(None)}, "guide must return embeddings .* got NoneType"),
]  # fmt: skip


def argument(part: object) -> str:
    """For a test's name."""
    return part.split(" must")[0] if isinstance(part, str) else ""


def call_with(change):
    call = {"model": Mix(), "embeddings": table_of(), "length": 4, "sample_ids": [0, 1], "steps": 3} | change
    return sample(call.pop("model"), call.pop("embeddings"), ARCTAN, **call)


@pytest.mark.parametrize(("change", "message"), WRONG, ids=argument)
def test_messages(change, message):
    with pytest.raises(ValueError, match=message):
        call_with(change)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"length": 2.0}, "float"), ({"length": True}, "bool"), ({"steps": "3"}, "str"), ({"max_length": 4.5}, "float"),
        ({"stop_after": 1.5}, "float"), ({"shrink_after": False}, "bool"),
    ],
    ids=str,
)  # fmt: skip
def test_counts_are_ints(change, got):
    with pytest.raises(TypeError, match=f"{next(iter(change))} must be an int, got {got}"):
        call_with(change)


def test_a_later_answer_of_another_shape():
    """The model is looked at in every step."""
    answers = [torch.ones(1, L, D), torch.ones(1, L, D), torch.ones(1, L - 1, D)]
    with pytest.raises(ValueError, match=r"model must return embeddings of shape \[1, 6, 8\], got .* \[1, 5, 8\]"):
        sample(lambda *inputs: answers.pop(0), table_of(), ARCTAN, length=L, sample_ids=[0], steps=5)

"""The sampler against the published rules, dense in float64; what may be around a sample; what it gives and refuses."""

from functools import cache

import pytest
import torch
from conftest import device_of
from samplers import (
    ARCTAN,
    BATCH,
    CASES,
    F32,
    F64,
    IDS,
    LENGTHS_16,
    VARIANTS,
    D,
    L,
    Mix,
    V,
    batch,
    check_same,
    condition_of,
    dense,
    fixed_of,
    normals,
    own_normals,
    part,
    table_of,
    up_to,
)  # fmt: skip
from test_solvers import linspace
from torch.utils._python_dispatch import TorchDispatchMode

from smoothie_kernels import Vocabulary, fused_smoothie_step, nearest_token, noise
from smoothie_kernels.diffusion import make_schedule
from smoothie_kernels.diffusion.sampling import MAX_ROW_ID, sample
from smoothie_kernels.diffusion.solvers import ACCUMULATE, SOLVERS, make_route
from smoothie_kernels.diffusion.states import as_noise
from smoothie_kernels.testing import FLOOR, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


# --- The published rules


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

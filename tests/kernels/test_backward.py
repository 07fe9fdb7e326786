"""Gradients in every backend: float64, edges, only what is asked for, and what must not change them."""

import pytest
import torch
from cases import CASES, FIELDS, dense_outputs, inputs, loudness
from conftest import DEVICE, device_of
from hypothesis import given, settings
from hypothesis import strategies as st

from smoothie_kernels import Vocabulary, fused_smoothie_step, noise
from smoothie_kernels.testing import check_gradients, relative_error

WHERE = {"seed": 3, "offset": 1, "row_offset": 5}


class Problem:
    """Inputs, gradients that come in, and the noise that goes with them."""

    def __init__(
        self, backend, n, v, d, mu=0.05, std=0.99, scale=1.0, x_type=torch.float32, table_type=torch.float32,
        where=WHERE,
    ):  # fmt: skip
        device = device_of(backend)
        x, table = inputs(n, v, d, scale, device)
        self.backend, self.mu, self.std = backend, mu, std
        self.x, self.table = x.to(x_type), table.to(table_type)
        self.grad_smoothed, self.grad_lse = torch.randn(n, d).to(device, x_type), torch.randn(n, device=device)
        self.eps, self.where = noise.gaussian(n, v, backend="reference", **where).to(device), where

    def grads(self, *, x=True, table=True, smoothed=True, lse=True, **options):
        """Gradients of x and the table; None where it is not asked for."""
        inputs = [self.x.detach().requires_grad_(x), self.table.detach().requires_grad_(table)]
        step = fused_smoothie_step(*inputs, self.mu, self.std, backend=self.backend, **{**self.where, **options})
        outputs, grads = [], []
        if smoothed:
            outputs, grads = [step.smoothed], [self.grad_smoothed]
        if lse:
            outputs, grads = [*outputs, step.lse], [*grads, self.grad_lse]
        found = iter(torch.autograd.grad(outputs, [i for i in inputs if i.requires_grad], grads))
        return [next(found) if i.requires_grad else None for i in inputs]

    def wrong(self, grads, *, smoothed=True, lse=True, cancelled=0.0, loud=True):
        rows = torch.ones(len(self.x), device=self.x.device)
        incoming = self.grad_smoothed * smoothed, self.grad_lse * lse
        given = self.x, self.table, self.mu * rows, self.std * rows, self.eps
        loud = loudness(self.where.get("field_weights", [1])) if loud else 0.0
        return check_gradients(grads, *given, *incoming, cancelled=cancelled, loudness=loud)


@pytest.mark.parametrize("case", CASES)
def test_against_float64(backend, case):
    problem = Problem(backend, *CASES[case])
    assert problem.wrong(problem.grads()) == []


@pytest.mark.parametrize("fields", FIELDS)
def test_sum_of_fields(backend, fields):
    """The backward makes the same sum again."""
    offset, weights, std = FIELDS[fields]
    where = {**WHERE, "offset": offset, "field_weights": weights}
    problem = Problem(backend, 19, 150, 24, 0.1, std, where=where)
    grads = problem.grads()
    assert problem.wrong(grads) == []
    on = {"offset": torch.tensor([o - 2**64 if o >= 2**63 else o for o in offset]).to(problem.x.device)}
    again = problem.grads(**on, field_weights=torch.tensor(weights).to(problem.x.device))
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("case", ["odd", "one token", "peaked", "flat", "far away"])
def test_of_the_mean_alone(backend, case):
    problem = Problem(backend, *CASES[case])
    assert problem.wrong(problem.grads(lse=False), lse=False) == []


@pytest.mark.parametrize("case", ["odd", "one token", "peaked", "far away"])
def test_of_lse_alone(backend, case):
    problem = Problem(backend, *CASES[case])
    assert problem.wrong(problem.grads(smoothed=False), smoothed=False) == []


def test_a_far_row_among_near_ones(backend):
    """A pass of its own finds its largest logit; the backward must round its scores as that pass did."""
    problem = Problem(backend, 20, 130, 64, mu=0.3)
    problem.x[11] *= 1e4
    assert problem.wrong(problem.grads(smoothed=False), smoothed=False) == []


# By what rows and table are multiplied, by what the rows alone, and the type of both.
ONE_TOKEN = {
    "10": (10, 1, torch.float32),
    "30": (30, 1, torch.float32),
    "100": (100, 1, torch.float32),
    "1000": (1000, 1, torch.float32),
    "far rows": (1, 1000, torch.float32),
    "bfloat16": (1000, 1, torch.bfloat16),
    "float16": (300, 1, torch.float16),
}


@pytest.mark.parametrize("lse", [False, True], ids=["mean", "mean and lse"])
@pytest.mark.parametrize("case", ONE_TOKEN)
def test_table_where_one_token_has_all_the_weight(backend, case, lse):
    """dS of that token is what the others leave, next to nothing; the rounding of delta would drown the gradient."""
    times, far, dtype = ONE_TOKEN[case]
    problem = Problem(backend, 17, 150, 64, mu=0.3)
    problem.x[5] = problem.x[2]  # two rows of one token
    problem.x, problem.table = (times * far * problem.x).to(dtype), (times * problem.table).to(dtype)
    problem.grad_smoothed = problem.grad_smoothed.to(dtype)
    problem.grad_lse *= 1e-6  # else of lse alone
    assert problem.wrong(problem.grads(x=False, lse=lse), lse=lse) == []


# Where log_sum is so large a number that its rounding is a factor of all weights of a row: mu, std, by what rows and
# table are multiplied, and the type of both.
LARGE_LOG_SUMS = {
    "farthest token": (-0.3, 0.99, 100, torch.float32),
    "farther": (-0.3, 0.99, 1000, torch.float32),
    "loud": (0.05, 1e5, 1, torch.float32),
    "louder": (0.05, 1.5e7, 1, torch.float32),
    "loud, bfloat16": (0.05, 1e7, 1, torch.bfloat16),
    "farthest, bfloat16": (-0.3, 0.0, 100, torch.bfloat16),
}


@pytest.mark.parametrize("parts", [(True, False), (False, True), (True, True)], ids=["mean", "lse", "both"])
@pytest.mark.parametrize("case", LARGE_LOG_SUMS)
def test_weights_add_up_to_one(backend, case, parts):
    mu, std, times, dtype = LARGE_LOG_SUMS[case]
    problem = Problem(backend, 17, 150, 64, mu, std)
    problem.x, problem.table = (times * problem.x).to(dtype), (times * problem.table).to(dtype)
    problem.grad_smoothed = problem.grad_smoothed.to(dtype)
    parts = dict(zip(("smoothed", "lse"), parts, strict=True))
    # Without lse the gradient of x is nearly zero: a rounding of a rounding is left.
    cancelled = 0.0 if parts["lse"] else 1e-6
    assert problem.wrong(problem.grads(**parts), **parts, loud=False, cancelled=cancelled) == []


def test_rows_that_do_not_fit_in_memory_at_once():
    """The CPU backward packs 1,536 rows of this width at a time; the four that are left round as all others do."""
    problem = Problem("cpu", 1540, 40, 1024, mu=0.3)
    grad = problem.grads(table=False, smoothed=False)[0][-4:]
    problem.x, problem.eps = problem.x[-4:], problem.eps[-4:]
    problem.grad_smoothed, problem.grad_lse = problem.grad_smoothed[-4:], problem.grad_lse[-4:]
    assert problem.wrong([grad, None], smoothed=False) == []


@pytest.mark.parametrize("output", ["smoothed", "lse", "values"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_table_of_many_rows(backend, output):
    """Half of them alike, as padding is: sums that add rows one by one would round the same way every time."""
    n, v, d = 50_000, 30, 16
    x, table = inputs(n, v, d, 1.0, "cpu")
    x[::2] = x[0]
    table.requires_grad_()
    step = fused_smoothie_step(x, table, 0.1, 0.0, seed=0, topk=4, backend=backend)
    (found,) = torch.autograd.grad(step.topk.values.sum() if output == "values" else getattr(step, output).sum(), table)

    def dense(dtype):
        leaf, zeros = table.detach().to(dtype).requires_grad_(), torch.zeros(n, v, dtype=dtype)
        mu, std = 0.1 * torch.ones(n, dtype=dtype), torch.zeros(n, dtype=dtype)
        made = dense_outputs(x.to(dtype), leaf, mu, std, zeros, step.topk.indices, "full")
        outputs = dict(zip(("smoothed", "lse", "values"), made, strict=False))
        return torch.autograd.grad(outputs[output].sum(), leaf)[0]

    exact, naive = dense(torch.float64), dense(torch.float32)
    assert relative_error(found, exact) <= max(2e-6, 2 * relative_error(naive, exact))


@pytest.mark.parametrize("table_type", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types(backend, x_type, table_type):
    problem = Problem(backend, 19, 261, 40, x_type=x_type, table_type=table_type)
    grads = problem.grads()
    assert [g.dtype for g in grads] == [x_type, table_type]
    assert problem.wrong(grads) == []


@pytest.mark.parametrize("mean", [8.0, 30.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_all_tokens_have_in_common(backend, dtype, mean):
    """It goes out of the gradients; delta of a 16-bit `smoothed` would round it."""
    problem = Problem(backend, 20, 150, 16, mu=0.02)
    problem.x, problem.table = ((m + mean).to(dtype) for m in (problem.x, problem.table))
    if backend == "triton" and DEVICE == "cpu":
        problem.table = problem.table.float()  # weights stay float32: the interpreter rounds dS after it has added them
    problem.grad_smoothed = problem.grad_smoothed.to(dtype)
    grads = problem.grads(lse=False)
    assert problem.wrong(grads, lse=False) == []


def test_gradcheck():
    """Against finite differences, which know nothing of formulas."""
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    table = torch.randn(23, 5, dtype=torch.float64, requires_grad=True)
    mu = torch.rand(2, 3, dtype=torch.float64)

    def step(x, table):
        return fused_smoothie_step(x, table, mu, 0.9, seed=3, backend="reference")[0::3]

    assert torch.autograd.gradcheck(step, (x, table))


def test_only_what_is_asked_for(backend):
    problem = Problem(backend, 18, 150, 24)
    both = problem.grads()
    for asked in ({"table": False}, {"x": False}):
        for found, expected in zip(problem.grads(**asked), both, strict=True):
            assert found is None or relative_error(found, expected) <= 1e-6


def test_same_call_same_bits(backend):
    problem = Problem(backend, 40, 300, 48)
    first, second = problem.grads(), problem.grads()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_do_not_depend_on_their_call(backend):
    """A row's gradient is its own; the table's is a sum over calls."""
    problem = Problem(backend, 21, 150, 40)
    whole_x, whole_table = problem.grads()
    total = torch.zeros_like(whole_table)
    for first, last in ((0, 1), (1, 19), (19, 21)):
        part = Problem(backend, 1, 1, 1)
        part.x, part.table = problem.x[first:last], problem.table
        part.grad_smoothed, part.grad_lse = problem.grad_smoothed[first:last], problem.grad_lse[first:last]
        grad_x, grad_table = part.grads(row_offset=5 + first)
        assert relative_error(grad_x, whole_x[first:last]) <= 1e-6
        total += grad_table
    assert relative_error(total, whole_table) <= 1e-6


def test_row_ids_and_leading_dimensions(backend):
    problem = Problem(backend, 12, 90, 16)
    mu, std = torch.rand(12, device=problem.x.device), torch.rand(12, device=problem.x.device)
    ids = torch.tensor([0, 7, 2**31, 2**32 - 1, 5, 6, 9, 1, 2, 3, 4, 2**31 - 1], device=problem.x.device)

    def grads(shape):
        x, table = problem.x.view(*shape, 16).detach().requires_grad_(), problem.table.detach().requires_grad_()
        step = fused_smoothie_step(
            x, table, mu.view(shape), std.view(shape), seed=3, row_ids=ids.view(shape), backend=backend
        )
        found = torch.autograd.grad(
            (step.smoothed, step.lse),
            (x, table),
            (problem.grad_smoothed.view(*shape, 16), problem.grad_lse.view(shape)),
        )
        return found[0].view(12, 16), found[1]

    eps = noise.gaussian(12, 90, seed=3, row_ids=ids.cpu(), backend="reference").to(problem.x.device)
    flat = grads((12,))
    incoming = problem.grad_smoothed, problem.grad_lse
    assert check_gradients(flat, problem.x, problem.table, mu, std, eps, *incoming) == []
    assert all(torch.equal(a, b) for a, b in zip(grads((2, 6)), flat, strict=True))


def test_not_contiguous(backend):
    problem = Problem(backend, 18, 140, 24)
    expected = problem.grads()
    problem.x, problem.table = problem.x.T.contiguous().T, problem.table.T.contiguous().T
    problem.grad_smoothed = problem.grad_smoothed.T.contiguous().T
    problem.grad_lse = problem.grad_lse.repeat_interleave(3)[::3]
    assert all(torch.equal(a, b) for a, b in zip(problem.grads(), expected, strict=True))
    x = problem.x.detach().requires_grad_()
    step = fused_smoothie_step(x, problem.table, 0.05, 0.99, seed=1, backend=backend)
    (ones,) = torch.autograd.grad(step.smoothed.sum(), x)  # its gradient is one number, expanded
    step = fused_smoothie_step(x, problem.table, 0.05, 0.99, seed=1, backend=backend)
    assert torch.equal(ones, *torch.autograd.grad(step.smoothed, x, torch.ones_like(x)))


def test_rows_of_a_wider_table(backend):
    problem = Problem(backend, 18, 140, 24)
    expected = problem.grads()
    problem.table = torch.cat((problem.table, problem.table), 1)[:, :24]
    for found, wanted in zip(problem.grads(), expected, strict=True):  # a GPU's library picks its kernels by strides
        assert relative_error(found, wanted) <= 1e-6


def test_no_rows(backend):
    problem = Problem(backend, 0, 10, 4)
    grad_x, grad_table = problem.grads()
    assert grad_x.shape == (0, 4)
    assert torch.equal(grad_table, torch.zeros_like(problem.table))


def test_outputs_that_nobody_uses(backend):
    problem = Problem(backend, 5, 30, 8)
    x = problem.x.detach().requires_grad_()
    step = fused_smoothie_step(x, problem.table, 0.05, 0.99, seed=1, backend=backend)
    assert not step.tokens.requires_grad
    assert not step.noisy_tokens.requires_grad
    (step.smoothed.detach().sum() + step.lse.sum()).backward()
    step = fused_smoothie_step(x, problem.table, 0.05, 0.99, seed=1, backend=backend)
    assert torch.equal(x.grad, *torch.autograd.grad(step.lse.sum(), x))


def test_non_finite_rows_stay_where_they_are(backend):
    problem = Problem(backend, 20, 150, 16)
    expected = problem.grads(table=False)[0]
    for bad in (torch.nan, torch.inf):
        problem.x[7, 3] = bad
        grad_x = problem.grads(table=False)[0]
        assert grad_x[7].isnan().any()
        others = torch.arange(20, device=grad_x.device) != 7
        assert relative_error(grad_x[others], expected[others]) <= 1e-6


def test_through_a_vocabulary(backend):
    problem = Problem(backend, 12, 90, 16)
    table = problem.table.detach().requires_grad_()
    vocabulary = Vocabulary(table, backend=backend)
    step = fused_smoothie_step(problem.x, vocabulary, 0.05, 0.99, backend=backend, **WHERE)
    (found,) = torch.autograd.grad((step.smoothed, step.lse), table, (problem.grad_smoothed, problem.grad_lse))
    assert torch.equal(found, problem.grads(x=False)[1])


def test_embeddings_learn(backend):
    """A table of its own per token moves to where its rows are."""
    torch.manual_seed(1)
    device = device_of(backend)
    target = torch.randn(6, 8, device=device)
    table = torch.nn.Parameter(target + 0.5 * torch.randn(6, 8, device=device))
    optimizer = torch.optim.Adam([table], lr=0.1)
    losses = []
    for offset in range(25):
        optimizer.zero_grad()
        step = fused_smoothie_step(target, table, 1.0, 0.1, seed=0, offset=offset, backend=backend)
        loss = (step.smoothed - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("name", ["mu", "std"])
def test_no_gradient_for_the_schedule(backend, name):
    problem = Problem(backend, 3, 20, 8)
    values = {name: torch.full((3,), 0.5, device=problem.x.device) for name in ("mu", "std")}
    values[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require grad: the step has no gradient for it"):
        fused_smoothie_step(problem.x, problem.table, **values, seed=0, backend=backend)


def test_no_second_derivative(backend):
    problem = Problem(backend, 3, 20, 8)
    x = problem.x.detach().requires_grad_()
    step = fused_smoothie_step(x, problem.table, 0.05, 0.99, seed=0, backend=backend)
    (grad,) = torch.autograd.grad(step.smoothed.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="fused_smoothie_step has first derivatives only"):
        grad.sum().backward()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 70), v=st.integers(1, 280), d=st.integers(1, 70), seed=st.integers(0, 2**32),
    mu=st.sampled_from([7e-5, 0.01, 0.3]), std=st.sampled_from([0.0, 0.8]),
)  # fmt: skip
def test_any_shape(n, v, d, seed, mu, std):
    """The backend that users of a CPU get. Sums of one or two columns may come out next to zero."""
    if device_of("auto") != "cpu":
        pytest.skip("a CPU test: Triton would compile its kernels for every width")
    torch.manual_seed(seed)
    problem = Problem("auto", n, v, d, mu, std)
    assert problem.wrong(problem.grads(), cancelled=0.25) == []

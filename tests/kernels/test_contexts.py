"""What surrounds a call may not change its result: default dtypes and devices, layouts, modes, copies, compilers."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from smoothie_kernels import Vocabulary, expected_recall, fused_smoothie_step, nearest_token, noise
from smoothie_kernels.backends import cpu

N, V, D, K = 5, 130, 16, 7
DTYPES = [torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture
def table():
    return torch.randn(V, D)


@pytest.fixture
def x(table):
    return table[:N] + 0.1


def everything(x, table, backend="auto"):
    """All outputs of all public functions, and gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, table)]
    step = fused_smoothie_step(*leaves, 0.05, 0.9, seed=3, topk=K, smooth="topk+mean", backend=backend)
    full = fused_smoothie_step(*leaves, 0.05, 0.9, seed=3, backend=backend)
    loss = full.smoothed.square().sum() + full.lse.sum() + step.smoothed.square().sum() + step.topk.values.sum()
    grads = torch.autograd.grad(loss, leaves)
    rest = nearest_token(x, table, backend=backend), [noise.gaussian(3, 9, seed=1, backend=backend)]
    of_fields = fused_smoothie_step(
        x, table, 0.05, 0.9, seed=3, offset=[1, 2], field_weights=[0.6, 0.8], backend=backend
    )
    return [*full[:4], step.smoothed, *step.topk, *grads, *rest[0], *rest[1], of_fields.lse]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_default_dtypes(x, table, backend, dtype):
    """Memory that is allocated without a type would have this one, and kernels would write past its end."""
    expected = everything(x, table, backend)
    torch.set_default_dtype(dtype)
    try:
        found = everything(x, table, backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_default_devices(x, table, backend):
    expected = everything(x, table, backend)
    with torch.device("meta"):
        found = fused_smoothie_step(x, table, 0.05, 0.9, seed=3, topk=K, smooth="topk+mean", backend=backend)
        fused_smoothie_step(x, Vocabulary(table), 0.05, 0.9, backend=backend)
        fields = fused_smoothie_step(
            x, table, 0.05, 0.9, seed=3, offset=[1, 2], field_weights=[0.6, 0.8], backend=backend
        )
    assert torch.equal(found.smoothed, expected[4])
    assert torch.equal(fields.lse, expected[-1])


@pytest.mark.parametrize("wrong", ["dtype", "sizes", "layout"])
def test_compiled_kernels_refuse_what_they_would_misread(table, wrong):
    """An error, not a write: backends allocate right, so that only their own tests see it."""
    if cpu.supports("cpu", torch.float32):
        pytest.skip("the CPU library is not here")
    bias = {
        "dtype": torch.empty(V, dtype=torch.float64),
        "sizes": torch.empty(V - 1),
        "layout": torch.empty(2 * V)[::2],
    }
    with pytest.raises(RuntimeError, match=r"bias (has another type|must have sizes|must be contiguous)"):
        cpu._ops().column_bias(table, -1, bias[wrong])


# --- layouts

LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "columns": lambda t: torch.stack((t, t), -1)[..., 0],
    "flipped twice": lambda t: t.flip(0).flip(0),
    "sliced": lambda t: torch.cat((t, t))[: len(t)],
    "offset": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["x", "table", "gradients", "mu, std", "row_ids"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_layouts(x, table, backend, what, layout):
    """The same as of contiguous copies, of every input and of every gradient that comes in."""
    changed = LAYOUTS[layout]

    def results(form):
        given = [form(x) if what == "x" else x, form(table) if what == "table" else table]
        given = [leaf.detach().requires_grad_() for leaf in given]
        per_row = form(torch.rand(N, 2)) if what == "mu, std" else torch.rand(N, 2)
        ids = form(torch.arange(2 * N).view(N, 2))[:, 0] if what == "row_ids" else None
        step = fused_smoothie_step(
            *given, per_row[:, 0], per_row[:, 1], seed=3, topk=K, row_ids=ids, backend=backend
        )  # fmt: skip
        outputs = step.smoothed, step.lse, step.topk.values, step.topk.tail_mass
        grads = [torch.randn(o.shape) for o in outputs]
        if what == "gradients":
            grads = [form(g) if g.dim() == 2 else form(g[:, None].repeat(1, 2))[:, 0] for g in grads]
        return [*outputs, *torch.autograd.grad(outputs, given, grads)]

    torch.manual_seed(1)
    found = results(changed)
    torch.manual_seed(1)
    expected = results(lambda t: changed(t).contiguous())
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradient_of_a_transposed_top_k(x, table, backend):
    """The gradient that comes back through a transposition has the strides of one."""
    w = torch.randn(N, 3)
    grads = []
    for values_of in (
        lambda step: step.topk.values,
        lambda step: (lambda v: v.T.contiguous().T.contiguous())(step.topk.values),
    ):
        leaf = x.clone().requires_grad_()
        step = fused_smoothie_step(leaf, table, 0.05, 0.9, seed=3, topk=K, backend=backend)
        (values_of(step).T @ w).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradient_of_lse_alone_of_rows_apart(x, table, backend):
    """The mean is not needed then, nor saved: the rows stand in for it."""
    grads = []
    for rows in (x, x.T.contiguous().T):
        leaf = rows.detach().requires_grad_()
        grads += torch.autograd.grad(
            fused_smoothie_step(leaf, table, 0.05, 0.9, seed=3, backend=backend).lse.sum(), leaf
        )
    assert torch.equal(*grads)


# --- what a Vocabulary keeps


def gradient_of(table, vocabulary, x, smooth="topk+mean"):
    step = fused_smoothie_step(x, vocabulary, 0.05, 0.9, seed=3, topk=K, smooth=smooth)
    (grad,) = torch.autograd.grad(step.smoothed.square().sum() + step.lse.sum(), table)
    return grad


def test_moments_made_without_gradients_are_not_kept_for_training(x, table):
    trained = table.clone().requires_grad_()
    expected = gradient_of(trained, trained, x)
    vocabulary = Vocabulary(trained)
    with torch.no_grad():
        fused_smoothie_step(x, vocabulary, 0.05, 0.9, topk=K, smooth="topk+mean")
    torch.testing.assert_close(gradient_of(trained, vocabulary, x), expected)
    later = table.clone()
    vocabulary = Vocabulary(later)
    fused_smoothie_step(x, vocabulary, 0.05, 0.9, topk=K, smooth="topk+mean")
    later.requires_grad_()
    torch.testing.assert_close(gradient_of(later, vocabulary, x), expected)


def test_moments_are_float32_under_autocast(x, table):
    expected = Vocabulary(table).moments()
    with torch.autocast("cpu", torch.bfloat16):
        found = Vocabulary(table).moments()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(x, table, dtype):
    expected = everything(x, table)
    with torch.autocast("cpu", dtype):
        step = fused_smoothie_step(x, table, 0.05, 0.9, seed=3, topk=K, smooth="topk+mean")
    assert torch.equal(step.smoothed, expected[4])


def test_several_gradients_at_once_under_autocast(x, table):
    """PyTorch puts them together, and stacks no float16 under autocast to bfloat16."""
    leaf = x.half().requires_grad_()
    step = fused_smoothie_step(leaf, table, 0.05, 0.9, seed=3)
    incoming = torch.randn(2, N, D).half()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(step.smoothed, leaf, incoming, is_grads_batched=True, retain_graph=True)
    for grad, given in zip(found, incoming, strict=True):
        assert torch.equal(grad, *torch.autograd.grad(step.smoothed, leaf, given, retain_graph=True))


@pytest.mark.parametrize("trains", ["x", "table"])
def test_a_vocabulary_made_in_inference_mode_serves_training(x, table, trains):
    with torch.inference_mode():
        vocabulary = Vocabulary(table)
        fused_smoothie_step(x, vocabulary, 0.05, 0.9, topk=K, smooth="topk+mean")
    leaf = (x if trains == "x" else table).requires_grad_()
    step = fused_smoothie_step(x, vocabulary, 0.05, 0.9, seed=3, topk=K, smooth="topk+mean")
    torch.autograd.grad(step.smoothed.square().sum() + step.lse.sum(), leaf)


def test_inference_tensors_cannot_be_saved(x, table):
    with torch.inference_mode():
        made = table.clone()
    with pytest.raises(ValueError, match=r"embeddings must not be made in torch\.inference_mode where a gradient"):
        fused_smoothie_step(x.requires_grad_(), made, 0.05, 0.9)
    with torch.no_grad():
        fused_smoothie_step(x, made, 0.05, 0.9)
    with torch.inference_mode():
        made = x.detach().clone()
    with pytest.raises(ValueError, match=r"x must not be made in torch\.inference_mode where a gradient"):
        fused_smoothie_step(made, table.requires_grad_(), 0.05, 0.9)


def test_a_vocabulary_follows_a_table_that_trains(x, table):
    """Also one whose rows are not contiguous, of which a copy is read."""
    for trained in (table.clone(), table.T.contiguous().T):
        trained.requires_grad_()
        vocabulary = Vocabulary(trained)
        fused_smoothie_step(x, vocabulary, 0.05, 0.9, topk=K, smooth="topk+mean")
        with torch.no_grad():
            trained.mul_(1.5)
        found, expected = (
            fused_smoothie_step(x, of, 0.05, 0.9, seed=3, topk=K, smooth="topk+mean") for of in (vocabulary, trained)
        )
        assert torch.equal(found.smoothed, expected.smoothed)
        assert torch.equal(found.lse, expected.lse)
        torch.testing.assert_close(gradient_of(trained, vocabulary, x), gradient_of(trained, trained, x))
        vocabulary.table.requires_grad_(False)
        assert torch.equal(vocabulary.bias, Vocabulary(trained).bias)


@pytest.mark.parametrize("write", [
    lambda t: t.mul_(1.5),
    lambda t: setattr(t, "data", t * 2),
    lambda t: setattr(t, "data", t.half()),
    lambda t: t.resize_(V - 30, D),
], ids=["in place", "other memory", "other type", "fewer tokens"])  # fmt: skip
def test_a_vocabulary_follows_a_frozen_table(x, table, write):
    """As by an average of weights, load_state_dict, Module.half; also one of which a copy is read."""
    for frozen in (table.clone(), table.T.contiguous().T):
        vocabulary = Vocabulary(frozen)
        kept = fused_smoothie_step(x, vocabulary, 0.05, 0.9, topk=K, smooth="topk+mean") and vocabulary.moments()[0]
        assert vocabulary.moments()[0].data_ptr() == kept.data_ptr()
        write(frozen)
        found, expected = (
            fused_smoothie_step(x, of, 0.05, 0.9, seed=3, topk=K, smooth="topk+mean") for of in (vocabulary, frozen)
        )
        assert torch.equal(found.smoothed, expected.smoothed)
        assert torch.equal(found.lse, expected.lse)


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_compiled_inference_keeps_nothing_that_training_cannot_save(x, table, compiles):
    def smoothed(rows):
        return fused_smoothie_step(rows, vocabulary, 0.05, 0.9, seed=3, topk=K, smooth="topk+mean").smoothed

    vocabulary = Vocabulary(table)
    compiled = torch.compile(smoothed, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        compiled(x)
    leaf = x.clone().requires_grad_()
    torch.autograd.grad((compiled if compiles else smoothed)(leaf).sum(), leaf)


def _distance(vocabulary, x):
    return nearest_token(x, vocabulary).distance


def test_copies_of_a_vocabulary(x, table):
    table += 1  # written to, before
    vocabulary = Vocabulary(table)
    vocabulary.moments()
    expected = nearest_token(x, vocabulary).distance
    for copied in (copy.deepcopy(vocabulary), copy.copy(vocabulary), pickle.loads(pickle.dumps(vocabulary))):
        assert torch.equal(nearest_token(x, copied).distance, expected)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(_distance, (vocabulary, x)), expected)


# --- derivatives that there are none of


@pytest.mark.parametrize("what", ["x", "embeddings", "mu", "std"])
def test_forward_mode_says_that_there_is_none(x, table, what):
    given = {"x": x, "embeddings": table, "mu": torch.full((N,), 0.05), "std": torch.full((N,), 0.9)}

    def lse(changed):
        return fused_smoothie_step(**(given | {what: changed}), seed=1).lse

    message = f"{what} must have no tangent"
    with pytest.raises(NotImplementedError, match=message):
        func.jvp(lse, (given[what],), (given[what],))
    with pytest.raises(NotImplementedError, match=message):
        func.jacfwd(lse)(given[what])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        lse(forward_ad.make_dual(given[what], given[what]))
    if what in ("x", "embeddings"):
        with pytest.raises(NotImplementedError, match=message):
            func.jvp(
                lambda t: nearest_token(**({"x": x, "embeddings": table} | {what: t})).distance,
                (given[what],),
                (given[what],),
            )


@pytest.mark.parametrize("what", ["x", "embeddings"])
@pytest.mark.parametrize("function", [fused_smoothie_step, nearest_token])
def test_transforms_that_custom_operators_do_not_take(x, table, function, what):
    given = {"x": x, "embeddings": table} | ({"mu": 0.05, "std": 0.9} if function is fused_smoothie_step else {})

    def loss(changed):
        outputs = function(**(given | {what: changed}))
        return (outputs.lse if function is fused_smoothie_step else outputs.distance).sum()

    for transform in (func.grad, func.jacrev, func.hessian):
        with pytest.raises(NotImplementedError, match=f"{what} must not be differentiated by torch.func: "):
            transform(loss)(given[what])
        with pytest.raises(NotImplementedError, match=f"{what} must not be differentiated by torch.func: "):
            transform(lambda t: func.vmap(loss)(t[None]).sum())(given[what])
    with pytest.raises(NotImplementedError, match=f"{what} must have no tangent"):
        func.jacfwd(lambda t: func.vmap(loss)(t[None]).sum())(given[what])


def test_transforms_of_something_else(x, table):
    """torch.func wraps what is detached inside of it as well."""
    x.requires_grad_()
    expected = fused_smoothie_step(x, table, 0.05, 0.9, seed=1).lse

    def lse(weights, detached):
        return weights.dot(fused_smoothie_step(x.detach() if detached else x, table, 0.05, 0.9, seed=1).lse)

    for detached in (False, True):
        assert torch.equal(func.grad(lse)(torch.ones(N), detached), expected)


def test_seed_under_vmap(x, table):
    with pytest.raises(ValueError, match="seed must be given where PyTorch draws no numbers, got None: vmap"):
        func.vmap(lambda x: fused_smoothie_step(x, table, 0.05, 0.9).lse)(x[None])


def test_one_vocabulary_for_all_samples(table):
    with pytest.raises(NotImplementedError, match="one embeddings for all samples"):
        func.vmap(lambda table: Vocabulary(table).bias)(table.expand(2, *table.shape))


# --- torch.compile, torch.export


def test_numbers_that_change_do_not_compile_again(x, table):
    """A schedule gives every step other numbers; beyond eight versions of one graph torch.compile gives up."""

    def step(x, mu, std, sigma_min, weight, seed):
        how = {"sigma_min": sigma_min, "seed": seed, "offset": [0, 1], "field_weights": [weight, 0.6]}
        return fused_smoothie_step(x, table, mu, std, **how).smoothed

    torch._dynamo.reset()
    versions = []

    def count(graph, inputs):
        versions.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for i in range(12):
        numbers = 0.05 + i / 100, 0.9 - i / 100, 1.5 + i / 10, 0.7 + i / 50, 3 + i
        torch.testing.assert_close(compiled(x, *numbers), step(x, *numbers))
    assert len(versions) <= 3  # as constants, then as symbols


@pytest.mark.compilers
def test_large_seeds_under_a_compiler(x, table):
    compiled = torch.compile(lambda x, seed: fused_smoothie_step(x, table, 0.05, 0.9, seed=seed).lse, fullgraph=True)
    for seed in (1, 5, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)):
        torch.testing.assert_close(compiled(x, seed), fused_smoothie_step(x, table, 0.05, 0.9, seed=seed).lse)


@pytest.mark.parametrize(
    "change",
    [{"mu": 10**400}, {"row_offset": 2**63}, {"workspace": 2**64}, {"topk": 10**30}],
    ids=["mu", "row_offset", "workspace", "topk"],
)
def test_huge_numbers_under_a_compiler(x, table, change):
    call = {"mu": 0.05, "std": 0.9} | change
    compiled = torch.compile(lambda x: fused_smoothie_step(x, table, **call).lse, backend="eager")
    with pytest.raises(ValueError, match=f"^{next(iter(change))} must "):
        compiled(x)


def test_a_dynamic_batch_is_exported(table):
    class Step(torch.nn.Module):
        def forward(self, x):
            return fused_smoothie_step(x, table, 0.05, 0.9, seed=1).smoothed

    dynamic = {"x": {0: torch.export.Dim("n", min=2)}}
    program = torch.export.export(Step(), (table[:4, None],), dynamic_shapes=dynamic).module()
    for n in (2, 4, 9):
        assert torch.equal(program(table[:n, None]), Step()(table[:n, None]))


def test_a_dynamic_number_of_fields_is_exported(table):
    class Step(torch.nn.Module):
        def forward(self, offset, weights):
            return fused_smoothie_step(table[:2], table, 0.05, 0.9, seed=1, offset=offset, field_weights=weights).lse

    fields = {0: torch.export.Dim("fields", min=2)}
    given = torch.arange(2), torch.randn(2)
    program = torch.export.export(Step(), given, dynamic_shapes={"offset": fields, "weights": fields}).module()
    for n in (2, 5):
        given = torch.arange(n), torch.randn(n)
        assert torch.equal(program(*given), Step()(*given))


# --- numbers and tensors of other kinds


def test_numpy_scalars(x, table):
    expected = fused_smoothie_step(
        x, table, 0.5, 0.25, sigma_min=1.5, seed=3, offset=[1, 2], field_weights=[1, 2], topk=4
    )
    found = fused_smoothie_step(
        x, table, np.float32(0.5), np.float64(0.25), sigma_min=np.float16(1.5), seed=np.int64(3),
        offset=[np.int32(1), np.uint8(2)], field_weights=[np.int64(1), np.float32(2)], topk=np.int64(4),
    )  # fmt: skip
    assert torch.equal(found.lse, expected.lse)
    assert torch.equal(found.topk.values, expected.topk.values)
    assert torch.equal(noise.gaussian(np.int64(2), 3, seed=np.uint64(2**64 - 1)), noise.gaussian(2, 3, seed=-1))
    unsigned = {"row_offset": np.uint64(7), "workspace": np.uint64(0), "offset": np.uint64(2**63)}
    found = fused_smoothie_step(x, table, 0.5, 0.25, seed=3, **unsigned)
    expected = fused_smoothie_step(x, table, 0.5, 0.25, seed=3, row_offset=7, workspace=0, offset=-(2**63))
    assert torch.equal(found.lse, expected.lse)
    assert expected_recall(*map(np.int64, (100, 5, 10, 2))) == expected_recall(100, 5, 10, 2)


class Wrapped(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("planted")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (lambda t: t.to_sparse(), TypeError, "must be a dense tensor, got torch.float32 tensor of torch.sparse_coo"),
        (
            lambda t: t.to_sparse_csr(),
            TypeError,
            "must be a dense tensor, got torch.float32 tensor of torch.sparse_csr",
        ),
        (Wrapped, TypeError, "must be a plain tensor, got Wrapped"),
        (lambda t: torch.nested.nested_tensor([t]), TypeError, "must be a dense tensor, got nested tensor"),
    ],
)
def test_other_kinds_of_tensors(x, table, kind, error, message):
    for name, given in (("embeddings", (x, kind(table))), ("x", (kind(x), table))):
        for call in (nearest_token, lambda *both: fused_smoothie_step(*both, 0.05, 0.9)):
            with pytest.raises(error, match=f"{name} {message}"):
                call(*given)
    with pytest.raises(error, match=f"mu {message}"):
        fused_smoothie_step(x[None], table, kind(torch.ones(1, N)), 0.9)


def test_devices_that_no_backend_knows(table):
    with pytest.raises(ValueError, match="embeddings must be on a CPU or a CUDA device, got meta"):
        Vocabulary(table.to("meta"))
    with pytest.raises(ValueError, match="device must be on a CPU or a CUDA device, got meta"):
        noise.gaussian(2, 3, seed=1, device="meta")


def test_arrays_are_not_numbers(x, table):
    for name in ("offset", "seed", "mu"):
        with pytest.raises(TypeError, match=f"{name} must be .*, got ndarray"):
            fused_smoothie_step(x, table, **({"mu": 0.05, "std": 0.9} | {name: np.zeros(3, np.int64)}))

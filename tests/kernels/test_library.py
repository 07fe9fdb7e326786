"""The operators as PyTorch sees them: schema, fake kernels, torch.compile."""

import hashlib

import pytest
import torch
import torch.utils.checkpoint
from conftest import DEVICE, device_of
from torch._library.custom_ops import CustomOpDef

from smoothie_kernels import Vocabulary, average, fused_smoothie_step, library, metric, moments, nearest_token, noise
from smoothie_kernels.stream import Request


def request_of(backend="auto", weights=None):
    table = torch.randn(40, 8, device=DEVICE)
    rows = torch.ones(6, device=DEVICE)
    seed, offset = torch.tensor(3), torch.arange(len(weights or [1]))
    weights = None if weights is None else torch.tensor(weights, device=DEVICE)
    bias = Vocabulary(table, backend=backend).bias
    return Request(
        table[:6] + 0.1,
        table,
        bias,
        0.1 * rows,
        0.9 * rows,
        None,
        0,
        seed,
        offset,
        weights,
        2**28,
        backend=backend,
    )


@pytest.mark.compilers
@pytest.mark.parametrize("weights", [None, [0.5, -1.0, 2.0]], ids=["one field", "three"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend, weights):
    request = request_of(backend, weights)
    x, table = request.x, request.embeddings
    leaves = {"x": x.detach().requires_grad_(), "embeddings": table.detach().requires_grad_()}
    for given in (request, request._replace(**leaves), request._replace(**leaves, topk=4)):
        torch.library.opcheck(library.step_fwd, given)
    outputs = library.step_fwd(*request._replace(**leaves, topk=4))
    differentiable = {name for name, o in zip(library.Step._fields, outputs, strict=True) if o.requires_grad}
    assert differentiable == {"smoothed", "lse", "top_logits"}
    given = request._replace(topk=4)
    step = library.Step(*library.step_fwd(*given))
    kept = library.Kept(*(getattr(step, name) for name in library.Kept._fields))
    grads = torch.randn_like(x), torch.randn(6, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    for used in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)):
        incoming = [grad if use else None for grad, use in zip(grads, used, strict=True)]
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(library.step_bwd, (*given, *kept, *incoming, *needs, False, False, False))
    other = given._replace(bound=torch.full_like(request.scale, 99.0), col=torch.rand_like(request.bias), values=table)
    others = {
        "bias": request.bias.clone().requires_grad_(),
        "col": other.col.clone().requires_grad_(),
        "values": table.flip(0),
    }
    torch.library.opcheck(library.step_fwd, other._replace(**leaves, **others))
    for used in ((1, 1, 1), (0, 0, 1)):
        incoming = [grad if use else None for grad, use in zip(grads, used, strict=True)]
        torch.library.opcheck(library.step_bwd, (*other, *kept, *incoming, *[True] * 5))
    torch.library.opcheck(library.nearest_fwd, (x, table, request.bias, None, backend))
    torch.library.opcheck(library.column_bias, (table, True, backend))
    noise_of = request.seed, request.offset, request.field_weights
    torch.library.opcheck(library.gaussian, (x.new_empty(6, 0), 11, None, *noise_of, 5, backend))


@pytest.mark.compilers
@pytest.mark.parametrize("bare", [True, False], ids=["table", "vocabulary"])
def test_compile_fullgraph(bare):
    table = torch.randn(150, 16, device=DEVICE)
    embeddings = table if bare else Vocabulary(table)
    x = torch.randn(2, 9, 16, device=DEVICE)

    def both(x, mu, std, offset):
        step = fused_smoothie_step(2 * x, embeddings, mu, std, seed=7, offset=offset)
        return step.smoothed + 1, step.lse, nearest_token(step.smoothed, embeddings).tokens

    compiled = torch.compile(both, fullgraph=True)
    for mu, std, offset in ((0.1, 0.9, 0), (0.2, 0.8, 1), (torch.rand(2, 1, device=DEVICE), 0.0, 2)):
        for a, b in zip(compiled(x, mu, std, offset), both(x, mu, std, offset), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.compilers
def test_compile_with_several_fields():
    """Numbers or tensors, their values and how many they are may change; forward and backward."""
    table = torch.randn(50, 16, device=DEVICE)
    x = torch.randn(9, 16, device=DEVICE, requires_grad=True)

    def loss(x, offset, weights):
        step = fused_smoothie_step(x, table, 0.1, 0.9, seed=7, offset=offset, field_weights=weights)
        eps = noise.gaussian(9, 50, seed=7, offset=offset, field_weights=weights, device=x.device)
        return step.lse.sum() + step.smoothed.square().sum() + eps.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ranges = torch.arange(3), torch.arange(3) + 2**40, torch.arange(5)
    for offset, weights in (
        ([1, 2], [0.5, 0.25]), ([3, 4], [0.125, -2.0]), ([-1, 2**62, 5], [1.0, 2.0, 3.0]),
        *((r.to(DEVICE), torch.randn(len(r), device=DEVICE)) for r in ranges),
    ):  # fmt: skip
        found, expected = (f(x, offset, weights) for f in (compiled, loss))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(of, x)[0] for of in (found, expected)))


@pytest.mark.compilers
def test_compile_dynamic_rows():
    table = torch.randn(50, 16, device=DEVICE)
    compiled = torch.compile(
        lambda x: fused_smoothie_step(x, table, 0.1, 0.9, seed=7).lse, fullgraph=True, dynamic=True
    )
    for n in (3, 5, 17):
        x = torch.randn(n, 16, device=DEVICE)
        torch.testing.assert_close(compiled(x), fused_smoothie_step(x, table, 0.1, 0.9, seed=7).lse)


@pytest.mark.compilers
def test_compile_draws_new_seeds():
    table = torch.randn(50, 16, device=DEVICE)
    x = torch.randn(3, 16, device=DEVICE)
    compiled = torch.compile(lambda x: fused_smoothie_step(x, table, 0.1, 0.9).lse, fullgraph=True)
    assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.compilers
def test_values_are_checked_under_compile():
    table = torch.randn(50, 16)
    compiled = torch.compile(lambda x, std: fused_smoothie_step(x, table, 0.1, std, seed=0).lse, fullgraph=True)
    with pytest.raises(ValueError, match="std must not be negative"):
        compiled(torch.randn(3, 16), torch.tensor([0.1, -0.1, 0.1]))
    weighted = torch.compile(
        lambda x, w: fused_smoothie_step(x, table, 0.1, 0.9, seed=0, offset=[1, 2], field_weights=w).lse,
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(ValueError, match="field_weights must be finite, got inf"):
        weighted(torch.randn(3, 16), torch.tensor([0.1, float("inf")]))


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x, table = torch.empty(4, 7, 16, dtype=torch.bfloat16), torch.empty(50, 16)
        step = fused_smoothie_step(x, table, 0.1, 0.9, seed=0)
        assert (step.smoothed.shape, step.smoothed.dtype) == ((4, 7, 16), torch.bfloat16)
        assert (step.lse.shape, step.lse.dtype) == ((4, 7), torch.float32)
        assert step.tokens.dtype == torch.int64
        assert noise.gaussian(3, 5, seed=0).shape == (3, 5)
        fields = {"offset": [1, 2], "field_weights": [0.5, 0.5]}
        assert fused_smoothie_step(x, table, 0.1, 0.9, seed=0, **fields).lse.shape == (4, 7)
        assert noise.gaussian(3, 5, seed=0, **fields).shape == (3, 5)


@pytest.mark.compilers
@pytest.mark.parametrize("bare", [True, False], ids=["table", "vocabulary"])
def test_compile_backward(bare):
    x = torch.randn(2, 9, 16, device=DEVICE, requires_grad=True)
    table = torch.randn(150, 16, device=DEVICE, requires_grad=True)

    def loss(x, table, offset):
        step = fused_smoothie_step(2 * x, table if bare else Vocabulary(table), 0.1, 0.9, seed=7, offset=offset)
        return step.smoothed.square().sum() + step.lse.sum()

    compiled = torch.compile(loss, fullgraph=True)
    for offset in (0, 1):
        found, expected = (torch.autograd.grad(f(x, table, offset), (x, table)) for f in (compiled, loss))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(backend, x_type):
    """The step takes its inputs as they come, also where a backend multiplies with torch's own products."""
    device = device_of(backend)
    x, table = torch.randn(9, 16, device=device, dtype=x_type), torch.randn(150, 16, device=device)

    def results():
        inputs = x.detach().requires_grad_(), table.detach().requires_grad_()
        step = fused_smoothie_step(*inputs, 0.1, 0.9, seed=7, backend=backend)
        grads = torch.autograd.grad((step.smoothed, step.lse), inputs, (torch.ones_like(x), torch.ones_like(step.lse)))
        return *step[:4], *grads, *nearest_token(x, table, backend=backend)

    expected = results()
    with torch.autocast(device, torch.bfloat16):
        found = results()
    assert found[0].dtype == x_type
    assert found[3].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_rows_of_an_autocast_model():
    """What a network gives under autocast is bfloat16; its table stays float32."""
    table = torch.randn(150, 16, device=DEVICE, requires_grad=True)
    layer = torch.nn.Linear(16, 16, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        step = fused_smoothie_step(layer(torch.randn(9, 16, device=DEVICE)), table, 0.1, 0.9, seed=7)
    assert step.smoothed.dtype == torch.bfloat16
    step.smoothed.float().square().sum().backward()
    assert layer.weight.grad.dtype == table.grad.dtype == torch.float32


def test_vmap(backend):
    device = device_of(backend)
    x, table = torch.randn(4, 3, 16, device=device), torch.randn(50, 16, device=device)
    mu = torch.rand(4, device=device)
    ids = torch.tensor([5, 2**32 - 1, 7], device=device)

    def step(x, mu, row_ids=None):
        return fused_smoothie_step(x, table, mu, 0.9, seed=3, row_ids=row_ids, backend=backend)[:4]

    for arguments, dims in (((x, mu), (0, 0)), ((x, 0.1), (0, None)), ((x.movedim(0, 1), mu, ids), (1, 0, None))):
        found = torch.func.vmap(step, in_dims=dims)(*arguments)
        samples = [[a if d is None else a.select(d, i) for a, d in zip(arguments, dims, strict=True)] for i in range(4)]
        for a, b in zip(found, zip(*(step(*s) for s in samples), strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(b))
    fields = {"seed": 3, "offset": [4, 5], "field_weights": [0.5, -2.0], "backend": backend}
    lse = torch.func.vmap(lambda x: fused_smoothie_step(x, table, 0.1, 0.9, **fields).lse)(x)
    one_by_one = torch.stack([fused_smoothie_step(sample, table, 0.1, 0.9, **fields).lse for sample in x])
    torch.testing.assert_close(lse, one_by_one)
    one_row = torch.func.vmap(lambda x: nearest_token(x, table, backend=backend).tokens)(x)
    assert torch.equal(one_row, nearest_token(x, table, backend=backend).tokens)


@pytest.mark.parametrize("smooth", ["full", "topk"])
def test_checkpointing(backend, smooth):
    """It gives saved tensors once."""
    x, table = (t.requires_grad_() for t in (torch.randn(4, 5), torch.randn(20, 5)))

    def loss(x, table):
        step = fused_smoothie_step(x, table, 0.3, 0.9, seed=3, topk=2, smooth=smooth, backend=backend)
        return step.smoothed.square().sum() + step.lse.sum() + step.topk.values.sum()

    expected = torch.autograd.grad(loss(x, table), (x, table))
    again = torch.utils.checkpoint.checkpoint(loss, x, table, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again, (x, table)), expected, strict=True))


def test_vmap_says_what_it_cannot():
    x, tables = torch.randn(3, 16), torch.randn(4, 50, 16)
    with pytest.raises(NotImplementedError, match="one embeddings for all samples"):
        torch.func.vmap(lambda table: fused_smoothie_step(x, table, 0.1, 0.9, seed=3).lse)(tables)
    with pytest.raises(NotImplementedError, match="one seed for all samples"):
        torch.func.vmap(lambda seed: fused_smoothie_step(x, tables[0], 0.1, 0.9, seed=seed).lse)(torch.arange(4))

    def lse(**fields):
        return fused_smoothie_step(x, tables[0], 0.1, 0.9, seed=3, **fields).lse

    several, weights = torch.arange(8).view(4, 2), torch.rand(4, 2)
    with pytest.raises(NotImplementedError, match="one offset for all samples"):
        torch.func.vmap(lambda offset: lse(offset=offset))(torch.arange(4))
    with pytest.raises(NotImplementedError, match="one offset for all samples"):
        torch.func.vmap(lambda offset: lse(offset=offset, field_weights=weights[0]))(several)
    with pytest.raises(NotImplementedError, match="one field_weights for all samples"):
        torch.func.vmap(lambda weights: lse(offset=[1, 2], field_weights=weights))(weights)
    with pytest.raises(NotImplementedError, match="one embeddings for all samples"):
        torch.func.vmap(lambda table: nearest_token(x, table).tokens)(tables)


def test_batched_gradients(backend):
    """A Jacobian, row by row."""
    x, table = torch.randn(2, 5, device=device_of(backend)), torch.randn(20, 5, device=device_of(backend))
    x.requires_grad_()
    smoothed = fused_smoothie_step(x, table, 0.3, 0.9, seed=3, backend=backend).smoothed.flatten()
    basis = torch.eye(10, device=x.device)

    def gradient(grad):
        return torch.autograd.grad(smoothed, x, grad, retain_graph=True)[0]

    expected = torch.stack([gradient(b) for b in basis])
    torch.testing.assert_close(torch.func.vmap(gradient)(basis), expected)
    at_once = torch.autograd.grad(smoothed, x, basis, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(at_once, expected)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_cuda_graph_draws_new_noise():
    x, table = torch.randn(40, 64, device=DEVICE, requires_grad=True), torch.randn(500, 64, device=DEVICE)
    vocabulary, seed = Vocabulary(table), torch.tensor(3, device=DEVICE)
    offset, several = torch.tensor(0, device=DEVICE), torch.arange(3, device=DEVICE)
    fields = {"offset": [1, 2], "field_weights": [0.5, -0.5]}  # numbers are filled in

    def step():
        smoothed = fused_smoothie_step(x, vocabulary, 0.1, 0.9, seed=seed, offset=offset).smoothed
        smoothed = smoothed + fused_smoothie_step(x, vocabulary, 0.1, 0.9, seed=seed, **fields).smoothed
        weighted = {"offset": several, "field_weights": weights}
        smoothed = smoothed + fused_smoothie_step(x, vocabulary, 0.1, 0.9, seed=seed, **weighted).smoothed
        return smoothed, *torch.autograd.grad(smoothed.square().sum(), x)

    weights = torch.rand(3, device=DEVICE)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for k in (0, 1, 5):
        offset.fill_(k)
        several.add_(k)
        weights.mul_(-1.5)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            torch.testing.assert_close(a, b)


def test_another_schema_takes_another_namespace():
    """torch.compile's cache on disk would call this version's operators as the version that filled it did."""
    operators = [
        of
        for module in (library, average, metric, moments)
        for of in vars(module).values()
        if isinstance(of, CustomOpDef)
    ]
    assert len(operators) == 11
    arguments = [argument.name for operator in operators for argument in operator._opoverload._schema.arguments]
    known = hashlib.sha256(" ".join(arguments).encode()).hexdigest()[:12]
    assert (library.OPERATORS, known) == ("smoothie_kernels_5", "540188ce5450")

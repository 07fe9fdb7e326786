"""What smooth="topk+mean" computes of the table alone: its gradient, its graph, and what a Vocabulary keeps of it."""

import pickle

import pytest
import torch
from torch import func

from smoothie_kernels import Vocabulary, fused_smoothie_step, moments

V, D = 40, 6
HOW = {"seed": 3, "topk": 4, "smooth": "topk+mean"}


def smoothed(x, table):
    return fused_smoothie_step(x, table, 0.3, 0.9, **HOW).smoothed


def dense(table):
    features = torch.cat((table, -table.square().sum(1, keepdim=True) / 2), 1)
    covariance = (features - features.mean(0)).T @ (table - table.mean(0)) / len(table)
    return torch.cat((table.mean(0)[None], covariance))


def test_gradient(monkeypatch):
    """In blocks of tokens, the last of which is not full, of rows that are far from the origin."""
    monkeypatch.setattr(moments, "BLOCK", 7)
    table = (3 + torch.randn(V, D, dtype=torch.float64)).requires_grad_()
    found, expected = moments.moments(table), dense(table)
    torch.testing.assert_close(found, expected)
    incoming = torch.randn(2, D + 2, D, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(expected, table, incoming[0], retain_graph=True)
    torch.testing.assert_close(*torch.autograd.grad(found, table, incoming[0], retain_graph=True), wanted)
    (at_once,) = torch.autograd.grad(found, table, incoming, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(at_once[0], wanted)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(*torch.autograd.grad(moments.moments(table), table, incoming[0]), wanted)
    half = table.detach().bfloat16().requires_grad_()
    assert moments.moments(half).dtype == torch.float32
    assert torch.autograd.grad(moments.moments(half).sum(), half)[0].dtype == torch.bfloat16


@pytest.mark.compilers
def test_opcheck():
    table, grad = torch.randn(V, D), torch.randn(D + 2, D)
    torch.library.opcheck(moments.moments, (table.clone().requires_grad_(),))
    torch.library.opcheck(moments.moments_bwd, (table, moments.moments(table), grad))


def test_a_compiler_s_graph_does_not_grow_with_the_vocabulary(monkeypatch):
    monkeypatch.setattr(moments, "BLOCK", 4)
    torch._dynamo.reset()
    sizes = []

    def count(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(smoothed, fullgraph=True, dynamic=False, backend=count)
    for v in (V, 3 * V):
        table = torch.randn(v, D)
        assert torch.equal(compiled(table[:2], table), smoothed(table[:2], table))
    assert sizes[0] == sizes[1]


# --- what a Vocabulary keeps


class Step(torch.nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, x):
        return smoothed(x, self.vocabulary)


def gradient_of_a_weight(step, x):
    return func.grad(lambda weight: (weight * step(x)).sum())(torch.tensor(1.0))


def with_fake_tensors(step, x):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        step(mode.from_tensor(x))


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True)


@torch.inference_mode()
def compiled_in_inference_mode(step, x):
    compiled(step)(x)


USES = {
    "torch.func.grad": gradient_of_a_weight,
    "torch.func.vmap": lambda step, x: func.vmap(step)(x[None]),
    "fake tensors": with_fake_tensors,
    "torch.export": lambda step, x: torch.export.export(step, (x,)),
    "torch.jit.trace": lambda step, x: torch.jit.trace(step, (x,)),  # which compares two traces
}
COMPILED = {
    "torch.compile": lambda step, x: compiled(step)(x),
    "torch.compile of torch.func.vmap": lambda step, x: compiled(func.vmap(step))(x[None]),
    "torch.compile in inference mode": compiled_in_inference_mode,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("use", [*USES, *(pytest.param(use, marks=pytest.mark.compilers) for use in COMPILED)])
def test_a_vocabulary_keeps_nothing_that_ends_with_its_first_use(use):
    """No fake tensor, nothing that a transform has wrapped, no inference tensor, which autograd does not save."""
    table = torch.randn(D, V).T  # of rows that are not contiguous it keeps a copy
    x, step = table[:3] + 0.1, Step(Vocabulary(table))
    (USES | COMPILED)[use](step, x)

    def results(step):
        leaf = x.detach().clone().requires_grad_()
        outputs = step(leaf)
        return outputs, *torch.autograd.grad(outputs.square().sum(), leaf)

    expected = results(lambda leaf: smoothed(leaf, table))
    found = results(compiled(step)) if use == "torch.compile in inference mode" else results(step)
    again = results(pickle.loads(pickle.dumps(step)))
    assert all(torch.equal(a, b) for a, b in zip((*found, *again), (*expected, *expected), strict=True))

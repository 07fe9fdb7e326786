"""What people use instead of this package: PyTorch as one writes it, the same compiled, and attention libraries."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.step.inputs import SIGMA_MIN, Call, Inputs, Outputs, Prepare, training
from benchmarks.step.pieces import column_bias

# Dense PyTorch, as one writes it


def dense_distances(x: Tensor, table: Tensor) -> Tensor:
    """-||x_i - E_j||^2 / (2 sigma_min^2), expanded; the product in the inputs' type, the rest at least in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    squares_of_x, squares_of_table = x.to(wide).square().sum(-1), table.to(wide).square().sum(-1)
    return -(squares_of_x[:, None] - (2 * x @ table.T).to(wide) + squares_of_table) / (2 * SIGMA_MIN**2)


def dense_mean(
    distances: Tensor, table: Tensor, mu: Tensor, std: Tensor, noise: Callable[[Tensor], Tensor] | None
) -> Tensor:
    logits = mu[:, None] * distances
    if noise is not None:
        logits = logits + std[:, None] * noise(logits)
    return logits.softmax(-1).to(table.dtype) @ table


def normals(like: Tensor, fields: int) -> Tensor:
    """A sum of independent fields, with variance 1."""
    total = torch.randn_like(like)
    for _ in range(1, fields):
        total += torch.randn_like(like)
    return total if fields == 1 else total.mul_(fields**-0.5)


def dense_step(
    x: Tensor, table: Tensor, mu: Tensor, std: Tensor, noisy: bool, fields: int = 1
) -> tuple[Tensor, Tensor]:
    distances = dense_distances(x, table)
    noise = partial(normals, fields=fields) if noisy else None
    return dense_mean(distances, table, mu, std, noise), distances.argmax(-1)


def dense_smoothed(x: Tensor, table: Tensor, mu: Tensor, std: Tensor, noisy: bool) -> Tensor:
    return dense_mean(dense_distances(x, table), table, mu, std, torch.randn_like if noisy else None)


def dense_nearest(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    distance, tokens = dense_distances(x, table).max(-1)
    return tokens, distance * (-2 * SIGMA_MIN**2)


def dense_topk(
    x: Tensor, table: Tensor, mu: Tensor, std: Tensor, noisy: bool, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean of the top-k tokens, the nearest token, and the top-k."""
    distances = dense_distances(x, table)
    logits = mu[:, None] * distances
    if noisy:
        logits = logits + std[:, None] * torch.randn_like(logits)
    values, indices = logits.topk(k)
    weights = values.softmax(-1).to(table.dtype)
    return (weights[:, None] @ table[indices])[:, 0], distances.argmax(-1), values, indices


def dense(*, compiled: bool = False, dtype: torch.dtype | None = None) -> Mapping[str, Prepare]:
    """The dense form, compiled or not, in the inputs' type or a given one."""

    def program(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False) if compiled else function

    def operator(function: Callable[..., Any], more: Callable[[Inputs], tuple[Any, ...]], *names: str) -> Prepare:
        """What the function gives has these names in Outputs."""

        def prepare(inputs: Inputs) -> Call:
            inputs, run = inputs.to(dtype), program(function)
            given = (inputs.x, inputs.table, *more(inputs))
            return lambda: Outputs(**dict(zip(names, run(*given), strict=True)))

        return prepare

    def smoothed(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
        run = program(dense_smoothed)
        return lambda x, table: run(x, table, inputs.mu, inputs.std, inputs.noisy)

    noisy = attrgetter("mu", "std", "noisy")
    return {
        "step": operator(dense_step, lambda inputs: (*noisy(inputs), inputs.case.fields), "smoothed", "tokens"),
        "nearest": operator(dense_nearest, lambda inputs: (), "tokens", "distance"),
        "topk": operator(
            dense_topk, lambda inputs: (*noisy(inputs), inputs.k), "smoothed", "tokens", "top_values", "top_indices"
        ),
        **training(smoothed, dtype),
    }


# Attention and kernel libraries: without noise, and without the nearest token


def sdpa(inputs: Inputs) -> Call:
    """The column bias as one more dimension of queries and keys; dimensions padded to a multiple of 8."""
    d = inputs.table.shape[1]
    pad = -(d + 1) % 8
    bias = column_bias(inputs.table).to(inputs.table.dtype)
    keys = functional.pad(torch.cat((inputs.table, bias[:, None]), 1), (0, pad))[None, None]
    values = functional.pad(inputs.table, (0, pad + 1))[None, None]

    def call() -> Outputs:
        scale = (inputs.mu / SIGMA_MIN**2)[:, None].to(inputs.x.dtype)
        queries = functional.pad(torch.cat((inputs.x * scale, scale), 1), (0, pad))[None, None]
        return Outputs(functional.scaled_dot_product_attention(queries, keys, values, scale=1.0)[0, 0, :, :d])

    return call


def flex(inputs: Inputs) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    bias, scale = column_bias(inputs.table), inputs.mu / SIGMA_MIN**2

    def score(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, token: Tensor) -> Tensor:
        return (score + bias[token]) * scale[row]

    program = torch.compile(flex_attention, dynamic=False)
    x, table = inputs.x[None, None], inputs.table[None, None]
    return lambda: Outputs(program(x, table, table, score_mod=score, scale=1.0)[0, 0])


def keops(inputs: Inputs) -> Call:
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")
    LazyTensor = import_module("pykeops.torch").LazyTensor

    def call() -> Outputs:
        rows, table = LazyTensor(inputs.x[:, None]), LazyTensor(inputs.table[None])
        scale = LazyTensor((inputs.mu / (-2 * SIGMA_MIN**2))[:, None, None])
        logits = ((rows - table) ** 2).sum(-1) * scale
        return Outputs(logits.sumsoftmaxweight(table, axis=1))

    return call


def no_keops(inputs: Inputs) -> str | None:
    if find_spec("pykeops") is None:
        return "pykeops is not installed"
    return None if inputs.x.dtype == torch.float32 else "it takes float32 here"

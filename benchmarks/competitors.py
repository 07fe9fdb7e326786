"""What people use instead of this package: PyTorch as one writes it, compiled, in chunks, and attention libraries."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.inputs import SIGMA_MIN, Call, Inputs, Outputs, Prepare

# Dense PyTorch, as one writes it


def dense_distances(x: Tensor, table: Tensor) -> Tensor:
    """-||x_i - E_j||^2 / (2 sigma_min^2), expanded; the product in the inputs' type, the rest in float32."""
    squares_of_x, squares_of_table = x.float().square().sum(-1), table.float().square().sum(-1)
    return -(squares_of_x[:, None] - (2 * x @ table.T).float() + squares_of_table) / (2 * SIGMA_MIN**2)


def dense_step(x: Tensor, table: Tensor, mu: Tensor, std: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
    distances = dense_distances(x, table)
    logits = mu[:, None] * distances
    if noisy:
        logits = logits + std[:, None] * torch.randn_like(logits)
    return logits.softmax(-1).to(table.dtype) @ table, distances.argmax(-1)


def dense_nearest(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    distance, tokens = dense_distances(x, table).max(-1)
    return tokens, distance * (-2 * SIGMA_MIN**2)


def dense(compiled: bool) -> Mapping[str, Prepare]:
    def step(inputs: Inputs) -> Call:
        program = _compiled(dense_step) if compiled else dense_step
        return lambda: Outputs(*program(inputs.x, inputs.table, inputs.mu, inputs.std, inputs.noisy))

    def nearest(inputs: Inputs) -> Call:
        program = _compiled(dense_nearest) if compiled else dense_nearest

        def call() -> Outputs:
            tokens, distance = program(inputs.x, inputs.table)
            return Outputs(tokens=tokens, distance=distance)

        return call

    return {"step": step, "nearest": nearest}


def _compiled(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    torch.compiler.reset()  # beyond eight shapes of one function it would quietly run the function as it is
    return torch.compile(function, dynamic=False)


# PyTorch in chunks: the same library products, nothing of size N x V


def column_bias(table: Tensor) -> Tensor:
    """-||E_j||^2 / 2 in float32."""
    bias = table.new_empty(len(table), dtype=torch.float32)
    for part, columns in zip(torch.split(table, 1024), torch.split(bias, 1024), strict=True):
        torch.sum(part.float().square(), 1, out=columns)
    return bias.div_(-2)


class Chunks:
    """The vocabulary in chunks of about a million scores (on a GPU 32 million), through buffers that are reused.

    Chunks of rows (64 x V was their best) take 0.22 s where these take 0.20 s on 2 AVX-512 cores, N = 512.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.bias = column_bias(inputs.table)
        scores = 2**25 if inputs.x.is_cuda else 2**20
        n, v, _ = inputs.sizes
        self.width = min(max(1024, scores // n), v)

    def buffer(self) -> Tensor:
        return self.inputs.x.new_empty(len(self.inputs.x) * self.width, dtype=torch.float32)

    def scores(self, first: int, buffer: Tensor) -> Tensor:
        """x_i . E_j - ||E_j||^2 / 2 for the chunk that begins with token `first`."""
        x, part = self.inputs.x, self.inputs.table[first : first + self.width]
        scores = buffer[: len(x) * len(part)].view(len(x), len(part))
        if x.dtype == torch.float32:
            return torch.addmm(self.bias[first : first + self.width], x, part.T, out=scores)
        return scores.copy_(x @ part.T).add_(self.bias[first : first + self.width])

    def nearest(self) -> tuple[Tensor, Tensor]:
        """Nearest tokens and their scores."""
        buffer, best, tokens = self.buffer(), *self.no_token_yet()
        for first in range(0, len(self.bias), self.width):
            best, tokens = self.better(best, tokens, self.scores(first, buffer), first)
        return tokens, best

    def step(self) -> tuple[Tensor, Tensor]:
        inputs, table = self.inputs, self.inputs.table
        scale, std = (inputs.mu / SIGMA_MIN**2)[:, None], inputs.std[:, None]
        buffer, noise = self.buffer(), self.buffer() if inputs.noisy else None
        best, tokens = self.no_token_yet()
        smoothed = torch.zeros_like(inputs.x, dtype=torch.float32)
        highest, total = torch.full_like(scale, -torch.inf), torch.zeros_like(scale)
        for first in range(0, len(table), self.width):
            part, logits = table[first : first + self.width], self.scores(first, buffer)
            best, tokens = self.better(best, tokens, logits, first)
            logits.mul_(scale)
            if noise is not None:
                logits.addcmul_(noise[: logits.numel()].normal_().view_as(logits), std)
            new_highest = torch.maximum(highest, logits.amax(1, keepdim=True))
            rescale, weights = highest.sub_(new_highest).exp_(), logits.sub_(new_highest).exp_()
            total.mul_(rescale).add_(weights.sum(1, keepdim=True))
            if part.dtype == torch.float32:
                smoothed.mul_(rescale).addmm_(weights, part)
            else:
                smoothed.mul_(rescale).add_(weights.to(part.dtype) @ part)
            highest = new_highest
        return smoothed.div_(total).to(inputs.x.dtype), tokens

    def no_token_yet(self) -> tuple[Tensor, Tensor]:
        x = self.inputs.x
        return x.new_full((len(x),), -torch.inf, dtype=torch.float32), x.new_zeros(len(x), dtype=torch.int64)

    @staticmethod
    def better(best: Tensor, tokens: Tensor, scores: Tensor, first: int) -> tuple[Tensor, Tensor]:
        score, column = scores.max(1)
        better = score > best
        return torch.where(better, score, best), torch.where(better, column + first, tokens)


def chunked_step(inputs: Inputs) -> Call:
    chunks = Chunks(inputs)
    return lambda: Outputs(*chunks.step())


def chunked_nearest(inputs: Inputs) -> Call:
    chunks = Chunks(inputs)

    def call() -> Outputs:
        tokens, score = chunks.nearest()
        return Outputs(tokens=tokens, distance=inputs.x.float().square().sum(1) - 2 * score)

    return call


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

    torch.compiler.reset()
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

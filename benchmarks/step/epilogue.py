"""The hardest competitor on a GPU: library products over blocks of rows, and one kernel by torch.compile between them.

Distances are not positive, so exp(logit) cannot overflow and the softmax needs no maximum: one pass over the scores of
a block adds bias and noise, takes exp, sums over the row and finds the nearest token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.chunked import add_product_, column_bias
from benchmarks.step.inputs import SIGMA_MIN, Call, Inputs, Outputs, aligned

# What stands between the products. All operands of shape [R, 1] but: scores, grad_weights [R, V] in the inputs' type;
# bias [V]. V is that of the aligned table. The results of shape [R, V] are in the inputs' type again.


def _weights(
    scores: Tensor, bias: Tensor, squares: Tensor, scale: Tensor, std: Tensor, noisy: bool, log_total: Tensor | float
) -> Tensor:
    logits = scale * (scores.float() + bias - squares / 2)
    if noisy:
        logits = logits + std * torch.randn_like(logits)
    return (logits - log_total).exp()


def _forward(
    scores: Tensor, bias: Tensor, squares: Tensor, scale: Tensor, std: Tensor, noisy: bool, with_tokens: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights before their division by the total, the total, the nearest tokens."""
    weights = _weights(scores, bias, squares, scale, std, noisy, 0.0)
    tokens = (scores.float() + bias).argmax(1) if with_tokens else None
    return weights.to(scores.dtype), weights.sum(1, keepdim=True), tokens


def _backward(
    scores: Tensor, bias: Tensor, squares: Tensor, scale: Tensor, std: Tensor, noisy: bool, log_total: Tensor,
    grad_weights: Tensor, delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weights, gradients of the scores, and the sums of these over V."""
    weights = _weights(scores, bias, squares, scale, std, noisy, log_total)
    grad_scores = scale * weights * (grad_weights.float() - delta)
    return weights.to(scores.dtype), grad_scores.to(scores.dtype), grad_scores.sum(1, keepdim=True)


class Blocks:
    """Equal blocks of rows whose scores take at most 256 MiB on a GPU, on a CPU 8 MiB.

    The table is an aligned copy. Its padding has a bias of -inf: weights of 0, never the nearest token.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.table = aligned(inputs.table)
        self.bias = self.table.new_full((len(self.table),), -torch.inf, dtype=torch.float32)
        self.set_table(inputs.table)
        self.scale = (inputs.mu / SIGMA_MIN**2)[:, None]
        self.forward = torch.compile(_forward, dynamic=False)
        self.backward = torch.compile(_backward, dynamic=False)
        n, v = len(inputs.x), len(self.table)
        blocks = -(-n * v * inputs.x.element_size() // (2**28 if inputs.x.is_cuda else 2**23))
        self.rows = -(-n // blocks)

    def set_table(self, table: Tensor) -> None:
        self.table[: len(table)] = table
        self.bias[: len(table)] = column_bias(table)

    def buffer(self) -> Tensor:
        return self.inputs.x.new_empty(self.rows, len(self.bias))

    def block(self, first: int) -> tuple[slice, Tensor, tuple[Tensor, Tensor, Tensor, Tensor, bool]]:
        """Its place among the rows, its rows, and what its kernels take after the scores."""
        place = slice(first, first + self.rows)
        x = self.inputs.x[place]
        squares = x.float().square().sum(1, keepdim=True)
        return place, x, (self.bias, squares, self.scale[place], self.inputs.std[place, None], self.inputs.noisy)

    def step(self, *, with_tokens: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The mean embedding in float32, the nearest tokens, and the logarithm of every row's sum of weights [N, 1]."""
        x, table, buffer = self.inputs.x, self.table, self.buffer()
        smoothed = torch.empty_like(x, dtype=torch.float32)
        totals, tokens = torch.empty_like(self.scale), x.new_empty(len(x), dtype=torch.int64)
        for first in range(0, len(x), self.rows):
            place, rows, operands = self.block(first)
            scores = torch.mm(rows, table.T, out=buffer[: len(rows)])
            weights, totals[place], found = self.forward(scores, *operands, with_tokens)
            if found is not None:
                tokens[place] = found
            torch.div(weights @ table, totals[place], out=smoothed[place])
        return smoothed, tokens, totals.log_()

    def gradients(self, grad: Tensor, smoothed: Tensor, log_totals: Tensor, of_table: bool) -> tuple[Tensor, Tensor]:
        """Of x and, where asked for, of the table (else empty); in float32."""
        x, table, buffer, other_buffer = self.inputs.x, self.table, self.buffer(), self.buffer()
        delta = (grad * smoothed).sum(1, keepdim=True)
        grad_x = torch.empty_like(smoothed)
        grad_table = torch.zeros_like(table, dtype=torch.float32) if of_table else torch.empty(0)
        sums = torch.zeros_like(self.bias)
        for first in range(0, len(x), self.rows):
            place, rows, operands = self.block(first)
            scores = torch.mm(rows, table.T, out=buffer[: len(rows)])
            grad_weights = torch.mm(grad[place], table.T, out=other_buffer[: len(rows)])
            weights, grad_scores, excess = self.backward(
                scores, *operands, log_totals[place], grad_weights, delta[place]
            )
            torch.mul(smoothed[place], excess.neg_(), out=grad_x[place])  # why: see Chunks.gradients
            add_product_(grad_x[place], grad_scores, table)
            if of_table:
                add_product_(grad_table, weights.T, grad[place])
                add_product_(grad_table, grad_scores.T, rows)
                sums += grad_scores.sum(0, dtype=torch.float32)
        if of_table:
            grad_table.addcmul_(table.float(), sums[:, None], value=-1)
        return grad_x, grad_table[: len(self.inputs.table)]


class BlockMean(torch.autograd.Function):
    """The mean embedding with gradients from `Blocks`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, blocks: Blocks) -> Tensor:
        if ctx.needs_input_grad[1]:
            blocks.set_table(table)  # a table that is trained is another one in every call
        ctx.blocks, ctx.noise = blocks, _generator(x).get_rng_state()
        smoothed, _, log_totals = blocks.step(with_tokens=False)
        ctx.save_for_backward(smoothed, log_totals)
        return smoothed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # As many seeds are drawn as in the forward pass, in the same order: every block has the same noise again.
        _generator(grad).set_rng_state(ctx.noise)
        of_table = ctx.needs_input_grad[1]
        grad_x, grad_table = ctx.blocks.gradients(grad, *ctx.saved_tensors, of_table)
        return grad_x.to(grad.dtype), grad_table.to(grad.dtype) if of_table else None, None


def _generator(x: Tensor) -> Any:
    """PyTorch's default one, which compiled programs draw their seeds from."""
    return torch.cuda if x.is_cuda else torch


def step(inputs: Inputs) -> Call:
    blocks = Blocks(inputs)

    def call() -> Outputs:
        smoothed, tokens, _ = blocks.step(with_tokens=True)
        return Outputs(smoothed.to(inputs.x.dtype), tokens)

    return call


def smoothed(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    blocks = Blocks(inputs)
    return lambda x, table: BlockMean.apply(x, table, blocks)  # type: ignore[no-untyped-call]

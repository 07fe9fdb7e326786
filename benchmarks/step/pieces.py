"""PyTorch in pieces, nothing of size N x V, gradients written by hand: chunks of the vocabulary, or blocks of rows.

Blocks of rows are the hardest competitor on a GPU: library products, and one kernel by torch.compile between them.
Distances are not positive, so exp(logit) cannot overflow and the softmax needs no maximum: one pass over the scores of
a block adds bias and noise, takes exp, sums over the row and finds the nearest token.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.inputs import SIGMA_MIN, Call, Inputs, Outputs, Prepare, aligned, training


def column_bias(table: Tensor) -> Tensor:
    """-||E_j||^2 / 2 in float32."""
    bias = table.new_empty(len(table), dtype=torch.float32)
    for part, columns in zip(torch.split(table, 1024), torch.split(bias, 1024), strict=True):
        torch.sum(part.float().square(), 1, out=columns)
    return bias.div_(-2)


def add_product_(total: Tensor, left: Tensor, right: Tensor, *, into_empty: bool = False) -> None:
    """total (float32) += left @ right, with the product in right's type; `into_empty` leaves out what total holds."""
    if right.dtype == torch.float32:
        total.addmm_(left, right, beta=0 if into_empty else 1)
    elif total.is_cuda:
        torch.addmm(total, left.to(right.dtype), right, out_dtype=torch.float32, beta=0 if into_empty else 1, out=total)
    elif into_empty:
        total.copy_(left.to(right.dtype) @ right)
    else:
        total.add_(left.to(right.dtype) @ right)


class Chunks:
    """Chunks of about a million scores (on a GPU 32 million), through buffers that are reused.

    On 2 AVX-512 cores, N = 512: chunks of rows (64 x V was their best) take 0.22 s where these take 0.20 s; with
    gradients of x and table, chunks of rows under torch.utils.checkpoint (128 was their best) 0.86 s, these 0.46 s.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.bias = column_bias(inputs.table)
        self.generator = torch.Generator(inputs.x.device)  # its own, so that a backward pass can draw the noise again
        self.scale = (inputs.mu / SIGMA_MIN**2)[:, None]
        scores = 2**25 if inputs.x.is_cuda else 2**20
        n, v, _ = inputs.sizes
        self.width = min(max(1024, scores // n), v)

    def set_table(self, table: Tensor) -> None:
        self.bias = column_bias(table)

    def keep_noise(self) -> Tensor:
        return self.generator.get_state()

    def recall_noise(self, kept: Tensor) -> None:
        self.generator.set_state(kept)

    def buffer(self) -> Tensor:
        return self.inputs.x.new_empty(len(self.inputs.x) * self.width, dtype=torch.float32)

    def scores(self, first: int, buffer: Tensor) -> Tensor:
        """x_i . E_j - ||E_j||^2 / 2 for the chunk that begins with token `first`: [N, width], less at the end."""
        x, part, bias = self.inputs.x, self.part(self.inputs.table, first), self.part(self.bias, first)
        scores = buffer[: len(x) * len(part)].view(len(x), len(part))
        if x.dtype == torch.float32:
            return torch.addmm(bias, x, part.T, out=scores)
        return scores.copy_(x @ part.T).add_(bias)

    def part(self, by_token: Tensor, first: int) -> Tensor:
        return by_token[first : first + self.width]

    def to_logits_(self, scores: Tensor, noise: Tensor | None) -> Tensor:
        """In place, but for the row constant. Draws into the buffer `noise`."""
        scores.mul_(self.scale)
        if noise is None:
            return scores
        eps = noise[: scores.numel()].normal_(generator=self.generator).view_as(scores)
        return scores.addcmul_(eps, self.inputs.std[:, None])

    def nearest(self) -> tuple[Tensor, Tensor]:
        """Nearest tokens and their scores."""
        buffer, best, tokens = self.buffer(), *self.no_token_yet()
        for first in range(0, len(self.bias), self.width):
            best, tokens = self.better(best, tokens, self.scores(first, buffer), first)
        return tokens, best

    def step(self, *, with_tokens: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The mean embedding in float32, the nearest tokens, and lse [N, 1] without the row constant."""
        table, scale = self.inputs.table, self.scale
        buffer, noise = self.buffer(), self.buffer() if self.inputs.noisy else None
        best, tokens = self.no_token_yet()
        smoothed = torch.zeros_like(self.inputs.x, dtype=torch.float32)
        highest, total = torch.full_like(scale, -torch.inf), torch.zeros_like(scale)
        for first in range(0, len(table), self.width):
            scores = self.scores(first, buffer)
            if with_tokens:
                best, tokens = self.better(best, tokens, scores, first)
            logits = self.to_logits_(scores, noise)
            new_highest = torch.maximum(highest, logits.amax(1, keepdim=True))
            rescale, weights = highest.sub_(new_highest).exp_(), logits.sub_(new_highest).exp_()
            total.mul_(rescale).add_(weights.sum(1, keepdim=True))
            add_product_(smoothed.mul_(rescale), weights, self.part(table, first))
            highest = new_highest
        return smoothed.div_(total), tokens, highest + total.log()

    def gradients(self, grad: Tensor, smoothed: Tensor, lse: Tensor, of_table: bool) -> tuple[Tensor, Tensor | None]:
        """Of x and, where asked for, of the table; in float32."""
        x, table = self.inputs.x, self.inputs.table
        buffer, other_buffer = self.buffer(), self.buffer()
        delta = (grad * smoothed).sum(1, keepdim=True)
        grad_x, excess = torch.zeros_like(smoothed), torch.zeros_like(delta)
        grad_table = torch.empty_like(table, dtype=torch.float32) if of_table else None
        for first in range(0, len(table), self.width):
            part = self.part(table, first)
            logits = self.to_logits_(self.scores(first, buffer), other_buffer if self.inputs.noisy else None)
            weights = logits.sub_(lse).exp_()
            grad_scores = other_buffer[: weights.numel()].view_as(weights)
            add_product_(grad_scores, grad, part.T, into_empty=True)
            grad_scores.sub_(delta).mul_(weights).mul_(self.scale)
            add_product_(grad_x, grad_scores, part)
            excess.add_(grad_scores.sum(1, keepdim=True))
            if grad_table is not None:
                rows = self.part(grad_table, first)
                add_product_(rows, weights.T, grad, into_empty=True)
                add_product_(rows, grad_scores.T, x)
                rows.addcmul_(part.float(), grad_scores.sum(0)[:, None], value=-1)
        # Without rounding the excess is 0. Where one token has nearly all the weight, 16-bit (grad . E_j) - delta is
        # little but rounding: times E_j - smoothed, not E_j, that counts for little too.
        return grad_x.addcmul_(smoothed, excess, value=-1), grad_table

    def no_token_yet(self) -> tuple[Tensor, Tensor]:
        x = self.inputs.x
        return x.new_full((len(x),), -torch.inf, dtype=torch.float32), x.new_zeros(len(x), dtype=torch.int64)

    @staticmethod
    def better(best: Tensor, tokens: Tensor, scores: Tensor, first: int) -> tuple[Tensor, Tensor]:
        score, column = scores.max(1)
        better = score > best
        return torch.where(better, score, best), torch.where(better, column + first, tokens)


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

    # Of PyTorch's default generator, which compiled programs draw their seeds from. As many seeds are drawn in the
    # backward pass as in the forward pass, in the same order: every block has the same noise again.
    def keep_noise(self) -> Tensor:
        return torch.cuda.get_rng_state() if self.table.is_cuda else torch.get_rng_state()

    def recall_noise(self, kept: Tensor) -> None:
        (torch.cuda if self.table.is_cuda else torch).set_rng_state(kept)

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

    def gradients(
        self, grad: Tensor, smoothed: Tensor, log_totals: Tensor, of_table: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of x and, where asked for, of the table; in float32."""
        x, table, buffer, other_buffer = self.inputs.x, self.table, self.buffer(), self.buffer()
        delta = (grad * smoothed).sum(1, keepdim=True)
        grad_x = torch.empty_like(smoothed)
        grad_table = torch.zeros_like(table, dtype=torch.float32) if of_table else None
        sums = torch.zeros_like(self.bias)
        for first in range(0, len(x), self.rows):
            place, rows, operands = self.block(first)
            scores = torch.mm(rows, table.T, out=buffer[: len(rows)])
            grad_weights = torch.mm(grad[place], table.T, out=other_buffer[: len(rows)])
            weights, grad_scores, excess = self.backward(
                scores, *operands, log_totals[place], grad_weights, delta[place]
            )
            torch.mul(smoothed[place], excess.neg_(), out=grad_x[place])  # as in Chunks
            add_product_(grad_x[place], grad_scores, table)
            if grad_table is not None:
                add_product_(grad_table, weights.T, grad[place])
                add_product_(grad_table, grad_scores.T, rows)
                sums += grad_scores.sum(0, dtype=torch.float32)
        if grad_table is None:
            return grad_x, None
        return grad_x, grad_table.addcmul_(table.float(), sums[:, None], value=-1)[: len(self.inputs.table)]


class Mean(torch.autograd.Function):
    """The mean embedding with gradients from its pieces, which recompute scores and noise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, pieces: Chunks | Blocks) -> Tensor:
        if ctx.needs_input_grad[1]:
            pieces.set_table(table)  # a table that is trained is another one in every call
        ctx.pieces, ctx.noise = pieces, pieces.keep_noise()
        smoothed, _, lse = pieces.step(with_tokens=False)
        ctx.save_for_backward(smoothed, lse)
        return smoothed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.pieces.recall_noise(ctx.noise)
        grad_x, grad_table = ctx.pieces.gradients(grad, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return grad_x.to(grad.dtype), None if grad_table is None else grad_table.to(grad.dtype), None


def contestant(make: Callable[[Inputs], Chunks | Blocks]) -> Mapping[str, Prepare]:
    def step(inputs: Inputs) -> Call:
        pieces = make(inputs)

        def call() -> Outputs:
            smoothed, tokens, _ = pieces.step(with_tokens=True)
            return Outputs(smoothed.to(inputs.x.dtype), tokens)

        return call

    def smoothed(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
        pieces = make(inputs)
        return lambda x, table: Mean.apply(x, table, pieces)  # type: ignore[no-untyped-call]

    return {"step": step, **training(smoothed)}


def nearest(inputs: Inputs) -> Call:
    chunks = Chunks(inputs)

    def call() -> Outputs:
        tokens, score = chunks.nearest()
        return Outputs(tokens=tokens, distance=inputs.x.float().square().sum(1) - 2 * score)

    return call

"""What a contestant is given, and what it gives: rows that are tokens of real text, noised at the paper's schedule."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common.embeddings import Material
from benchmarks.step.cases import OPS, Case, Op
from smoothie_kernels.diffusion import Arctan

SIGMA_MIN = 1.5
ALIGNED = 64  # where V is no multiple of 8, cuBLAS takes kernels for 16-bit products at a third of the speed
SPREAD = 0.25  # standard deviation of a row around its token's embedding, whose entries have standard deviation 1


@dataclass(frozen=True)
class Inputs:
    """What every contestant of a case is given."""

    case: Case
    x: Tensor  # [N, D]
    table: Tensor  # [V, D]
    mu: Tensor  # [N] float32: one value per row, as in training
    std: Tensor  # [N] float32
    grad: Tensor  # [N, D]: the gradient of `smoothed` that the training operators' backward begins with

    @property
    def op(self) -> Op:
        return OPS[self.case.op]

    @property
    def noisy(self) -> bool:
        return self.op.noise and self.case.std > 0

    @property
    def fields(self) -> dict[str, Any]:
        """What names the noise, as this package takes it."""
        count = self.case.fields
        return {} if count == 1 else {"offset": range(count), "field_weights": [count**-0.5] * count}

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, V, D."""
        return self.x.shape[0], *self.table.shape

    @property
    def k(self) -> int:
        return min(self.case.k, len(self.table))

    def cut(self, n: int, v: int) -> "Inputs":
        """The first n rows and v tokens: a small call that loads what a first call loads."""
        return replace(
            self, x=self.x[:n], table=self.table[:v].clone(), mu=self.mu[:n], std=self.std[:n], grad=self.grad[:n]
        )  # fmt: skip

    def to(self, dtype: torch.dtype | None) -> "Inputs":
        """Rows and table in another type; None: as they are. The gradient is shared, so that it can be silenced."""
        return self if dtype is None else replace(self, x=self.x.to(dtype), table=self.table.to(dtype))


@contextmanager
def zeroed(tensor: Tensor, but: Tensor | None = None) -> Iterator[None]:
    """Zero in all rows, or in all but some, for a while."""
    kept = tensor.clone()
    tensor.zero_()
    if but is not None:
        tensor[but] = kept[but]
    try:
        yield
    finally:
        tensor.copy_(kept)


class Outputs(NamedTuple):
    """What a contestant gives; None where it does not compute it."""

    smoothed: Tensor | None = None  # [N, D]
    tokens: Tensor | None = None  # [N]
    noisy_tokens: Tensor | None = None  # [N]
    lse: Tensor | None = None  # [N]
    distance: Tensor | None = None  # [N]
    grad_x: Tensor | None = None  # [N, D]
    grad_embeddings: Tensor | None = None  # [V, D]
    top_values: Tensor | None = None  # [N, K]
    top_indices: Tensor | None = None  # [N, K]


Call = Callable[[], Outputs]
Prepare = Callable[[Inputs], Call]


def training(
    make: Callable[[Inputs], Callable[[Tensor, Tensor], Tensor]], dtype: torch.dtype | None = None
) -> Mapping[str, Prepare]:
    """A contestant's training operators, from its own function of rows and table that gives their mean embeddings."""

    def prepare(inputs: Inputs) -> Call:
        inputs, trains_table = inputs.to(dtype), inputs.op.trains_table
        x, table = inputs.x.detach().requires_grad_(), inputs.table.detach().requires_grad_(trains_table)
        forward = make(inputs)

        def call() -> Outputs:
            smoothed = forward(x, table)
            grads = torch.autograd.grad(
                smoothed, (x, table) if trains_table else (x,), inputs.grad.to(smoothed.dtype)
            )  # fmt: skip
            return Outputs(smoothed.detach(), grad_x=grads[0], grad_embeddings=grads[1] if trains_table else None)

        return call

    return {"train": prepare, "train-x": prepare}


def aligned(table: Tensor) -> Tensor:
    """A copy with rows of zeros at its end, so that their number is a multiple of ALIGNED."""
    return functional.pad(table, (0, 0, 0, -len(table) % ALIGNED))


def grad_mode(case: Case) -> AbstractContextManager[Any]:
    """As a contestant is run: with gradients where the operator has some, else as without training."""
    return torch.enable_grad() if OPS[case.op].trains else torch.inference_mode()


def build(case: Case, material: Material, device: str = "cpu") -> Inputs:
    """The same tensors for the same case and material, wherever it is called.

    A row is its token's embedding and a little of everything else, as a model's prediction is; exactly the embedding it
    would be in training. The noise of the schedule is in mu and std.
    """
    material = material.of(case)
    mu, std = case.mu, case.std
    if case.t is not None:
        mu, std = map(float, Arctan(sigma_min=SIGMA_MIN).marginal(torch.tensor(case.t, dtype=torch.float64)))
    tokens = material.tokens.repeat(-(-case.n // len(material.tokens)))[: case.n]
    x = material.table[tokens]
    generator = torch.Generator().manual_seed(case.n)
    x += SPREAD * torch.randn(x.shape, generator=generator)
    grad = torch.randn(x.shape, generator=generator)
    x, table, grad = (each.to(device, case.dtype) for each in (x, material.table, grad))
    return Inputs(
        case, x, table, torch.full((case.n,), mu, device=device), torch.full((case.n,), std, device=device), grad
    )

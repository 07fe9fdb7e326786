"""What a sampler carries from step to step: one embedding a position, or the logits themselves as the authors do."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from smoothie_kernels import Vocabulary, fused_smoothie_step, noise
from smoothie_kernels.diffusion.noising import STEPS, eager_distances
from smoothie_kernels.diffusion.solvers import Fields, Route
from smoothie_kernels.metric import embedded
from smoothie_kernels.stream import sum_dtype

Seed = int | None


class State(Protocol):
    """Rows are positions, each with its own row id of the noise field; i counts the model's calls."""

    knows_tokens: bool

    def begin(self, row_ids: Tensor, seed: Seed) -> list[Tensor]:
        """What is carried at first."""

    def smooth(self, i: int, carried: Tensor, row_ids: Tensor, seed: Seed) -> list[Tensor]:
        """The model's input, (N, D); then, where `knows_tokens`, the tokens (N,) that the mean answer is nearest to."""

    def update(self, i: int, carried: Tensor, answer: Tensor, row_ids: Tensor, seed: Seed) -> list[Tensor]:
        """What is carried after the model's answer."""


class Fused:
    """Carries the weighted mean of all answers, (N, D): the logits are its distances, weighted, and known noise.

    With cosines, the mean of the answers' directions: its length counts as well.
    """

    knows_tokens = True

    def __init__(self, vocabulary: Vocabulary, route: Route, sigma_min: float, backend: str) -> None:
        self.vocabulary, self.route = vocabulary, route
        self.directions = isinstance(vocabulary.metric, str) and vocabulary.metric == "cosine"
        self.options: dict[str, Any] = {"sigma_min": sigma_min, "backend": backend}

    def begin(self, row_ids: Tensor, seed: Seed) -> list[Tensor]:
        table = self.vocabulary.embeddings
        return [table.new_zeros(len(row_ids), table.shape[1], dtype=sum_dtype(table))]

    def smooth(self, i: int, carried: Tensor, row_ids: Tensor, seed: Seed) -> list[Tensor]:
        weight = self.route.weights[i]
        step = fused_smoothie_step(
            carried, self.vocabulary, weight * carried.norm(dim=-1) if self.directions else weight, row_ids=row_ids,
            seed=seed,
            **as_noise(self.route.fields[i]), **self.options,
        )  # fmt: skip
        return [step.smoothed, step.tokens]

    def update(self, i: int, carried: Tensor, answer: Tensor, row_ids: Tensor, seed: Seed) -> list[Tensor]:
        total, own = self.route.weights[i + 1], self.route.updates[i].answer
        answer = embedded(self.vocabulary.metric, answer) if self.directions else answer
        return [answer if own == total else carried + own / total * (answer - carried)]


class Eager:
    """Carries the logits, (N, V), in the arithmetic of Smoothie's authors; torch's normals where seed is None."""

    knows_tokens = False

    def __init__(self, vocabulary: Vocabulary, route: Route, sigma_min: float, backend: str) -> None:
        self.table = vocabulary.embeddings.to(sum_dtype(vocabulary.embeddings))
        self.metric = vocabulary.metric
        self.route, self.sigma_min, self.backend = route, sigma_min, backend

    def begin(self, row_ids: Tensor, seed: Seed) -> list[Tensor]:
        return [self.route.fields[0].get(0, 0.0) * self._normals(0, row_ids, seed)]

    def smooth(self, i: int, carried: Tensor, row_ids: Tensor, seed: Seed) -> list[Tensor]:
        return [carried.softmax(-1) @ self.table]

    def update(self, i: int, carried: Tensor, answer: Tensor, row_ids: Tensor, seed: Seed) -> list[Tensor]:
        update = self.route.updates[i]
        logits = update.answer * eager_distances(answer, self.table, self.sigma_min, self.metric)
        if update.keep:
            logits = logits + update.keep * carried
        if update.fresh:
            logits = logits + update.fresh * self._normals(i + 1, row_ids, seed)
        return [logits]

    def _normals(self, offset: int, row_ids: Tensor, seed: Seed) -> Tensor:
        shape = len(row_ids), len(self.table)
        if seed is None:
            return torch.randn(shape, dtype=self.table.dtype, device=self.table.device)
        field = noise.gaussian(*shape, seed=seed, offset=offset, row_ids=row_ids, backend=self.backend)
        return field.to(self.table.dtype)


def make_state(step: str, vocabulary: Vocabulary, route: Route, sigma_min: float, backend: str) -> State:
    if step not in STEPS:
        raise ValueError(f"step must be one of {', '.join(map(repr, STEPS))}, got {step!r}")
    return (Fused if step == "fused" else Eager)(vocabulary, route, sigma_min, backend)


def as_noise(fields: Fields) -> dict[str, Any]:
    """std and offset as the step takes them."""
    if not fields:
        return {"std": 0.0}
    (offset, weight), *more = fields.items()
    if not more and weight > 0:
        return {"std": weight, "offset": offset}
    return {"std": 1.0, "offset": [*fields], "field_weights": [*fields.values()]}

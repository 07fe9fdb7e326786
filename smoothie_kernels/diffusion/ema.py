"""The moving average of the weights: torch's, over what trains, with a warmed-up decay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Tensors = tuple[Tensor, ...] | list[Tensor]


class MovingAverage:
    """Average of a model's trainable parameters with decay min(decay, (1 + n) / (10 + n)) after n updates."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.live = nn.ParameterList(p for p in model.parameters() if p.requires_grad)

        def average(averaged: Tensors, live: Tensors, updates: Tensor | int) -> None:
            n = float(updates)
            get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, live, updates)  # type: ignore[no-untyped-call]

        self.averaged = AveragedModel(self.live, multi_avg_fn=average)

    def update(self) -> None:
        self.averaged.update_parameters(self.live)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        return self.averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averaged.load_state_dict(state)

    @torch.no_grad()
    def _swap(self) -> None:
        for live, averaged in zip(self.live, self.averaged.module.parameters(), strict=True):
            live.data, averaged.data = averaged.data, live.data

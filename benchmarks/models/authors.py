"""The sampler as Smoothie's authors run it: the eager one, with the tensors of rows x vocabulary that they never read.

Their code of November 2025 (github.com/ashaba1in/smoothie, diffusion_holder.py and diffusion_utils/dynamic.py) draws
the prior on the CPU and copies it. Every step makes the noise that the logits hold if the answer is right, and the
score from it; re-noising makes the score of the fresh noise. Their last step also moves the logits to t = 0: left out.
"""

import math

import torch
from torch import Tensor

from smoothie_kernels.diffusion.noising import eager_distances
from smoothie_kernels.diffusion.states import Eager, Seed


class Authors(Eager):
    def begin(self, row_ids: Tensor, seed: Seed) -> list[Tensor]:
        if seed is not None:
            return super().begin(row_ids, seed)
        prior = torch.randn(len(row_ids), len(self.table), dtype=self.table.dtype).to(self.table.device)
        return [self.route.fields[0].get(0, 0.0) * prior]

    def update(self, i: int, carried: Tensor, answer: Tensor, row_ids: Tensor, seed: Seed) -> list[Tensor]:
        update, std = self.route.updates[i], self._std(i)
        distances = eager_distances(answer, self.table, self.sigma_min)
        noise = (carried - self.route.weights[i] * distances) / std
        unread = [noise, -noise / std]  # held to the end: their step returns them
        logits = update.answer * distances
        if update.keep:
            logits = logits + update.keep * carried
        if update.fresh:
            normals = self._normals(i + 1, row_ids, seed)
            logits = logits + update.fresh * normals
            if not update.keep:
                unread.append(-normals / update.fresh)
        return [logits]

    def _std(self, i: int) -> float:
        """Of the noise in the logits."""
        return math.hypot(*self.route.fields[i].values()) or 1.0

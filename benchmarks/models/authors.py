"""The sampler as Smoothie's authors run it: the eager one with what their loop makes and never reads.

From their code of November 2025 (github.com/ashaba1in/smoothie: `calc_score`, `pred_embeddings` in diffusion_holder.py,
`marginal` in diffusion_utils/dynamic.py), in tensors of rows x vocabulary:

- the prior is drawn on the CPU, then copied;
- every step makes the noise that the logits hold if the answer is right, and the score from it: five operations;
- re-noising makes the score of the fresh noise: two more.

Their last step also moves the logits to t = 0, where nobody looks at them: left out here, as `sample` has no such step.
Statistics of the distances are of their training step alone. The arithmetic that counts is `Eager`'s, to the last bit.
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

"""How well a model predicts clean embeddings, next to predicting their mean."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from smoothie_kernels import nearest_token
from smoothie_kernels.diffusion.loss import STREAMS
from smoothie_kernels.diffusion.model import SmoothieModel
from smoothie_kernels.diffusion.noising import smooth
from smoothie_kernels.diffusion.options import LossOptions

OFFSET = STREAMS << 60  # of the noise field: beyond all training steps
NAMES = ("loss", "text_loss", "mean_loss", "mean_text_loss", "accuracy")


class Sums:
    """What validation adds up over batches and processes."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.scalars = torch.zeros(5, dtype=torch.float64, device=device)  # rows, text rows, errors of both, hits
        self.moments = torch.zeros(
            2, width + 1, dtype=torch.float64, device=device
        )  # of all rows, of text: sum, square

    def add(self, errors: Tensor, hits: Tensor, target: Tensor, text: Tensor, counted: Tensor) -> None:
        sums = counted.sum(), text.sum(), errors[counted].sum(), errors[text].sum(), hits.sum()
        self.scalars += torch.stack([value.double() for value in sums])
        for moments, rows in zip(self.moments, (target[counted], target[text]), strict=True):
            moments[:-1] += rows.double().sum(0)
            moments[-1] += rows.double().square().sum()

    def metrics(self) -> dict[str, float]:
        rows, text, error, text_error, hits = self.scalars.tolist()
        width = self.moments.shape[1] - 1
        spreads = [
            float(sums[-1] / n - (sums[:-1] / n).square().sum()) / width
            for sums, n in zip(self.moments, (rows, text), strict=True)
        ]
        return dict(zip(NAMES, (error / rows, text_error / text, *spreads, hits / text), strict=True))


@torch.no_grad()
def evaluate(
    model: SmoothieModel, batches: Iterable[tuple[int, dict[str, Tensor]]], samples: int, options: LossOptions
) -> Sums:
    """Sums over some batches of `samples` validation samples in all; `Sums.metrics` has the result.

    batches: (place of the first sample, batch). Sample i is looked at at time (i + 1/2) / samples, without
    self-conditioning, always with the same noise.

    loss and text_loss are mean squared errors over the positions that the training loss counts, and over text alone;
    mean_loss and mean_text_loss are those of the best constant answer, the mean embedding; accuracy is how often the
    nearest token is the right one.
    """
    device, vocabulary = model.device, model.vocabulary()
    sums = Sums(model.config.embedding_size, device)
    training = model.training
    model.eval()
    for first, batch in batches:
        tokens, text = batch["target"], batch["target_mask"]
        mask = text if options.skip_padding else None
        target = model.embeddings(tokens)
        t = (torch.arange(first, first + len(tokens), dtype=torch.float32, device=device) + 0.5) / samples
        mu, std = (m[:, None] for m in model.schedule().marginal(t))
        smoothed = smooth(
            target, vocabulary, mu, std, sigma_min=model.config.sigma_min, seed=options.seed, offset=OFFSET,
            row_offset=first * tokens.shape[1], mask=mask, step=options.step,
        )  # fmt: skip
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            condition = model.encode(batch["source"], batch["source_mask"]) if "source" in batch else None
            predicted = model(smoothed, t, condition, None, mask)
        hits = nearest_token(predicted[text], vocabulary).tokens == tokens[text]
        errors = (predicted - target).square().mean(-1).double()
        sums.add(errors, hits, target, text, torch.ones_like(text) if mask is None else mask)
    model.train(training)
    return sums

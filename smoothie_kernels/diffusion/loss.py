"""The training loss of a batch: noise, predict, compare; all that is random in it is a function of (seed, step, place).

A sample's place is its index in the whole batch of a training step, over all processes and micro-batches. So the loss
and its gradients are the same however the batch is split, and a resumed run needs no state of any random generator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from smoothie_kernels import noise
from smoothie_kernels.diffusion.model import SmoothieModel
from smoothie_kernels.diffusion.noising import smooth
from smoothie_kernels.diffusion.options import LossOptions

STREAMS = 3  # offsets of the noise field per training step: the input, the rounding loss, the target's own noise
FIRST_T = 1e-5
ROUNDING_T = 0.05
LOGITS_BYTES = 2**27  # of a block of logits of a cross-entropy


class Place(NamedTuple):
    """Where the samples of a (micro-)batch stand in the run."""

    step: int  # of training
    first: int = 0  # place of the first sample
    total: int = 0  # samples of the whole batch


class Losses(NamedTuple):
    """Of a batch; `total` is what is differentiated. The others are its parts, without gradients."""

    total: Tensor
    prediction: Tensor  # mean squared error, or cross-entropy of the token head
    collapse: Tensor  # spread of the noiseless input at t = 1; 0 unless embeddings train
    rounding: Tensor  # cross-entropy of slightly noised inputs against their tokens; 0 unless embeddings train


class TrainingLoss(nn.Module):
    """A model with its loss: what DistributedDataParallel wraps, so that every gradient passes through it.

    Equal to, with all options off::

        mu, std = model.schedule().marginal(t)  # t ~ U(1e-5, 1), one per sample
        smoothed = fused_smoothie_step(E[target], E, mu[:, None], std[:, None], seed=seed, offset=3 * step).smoothed
        loss = (model(smoothed, t, model.encode(source)) - E[target]).square().mean()
    """

    def __init__(self, model: SmoothieModel, options: LossOptions) -> None:
        super().__init__()
        if half := {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}:
            # An update of a few parts in ten thousand would be rounded away.
            wanted = (
                "model must be in float32 to train (load it with dtype=torch.float32; option bf16 runs its network in"
            )
            raise ValueError(f"{wanted} bfloat16), got {min(half, key=str)}")
        self.model, self.options = model, options
        for name, layers in (("self_conditioning", "self_condition_layers"), ("guidance_dropout", "condition_layers")):
            if getattr(options, name) and not getattr(model.config, layers):
                raise ValueError(f"{name} must be 0 for a model with {layers} = 0, got {getattr(options, name)}")

    def forward(self, batch: dict[str, Tensor], place: Place, scale: float | Tensor | None = None) -> Losses:
        """The losses of a batch, or of a part of one.

        Args:
            batch: target (b, L) and target_mask; source (b, S) and source_mask where the model has a condition.
            place: of these samples.
            scale: what the sum over positions is multiplied by; None means their mean.
        """
        options, model = self.options, self.model
        tokens, counted = batch["target"], batch["target_mask"] if options.skip_padding else None
        draw = Draws(options, place, len(tokens), tokens.device)
        rows = place.first * tokens.shape[1]
        target = model.embeddings(tokens)
        weights = (
            torch.ones(tokens.shape, dtype=torch.float32, device=tokens.device) if counted is None else counted.float()
        )
        weights = weights * (1 / weights.sum() if scale is None else scale)

        x, vocabulary, schedule = target, model.vocabulary(), model.schedule()
        if options.x_0_variance:
            x = x + options.x_0_variance**0.5 * self._normals(x, place, rows)
        t = draw.times()

        def noised(t: float | Tensor, stream: int, *, noiseless: bool = False) -> Tensor:
            mu, std = (m.to(tokens.device)[..., None] for m in schedule.marginal(t))
            return smooth(
                x, vocabulary, mu, 0.0 if noiseless else std, sigma_min=model.config.sigma_min,
                seed=None if options.torch_noise else options.seed,
                offset=STREAMS * place.step + stream, row_offset=rows, mask=counted, step=options.step,
            )  # fmt: skip

        smoothed = noised(t, 0)
        condition = answer = None
        if model.config.condition_layers:
            with self._network_precision(tokens.device):
                condition = model.encode(batch["source"], batch["source_mask"], draw.kept_sources())
        if draw.self_conditions():
            with torch.no_grad(), self._network_precision(tokens.device):
                answer = model(smoothed, t, condition, None, counted)
        with self._network_precision(tokens.device):
            hidden = model.hidden_states(smoothed, t, condition, answer, counted)
            predicted = None if model.config.token_head else model.predict(hidden)
        if predicted is None:
            head = model.output
            prediction = cross_entropy(hidden.float(), head.weight, tokens, weights, head.bias, options.step)
        else:
            prediction = ((predicted - target).square().mean(-1) * weights).sum()
        collapse = rounding = prediction.new_zeros(())
        if model.config.trainable_embeddings:
            collapse = spread(noised(1.0, 0, noiseless=True), weights)
            almost = noised(draw.early_times(), 1)
            rounding = cross_entropy(almost, model.embeddings.weight, tokens, weights, None, options.step)
        total = prediction + collapse + rounding
        return Losses(total, prediction.detach(), collapse.detach(), rounding.detach())

    def _normals(self, x: Tensor, place: Place, rows: int) -> Tensor:
        count, width = x.shape[:-1].numel(), x.shape[-1]
        normals = noise.gaussian(
            count, width, seed=self.options.seed, offset=STREAMS * place.step + 2, row_offset=rows, device=x.device
        )
        return normals.view(x.shape)

    def _network_precision(self, device: torch.device) -> torch.autocast:
        """A context of its own for every pass: weights that are cast without gradient would be kept for the next."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.options.bf16)


class Draws:
    """What is drawn for a batch, in a fixed order; of every whole-batch draw these samples' part."""

    def __init__(self, options: LossOptions, place: Place, count: int, device: torch.device) -> None:
        self.options, self.device = options, device
        self.part = slice(place.first, place.first + count)
        total = max(place.total, place.first + count)
        # On the CPU whatever the device: a few numbers, which then are the same everywhere.
        high, low = noise.noise_key(options.seed, place.step)
        generator = torch.Generator("cpu").manual_seed(high << 32 | low)
        self.t, self.early, self.drop = torch.rand(3, total, dtype=torch.float64, generator=generator, device="cpu")
        self.coin = torch.rand((), dtype=torch.float32, generator=generator, device="cpu")

    def times(self) -> Tensor:
        return self._placed(FIRST_T + (1 - FIRST_T) * self.t)

    def early_times(self) -> Tensor:
        return self._placed(ROUNDING_T * (FIRST_T + (1 - FIRST_T) * self.early))

    def kept_sources(self) -> Tensor | None:
        return self._placed(self.drop) >= self.options.guidance_dropout if self.options.guidance_dropout else None

    def self_conditions(self) -> bool:
        return bool(self.coin < self.options.self_conditioning)

    def _placed(self, whole: Tensor) -> Tensor:
        return whole[self.part].float().to(self.device)


def spread(smoothed: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean square of what is off the mean over positions, which is that of all processes together.

    The mean is taken without gradient: its gradient is zero, because deviations from a mean add up to zero.
    """
    with torch.no_grad():
        sums = torch.cat(((smoothed * weights[..., None]).flatten(0, -2).sum(0), weights.sum()[None]))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        mean = sums[:-1] / sums[-1]
    return ((smoothed - mean).square().mean(-1) * weights).sum()


def cross_entropy(
    x: Tensor, table: Tensor, tokens: Tensor, weights: Tensor, bias: Tensor | None = None, step: str = "fused"
) -> Tensor:
    """Sum over positions of weights * cross_entropy(x @ table.T + bias, tokens), by blocks of rows.

    No more than LOGITS_BYTES of logits at a time, which the backward pass makes again; step "eager" holds all of them.
    """
    rows, tokens, weights = x.flatten(0, -2), tokens.flatten(), weights.flatten()
    size = len(rows) if step == "eager" else max(1, LOGITS_BYTES // (4 * len(table)))

    def block(rows: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        losses = functional.cross_entropy(functional.linear(rows, table, bias), tokens, reduction="none")
        return (losses * weights).sum()

    blocks = list(zip(*(torch.split(each, size) for each in (rows, tokens, weights)), strict=True))
    if len(blocks) < 2:
        return block(rows, tokens, weights)
    return torch.stack([checkpoint(block, *each, use_reentrant=False) for each in blocks]).sum()

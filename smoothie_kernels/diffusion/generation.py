"""`generate`, as of every transformers model: from token ids to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smoothie_kernels.diffusion.options import SampleOptions
from smoothie_kernels.diffusion.sampling import Guide, Progress, Samples, sample


class Generation:
    """What a model needs to be sampled: config, vocabulary, schedule, encode, project."""

    @torch.no_grad()
    def generate(
        self: Any,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        *,
        count: int | None = None,
        sample_ids: Tensor | Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        length: int | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        fixed: Tensor | None = None,
        times: Sequence[float] | None = None,
        guide: Guide | None = None,
        output_history: bool = False,
        excluded: Sequence[int] | None = None,
        progress: Progress | None = None,
        options: SampleOptions | None = None,
        **choices: Any,
    ) -> Samples:
        """Texts for sources, or out of nothing where the model is unconditional.

        Args:
            source: (B, S) int64 tokens; None for an unconditional model.
            source_mask: (B, S) bool, True on text; None for all.
            count: B, where it is not said otherwise.
            sample_ids: (B,) numbers that name the samples: on its own and the seed alone each depends; None: 0, 1, ...
            seeds: (B,), instead of the options' one seed.
            length: positions of every sample, at most and by default the config's target_length.
            lengths, fixed, times, guide, output_history, progress: as `sample` takes them.
            excluded: as `sample` takes it; None: the config's unseen_token_ids, or none with keep_special.
            options, choices: a `SampleOptions`, or its fields by name: solver, steps, delta, guidance, seed, ...

        Returns:
            Samples(tokens, lengths, embeddings, steps, history).

        Raises:
            TypeError, ValueError: a bad argument, by name.
        """
        if options is not None and choices:
            raise ValueError(f"options must be None where they are given by name, got both: {', '.join(choices)}")
        options = SampleOptions(**choices) if options is None else options
        config, conditional = self.config, bool(self.config.condition_layers)
        _check_source(source, source_mask, conditional)
        b = _count(source, count, sample_ids)
        length = config.target_length if length is None else length
        if not 1 <= length <= config.target_length:
            raise ValueError(f"length must be in [1, {config.target_length}] as the model does, got {length}")
        if options.guidance and not conditional:
            raise ValueError(f"guidance must be 0 for a model with condition_layers = 0, got {options.guidance}")
        if excluded is None:
            excluded = config.unseen_token_ids or ()
        end, pad = (getattr(config, name, None) for name in ("eos_token_id", "pad_token_id"))
        training = self.training
        self.eval()
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=options.bf16):
                condition = None if source is None else self._condition(source, source_mask)
                empty = self._condition(source[:1, :0], None, b) if options.guidance and source is not None else None

            def network(*inputs: Any) -> Tensor:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=options.bf16):
                    answer: Tensor = self(*inputs)
                return answer

            return sample(
                network, self.vocabulary(), self.schedule(options.loudness(conditional)), length=length,
                sample_ids=range(b) if sample_ids is None else sample_ids, steps=options.steps, times=times,
                solver=options.solver, accumulate=options.accumulate, seed=options.seed if seeds is None else seeds,
                max_length=config.target_length, sigma_min=config.sigma_min, condition=condition,
                empty_condition=empty, guidance=options.guidance, guide=guide,
                self_conditioning=options.self_conditioning and config.self_condition_layers > 0, clamp=options.clamp,
                fixed=fixed, lengths=lengths, end=end, pad=pad or 0,
                excluded=() if options.keep_special else excluded,
                stop_after=options.stop_after, shrink_after=options.shrink_after, output_history=output_history,
                progress=progress, step=options.step,
            )  # fmt: skip
        finally:
            self.train(training)

    def _condition(self: Any, source: Tensor, mask: Tensor | None, count: int | None = None) -> Any:
        """What all steps look at; without the columns that are padding in every row."""
        source = source.to(self.device)
        if mask is not None:
            mask = mask.to(self.device)
            columns = mask.any(0).sum() if bool((mask.int().diff(dim=1) <= 0).all()) else mask.shape[1]
            source, mask = source[:, :columns], mask[:, :columns]
        condition = self.project(self.encode(source, mask))
        return condition if count is None else condition.expand(count)


def _check_source(source: Tensor | None, mask: Tensor | None, conditional: bool) -> None:
    if (source is None) == conditional:
        wanted = "int64 tokens [B, S]" if conditional else "None"
        layers = "condition_layers > 0" if conditional else "condition_layers = 0"
        got = "None" if source is None else "a source"
        raise ValueError(f"source must be {wanted} for a model with {layers}, got {got}")
    for name, tensor, dtype in (("source", source, torch.int64), ("source_mask", mask, torch.bool)):
        shape = None if source is None or tensor is source else list(source.shape)
        right = isinstance(tensor, Tensor) and tensor.dtype == dtype and tensor.dim() == 2
        if tensor is not None and not (right and shape in (None, list(tensor.shape))):
            got = (
                f"{tensor.dtype} of shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            )
            raise ValueError(f"{name} must be {dtype} of shape {shape or '[B, S]'}, got {got}")


def _count(source: Tensor | None, count: int | None, sample_ids: Any) -> int:
    """How many samples are asked for."""
    if count is not None and count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    said = {
        "source": None if source is None else len(source), "count": count,
        "sample_ids": None if sample_ids is None else len(sample_ids),
    }  # fmt: skip
    numbers = {name: number for name, number in said.items() if number is not None}
    if len({*numbers.values()}) > 1:
        got = ", ".join(map(str, numbers.values()))
        raise ValueError(f"{' and '.join(numbers)} must be of as many samples, got {got}")
    return next(iter(numbers.values()), 1)

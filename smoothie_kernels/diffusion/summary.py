"""What a run says before it starts: what became of the text on its way to the model, and what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from smoothie_kernels import dispatch
from smoothie_kernels.diffusion.data import Counts, Text
from smoothie_kernels.diffusion.options import DataOptions
from smoothie_kernels.diffusion.tokens import surviving

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from smoothie_kernels.diffusion.model import SmoothieModel

MOST_CUT, MOST_UNKNOWN = 0.20, 0.01  # shares above which there is a warning


class Split(NamedTuple):
    text: Text
    counts: dict[str, Counts]  # by column


def of_text(splits: Mapping[str, Split], data: DataOptions, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """One line a fact, warnings among them."""
    for name, (text, _) in splits.items():
        dropped = ", ".join(f"{count:,} without {column}" for column, count in text.dropped.items())
        yield f"{name}: {len(text.rows):,} of {text.read:,} rows{f', dropped: {dropped}' if dropped else ''}"
    if "validation" not in splits:
        yield f"validation: none in {data.data}: no errors are measured"
    train = splits["train"]
    lengths = dict(zip(("source", "target"), data.lengths, strict=True))
    warnings = []
    for column, counts in sorted(train.counts.items()):
        cut, unknown = counts.cut / len(train.text.rows), counts.unknown / counts.tokens
        yield (
            f"{column}: column {train.text.columns[column]!r}, {counts.tokens:,} tokens, {unknown:.1%} unknown; "
            f"{cut:.1%} of texts are cut at {lengths[column]} tokens"
        )
        if cut > MOST_CUT:
            warnings.append(f"{cut:.0%} of {column} texts are cut: a larger --{column}-length keeps more")
        if unknown > MOST_UNKNOWN:
            warnings.append(f"{unknown:.0%} of {column} tokens are unknown to the tokenizer: {tokenizer.unk_token}")
    if ended := train.counts["target"].ended:
        ends = " or ".join(dict.fromkeys(filter(None, (tokenizer.eos_token, tokenizer.sep_token, tokenizer.pad_token))))
        warnings.append(f"{ended:,} target texts hold {ends} before their end: what follows is never sampled")
    case, accents = surviving(tokenizer)
    yield (
        f"tokenizer: {len(tokenizer.get_vocab()):,} tokens, capital letters {'stay' if case else 'become small'}, "
        f"accents {'stay' if accents else 'are dropped'}"
    )
    yield from map("warning: {}".format, warnings)


def of_model(model: SmoothieModel, step: str) -> str:
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False))
    device = model.device
    backend = dispatch.pick_backend("auto", device, torch.float32).__name__.rpartition(".")[2]
    by = f"{backend} backend" if step == "fused" else f"{step} step"
    return f"model: {total:,} parameters, {trained:,} of them trained, on {device}, {by}"

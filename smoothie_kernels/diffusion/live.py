"""The samples that are still under way, and what has become of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FREE = -1  # in `fixed`: a position that is sampled


@dataclass(frozen=True)
class Live:
    """The first dimension of every tensor is the sample; L is the length of the longest."""

    index: Tensor  # (b,) place in the call
    first_rows: Tensor  # (b,) row id of position 0
    seeds: Tensor  # (b,) place of its seed among the call's
    lengths: Tensor  # (b,) positions that take part
    fixed: Tensor | None  # (b, L)
    condition: Any
    empty_condition: Any
    carried: Tensor  # (b, L, D), or V
    answer: Tensor  # (b, L, D), the last
    text: Tensor  # (b, L) at the last look, FREE behind its end
    same_text: Tensor  # (b,) for so many looks
    same_end: Tensor  # (b,)
    ragged: bool = False  # whether lengths are less than L anywhere

    @property
    def mask(self) -> Tensor | None:
        """(b, L) bool: the positions that take part; None for all."""
        return before(self.lengths, self.text.shape[1]) if self.ragged else None

    def on_rows(self, run: Callable[..., Any], seeds: list[int | None], *tensors: Tensor) -> list[Tensor]:
        """run(rows of tensors..., their row ids, their seed) for all rows that take part, those of one seed at a time.
        Its results (rows, ...) come back as (b, L, ...), zeros elsewhere."""
        length = self.text.shape[1]
        ids = self.first_rows[:, None] + torch.arange(length, device=self.first_rows.device)
        flat = [tensor.flatten(0, 1) for tensor in tensors]
        if len(seeds) == 1 and not self.ragged:
            return [found.view(*ids.shape, *found.shape[1:]) for found in run(*flat, ids.flatten(), seeds[0])]
        results: list[Tensor] = []
        for place, seed in enumerate(seeds):
            there = (self.seeds == place)[:, None] & before(self.lengths, length)
            rows = there.flatten().nonzero()[:, 0]
            for i, found in enumerate(run(*(tensor[rows] for tensor in flat), ids.flatten()[rows], seed)):
                if i == len(results):
                    results.append(found.new_zeros(len(ids) * length, *found.shape[1:]))
                results[i][rows] = found
        return [found.view(len(ids), length, *found.shape[1:]) for found in results]

    def of(self, chosen: Tensor) -> Live:
        """Some of the samples: (b,) bool."""
        values = {field.name: select(getattr(self, field.name), chosen) for field in fields(self)}
        return replace(self, **values).cut(values["lengths"])

    def cut(self, lengths: Tensor) -> Live:
        """With these lengths, and without positions that nobody has."""
        longest = int(lengths.max()) if len(lengths) else 0
        names = ("fixed", "carried", "answer", "text")
        cut = {name: value[:, :longest] for name in names if (value := getattr(self, name)) is not None}
        return replace(self, lengths=lengths, ragged=bool((lengths < longest).any()), **cut)

    def look(self, tokens: Tensor, ends: Tensor, ended: Tensor) -> Live:
        """Having seen these tokens, (b, L), whose texts end there, if they do."""
        text = tokens.where(before(ends, tokens.shape[1]), FREE)
        same_end = ended & (ends == (self.text != FREE).sum(1))
        same_text = ended & (text == self.text).all(1)
        return replace(
            self, text=text, same_text=torch.where(same_text, self.same_text + 1, 0),
            same_end=torch.where(same_end, self.same_end + 1, 0),
        )  # fmt: skip


class Finished:
    """What becomes of B samples of L positions."""

    def __init__(self, count: int, length: int, like: Tensor, steps: int) -> None:
        self.embeddings = like.new_zeros(count, length, like.shape[-1])
        self.lengths = torch.zeros(count, dtype=torch.int64, device=like.device)
        self.steps = self.lengths.clone()
        self.history = torch.zeros(count, steps, length, dtype=torch.int64, device=like.device)

    def put(self, live: Live, steps: int) -> None:
        """These are done, after so many calls of the model."""
        answer = live.answer if live.mask is None else live.answer.where(live.mask[..., None], 0)
        self.embeddings[live.index] = functional.pad(answer, (0, 0, 0, self.embeddings.shape[1] - answer.shape[1]))
        self.lengths[live.index], self.steps[live.index] = live.lengths, steps

    def remember(self, step: int, live: Live, tokens: Tensor) -> None:
        """Tokens after a step; those of samples that end here stay."""
        self.history[live.index, step:] = functional.pad(tokens, (0, self.history.shape[2] - tokens.shape[1]))[:, None]


def before(lengths: Tensor, length: int) -> Tensor:
    """(b, length) bool: the positions that come before."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def select(tree: Any, chosen: Tensor) -> Any:
    """The chosen samples of tensors, also in tuples, named tuples, lists and dictionaries."""
    if isinstance(tree, Tensor):
        return tree[chosen]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(select(part, chosen) for part in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(select(part, chosen) for part in tree)
    if isinstance(tree, dict):
        return {name: select(part, chosen) for name, part in tree.items()}
    return tree


def counts(tree: Any) -> set[int]:
    """The sizes of the first dimensions of a tree's tensors."""
    if isinstance(tree, Tensor):
        return {len(tree)} if tree.dim() else {0}
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    return {size for part in parts for size in counts(part)}

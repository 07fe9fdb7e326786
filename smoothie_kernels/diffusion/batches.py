"""Token ids to batches, in an order that only the seed decides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count as count_from

import torch
from torch import Tensor
from torch.utils.data import Sampler


class Stream(Sampler[list[int]]):
    """An endless sequence of batches of row numbers, each a function of its own number and the seed alone.

    Batch k is places k B to k B + B - 1 of the epochs one after the other; each epoch is a permutation of all rows that
    (seed, epoch) decides. So neither a resumed run nor one on another number of processes sees other batches.

    Args:
        length: how many rows there are; may be less than a batch has.
        batch_size: B, over all processes together.
        seed: of the order.
        start: the first batch's number.
        first, count: which places of every batch are yielded, [first, first + count): the share of one process. None
            for all from `first` on.

    Raises:
        ValueError: a number out of its range, by name.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, *, start: int = 0, first: int = 0, count: int | None = None
    ) -> None:
        check_positive("length", length)
        check_positive("batch_size", batch_size)
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}")
        if not 0 <= first < batch_size:
            raise ValueError(f"first must be in [0, batch_size) with batch_size = {batch_size}, got {first}")
        if count is not None and not 1 <= count <= batch_size - first:
            raise ValueError(f"count must be in [1, batch_size - first] = [1, {batch_size - first}], got {count}")
        self.length, self.batch_size, self.seed, self.start, self.first = length, batch_size, seed, start, first
        self.count = batch_size - first if count is None else count

    def __iter__(self) -> Iterator[list[int]]:
        for batch in count_from(self.start):
            yield self._rows(batch * self.batch_size + self.first)

    def _rows(self, position: int) -> list[int]:
        rows: list[int] = []
        while len(rows) < self.count:
            epoch, place = divmod(position + len(rows), self.length)
            rows += _permutation(self.length, self.seed, epoch)[place : place + self.count - len(rows)].tolist()
        return rows


class Collate:
    """Rows of token ids to a batch: "target" (b, L) int64 and "target_mask" (b, L) bool, True on text and its end
    token; where the rows have a source, "source" (b, S) and "source_mask" too.

    Args:
        pad: the id behind the end.
        target_length, source_length: L and S.

    Raises:
        ValueError: a row that is longer.
    """

    def __init__(self, pad: int, target_length: int, source_length: int) -> None:
        self.pad, self.lengths = pad, {"target": target_length, "source": source_length}

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for column, length in self.lengths.items():
            if column in rows[0]:
                ids, mask = _padded([row[column] for row in rows], length, self.pad, column)
                batch |= {column: ids, f"{column}_mask": mask}
        return batch


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randperm(length, generator=generator, device="cpu")


def _padded(rows: list[Sequence[int]], length: int, pad: int, name: str) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    if int(lengths.max()) > length:
        raise ValueError(f"{name} must have at most {length} tokens, got {int(lengths.max())}")
    mask = torch.arange(length, device="cpu") < lengths[:, None]
    ids = torch.full(mask.shape, pad, dtype=torch.int64, device="cpu")
    ids[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.int64, device="cpu")
    return ids, mask


def check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")

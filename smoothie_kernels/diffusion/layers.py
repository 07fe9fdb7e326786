"""Transformer layers: attention to the positions themselves, to a source, and a feed-forward network.

torch's own layers take the same products; these take them without copies in between, which is a tenth of the small
model's training step on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

KeysValues = tuple[Tensor, Tensor]


class Places(NamedTuple):
    """Where the positions that take part are among B x L. The others are left out of all but attention's products: with
    half of 16 x 32 positions padding the small model takes 0.74 of the time that it takes without a mask."""

    rows: Tensor  # (n,), in order of the flattened positions
    mask: Tensor  # (B, L) bool

    @classmethod
    def of(cls, mask: Tensor) -> Places:
        return cls(mask.flatten().nonzero()[:, 0], mask)

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, width) to (n, width)."""
        return x.flatten(0, 1)[self.rows]

    def pad(self, x: Tensor) -> Tensor:
        """(n, width) to (B, L, width), zeros elsewhere."""
        return x.new_zeros(self.mask.numel(), x.shape[1]).index_copy(0, self.rows, x).view(*self.mask.shape, -1)


class Attention(nn.Module):
    """Scaled dot-product attention of x, (B, L, width), to a context, (B, S, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.value, self.output = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)  # one would add the same to all scores of a query

    def project(self, context: Tensor, places: Places | None = None) -> KeysValues:
        """Its keys and values, (B, heads, S, width / heads): the same for every x."""
        return self._heads(_padded(self.key(context), places)), self._heads(_padded(self.value(context), places))

    def forward(
        self, x: Tensor, context: Tensor | KeysValues, there: Tensor | None, places: Places | None = None
    ) -> Tensor:
        """context: itself or what `project` makes of it; there: (B, S) bool, what of it may be looked at; None: all."""
        keys, values = self.project(context) if isinstance(context, Tensor) else context
        queries = self._heads(_padded(self.query(x), places))
        mask, dropout = None if there is None else there[:, None, None], self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(queries, keys, values, mask, dropout)
        rows = mixed.transpose(1, 2).flatten(2)
        output: Tensor = self.output(rows if places is None else places.pack(rows))
        return output

    def _heads(self, y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], self.heads, y.shape[2] // self.heads).transpose(1, 2)


def _padded(x: Tensor, places: Places | None) -> Tensor:
    return x if places is None else places.pad(x)


class Layer(nn.Module):
    """A transformer layer; with `source`, one that also attends to a source text.

    norm_first normalises what each part sees instead of what it gives.
    """

    def __init__(
        self, width: int, heads: int, intermediate: int, dropout: float, *, norm_first: bool, source: bool = False
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(width, heads, dropout)
        self.source_attention = Attention(width, heads, dropout) if source else None
        self.feed_forward = nn.Sequential(
            nn.Linear(width, intermediate), nn.GELU(), nn.Dropout(dropout), nn.Linear(intermediate, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 + source))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        there: Tensor | None,
        source: tuple[Tensor | KeysValues, Tensor] | None = None,
        places: Places | None = None,
    ) -> Tensor:
        """x: (B, L, width); there: (B, L) bool, None for all; source: its states, or the keys and values of this layer,
        and which of them are there; places: where x is of those positions alone, (n, width)."""
        x = self._with(x, 0, lambda y: self.attention(y, self.attention.project(y, places), there, places))
        if self.source_attention is not None and source is not None:
            attention, (states, source_there) = self.source_attention, source
            x = self._with(x, 1, lambda y: attention(y, states, source_there, places))
        return self._with(x, -1, self.feed_forward)

    def _with(self, x: Tensor, norm: int, part: Callable[[Tensor], Tensor]) -> Tensor:
        normalise = self.norms[norm]
        given: Tensor = self.dropout(part(normalise(x) if self.norm_first else x))
        return x + given if self.norm_first else normalise(x + given)

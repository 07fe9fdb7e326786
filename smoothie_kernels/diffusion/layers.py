"""Transformer layers: attention to the positions themselves, to a source, and a feed-forward network.

torch's own layers take the same products; these take them without copies in between, which is a tenth of the small
model's training step on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

KeysValues = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Scaled dot-product attention of x, (B, L, width), to a context, (B, S, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.value, self.output = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)  # one would add the same to all scores of a query

    def project(self, context: Tensor) -> KeysValues:
        """Its keys and values, (B, heads, S, width / heads): the same for every x."""
        return self._heads(self.key(context)), self._heads(self.value(context))

    def forward(self, x: Tensor, context: Tensor | KeysValues, there: Tensor | None) -> Tensor:
        """context: itself or what `project` makes of it; there: (B, S) bool, what of it may be looked at; None: all."""
        keys, values = self.project(context) if isinstance(context, Tensor) else context
        queries = self._heads(self.query(x))
        mask, dropout = None if there is None else there[:, None, None], self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(queries, keys, values, mask, dropout)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output

    def _heads(self, y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], self.heads, y.shape[2] // self.heads).transpose(1, 2)


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
        self, x: Tensor, there: Tensor | None, source: tuple[Tensor | KeysValues, Tensor] | None = None
    ) -> Tensor:
        """x: (B, L, width); there: (B, L) bool, None for all; source: its states, or the keys and values of this layer,
        and which of them are there."""
        x = self._with(x, 0, lambda y: self.attention(y, y, there))
        if self.source_attention is not None and source is not None:
            attention, (states, source_there) = self.source_attention, source
            x = self._with(x, 1, lambda y: attention(y, states, source_there))
        return self._with(x, -1, self.feed_forward)

    def _with(self, x: Tensor, norm: int, part: Callable[[Tensor], Tensor]) -> Tensor:
        normalise = self.norms[norm]
        given: Tensor = self.dropout(part(normalise(x) if self.norm_first else x))
        return x + given if self.norm_first else normalise(x + given)

"""One call of the pass over the vocabulary: every argument is declared once, with its kind. library.py makes the
operators' schemas, fake kernels, vmap rules and positions of gradients from it, and backends take it as it is.
"""

import inspect
from collections.abc import Iterator
from enum import Enum
from functools import cache
from itertools import islice
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor


class Kind(Enum):
    ROWS = "one entry a row"
    TOKENS = "one entry a token"
    SHARED = "the same for all rows"
    FIXED = "another value compiles again"


Rows = Annotated[Tensor, Kind.ROWS]
Tokens = Annotated[Tensor, Kind.TOKENS]
Shared = Annotated[Tensor, Kind.SHARED]


class Request(NamedTuple):
    """What one call is given."""

    x: Rows  # [N, D] contiguous
    embeddings: Tokens  # [V, D], rows contiguous
    bias: Tokens  # [V]: logits are scale score + std eps, score = col (x . E) + bias
    scale: Rows  # [N]
    std: Rows | None  # [N], None where there is no noise
    row_ids: Rows | None  # [N], instead of row_offset + i
    row_offset: int
    seed: Shared  # []
    offset: Shared  # [F]: the noise is a sum of F fields
    field_weights: Shared | None  # [F], None for one field as it is; these three may be on the host
    workspace: int  # bytes that a backend may take for weights of some rows and tokens
    mean: bool = True  # whether smoothed is wanted
    logits: bool = True  # False: the nearest token and its distance alone; scale, std and the noise are not read
    topk: int = 0  # how many of the largest logits
    recall_target: float = 1.0  # the share of them that is found, in expectation; 1: all
    wide: bool = False  # whether smoothed and gradients keep the type of their sums: 16 bits would round them
    backend: str = "auto"  # the name that the caller gave
    # Other scores than those of squared distances. Without a bound, bias is -||E||^2 / 2, and what all tokens of a row
    # have alike, -||x||^2 / 2, counts as well: in lse, and in the derivatives of a score, E - x and x - E. With one,
    # bias and values have gradients of their own.
    bound: Rows | None = None  # [N]: no score is above it
    col: Tokens | None = None  # [V], None for ones
    values: Tokens | None = None  # [V, D] of E's type, rows contiguous: what the mean is one of; None for E

    def result_dtype(self, of: Tensor) -> torch.dtype:
        """The type of smoothed (of x), or of the gradient of x or embeddings."""
        return sum_dtype(of) if self.wide else of.dtype


def sum_dtype(x: Tensor) -> torch.dtype:
    """The type in which sums over x's numbers are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- an operator's arguments: the fields of one or several NamedTuples


@cache
def kinds(part: Any) -> dict[str, Kind]:
    """The kind of every field."""
    return {name: _kind(hint) for name, hint in get_type_hints(part, include_extras=True).items()}


def _kind(hint: Any) -> Kind:
    within = [hint, *get_args(hint)]  # Rows | None
    found = (extra for each in within for extra in getattr(each, "__metadata__", ()))
    return next(found, Kind.FIXED)


def signature(*parts: Any, returns: Any) -> inspect.Signature:
    """The signature of an operator that takes the fields of all parts, as torch.library reads it."""
    arguments = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint)
        for part in parts
        for name, hint in get_type_hints(part).items()
    ]
    return inspect.Signature(arguments, return_annotation=returns)


def bound(arguments: tuple[Any, ...], *parts: Any) -> Iterator[Any]:
    """An operator's arguments, as the parts that its signature was made of."""
    rest = iter(arguments)
    for part in parts:
        yield part(*islice(rest, len(part._fields)))

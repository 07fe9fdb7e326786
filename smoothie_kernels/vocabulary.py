"""What is computed once per embedding table."""

from __future__ import annotations

import torch
from torch import Tensor

from smoothie_kernels import checks, library

BLOCK = 1024  # tokens at a time


class Vocabulary:
    """An embedding table with what the kernels need of it: build it once, pass it for `embeddings` to every call.

    Holds the table itself and the column bias -||E_j||^2 / 2 in float32 (float64 for a float64 table), 4 V bytes.
    The kernels read the table as it stands in memory, so nothing is copied, unless its rows are not contiguous.

    Args:
        embeddings: (V, D) float32, bfloat16, float16 or float64, all finite.
        backend: which backend computes the bias.
        check_finite: whether to look; on a GPU looking makes the host wait for the device.

    Raises:
        TypeError, ValueError: not such a tensor; V = 0 or D = 0; an entry that is not finite, or a row whose squared
            norm overflows float32.

    The bias does not follow later changes of the table: build a new Vocabulary after an optimizer step. A call that is
    given one whose table was written to since says so.
    """

    embeddings: Tensor  # (V, D)
    bias: Tensor  # (V,)
    version: int  # of the table's contents, as PyTorch counts them
    _moments: tuple[Tensor, Tensor] | None = None

    def __init__(self, embeddings: Tensor, *, backend: str = "auto", check_finite: bool = True) -> None:
        checks.check_backend(backend)
        checks.check_table(embeddings)
        self.embeddings = embeddings if embeddings.stride(1) == 1 else embeddings.contiguous()
        self.bias = library.column_bias(self.embeddings.detach(), check_finite, backend)
        self.version = _version(self.embeddings)

    def to(self, device: torch.device | str) -> Vocabulary:
        """This vocabulary on another device; itself where it is there already."""
        if torch.device(device) == self.embeddings.device:
            return self
        moved = object.__new__(Vocabulary)
        moved.embeddings, moved.bias = self.embeddings.to(device), self.bias.to(device)
        moved.version = _version(moved.embeddings)
        return moved

    def moments(self) -> tuple[Tensor, Tensor]:
        """mean(E), (D,), and the covariance of (E, -||E||^2 / 2) with E over all tokens, (D + 1, D); kept, unless
        the table takes a gradient. float32, or float64 for a float64 table."""
        if self._moments is not None:
            return self._moments
        v, dtype = len(self), self.bias.dtype
        blocks = [slice(first, first + BLOCK) for first in range(0, v, BLOCK)]
        mean = torch.stack([self.embeddings[b].to(dtype).sum(0) for b in blocks]).sum(0) / v
        mean_square = mean.square().sum()
        covariance = mean.new_zeros(len(mean) + 1, len(mean))
        for block in blocks:
            table = self.embeddings[block].to(dtype)
            # Any constant does beside the halved squares, because the other factor adds up to zero.
            squares = (mean_square - table.square().sum(1, keepdim=True)) / 2
            covariance = covariance + torch.cat((table - mean, squares), 1).T @ (table - mean) / v
        if not mean.requires_grad:
            self._moments = mean, covariance
        return mean, covariance

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    def __repr__(self) -> str:
        v, d = self.embeddings.shape
        return f"Vocabulary(V={v}, D={d}, dtype={self.embeddings.dtype}, device='{self.embeddings.device}')"


def as_vocabulary(embeddings: Tensor | Vocabulary, backend: str) -> Vocabulary:
    """`embeddings`, or the Vocabulary of a bare table; on a CPU, where looking is cheap, that is checked every time."""
    if isinstance(embeddings, Vocabulary):
        checks.check_unchanged(_version(embeddings.embeddings), embeddings.version)
        return embeddings
    on_cpu = isinstance(embeddings, Tensor) and embeddings.device.type == "cpu"
    return Vocabulary(embeddings, backend=backend, check_finite=on_cpu)


def _version(table: Tensor) -> int:
    """0 where nobody counts: in inference mode, and while a graph is traced."""
    return 0 if torch.compiler.is_compiling() or table.is_inference() else table._version

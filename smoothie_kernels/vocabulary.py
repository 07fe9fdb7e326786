"""What is computed once per embedding table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from smoothie_kernels import checks, library

BLOCK = 1024  # tokens at a time


class Vocabulary:
    """An embedding table with what the kernels need of it: build it once, pass it for `embeddings` to every call.

    Holds the table itself and, of a frozen table (one that requires no gradient), the column bias -||E_j||^2 / 2 in
    float32 (float64 for a float64 table), 4 V bytes. The kernels read the table as it stands in memory; only a table
    whose rows are not contiguous is copied.

    Args:
        embeddings: (V, D) float32, bfloat16, float16 or float64, all finite.
        backend: which backend computes the bias.
        check_finite: whether to look; on a GPU looking makes the host wait for the device.

    Raises:
        TypeError, ValueError: not such a tensor; V = 0 or D = 0; an entry that is not finite, or a row whose squared
            norm overflows float32.

    Of a table that requires a gradient nothing is kept: every call computes the bias from the table as it is, so one
    Vocabulary serves all steps of an optimizer. A frozen table may be written to as well (an average of weights,
    load_state_dict): a call that sees it computes anew. It sees what PyTorch counts, so neither writes through `.data`
    nor those to a tensor made in inference mode, and under torch.compile none: build a new Vocabulary then.
    """

    table: Tensor  # (V, D): as it was given
    _backend: str
    _kept: dict[str, Tensor]
    _state: tuple[object, ...] | None = None  # of the table when it was read
    _follows = True  # whether nothing is kept of a table that requires a gradient

    def __init__(self, embeddings: Tensor, *, backend: str = "auto", check_finite: bool = True) -> None:
        checks.check_backend(backend)
        checks.check_table(embeddings)
        checks.check_bool("check_finite", check_finite)
        self.table, self._backend, self._kept = embeddings, backend, {}
        if check_finite or self._keeps:
            self._keep("bias", lambda: self._bias(check_finite))

    @property
    def embeddings(self) -> Tensor:
        """(V, D), the table with contiguous rows."""
        if self.table.stride(1) == 1 or self.table.shape[1] == 1:
            return self.table
        return self._keep("rows", self.table.contiguous)

    @property
    def bias(self) -> Tensor:
        """(V,)"""
        return self._keep("bias", lambda: self._bias(check_finite=False))

    def _bias(self, check_finite: bool) -> Tensor:
        bias: Tensor = library.column_bias(self.embeddings.detach(), check_finite, self._backend)
        return bias

    @property
    def _keeps(self) -> bool:
        return not (self._follows and self.table.requires_grad)

    def _keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if not self._keeps:
            self._kept.clear()  # the table may be written to, and frozen afterwards
            return make()
        compiling = torch.compiler.is_compiling()
        if self._follows and not compiling and self._state != (state := _state(self.table)):
            self._kept, self._state = {}, state
        # Autograd does not save tensors that are made in inference mode, and a later call may train. A compiled call
        # can neither leave the mode nor ask for it: what it makes without gradients is for such calls alone.
        if compiling and not torch.is_grad_enabled() and name not in self._kept:
            name = f"{name} of compiled calls without gradients"
        if (kept := self._kept.get(name)) is not None:
            return kept
        leaves = not compiling and torch.is_inference_mode_enabled()
        with torch.inference_mode(False) if leaves else nullcontext():
            kept = self._kept[name] = make()
        return kept

    def to(self, device: torch.device | str) -> Vocabulary:
        """This vocabulary on another device; itself where it is there already."""
        if checks.as_device("device", device) == self.table.device:
            return self
        moved = object.__new__(type(self))
        moved.table, moved._backend = self.table.to(device), self._backend
        moved._kept = {name: kept.to(device) for name, kept in self._kept.items()}
        return moved

    def moments(self) -> tuple[Tensor, Tensor]:
        """mean(E), (D,), and the covariance of (E, -||E||^2 / 2) with E over all tokens, (D + 1, D). float32, or
        float64 for a float64 table, under autocast too."""
        both = self._keep("moments", self._moments)  # (D + 2, D)
        return both[0], both[1:]

    def _moments(self) -> Tensor:
        v, dtype = len(self), library.sum_dtype(self.table)
        blocks = [slice(first, first + BLOCK) for first in range(0, v, BLOCK)]
        with torch.autocast(self.table.device.type, enabled=False):
            mean = torch.stack([self.table[b].to(dtype).sum(0) for b in blocks]).sum(0) / v
            mean_square = mean.square().sum()
            covariance = mean.new_zeros(len(mean) + 1, len(mean))
            for block in blocks:
                table = self.table[block].to(dtype)
                # Any constant does beside the halved squares, because the other factor adds up to zero.
                squares = (mean_square - table.square().sum(1, keepdim=True)) / 2
                covariance = covariance + torch.cat((table - mean, squares), 1).T @ (table - mean) / v
        return torch.cat((mean[None], covariance))

    def __len__(self) -> int:
        return self.table.shape[0]

    def __repr__(self) -> str:
        v, d = self.table.shape
        return f"Vocabulary(V={v}, D={d}, dtype={self.table.dtype}, device='{self.table.device}')"


def _state(table: Tensor) -> tuple[object, ...]:
    """Differs after a write that PyTorch counts, and where `.data` was set, as by Module.to."""
    return None if table.is_inference() else table._version, table.untyped_storage()._cdata, table.dtype


class OneStep(Vocabulary):
    """The Vocabulary of a table that nothing writes to while it lives, so that it may keep the bias of any table."""

    _follows = False


def as_vocabulary(embeddings: Tensor | Vocabulary, backend: str) -> Vocabulary:
    """`embeddings`, or the Vocabulary of a bare table; on a CPU, where looking is cheap, that is checked every time."""
    if isinstance(embeddings, Vocabulary):
        return embeddings
    on_cpu = isinstance(embeddings, Tensor) and embeddings.device.type == "cpu"
    return OneStep(embeddings, backend=backend, check_finite=on_cpu)

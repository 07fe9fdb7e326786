"""What is computed once per embedding table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.multiprocessing.reductions import StorageWeakRef

from smoothie_kernels import checks, library
from smoothie_kernels import metric as metrics
from smoothie_kernels.moments import moments
from smoothie_kernels.stream import sum_dtype


class Vocabulary:
    """An embedding table with what the kernels need of it: build it once, pass it for `embeddings` to every call.

    Holds the table itself and, of a frozen table (one that requires no gradient), the column bias -||E_j||^2 / 2 in
    float32 (float64 for a float64 table), 4 V bytes. The kernels read the table as it stands in memory; only a table
    whose rows are not contiguous is copied.

    Args:
        embeddings: (V, D) float32, bfloat16, float16 or float64, all finite.
        metric: the distances D of a step. "euclidean": ||x - E||^2; "cosine": 2 - 2 cos(x, E), where a row of zeros has
            the cosine 0; or a (D, D) factor A of M = A A^T: (x - E)^T M (x - E). Gradients go to A as well.
        backend: which backend computes the bias.
        check_finite: whether to look; on a GPU looking makes the host wait for the device.

    Raises:
        TypeError, ValueError: not such a tensor; V = 0 or D = 0; an entry that is not finite, or a row whose squared
            norm overflows float32.

    Of a table that requires a gradient nothing is kept: every call computes the bias from the table as it is, so one
    Vocabulary serves all steps of an optimizer. A frozen table may be written to as well (an average of weights,
    load_state_dict): a call that sees it computes anew. It sees what PyTorch counts, so neither writes through `.data`,
    those to a tensor made in inference mode nor those of an optimizer with fused=True, and under torch.compile none:
    build a new Vocabulary then.
    """

    table: Tensor  # (V, D): as it was given
    metric: metrics.Metric = "euclidean"
    _backend: str
    _kept: dict[str, Tensor]
    _state: tuple[object, ...] | None = None  # of the table when it was read
    _for_one_step = False  # then it keeps all: neither an optimizer nor a transform ends while it lives

    def __init__(
        self,
        embeddings: Tensor,
        *,
        metric: metrics.Metric = "euclidean",
        backend: str = "auto",
        check_finite: bool = True,
    ) -> None:
        checks.check_backend(backend)
        checks.check_table(embeddings)
        checks.check_bool("check_finite", check_finite)
        self.metric = checks.check_metric(metric, embeddings)
        self.table, self._backend, self._kept = embeddings, backend, {}
        if self.metric == "euclidean" and (check_finite or self._keeps):
            self._keep("bias", lambda: self._bias(check_finite))
        elif check_finite:
            self._bias(check_finite)

    @property
    def embeddings(self) -> Tensor:
        """(V, D), the table with contiguous rows."""
        if self.table.stride(1) == 1 or self.table.shape[1] == 1:
            return self.table
        return self._keep("rows", self.table.contiguous)

    @property
    def bias(self) -> Tensor:
        """(V,)"""
        return self._keep("bias", self._make_bias)

    @property
    def col(self) -> Tensor | None:
        """(V,), what the products x . E count, None for once."""
        cosine = isinstance(self.metric, str) and self.metric == "cosine"
        return self._keep("col", lambda: metrics.cosine_col(self.embeddings)) if cosine else None

    def _make_bias(self) -> Tensor:
        if isinstance(self.metric, Tensor):
            bias: Tensor = metrics.factor_bias(self.embeddings, self.metric)
            return bias
        if self.metric == "cosine":
            return self.table.new_zeros(len(self), dtype=sum_dtype(self.table))
        return self._bias(check_finite=False)

    def _bias(self, check_finite: bool) -> Tensor:
        bias: Tensor = library.column_bias(self.embeddings.detach(), check_finite, self._backend)
        return bias

    @property
    def _keeps(self) -> bool:
        trained = self.table.requires_grad or (isinstance(self.metric, Tensor) and self.metric.requires_grad)
        return self._for_one_step or not trained

    def _keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if not self._keeps:
            self._kept.clear()  # the table may be written to, and frozen afterwards
            return make()
        dynamo, compiling = torch.compiler.is_dynamo_compiling(), torch.compiler.is_compiling()
        if not (self._for_one_step or compiling) and self._state != (state := self._state_now()):
            self._kept, self._state = {}, state
        if name not in self._kept and dynamo and not torch.is_grad_enabled():
            name = f"{name}, without gradients"  # Dynamo does not see inference mode: this may be an inference tensor
        if name not in self._kept:
            # Autograd does not save tensors that are made in inference mode, and a later call may train.
            leaves = not compiling and torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if leaves else nullcontext():
                made = make()
            if not (self._for_one_step or dynamo or _outlives_transforms(made)):
                return made
            self._kept[name] = made
        return self._kept[name]

    def _state_now(self) -> tuple[object, ...]:
        return _state(self.table) + (_state(self.metric) if isinstance(self.metric, Tensor) else ())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_state": None}  # of another process, or of another table

    def to(self, device: torch.device | str) -> Vocabulary:
        """This vocabulary on another device; itself where it is there already."""
        device = checks.as_device("device", device)
        if device == self.table.device:
            return self
        if device.type != "meta":  # for shapes alone
            checks.check_device("device", device)
        moved = object.__new__(type(self))
        moved.table, moved._backend, moved._kept = self.table.to(device), self._backend, {}
        moved.metric = self.metric.to(device) if isinstance(self.metric, Tensor) else self.metric
        return moved

    def with_one_rounding(self) -> Vocabulary:
        """Itself; of a table in 16 bits one in float32, where several parts of its gradient would be rounded."""
        if not self.table.requires_grad or self.table.itemsize > 2 or not torch.is_grad_enabled():
            return self
        if isinstance(self.metric, str) and self.metric == "euclidean":
            return self
        return OneStep(self.table.float(), metric=self.metric, backend=self._backend, check_finite=False)

    def take(self, tokens: Tensor) -> Vocabulary:
        """The Vocabulary of some tokens' embeddings."""
        return Vocabulary(self.embeddings[tokens], metric=self.metric, backend=self._backend, check_finite=False)

    def moments(self) -> tuple[Tensor, Tensor]:
        """mean(E), (D,), and the covariance of (E, -||E||^2 / 2) with E over all tokens, (D + 1, D). float32, or
        float64 for a float64 table, under autocast too."""
        both = self._keep("moments", lambda: moments(self.table))  # (D + 2, D)
        return both[0], both[1:]

    def __len__(self) -> int:
        return self.table.shape[0]

    def __repr__(self) -> str:
        v, d = self.table.shape
        metric = "a factor" if isinstance(self.metric, Tensor) else repr(self.metric)
        metric = "" if metric == "'euclidean'" else f"metric={metric}, "
        return f"Vocabulary(V={v}, D={d}, {metric}dtype={self.table.dtype}, device='{self.table.device}')"


def _state(table: Tensor) -> tuple[object, ...]:
    """Differs after a write that PyTorch counts, and where `.data` was set, as by Module.to. The weak reference keeps
    the address of a storage that has gone from being given to another one."""
    if functorch.is_batchedtensor(table):
        raise library.one_for_all("embeddings")
    storage = StorageWeakRef(table.untyped_storage())  # type: ignore[no-untyped-call]
    return None if table.is_inference() else table._version, storage, table.dtype


def _outlives_transforms(made: Tensor) -> bool:
    """Not what stands for a tensor while torch.export traces, fake tensors are used or torch.func differentiates."""
    plain = type(made).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and not functorch.is_functorch_wrapped_tensor(made) and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]


class OneStep(Vocabulary):
    """The Vocabulary of a table that nothing writes to while it lives, so that it may keep the bias of any table."""

    _for_one_step = True


def as_vocabulary(embeddings: Tensor | Vocabulary, backend: str) -> Vocabulary:
    """`embeddings`, or the Vocabulary of a bare table; on a CPU, where looking is cheap, that is checked every time."""
    if isinstance(embeddings, Vocabulary):
        return embeddings.with_one_rounding()
    on_cpu = isinstance(embeddings, Tensor) and embeddings.device.type == "cpu"
    return OneStep(embeddings, backend=backend, check_finite=on_cpu)

"""Which backend runs: an ordered table, and every backend's own word on why it cannot."""

import importlib
import logging
from functools import cache
from types import ModuleType

import torch

# Fastest first. What a backend is, is in backends/__init__.py.
BACKENDS = ("cpu", "triton", "reference")
BY_NAME = ("cuda",)  # never for "auto": its kernels of today await the probes of `smoothie-kernels check` on a GPU

logger = logging.getLogger("smoothie_kernels")


@cache
def load(name: str) -> ModuleType:
    return importlib.import_module(f"smoothie_kernels.backends.{name}")


def pick_backend(name: str, device: torch.device, dtype: torch.dtype | None) -> ModuleType:
    """The named backend, or for "auto" the first that supports these tensors. RuntimeError says why none does."""
    if name != "auto":
        backend = load(name)
        reason = backend.supports(device.type, dtype)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run on {_tensors(device.type, dtype)}: {reason}")
        return backend
    return _first_that_runs(device.type, dtype)


@cache
def _first_that_runs(device_type: str, dtype: torch.dtype | None) -> ModuleType:
    passed_over: list[str] = []
    for name in BACKENDS:
        backend = load(name)
        reason = backend.supports(device_type, dtype)
        if not reason:
            logger.info(
                "backend %r for %s; %s", name, _tensors(device_type, dtype), "; ".join(passed_over) or "first choice"
            )
            return backend
        passed_over.append(f"not {name!r}: {reason}")
    raise RuntimeError(f"no backend runs on {_tensors(device_type, dtype)}: {'; '.join(passed_over)}")


def _tensors(device_type: str, dtype: torch.dtype | None) -> str:
    return f"{device_type} tensors of {dtype}" if dtype else f"{device_type} tensors"

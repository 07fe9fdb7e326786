"""Which backend runs: an ordered table, and every backend's own word on why it cannot."""

import importlib
import logging
from functools import cache
from types import ModuleType

import torch

# Fastest first. What a backend is, is in backends/__init__.py.
BACKENDS = ("cpu", "triton", "reference")

logger = logging.getLogger("smoothie_kernels")


def load(name: str) -> ModuleType:
    return importlib.import_module(f"smoothie_kernels.backends.{name}")


def pick_backend(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The named backend, or for "auto" the first that supports these tensors. RuntimeError says why none does."""
    if name != "auto":
        backend = load(name)
        reason = backend.supports(device.type, dtype)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run on {device.type} tensors of {dtype}: {reason}")
        return backend
    return _first_that_runs(device.type, dtype)


@cache
def _first_that_runs(device_type: str, dtype: torch.dtype) -> ModuleType:
    passed_over: list[str] = []
    for name in BACKENDS:
        backend = load(name)
        reason = backend.supports(device_type, dtype)
        if not reason:
            logger.info(
                "backend %r for %s tensors of %s; %s",
                name,
                device_type,
                dtype,
                "; ".join(passed_over) or "first choice",
            )
            return backend
        passed_over.append(f"not {name!r}: {reason}")
    raise RuntimeError(f"no backend runs on {device_type} tensors of {dtype}: {'; '.join(passed_over)}")

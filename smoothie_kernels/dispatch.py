"""Which backend runs: an ordered table, and every backend's own word on why it cannot."""

import importlib
import logging
from functools import cache
from types import ModuleType

import torch

from smoothie_kernels.stream import Request

# Fastest first. What a backend is, is in backends/__init__.py.
BACKENDS = ("cpu", "triton", "reference")
BY_NAME = ("cuda",)  # never for "auto": its kernels of today await the probes of `smoothie-kernels check` on a GPU

logger = logging.getLogger("smoothie_kernels")


@cache
def load(name: str) -> ModuleType:
    return importlib.import_module(f"smoothie_kernels.backends.{name}")


def pick_backend(
    name: str, device: torch.device, dtype: torch.dtype | None, request: Request | None = None
) -> ModuleType:
    """The named backend, or for "auto" the first that supports these tensors, and this call where there is one.
    RuntimeError says why none does."""
    if name == "auto":
        runs = _that_run(device.type, dtype)
        return runs[0] if request is None else _first_for(runs, request)
    backend = load(name)
    reason = backend.supports(device.type, dtype)
    if reason:
        raise RuntimeError(f"backend {name!r} cannot run on {_tensors(device.type, dtype)}: {reason}")
    if request is not None and (reason := backend.lacks(request)):
        raise RuntimeError(f"backend {name!r} {reason}: use backend='auto'")
    return backend


def _first_for(runs: tuple[ModuleType, ...], request: Request) -> ModuleType:
    """ "reference" takes every call."""
    return next(backend for backend in runs if not backend.lacks(request))


@cache
def _that_run(device_type: str, dtype: torch.dtype | None) -> tuple[ModuleType, ...]:
    """The backends that do, fastest first."""
    reasons = {name: load(name).supports(device_type, dtype) for name in BACKENDS}
    passed_over = "; ".join(f"not {name!r}: {reason}" for name, reason in reasons.items() if reason)
    runs = [name for name, reason in reasons.items() if not reason]
    if not runs:
        raise RuntimeError(f"no backend runs on {_tensors(device_type, dtype)}: {passed_over}")
    logger.info("backend %r for %s; %s", runs[0], _tensors(device_type, dtype), passed_over or "first choice")
    return tuple(map(load, runs))


def _tensors(device_type: str, dtype: torch.dtype | None) -> str:
    return f"{device_type} tensors of {dtype}" if dtype else f"{device_type} tensors"

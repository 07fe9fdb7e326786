"""Noise schedules: D_t = mu(t) D_0 + std(t) eps, from clean at t = 0 to noise at t = 1.

All of them have std = delta sqrt(1 - mu^2); each gives the logarithm of mu, so that std keeps its digits where mu is
next to 1. delta scales the noise alone: Smoothie trains with 1, and samples with 0.25 for sequence-to-sequence tasks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """mu(t) and std(t) of a forward process."""

    delta: float = 1.0  # of the noise

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) != (field.type == "bool") or not isinstance(value, int | float):
                raise TypeError(f"{field.name} must be a {field.type}, got {type(value).__name__}")
            if field.type == "float" and not 0 < value < math.inf and not (field.name == "delta" and value == 0):
                raise ValueError(f"{field.name} must be positive and finite, got {value}")

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """(mu, std) at time t.

        Equal to::

            mu = log_mu(t.double()).exp()
            std = delta * (1 - mu**2).sqrt()

        Args:
            t: a number or a tensor, in [0, 1]. Values of tensors are checked on a CPU, and not in a compiled graph.

        Returns:
            Two tensors of t's shape on t's device (the CPU for a number): float64 for float64, else float32; computed
            in float64.

        Raises:
            TypeError, ValueError: not such a t.
        """
        time = _checked(t)
        log_mu = self.log_mu(time.double())
        dtype = torch.float64 if time.dtype == torch.float64 and isinstance(t, Tensor) else torch.float32
        return log_mu.exp().to(dtype), (self.delta * (-torch.expm1(2 * log_mu)).sqrt()).to(dtype)

    @property
    def prior_std(self) -> float:
        """Standard deviation of the logits from which sampling starts: noise alone."""
        return self.delta

    @abstractmethod
    def log_mu(self, t: Tensor) -> Tensor:
        """log mu(t) of float64 times, at most 0."""


@dataclass(frozen=True, kw_only=True)
class Arctan(Schedule):
    """Smoothie's: the kernel's width grows from sigma_min to sigma_max, mu = (sigma_min / width)^2.

    width / sigma_min = (sigma_max / sigma_min - 1) (2 / pi) arctan(r / sharpness) + 1, r = sqrt(t / (1 - t)), or
    t / (1 - t) without `root`. Times next to the ends are moved to 5e-4 and 0.9995. arXiv 2505.18853.
    """

    sigma_min: float = 1.5
    sigma_max: float = 200.0
    sharpness: float = 9.0
    root: bool = True

    def log_mu(self, t: Tensor) -> Tensor:
        t = t.clamp(5e-4, 0.9995)
        ratio = t / (1 - t)
        angle = torch.atan((ratio.sqrt() if self.root else ratio) / self.sharpness)
        return -2 * torch.log1p((self.sigma_max / self.sigma_min - 1) * (2 / math.pi) * angle)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """The variance-preserving process whose rate grows linearly: what Smoothie's authors call "cosine"."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_mu(self, t: Tensor) -> Tensor:
        return -(self.beta_max - self.beta_min) * t**2 / 4 - self.beta_min * t / 2


@dataclass(frozen=True, kw_only=True)
class Tangent(Schedule):
    """mu = 1 / sqrt(1 + (sharpness tan(pi t / 2))^2): simple diffusion's shifted cosine, "sd" (arXiv 2301.11093)."""

    sharpness: float = 9.0

    def log_mu(self, t: Tensor) -> Tensor:
        return -torch.log1p((self.sharpness * torch.tan(math.pi * t / 2)) ** 2) / 2


@dataclass(frozen=True, kw_only=True)
class SquareRoot(Schedule):
    """mu^2 = 1 - sqrt(t + 1e-4), not below 0: Diffusion-LM's, "sqrt" (arXiv 2205.14217)."""

    def log_mu(self, t: Tensor) -> Tensor:
        return torch.log1p(-(t + 1e-4).sqrt().clamp(max=1)) / 2


@dataclass(frozen=True, kw_only=True)
class Tess(Schedule):
    """TESS's cosine, for logits of +-simplex: mu = cos(pi u / 2) over its value at t = 0, u = (t + s) / (1 + s),
    s = 1e-4, and noise as loud as the simplex (arXiv 2305.08379)."""

    simplex: float = 5.0

    @property
    def prior_std(self) -> float:
        return self.simplex * self.delta

    def log_mu(self, t: Tensor) -> Tensor:
        return (_tess_log_cos(t) - _tess_log_cos(t.new_zeros(()))).clamp(max=0)

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        mu, std = super().marginal(t)
        return mu, self.simplex * std


def _tess_log_cos(t: Tensor) -> Tensor:
    return torch.cos((t + 1e-4) / (1 + 1e-4) * math.pi / 2).abs().log()


SCHEDULES: dict[str, type[Schedule]] = {
    "arctan": Arctan,
    "cosine": Cosine,
    "sd": Tangent,
    "sqrt": SquareRoot,
    "tess": Tess,
}


def make_schedule(name: str, **options: float | bool) -> Schedule:
    """The schedule of that name; options are its fields.

    Raises:
        TypeError, ValueError: another name, an option that it does not have, or a bad value of one.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {name!r}")
    kind = SCHEDULES[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise TypeError(f"options of schedule {name!r} must be among {', '.join(known)}, got {option!r}")
    return kind(**options)


def _checked(t: float | Tensor) -> Tensor:
    if isinstance(t, Tensor):
        if not t.is_floating_point():
            raise TypeError(f"t must be a number or a floating-point tensor, got {t.dtype}")
    elif isinstance(t, bool) or not isinstance(t, int | float):
        raise TypeError(f"t must be a number or a floating-point tensor, got {type(t).__name__}")
    else:
        t = torch.tensor(t, dtype=torch.float64, device="cpu")
    looked_at = t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling()
    if looked_at and not (float(t.min()) >= 0 and float(t.max()) <= 1):
        raise ValueError(f"t must be in [0, 1], got {float(t.min())} to {float(t.max())}")
    return t

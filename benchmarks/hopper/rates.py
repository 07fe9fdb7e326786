"""What the machine itself reaches: square products by its library, and copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import timing
from benchmarks.common.race import Suite
from benchmarks.common.report import Row

SQUARE = {"cuda": 8192, "cpu": 512}  # rows and columns of a product
COPIED = {"cuda": 2**32, "cpu": 2**24}  # bytes read and written: more than any L2 holds
CASE = "gpu-rates"
COPY = "copy"
PATIENCE = 0.5


@dataclass(frozen=True)
class Rate:
    call: Callable[[], Tensor]
    flop: int = 0
    bytes: int = 0


def product_of(dtype: torch.dtype) -> str:
    """Its row."""
    return f"square product, {str(dtype).removeprefix('torch.')}"


def measure(suite: Suite) -> None:
    size, device = SQUARE[suite.device], suite.device
    copied = torch.ones(2, COPIED[device] // 2, dtype=torch.int8, device=device)
    rates = {COPY: Rate(partial(copied[1].copy_, copied[0]), bytes=copied.nbytes)}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        rates[product_of(dtype)] = Rate(product, flop=2 * size**3)
    for rate in rates.values():
        rate.call()
    times = timing.race(
        {name: rate.call for name, rate in rates.items()}, timing.clock_of(device), patience=PATIENCE,
        repeats=suite.repeats, on_turn=suite.on_turn,
    )  # fmt: skip
    for name, time in times.items():
        rate, edge = rates[name], 0 if name == COPY else size
        kind = "int8" if name == COPY else name.rpartition(" ")[2]
        suite.on_row(
            Row(
                CASE, name, "rates", edge, edge, edge, kind, noise=False, seconds=time.median,
                quartiles=time.quartiles, runs=time.runs, gflop_per_s=rate.flop / time.median / 1e9,
                gb_per_s=rate.bytes / time.median / 1e9, commit=suite.machine.commit, machine=suite.machine.processor,
                versions=suite.machine.versions_line,
            )
        )  # fmt: skip

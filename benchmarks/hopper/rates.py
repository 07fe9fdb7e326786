"""What the machine itself reaches: square products by its library, and copies."""

from functools import partial

import torch

from benchmarks.common import timing
from benchmarks.common.race import Suite
from benchmarks.common.report import Row

SQUARE = {"cuda": 8192, "cpu": 512}  # rows and columns of a product
COPIED = {"cuda": 2**32, "cpu": 2**24}  # bytes read and written: more than any L2 holds
CASE = "gpu-rates"
COPY = "copy"
PATIENCE = 0.5


def product_of(dtype: torch.dtype) -> str:
    """Its row."""
    return f"square product, {str(dtype).removeprefix('torch.')}"


def measure(suite: Suite) -> None:
    edge, device = SQUARE[suite.device], suite.device
    copied = torch.ones(2, COPIED[device] // 2, dtype=torch.int8, device=device)
    calls = {COPY: partial(copied[1].copy_, copied[0])}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, edge, edge, device=device).to(dtype)
        calls[product_of(dtype)] = partial(torch.mm, a, b, out=torch.empty_like(a))
    for call in calls.values():
        call()
    clock = timing.clock_of(device)
    times = timing.race(calls, clock, patience=PATIENCE, repeats=suite.repeats, on_turn=suite.on_turn)
    for name, time in times.items():
        d, flop, moved = (0, 0, copied.nbytes) if name == COPY else (edge, 2 * edge**3, 0)
        machine, kind = suite.machine, "int8" if name == COPY else name.rpartition(" ")[2]
        suite.on_row(
            Row(
                CASE, name, "rates", d, d, d, kind, seconds=time.median, quartiles=time.quartiles, runs=time.runs,
                gflop_per_s=flop / time.median / 1e9, gb_per_s=moved / time.median / 1e9, commit=machine.commit,
                machine=machine.processor, versions=machine.versions_line,
            )
        )  # fmt: skip

"""Small ragged calls of every kernel, to be run under a memory checker: python -m benchmarks.sanitize.

On a GPU: `PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m benchmarks.sanitize`. (A cached block is larger
than its tensor, and an access beyond the tensor would go unseen.) Of the results it only sees whether they are finite;
the tests compare them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

import smoothie_kernels as sk
from smoothie_kernels import noise

# N, V, D: few rows, whose vocabulary is split; widths of one and of several tiles, not powers of two; a ragged last
# tile of rows and of tokens each. The first ones matter most: time may end.
SHAPES = ((3, 301, 100), (130, 515, 384), (70, 259, 768), (1, 1, 32), (200, 1030, 40), (66, 130, 1024))
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
WORKSPACES = (2**28, 0, 2**18)  # the default, none, and one that takes several blocks


@dataclass(frozen=True)
class Call:
    """One forward and backward of the step, one nearest_token, one field of noise."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    workspace: int

    def __str__(self) -> str:
        n, v, d = self.shape
        return f"N = {n}, V = {v}, D = {d}, {str(self.dtype).removeprefix('torch.')}, workspace = {self.workspace}"

    def run(self, backend: str, device: str) -> bool:
        """Whether all results are finite."""
        n, v, d = self.shape
        x, table = (torch.randn(rows, d).to(device, self.dtype).requires_grad_() for rows in (n, v))
        mu, std = torch.full((n,), 0.05, device=device), torch.full((n,), 0.99, device=device)
        found = [noise.gaussian(n, v, seed=1, row_ids=torch.arange(n, device=device), backend=backend)]
        found.append(sk.nearest_token(x.detach(), table.detach(), backend=backend).distance)
        for deviation, leaves in ((std, (x, table)), (0, (x,)), (std, (table,))):
            y = sk.fused_smoothie_step(
                x, table, mu, deviation, seed=1, workspace=self.workspace, backend=backend
            )  # fmt: skip
            loss = y.smoothed.float().square().sum() + y.lse.sum()
            found += [y.smoothed, y.lse, *torch.autograd.grad(loss, leaves)]
        return all(bool(tensor.isfinite().all()) for tensor in found)


def calls() -> Iterator[Call]:
    for dtype, workspace, shape in product(DTYPES, WORKSPACES, SHAPES):
        yield Call(shape, dtype, workspace)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no call begins later than this")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    start, wrong, done = time.monotonic(), 0, 0
    todo = list(calls())
    for call in todo:
        if time.monotonic() - start > arguments.seconds:
            break
        finite = call.run(arguments.backend, arguments.device)
        wrong, done = wrong + (not finite), done + 1
        print(f"{call}: {'finite' if finite else 'NOT FINITE'} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{done} of {len(todo)} calls, {wrong} with results that are not finite")
    return 1 if wrong or not done else 0


if __name__ == "__main__":
    sys.exit(main())

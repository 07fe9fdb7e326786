"""Small ragged calls of every kernel, to be run under a memory checker: python -m benchmarks.sanitize.

On a GPU: `PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m benchmarks.sanitize --backend cuda`. (A cached
block is larger than its tensor, and an access beyond the tensor would go unseen.) Of the results it only sees whether
they are finite; the tests compare them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

import smoothie_kernels as sk
from smoothie_kernels import noise

WORKSPACES = (2**28, 0, 2**18)  # the default, none, and one that takes several blocks
TOPK = 40  # or all tokens, where there are fewer
FAR = 40.0  # times as far from all tokens: such rows are done again, with another reference


@dataclass(frozen=True)
class Backend:
    """What the calls of a backend are. The first ones matter most: time may end."""

    # N, V, D: few rows, whose vocabulary is split; widths of one and of several tiles, not powers of two; a ragged last
    # tile of rows and of tokens each.
    shapes: tuple[tuple[int, int, int], ...]
    dtypes: tuple[torch.dtype, ...]
    means: tuple[tuple[str, float], ...]  # smooth and recall_target
    gradients: bool


BACKENDS = {
    "triton": Backend(
        ((3, 301, 100), (130, 515, 384), (70, 259, 768), (1, 1, 32), (200, 1030, 40), (66, 130, 1024)),
        (torch.bfloat16, torch.float32, torch.float16),
        (("full", 1.0), ("topk", 0.9), ("topk+mean", 0.9)),
        gradients=True,
    ),
    # One and several tiles in one pass, for few rows and for narrow ones; one and several boxes of columns, resident or
    # not; rows of one block, of a cluster, of a cluster with a block too many. Means of a top-k and gradients are
    # triton's.
    "cuda": Backend(
        (
            (3, 301, 104), (130, 515, 384), (70, 259, 768), (200, 1030, 40), (66, 130, 1024), (1, 1, 32),
            (1100, 515, 320), (300, 700, 256), (40, 900, 1024), (130, 4200, 104),
        ),
        (torch.bfloat16, torch.float16),
        (("full", 1.0), ("full", 0.9), ("full", 0.99)),  # of the last shape buckets keep four, one, two
        gradients=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """Forwards and backwards of the step, one nearest_token, one field of noise; or of the step with its top-k."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    workspace: int
    topk: bool = False
    far: bool = False

    def __str__(self) -> str:
        n, v, d = self.shape
        text = f"N = {n}, V = {v}, D = {d}, {str(self.dtype).removeprefix('torch.')}, workspace = {self.workspace}"
        return f"{text}{', top-k' if self.topk else ''}{', far' if self.far else ''}"

    def run(self, backend: str, device: str) -> bool:
        """Whether all results are finite."""
        n, v, d = self.shape
        of = BACKENDS.get(backend, BACKENDS["triton"])
        x, table = (torch.randn(rows, d) for rows in (n, v))
        x[::2] *= FAR if self.far else 1.0
        x, table = (leaf.to(device, self.dtype).requires_grad_(of.gradients) for leaf in (x, table))
        mu, std = torch.full((n,), 0.05, device=device), torch.full((n,), 0.99, device=device)
        if self.topk:
            found = self.run_topk(x, table, mu, std, backend, of)
            return all(bool(tensor.isfinite().all()) for tensor in found)
        found = [noise.gaussian(n, v, seed=1, row_ids=torch.arange(n, device=device), backend=backend)]
        found.append(sk.nearest_token(x.detach(), table.detach(), backend=backend).distance)
        for deviation, leaves in ((std, (x, table)), (0, (x,)), (std, (table,))):
            y = sk.fused_smoothie_step(
                x, table, mu, deviation, seed=1, workspace=self.workspace, backend=backend
            )  # fmt: skip
            found += [y.smoothed, y.lse]
            if of.gradients:
                found += torch.autograd.grad(y.smoothed.float().square().sum() + y.lse.sum(), leaves)
        return all(bool(tensor.isfinite().all()) for tensor in found)

    def run_topk(
        self, x: Tensor, table: Tensor, mu: Tensor, std: Tensor, backend: str, of: Backend
    ) -> list[Tensor]:  # fmt: skip
        found = []
        for smooth, recall_target in of.means:
            y = sk.fused_smoothie_step(
                x, table, mu, std, seed=1, topk=min(TOPK, len(table)), recall_target=recall_target, smooth=smooth,
                workspace=self.workspace, backend=backend,
            )  # fmt: skip
            assert y.topk is not None
            found += [y.smoothed, y.topk.values, y.topk.tail_mass]
            if of.gradients:
                loss = y.smoothed.float().square().sum() + y.topk.values.sum() + y.topk.tail_mass.sum()
                found += torch.autograd.grad(loss, (x, table))
        return found


def calls(backend: str = "triton") -> Iterator[Call]:
    of = BACKENDS.get(backend, BACKENDS["triton"])
    for dtype, workspace, shape, (topk, far) in product(
        of.dtypes, WORKSPACES, of.shapes, ((False, False), (True, False), (False, True))
    ):
        yield Call(shape, dtype, workspace, topk, far)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no call begins later than this")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    start, wrong, done = time.monotonic(), 0, 0
    todo = list(calls(arguments.backend))
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

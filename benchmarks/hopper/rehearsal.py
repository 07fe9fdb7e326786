"""Stand-ins for a GPU, for `benchmarks.hopper --rehearse`: small cases, Triton's interpreter, Hopper's emulator."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common.machine import ROOT
from benchmarks.hopper import rates
from benchmarks.step import cases

N, V, D = 5, 132, 32  # at most, and D a multiple of what the cuda backend takes


def prepare() -> None:
    """Of this process, before anything of a case is built. TRITON_INTERPRET=1 must be in its environment."""
    from smoothie_kernels.backends import cuda

    torch.compiler.set_stance("force_eager")
    cuda.LIBRARY, cuda.DEVICE = emulator(), "cpu"
    for name, case in cases.CASES.items():
        if case.groups == cases.HOPPER:
            cases.CASES[name] = replace(case, n=min(case.n, N), v=V, d=D, k=4)
    rates.SQUARE["cpu"], rates.COPIED["cpu"] = 64, 2**16


def emulator() -> Path:
    """The library of the emulator; built where it is not there."""
    for folder in (ROOT, ROOT / "tests"):
        sys.path.append(str(folder))
    library: Path = importlib.import_module("compiled").emulated_library()
    return library

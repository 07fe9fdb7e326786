"""The words and normals of Triton's noise, and where the backend cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import words_of
from conftest import DEVICE

from smoothie_kernels import noise

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

from smoothie_kernels.backends.triton import parts  # noqa: E402  (they import triton)

pytestmark = pytest.mark.usefixtures("triton_runs")
ROOT = Path(__file__).resolve().parents[2]
KEYS = [(0, 0), (1, 2), (-1, -1), (2**63 - 1, -(2**63)), (0x0123456789ABCDEF, 1 << 40)]  # (seed, offset)


@triton.jit
def _key_kernel(seed_ptr, offset_ptr, out_ptr):
    key, row_shift = parts.noise_key(seed_ptr, offset_ptr)
    tl.store(out_ptr, key.to(tl.int64))
    tl.store(out_ptr + 1, row_shift.to(tl.int64))


@triton.jit
def _words_kernel(seed_ptr, offset_ptr, row_ids_ptr, out_ptr, first, N: tl.constexpr, V: tl.constexpr):
    o_n, o_p = tl.arange(0, N), tl.arange(0, V // 2)
    key, row_shift = parts.noise_key(seed_ptr, offset_ptr)
    rows = tl.load(row_ids_ptr + o_n).to(tl.uint32) + row_shift
    r0, r1 = parts.words((first // 2 + o_p).to(tl.uint32)[None, :], rows[:, None], key)
    at = out_ptr + o_n[:, None] * V + 2 * o_p[None, :]
    tl.store(at, r0.to(tl.int64))
    tl.store(at + 1, r1.to(tl.int64))


@triton.jit
def _box_muller_kernel(r0_ptr, r1_ptr, even_ptr, odd_ptr, N: tl.constexpr):
    o_n = tl.arange(0, N)
    even, odd = parts.box_muller(tl.load(r0_ptr + o_n).to(tl.uint32), tl.load(r1_ptr + o_n).to(tl.uint32))
    tl.store(even_ptr + o_n, even)
    tl.store(odd_ptr + o_n, odd)


@pytest.mark.parametrize(("seed", "offset"), KEYS)
def test_key_is_that_of_the_host(seed, offset):
    out = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    _key_kernel[(1,)](*words_of(seed, offset, DEVICE), out)
    assert tuple(out.tolist()) == noise.noise_key(seed, offset)


@pytest.mark.parametrize("first", [0, 30_464, 2**31 - 128])
@pytest.mark.parametrize(("seed", "offset"), KEYS)
def test_words_are_the_fields(seed, offset, first):
    row_ids = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 12_345, 77], device=DEVICE)
    out = torch.zeros(8, 64, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](*words_of(seed, offset, DEVICE), row_ids, out, first, N=8, V=64)
    assert torch.equal(out, noise.words(row_ids, first, 64, seed, offset))


def test_normals_of_hard_words():
    """Uniforms next to 0, 1/2 and 1, angles next to every quarter turn."""
    edges = [0, 1, 2, 3, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 3, 2**32 - 2, 2**32 - 1, 2**24, 2**24 + 1]
    edges += [2**30 - 1, 2**30, 3 * 2**30 - 1, 3 * 2**30, 2**32 - 2**9]
    r0, r1 = (t.flatten() for t in torch.meshgrid(torch.tensor(edges), torch.tensor(edges), indexing="ij"))
    r0, r1 = (torch.cat((t, torch.randint(2**32, (1024 - len(t),)))).to(DEVICE) for t in (r0, r1))
    even, odd = (torch.zeros(1024, device=DEVICE) for _ in range(2))
    _box_muller_kernel[(1,)](r0, r1, even, odd, N=1024)
    radius = (-2 * ((r0.double() + 0.5) * 2.0**-32).log()).sqrt()
    angle = 2 * torch.pi * (r1.double() + 0.5) * 2.0**-32
    for found, exact in ((even, radius * angle.cos()), (odd, radius * angle.sin())):
        assert (found - exact).abs().max() <= 5e-6  # the contract: 5e-5
        assert found.abs().max() <= noise.MAX_ABS_NORMAL


# --- where it cannot run


def python(*command: str, interpret: str) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": interpret}
    return subprocess.run(
        [sys.executable, *command], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_says_why_it_cannot_run():
    program = """if True:
        import os, sys
        from smoothie_kernels import dispatch
        backend, torch = dispatch.load("triton"), dispatch.torch
        print("triton" in sys.modules)
        print(backend.supports("cpu", torch.float32))
        print(backend.supports("mps", torch.float32))
        print(backend.supports("cuda", torch.float64))
        print("triton" in sys.modules)
        sys.modules["triton"] = None
        print(backend.supports("cuda", torch.float32))
        del sys.modules["triton"]
        import triton
        os.environ["TRITON_INTERPRET"] = "1"
        print(backend.supports("cpu", torch.float32))
    """
    wanted_device = "it takes CUDA or HIP tensors (CPU tensors only through TRITON_INTERPRET=1)"
    assert python("-c", program, interpret="0").splitlines() == [
        "False",
        wanted_device,
        wanted_device,
        "it takes float32, bfloat16 and float16",
        "False",
        "triton is not installed (import of triton halted; None in sys.modules)",
        "TRITON_INTERPRET was set after triton had been imported: set it before",
    ]

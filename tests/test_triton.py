"""What is Triton's alone: the words of its noise, tiles that do not matter, and what its kernels compile to offline.

Without a GPU the kernels run in Triton's interpreter (conftest.py sets TRITON_INTERPRET before triton is imported).
Run as a script, this file compiles the kernels for the targets below, for which no GPU is needed, and prints what each
of them takes as JSON.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from smoothie_kernels import fused_smoothie_step, nearest_token, noise
from smoothie_kernels.backends import triton as backend

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

from smoothie_kernels.backends.triton import forward, parts  # noqa: E402  (they import triton)
from smoothie_kernels.backends.triton.tiles import TILES, Tile, pick_tile  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
KEYS = [(0, 0), (1, 2), (-1, -1), (2**63 - 1, -(2**63)), (0x0123456789ABCDEF, 1 << 40)]  # (seed, offset)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def runs_here():
    reason = backend.supports(device(), torch.float32)
    if reason:
        pytest.skip(f"triton: {reason}")


def words_of(seed: int, offset: int) -> list[torch.Tensor]:
    return [torch.tensor(word, dtype=torch.int64, device=device()) for word in (seed, offset)]


# --- noise


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
    out = torch.zeros(2, dtype=torch.int64, device=device())
    _key_kernel[(1,)](*words_of(seed, offset), out)
    assert tuple(out.tolist()) == noise.noise_key(seed, offset)


@pytest.mark.parametrize("first", [0, 30_464, 2**31 - 128])
@pytest.mark.parametrize(("seed", "offset"), KEYS)
def test_words_are_the_fields(seed, offset, first):
    row_ids = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 12_345, 77], device=device())
    out = torch.zeros(8, 64, dtype=torch.int64, device=device())
    _words_kernel[(1,)](*words_of(seed, offset), row_ids, out, first, N=8, V=64)
    assert torch.equal(out, noise.words(row_ids, first, 64, seed, offset))


def test_normals_of_hard_words():
    """Uniforms next to 0, 1/2 and 1, angles next to every quarter turn."""
    edges = [0, 1, 2, 3, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 3, 2**32 - 2, 2**32 - 1, 2**24, 2**24 + 1]
    edges += [2**30 - 1, 2**30, 3 * 2**30 - 1, 3 * 2**30, 2**32 - 2**9]
    r0, r1 = (t.flatten() for t in torch.meshgrid(torch.tensor(edges), torch.tensor(edges), indexing="ij"))
    r0, r1 = (torch.cat((t, torch.randint(2**32, (1024 - len(t),)))).to(device()) for t in (r0, r1))
    even, odd = (torch.zeros(1024, device=device()) for _ in range(2))
    _box_muller_kernel[(1,)](r0, r1, even, odd, N=1024)
    radius = (-2 * ((r0.double() + 0.5) * 2.0**-32).log()).sqrt()
    angle = 2 * torch.pi * (r1.double() + 0.5) * 2.0**-32
    for found, exact in ((even, radius * angle.cos()), (odd, radius * angle.sin())):
        assert (found - exact).abs().max() <= 5e-6  # the contract: 5e-5
        assert found.abs().max() <= noise.MAX_ABS_NORMAL


# --- tiles


def step(x, table, tile=None, *, mu=0.05, std=0.99, row_offset=0):
    """The launcher itself, for which a tile may be chosen."""
    rows = torch.ones(len(x), device=x.device)
    bias = forward.column_bias(table)
    seed, offset = words_of(3, 1)
    return forward.step_fwd(
        x, table, bias, mu * rows, std * rows if std else None, None, row_offset, seed, offset, 1.5, tile
    )


def inputs(n, v, d, dtype=torch.float32):
    table = torch.randn(v, d)
    x = table[torch.randint(v, (n,))] + 0.3 * torch.randn(n, d)
    return x.to(device(), dtype), table.to(device(), dtype)


def relative_error(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


OTHER_TILES = {
    "small": Tile(16, 16, 16, 16, 1, 1),  # one warp; every loop goes round, D takes several programs
    "one tile": Tile(32, 64, 64, 64, 4, 2),  # the table's tile serves both products
    "ragged slices": Tile(16, 128, 32, 32, 4, 3),
    "wider than D": Tile(32, 16, 32, 128, 4, 2),
    "all of V": Tile(16, 256, 16, 32, 8, 1),
}


@pytest.mark.parametrize("std", [0.99, 0.0])
@pytest.mark.parametrize("tile", OTHER_TILES)
def test_tiles_do_not_matter(tile, std):
    x, table = inputs(18, 141, 50)
    found, expected = (step(x, table, t, std=std) for t in (OTHER_TILES[tile], None))
    assert relative_error(found[0], expected[0]) <= 2e-6
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])
    assert (found[3] - expected[3]).abs().max() <= 1e-5
    bias = forward.column_bias(table)
    tokens, distance = forward.nearest_fwd(x, table, bias, OTHER_TILES[tile])
    assert torch.equal(tokens, expected[1])
    torch.testing.assert_close(distance, forward.nearest_fwd(x, table, bias)[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("tile", [None, *OTHER_TILES.values()])
def test_ties_within_and_between_tiles(tile):
    """Five tokens, thirty times over: the first of them wins."""
    x, table = inputs(18, 5, 24)
    found = step(x, table.repeat(30, 1), tile, std=0.0)
    nearest = torch.cdist(x.double(), table.double()).argmin(1)
    assert torch.equal(found[1], nearest)
    assert torch.equal(found[2], nearest)


def test_bits_do_not_depend_on_the_batch():
    """The tile comes from type and width alone."""
    x, table = inputs(21, 150, 40)
    whole = step(x, table, row_offset=100)
    for first, last in ((0, 1), (5, 21), (20, 21)):
        part = step(x[first:last], table, row_offset=100 + first)
        assert all(torch.equal(p, w[first:last]) for p, w in zip(part, whole, strict=True))


def test_every_type_and_width_has_a_tile():
    for dtype in backend.DTYPES:
        for width in (1, 3, 64, 65, 384, 768, 1024, 4096):
            tile = pick_tile(dtype, width)
            assert all(size & (size - 1) == 0 and size >= 16 for size in tile[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "v", "d"), [(3, 70, 384), (2, 40, 600)])
def test_wide(dtype, n, v, d):
    """The tiles of wide tables: the first product in parts, and more columns than one program has."""
    x, table = inputs(n, v, d, dtype)
    table[: v // 2] = table[:1] + 0.05 * torch.randn(v // 2, d).to(x)  # some weight on many tokens
    x[0] = table[0]
    found = fused_smoothie_step(x, table, 0.3, 0.9, seed=1, backend="triton")
    exact = fused_smoothie_step(x.double(), table.double(), 0.3, 0.9, seed=1, backend="reference")
    assert relative_error(found.smoothed, exact.smoothed) <= {4: 2e-6, 2: torch.finfo(dtype).eps / 2}[dtype.itemsize]
    assert torch.equal(found.tokens, exact.tokens)
    assert torch.equal(found.noisy_tokens, exact.noisy_tokens)
    assert ((found.lse - exact.lse) / (1 + exact.lse.abs())).abs().max() <= 1e-5


# --- memory around the tensors


@pytest.mark.parametrize(("n", "v", "d"), [(1, 1, 1), (1, 17, 5), (33, 129, 65)])
def test_reads_and_writes_stay_inside(n, v, d):
    """NaN around x, the table and the noise reaches no output, and what lies around the noise stays."""
    around = torch.full((v + 2, d + 3), torch.nan, device=device())
    table, x_around = around[1:-1, 1:-2], torch.full((n + 2, d), torch.nan, device=device())
    table.copy_(torch.randn(v, d))
    x = x_around[1:-1].copy_(torch.randn(n, d))
    assert all(bool(t.isfinite().all()) for t in step(x, table))
    found, expected = nearest_token(x, table, backend="triton"), nearest_token(x, table.clone(), backend="reference")
    assert torch.equal(found.tokens, expected.tokens)

    field = torch.full((n + 2, v + 3), torch.nan, device=device())
    forward.gaussian(field[1:-1, 1:-2], None, 2**32 - n, *words_of(5, 6))
    inside = noise.normals(torch.arange(2**32 - n, 2**32, device=device()), 0, v, 5, 6)
    assert (field[1:-1, 1:-2] - inside).abs().max() <= 5e-5
    assert int(field.isnan().sum()) == field.numel() - n * v


def test_seed_and_offset_may_be_on_the_device():
    x, table = inputs(5, 60, 16)
    numbers = fused_smoothie_step(x, table, 0.05, 0.99, seed=-7, offset=2**40, backend="triton")
    seed, offset = words_of(-7, 2**40)
    tensors = fused_smoothie_step(x, table, 0.05, 0.99, seed=seed, offset=offset, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(numbers[:4], tensors[:4], strict=True))


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


# --- compiled offline

POINTERS = {
    "bias_ptr": "*fp32",
    "mu_ptr": "*fp32",
    "std_ptr": "*fp32",
    "row_ids_ptr": "*i64",
    "seed_ptr": "*i64",
    "offset_ptr": "*i64",
    "tokens_ptr": "*i64",
    "noisy_tokens_ptr": "*i64",
    "lse_ptr": "*fp32",
    "distance_ptr": "*fp32",
    "inverse_variance": "fp32",
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# target -> shared memory of a program (all NVIDIA GPUs from sm_80 on have 99 KiB), spilled bytes of a thread
LIMITS = {"sm_90": (99 << 10, 0), "sm_80": (99 << 10, 160), "gfx942": (64 << 10, 640)}
ROWS = [("bf16" if size == 2 else "fp32", min(widest, 768)) for size, widest, _ in TILES]  # of the table of tiles
COMPILED = {"sm_90": ROWS, "sm_80": [*ROWS[:4], ROWS[-1]], "gfx942": [ROWS[0], ROWS[-1]]}  # half a minute


def compile_offline(kernel, target, dtype, width=0, table_dtype=None, absent=("row_ids_ptr",)):
    """One kernel for one target, as a launch on well aligned tensors would compile it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    table_dtype = table_dtype or dtype
    dot = dtype if dtype == table_dtype else "fp32"
    tile = pick_tile(TYPES[dot], width)
    constants = {"D": width, "BLOCK_N": tile.n, "BLOCK_V": tile.v, "BLOCK_K": tile.k, "BLOCK_D": tile.d}
    constants["DOT"] = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dot]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    constants |= {name: None for name in absent if name in kernel.arg_names}
    types = {**POINTERS, "x_ptr": f"*{dtype}", "smoothed_ptr": f"*{dtype}", "e_ptr": f"*{table_dtype}"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (name.startswith("stride") and width % 16 == 0)
    }
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    options = {**forward.OPTIONS, "num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=gpu, options=options)


def usage(compiled) -> dict[str, int]:
    """Registers, bytes of a thread's memory outside of them, and shared memory of a program."""
    if "amdgcn" in compiled.asm:
        read = {"registers": r"\.vgpr_count:\s+(\d+)", "stack": r"\.private_segment_fixed_size:\s+(\d+)"}
        text = compiled.asm["amdgcn"]
    else:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
        read = {"registers": r"REG:(\d+)", "stack": r"STACK:(\d+)"}
    found = {name: int(re.search(pattern, text)[1]) for name, pattern in read.items()}
    return {**found, "shared": compiled.metadata.shared}


def main() -> None:
    taken = {}
    for target, rows in COMPILED.items():
        for dtype, width in rows:
            taken[f"{target} {dtype} {width}"] = usage(compile_offline(forward._step_fwd_kernel, target, dtype, width))
    sm90 = {
        "fp16 384": (forward._step_fwd_kernel, "fp16", 384),
        "bf16 384 without noise": (forward._step_fwd_kernel, "bf16", 384, None, ("std_ptr", "row_ids_ptr")),
        "bf16 384 with row ids": (forward._step_fwd_kernel, "bf16", 384, None, ()),
        "bf16 100, narrow loads": (forward._step_fwd_kernel, "bf16", 100),
        "bf16 in, fp32 table 384": (forward._step_fwd_kernel, "bf16", 384, "fp32"),
        "nearest bf16 384": (forward._nearest_fwd_kernel, "bf16", 384),
        "nearest fp32 768": (forward._nearest_fwd_kernel, "fp32", 768),
    }
    for name, arguments in sm90.items():
        taken[f"sm_90 {name}"] = usage(compile_offline(arguments[0], "sm_90", *arguments[1:]))
    print(json.dumps(taken))


@pytest.fixture(scope="module")
def taken() -> dict[str, dict[str, int]]:
    return json.loads(python(__file__, interpret="0").splitlines()[-1])


@pytest.mark.parametrize("target", LIMITS)
def test_compiles_offline(taken, target):
    mine = {name: numbers for name, numbers in taken.items() if name.startswith(target)}
    assert len(mine) >= len(COMPILED[target])
    shared, stack = LIMITS[target]
    assert {name: numbers for name, numbers in mine.items() if numbers["shared"] > shared} == {}
    # Rows off 16 bytes: Triton 3.6 spills 176 bytes.
    aligned = {name: numbers for name, numbers in mine.items() if "narrow" not in name}
    assert {name: numbers for name, numbers in aligned.items() if numbers["stack"] > stack} == {}


if __name__ == "__main__":
    main()

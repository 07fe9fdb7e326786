"""Compiles every Triton kernel for GPUs that are not here, and prints what each takes. Run by `make kernels-check`.

    python -m smoothie_kernels.backends.triton.offline [--only REGEX] [--json]

Registers of a thread, spilled bytes of a thread, KiB of shared memory, tensor-core instructions. Exit status 1 where a
kernel spills, takes more shared memory than its target has, or multiplies outside the tensor cores, at D = 384 or 768.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped"

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smoothie_kernels.backends.triton import chunked, chunked_kernels, forward, merge, topk
from smoothie_kernels.backends.triton.launch import INTERPRETED, OPTIONS
from smoothie_kernels.backends.triton.tiles import FAMILIES, pick_tile
from smoothie_kernels.recall import KEEPS

SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB of a program; sm_80: of all its family
MUST_FIT = (384, 768)  # widths for which a kernel must not spill
WIDTHS = (64, 128, 256, *MUST_FIT, 1024)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DOT = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
TENSOR_CORES = r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b"  # sm_80, sm_90, sm_100

# Arguments by name; what is not here is an int32.
TYPES = {
    **dict.fromkeys(("bias_ptr", "mu_ptr", "std_ptr", "best_score_ptr", "best_logit_ptr", "highest_ptr"), "*fp32"),
    **dict.fromkeys(("total_ptr", "ref_score_ptr", "part_score_ptr", "part_logit_ptr", "log_sum_ptr"), "*fp32"),
    **dict.fromkeys(("lse_ptr", "distance_ptr", "shift_ptr", "row_sums_ptr", "token_sums_ptr", "out_ptr"), "*fp32"),
    **dict.fromkeys(("acc_ptr", "inverse_variance_ptr", "weight_ptr", "field_weights_ptr"), "*fp32"),
    **dict.fromkeys(("seed_ptr", "offset_ptr", "offsets_ptr", "row_ids_ptr", "tokens_ptr"), "*i64"),
    **dict.fromkeys(("noisy_tokens_ptr", "keys_ptr"), "*i64"),
    **dict.fromkeys(("token_ptr", "noisy_token_ptr"), "*i32"),
    "only_ptr": "*i1",
    "inverse_variance": "fp32",
}


class Launch(NamedTuple):
    """A kernel as it would be launched on aligned tensors."""

    target: str
    name: str
    dtype: str
    width: int
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]
    multiplies: bool

    @property
    def label(self) -> str:
        return f"{self.target} {self.name} {self.dtype} {self.width}"


# --- what is launched


def launches() -> Iterator[Launch]:
    for target in FAMILIES:
        for dtype in ("bf16", "fp32"):
            yield from _streaming(target, dtype)
            for width in MUST_FIT:
                yield from _chunked(target, dtype, width)
                yield from _without_products(target, dtype, width)
        yield Launch(target, "gaussian", "fp32", 0, forward._gaussian_kernel, _blocks(32, 128), {}, False)
        kept = {"BLOCK_S": merge.KEYS // 256, "SIZE": 256}
        yield Launch(target, "merge, kept", "fp32", 0, merge._merge_kept_kernel, kept, {}, False)


def _streaming(target: str, dtype: str) -> Iterator[Launch]:
    nearest = [name for name in forward._ABSENT if name.endswith("_ptr")]
    absent = {
        "mean": ["row_ids_ptr", "only_ptr", "keys_ptr"],
        **({"redo": ["row_ids_ptr", "keys_ptr"]} if dtype == "bf16" else {}),  # after chunked.py, which is bfloat16's
        "statistics": ["row_ids_ptr", "only_ptr", "acc_ptr", "keys_ptr"],
        "nearest": nearest,
    }
    keeps = {f"statistics, keep {keep}": keep for keep in KEEPS}
    absent |= {name: ["row_ids_ptr", "only_ptr", "acc_ptr"] for name in keeps}
    absent = {name: sorted({*none, "field_weights_ptr"}) for name, none in absent.items()}
    absent["mean, fields"] = ["row_ids_ptr", "only_ptr", "keys_ptr"]
    of_mean = {"redo", "mean, fields"}
    for name, none in absent.items():
        for few in [""] if name in of_mean else ["", ", few rows"]:
            kind = ("mean" if name in of_mean else "statistics" if name == "nearest" else name) + few
            last = None
            for width in WIDTHS:
                tile = pick_tile(kind, target, DTYPES[dtype], width)
                if width not in MUST_FIT and (tile == last or name in of_mean or name in keeps):
                    continue
                last = tile
                tile = forward.redo_tile(target, tile) if name == "redo" else tile
                constants = {**_blocks(tile.n, tile.v), **_product(target, dtype, width, tile.k)}
                constants |= {"BLOCK_D": tile.d, "KEEP": keeps.get(name, 0), **dict.fromkeys(none)}
                yield Launch(
                    target, name + few, dtype, width, forward._stream_kernel, constants, _options(tile), True
                )  # fmt: skip


def _chunked(target: str, dtype: str, width: int) -> Iterator[Launch]:
    size = DTYPES[dtype].itemsize
    forms = {
        "chunked forward": (chunked_kernels.chunk_fwd_kernel, chunked.FORWARD, ()),
        "chunked backward": (chunked_kernels.chunk_bwd_kernel, chunked.BACKWARD, ()),
        "chunked backward, x alone": (chunked_kernels.chunk_bwd_kernel, chunked.BACKWARD, ("p_ptr",)),
        "chunked keys": (chunked_kernels.chunk_keys_kernel, topk.KEYS, ()),
    }
    for name, (kernel, table, none) in forms.items():
        for several in (False, True):
            tile = table[target][size]
            tile = chunked.tile_of_fields(tile) if several and table is not chunked.BACKWARD else tile
            constants = {**_blocks(tile.n, tile.v), **_product(target, dtype, width, tile.k)}
            constants |= dict.fromkeys(("row_ids_ptr", *none, *([] if several else ["field_weights_ptr"])))
            label = name + ", fields" * several
            yield Launch(target, label, dtype, width, kernel, constants, _options(tile), True)


def _without_products(target: str, dtype: str, width: int) -> Iterator[Launch]:
    def launch(name: str, kernel: Any, **constants: Any) -> Launch:
        return Launch(target, name, dtype, width, kernel, {"D": width, **constants}, {}, False)

    yield launch("column bias", forward._column_bias_kernel, BLOCK_V=forward.ROWS)
    for name, blocks in (("merge", merge.ONE_SUM), ("merge, many sums", merge.MANY_SUMS)):
        yield launch(name, merge._merge_kernel, only_ptr=None, **blocks)
    yield launch("merge, redo", merge._merge_kernel, acc_ptr=None, smoothed_ptr=None, **merge.ONE_SUM)
    yield launch("average", topk._average_kernel, BLOCK_K=topk.BLOCK_K, BLOCK_D=topk.BLOCK_D)
    yield launch("merge, nearest", merge._merge_nearest_kernel, BLOCK_N=merge.ROWS, BLOCK_S=merge.PARTS)


def _blocks(n: int, v: int) -> dict[str, Any]:
    return {"BLOCK_N": n, "BLOCK_V": v}


def _product(target: str, dtype: str, width: int, k: int) -> dict[str, Any]:
    precision = "tf32x3" if dtype == "fp32" and not target.startswith("gfx") else "ieee"  # as launch.PRECISION
    return {"D": width, "BLOCK_K": k, "DOT": DOT[dtype], "PRECISION": precision}


def _options(tile: Any) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


# --- what comes out


def compile_offline(launch: Launch) -> Any:
    names = launch.kernel.arg_names
    constants = {name: value for name, value in launch.constants.items() if name in names}
    weights = "*bf16" if launch.dtype == "bf16" else "*fp32"
    types = {**TYPES, **dict.fromkeys(("weights_ptr", "p_ptr", "ds_ptr"), weights)}
    types |= dict.fromkeys(("x_ptr", "e_ptr", "grad_ptr", "smoothed_ptr"), f"*{launch.dtype}")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # Without these, loads are scalar, and everything spills.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (name.startswith("stride") and launch.width % 16 == 0)
    }
    amd = launch.target.startswith("gfx")
    gpu = GPUTarget("hip", launch.target, 64) if amd else GPUTarget("cuda", int(launch.target[3:]), 32)
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return triton.compile(source, target=gpu, options={**OPTIONS, **launch.options})


def usage(compiled: Any) -> dict[str, int]:
    """Registers, spilled bytes of a thread, shared bytes of a program, tensor-core instructions."""
    if "amdgcn" in compiled.asm:
        text = code = compiled.asm["amdgcn"]
        patterns = {"registers": r"\.vgpr_count:\s+(\d+)", "spilled": r"\.private_segment_fixed_size:\s+(\d+)"}
        instruction = r"\bv_mfma_"
    else:
        text, code = _cuobjdump(compiled.asm["cubin"])
        patterns = {"registers": r"REG:(\d+)", "spilled": r"STACK:(\d+)"}
        instruction = TENSOR_CORES
    found = {name: int(re.findall(pattern, text)[0]) for name, pattern in patterns.items()}
    return {**found, "shared": compiled.metadata.shared, "tensor_cores": len(re.findall(instruction, code))}


def _cuobjdump(cubin: bytes) -> tuple[str, str]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        calls = ([tool, option, file.name] for option in ("-res-usage", "-sass"))
        usage, code = (subprocess.run(c, check=True, capture_output=True, text=True).stdout for c in calls)
    return usage, code


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel; other widths may spill."""
    found = []
    if row["spilled"] and row["width"] in MUST_FIT:
        found.append(f"spills {row['spilled']} bytes")
    if row["shared"] > SHARED[row["target"]] << 10:
        found.append(
            f"takes {row['shared'] / 1024:.0f} KiB of shared memory, {row['target']} has {SHARED[row['target']]}"
        )
    if row["multiplies"] and not row["tensor_cores"]:
        found.append("multiplies outside the tensor cores")
    return found


def row_of(label: str) -> dict[str, Any]:
    launch = next(candidate for candidate in launches() if candidate.label == label)
    row = {name: getattr(launch, name) for name in ("target", "name", "dtype", "width", "multiplies")}
    row |= usage(compile_offline(launch))
    return {**row, "faults": faults(row)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="of the kernels, those whose '<target> <name> <type> <D>' has this")
    parser.add_argument("--json", action="store_true", help="the table as JSON")
    arguments = parser.parse_args()
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: there is nothing to compile")
    labels = [launch.label for launch in launches() if re.search(arguments.only, launch.label)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = []
        for row in pool.map(row_of, labels):
            rows.append(row)
            if not arguments.json:
                print(_line(row), flush=True)
    if arguments.json:
        print(json.dumps(rows))
    return int(any(row["faults"] for row in rows))


def _line(row: dict[str, Any]) -> str:
    numbers = f"{row['registers']:>4} registers {row['spilled']:>5} spilled {row['shared'] / 1024:>6.1f} KiB"
    kernel = f"{row['target']:<7} {row['name']:<28} {row['dtype']} {row['width']:>5}"
    return f"{kernel} {numbers} {row['tensor_cores']:>5} tensor-core  {'; '.join(row['faults'])}".rstrip()


if __name__ == "__main__":
    sys.exit(main())

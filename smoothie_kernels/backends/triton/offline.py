"""Compiles every Triton kernel for GPUs that are not here, and prints what each takes. Run by `make kernels-check`.

    python -m smoothie_kernels.backends.triton.offline [--only REGEX] [--json]

What is compiled is what the launchers ask Triton for: `recorded` calls them on tensors without memory, and stops Triton
where it would compile. One line a kernel: registers of a thread, spilled bytes of a thread, KiB of shared memory,
tensor-core instructions. Exit status 1 where a kernel spills, takes more shared memory than its target has, or
multiplies outside the tensor cores, at D = 384 or 768.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped"

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smoothie_kernels.backends import Grads, Saved, Wanted
from smoothie_kernels.backends.triton import chunked, forward, launch, topk
from smoothie_kernels.backends.triton.tiles import FAMILIES
from smoothie_kernels.recall import KEEPS, STEP, Buckets
from smoothie_kernels.stream import Request

SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB of a program; sm_80: of all its family
MUST_FIT = (384, 768)  # widths for which a kernel must not spill
OTHER_WIDTHS = (64, 128, 256, 1024)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIXED = (("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp32"))  # of x and of the table
SCORED = (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"))  # the same, where scores are not those of distances
PROCESSORS = 132
V = 28_996
ROWS = (1, 512, 16_384)  # the tiles of few rows; parts of the vocabulary for all processors; one part
TENSOR_CORES = r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b"  # sm_80, sm_90, sm_100


class Kernel(NamedTuple):
    """A kernel as Triton would compile it."""

    target: str
    module: str
    function: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def constant(self, name: str, default: Any = None) -> Any:
        """The value of a constexpr; `default` where the kernel has none of that name, or a pointer."""
        names = list(self.signature)
        return self.constants.get((names.index(name),), default) if name in names else default

    def has(self, name: str) -> bool:
        return self.signature.get(name, "constexpr") != "constexpr"

    @property
    def name(self) -> str:
        if self.function != "_stream_kernel":
            return self.function.strip("_").removesuffix("_kernel").replace("_", " ")
        kind = "mean" if self.has("acc_ptr") else "statistics" if self.has("highest_ptr") else "nearest"
        keep = self.constant("KEEP")
        return kind + (f", keep {keep}" if keep else "") + ", redo" * self.has("only_ptr")

    @property
    def dtype(self) -> str:
        names = [name for name in ("x_ptr", "e_ptr", "smoothed_ptr") if self.has(name)]
        return "/".join(dict.fromkeys(self.signature[name].strip("*") for name in names)) or "fp32"

    @property
    def width(self) -> int:
        return int(self.constant("D", 0))

    @property
    def detail(self) -> str:
        """Its tile, and what else tells it from others of its name."""
        sizes = [str(self.constant(name)) for name in self.signature if name.startswith(("BLOCK_", "SIZE"))]
        details = {
            "one part": self.has("acc_ptr") and self.signature["acc_ptr"] != "*fp32",
            "mean": self.function == "_merge_kernel" and self.has("acc_ptr"),
            "no noise": self.has("scale_ptr") and "std_ptr" in self.signature and not self.has("std_ptr"),
            "row ids": self.has("row_ids_ptr"),
            "fields": self.has("field_weights_ptr"),
            "P": self.has("p_ptr"),
            "bound": self.function == "_merge_kernel" and not self.has("x_ptr"),
            "col": self.has("col_ptr"),
            "values": self.has("values_ptr"),
            "no gradient of smoothed": "grad_ptr" in self.signature and not self.has("grad_ptr"),
            "sum alone": "weights_ptr" in self.signature and not self.has("weights_ptr"),
        }
        return ", ".join(("x".join(sizes), *(name for name, here in details.items() if here)))

    @property
    def label(self) -> str:
        return f"{self.target} {self.name} {self.dtype} {self.width} {self.detail}"

    @property
    def key(self) -> str:
        """The same for what Triton takes for the same."""
        return repr((self.target, self.function, self.signature, self.constants, self.attributes, self.options))


# --- what is launched


class _Driver:
    """What Triton asks a driver before it compiles."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target  # kernels are cached by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        amd = self.target.startswith("gfx")
        return GPUTarget("hip", self.target, 64) if amd else GPUTarget("cuda", int(self.target[3:]), 32)


@contextmanager
def recording(target: str, *, stop: bool = True) -> Iterator[dict[str, Kernel]]:
    """The kernels that Triton is asked to compile inside, by their keys; `stop`: it neither compiles nor launches."""
    found: dict[str, Kernel] = {}

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        (attributes,) = compile["configs"]
        attributes = {at: value for at, value in attributes.items() if value}
        kernel = Kernel(target, fn.module, fn.name, compile["signature"], compile["constants"], attributes, options)
        found.setdefault(kernel.key, kernel)
        return stop

    gpu = launch.Gpu(target, PROCESSORS)
    with triton.knobs.runtime.scope(), mock.patch.object(launch, "gpu", return_value=gpu):
        triton.knobs.runtime.jit_cache_hook = hook
        yield found


def recorded(target: str, *, all_types: bool = True) -> list[Kernel]:
    """Every kernel of every launcher, for plain calls: tensors are aligned, and their rows lie side by side.

    all_types=False leaves out what hardly differs for the compiler: float16, mixed types, row ids, no noise.
    """
    triton.runtime.driver.set_active(_Driver(target))
    with recording(target) as found:
        for name, dtype in TYPES.items() if all_types else (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            for width in MUST_FIT:
                _call_all(dtype, width, all_types)
            for width in OTHER_WIDTHS if name != "fp16" else ():
                for n in ROWS:
                    inputs = _inputs(n, V, width, dtype, dtype)
                    forward.mean(inputs)
                    forward.statistics(inputs)
        for of_x, of_table in MIXED if all_types else ():
            for n in ROWS:
                inputs = _inputs(n, V, MUST_FIT[-1], TYPES[of_x], TYPES[of_table])
                for call in (_call_forward, _call_backward, _call_others):
                    call(inputs)
        for of_x, of_table in SCORED:
            for width in MUST_FIT if all_types else MUST_FIT[-1:]:
                for n in ROWS:
                    _call_scored(_inputs(n, V, width, TYPES[of_x], TYPES[of_table]))
        for cols in (V, 2**15):  # rows of a field that are not aligned, and rows that are
            for row_ids in (None, _empty(512, dtype=torch.int64)):
                forward.gaussian(_empty(512, cols), row_ids, 0, *_words())
    return list(found.values())


def _call_all(dtype: torch.dtype, d: int, all_noises: bool) -> None:
    for n in ROWS:
        plain = _inputs(n, V, d, dtype, dtype)
        noises = [plain, plain._replace(offset=_empty(3, dtype=torch.int64), field_weights=_empty(3))]
        if all_noises:
            noises += [plain._replace(row_ids=_empty(n, dtype=torch.int64)), plain._replace(std=None)]
        for inputs in noises:
            _call_forward(inputs)
            for keep in KEEPS:
                topk.approximate(inputs._replace(topk=8), Buckets(STEP, keep))
            for row_ids in (inputs.row_ids, _empty(n, dtype=torch.int64)):  # rows that are done again have ids
                topk.exact(inputs._replace(topk=8, row_ids=row_ids), inputs.scale)
            _call_backward(inputs)
        _call_others(plain)
    _call_forward(_inputs(1, 100, d, dtype, dtype))  # few rows, one part


def _call_forward(inputs: Request) -> None:
    for given in (inputs, inputs._replace(wide=True)):
        topk.step_fwd(given)
        topk.step_fwd(given._replace(workspace=0))  # streaming
    topk.step_fwd(inputs._replace(mean=False))


def _call_backward(inputs: Request) -> None:
    saved = Saved(inputs.x, _empty(len(inputs.x), dtype=torch.int64), inputs.scale, inputs.scale)
    grad = inputs.x
    for grads in (Grads(grad, inputs.scale), Grads(None, inputs.scale)):
        of_grads = saved if grads.smoothed is not None else saved._replace(smoothed=None)
        for needs_embeddings in (True, False):
            chunked.step_bwd(inputs, of_grads, grads, Wanted(True, needs_embeddings, values=needs_embeddings))


def _call_scored(inputs: Request) -> None:
    """With col, and the mean of the same table (as of cosine) or of another one."""
    n, table = len(inputs.x), inputs.embeddings
    of_table = inputs._replace(bound=_empty(n), col=_empty(len(table)), values=table)
    for given in (of_table, of_table._replace(values=torch.empty_like(table))):
        topk.step_fwd(given)
        topk.step_fwd(given._replace(workspace=0))  # streaming
        if n == ROWS[1]:
            _call_backward(given)
    topk.step_fwd(of_table._replace(mean=False))
    for keep in KEEPS:
        topk.approximate(of_table._replace(topk=8), Buckets(STEP, keep))
    topk.exact(of_table._replace(topk=8), of_table.scale)
    forward.nearest_fwd(inputs.x, table, inputs.bias, col=of_table.col)


def _call_others(inputs: Request) -> None:
    n, table = len(inputs.x), inputs.embeddings
    forward.nearest_fwd(inputs.x, table, inputs.bias)
    topk.average(_empty(n, 8), _empty(n, 8, dtype=torch.int64), table, inputs.x.dtype)


def _inputs(n: int, v: int, d: int, x_type: torch.dtype, table_type: torch.dtype) -> Request:
    seed, offset = _words()
    return Request(
        _empty(n, d, dtype=x_type), _empty(v, d, dtype=table_type), _empty(v), _empty(n), _empty(n), None, 0,
        seed, offset[None], None, workspace=2**40,
    )  # fmt: skip


def _words() -> tuple[Tensor, Tensor]:
    return _empty(dtype=torch.int64), _empty(dtype=torch.int64)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# --- what comes out


def compiled(kernel: Kernel) -> Any:
    function = getattr(importlib.import_module(kernel.module), kernel.function)
    source = ASTSource(function, kernel.signature, kernel.constants, kernel.attributes)
    return triton.compile(source, target=_Driver(kernel.target).get_current_target(), options=kernel.options)


def usage(code: Any) -> dict[str, int]:
    """Registers, spilled bytes of a thread, shared bytes of a program, tensor-core instructions."""
    if "amdgcn" in code.asm:
        text = assembly = code.asm["amdgcn"]
        patterns = {"registers": r"\.vgpr_count:\s+(\d+)", "spilled": r"\.private_segment_fixed_size:\s+(\d+)"}
        instruction = r"\bv_mfma_"
    else:
        text, assembly = _cuobjdump(code.asm["cubin"])
        patterns = {"registers": r"REG:(\d+)", "spilled": r"STACK:(\d+)"}
        instruction = TENSOR_CORES
    found = {name: int(re.findall(pattern, text)[0]) for name, pattern in patterns.items()}
    return {**found, "shared": code.metadata.shared, "tensor_cores": len(re.findall(instruction, assembly))}


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


def row_of(kernel: Kernel) -> dict[str, Any]:
    row = {name: getattr(kernel, name) for name in ("target", "name", "dtype", "width", "detail")}
    row |= {"multiplies": kernel.constant("DOT") is not None, **usage(compiled(kernel))}
    return {**row, "faults": faults(row)}


def in_processes(of: Callable[[Kernel], Any], kernels: list[Kernel], processes: int | None = None) -> Iterator[Any]:
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(of, kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="of the kernels, those whose line begins with what this finds"
    )
    parser.add_argument("--json", action="store_true", help="the table as JSON")
    arguments = parser.parse_args()
    if launch.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: there is nothing to compile")
    # sm_90 has been looked at most closely, and is what the CUDA backend's users have.
    found = (kernel for target in FAMILIES for kernel in recorded(target, all_types=target == "sm_90"))
    kernels = [kernel for kernel in found if re.search(arguments.only, kernel.label)]
    rows = []
    for row in in_processes(row_of, kernels):
        rows.append(row)
        if not arguments.json:
            print(_line(row), flush=True)
    if arguments.json:
        print(json.dumps(rows))
    return int(any(row["faults"] for row in rows))


def _line(row: dict[str, Any]) -> str:
    numbers = f"{row['registers']:>4} registers {row['spilled']:>5} spilled {row['shared'] / 1024:>6.1f} KiB"
    kernel = f"{row['target']} {row['name']} {row['dtype']} {row['width']} {row['detail']}"
    return f"{kernel:<72} {numbers} {row['tensor_cores']:>5} tensor-core  {'; '.join(row['faults'])}".rstrip()


if __name__ == "__main__":
    sys.exit(main())

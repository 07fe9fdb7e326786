"""Triton's own way to a launch, without a GPU: nothing is refused, and kernels-check has compiled what is launched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
KERNELS = {
    "_average_kernel", "_gaussian_kernel", "_merge_kept_kernel", "_merge_kernel",
    "_merge_nearest_kernel", "_stream_kernel", "chunk_bwd_kernel", "chunk_fwd_kernel", "chunk_keys_kernel",
}  # fmt: skip
pytestmark = [
    pytest.mark.compilers,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU refuses by itself"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler, of which Triton's launcher is in need")
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    link = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library)]
    subprocess.run([compiler, "-O1", "-w", *link, str(HERE / "fake_driver.c")], check=True)
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "launch_path.py"), str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_launch_is_accepted(found):
    """As many launches reach the driver as are asked for: Triton leaves out those whose grid is empty."""
    assert found["problems"] == []
    assert found["refused"] == 0
    assert found["reached"] == sum(found["asked"].values())


def test_every_kernel_is_launched(found):
    assert set(found["asked"]) == KERNELS


def test_kernels_check_compiles_what_is_launched(found):
    assert found["unknown"] == []


def test_what_is_wrong_is_found(found):
    outside, empty, refused = found["planted"]
    assert outside == "_average_kernel: outside device_of"
    assert empty == "_average_kernel: weight_ptr is empty"
    assert refused.startswith("_average_kernel: grid (1, 65536): ")

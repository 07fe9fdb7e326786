"""The main kernels compile for GPUs that are not here: no spills, shared memory that is there, tensor cores.

All of them: `make kernels-check`. Triton's interpreter is off in the process that compiles.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.compilers
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
# Of `<target> <kernel> <type> <D> <tile and what else>`: a minute for one processor, where Triton's cache is empty.
PLAIN = r"[0-9x]+$"
SUBSET = "|".join(
    (
        rf"(mean|statistics, keep 4|chunk (fwd|keys)|chunk bwd) bf16 768 {PLAIN}",
        rf"sm_.* (mean|chunk bwd) fp32 384 {PLAIN}",
        r"sm_90 (mean|mean, redo|chunk fwd) (bf16|fp16) 384 [0-9x]+(, one part)?$",
    )
)


def kernels_check(*options: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "smoothie_kernels.backends.triton.offline", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    done = kernels_check("--json", "--only", SUBSET)
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_fit(rows, target):
    mine = [row for row in rows if row["target"] == target]
    assert len(mine) >= 4
    assert [row for row in mine if row["faults"]] == []


def test_numbers_are_read(rows):
    """Not zero because a tool prints something else today."""
    for row in rows:
        assert 16 < row["registers"] <= 512
        assert row["shared"] > 1024
        assert row["tensor_cores"] > 0


def test_says_what_is_wrong():
    pytest.importorskip("smoothie_kernels.backends.triton.offline")
    from smoothie_kernels.backends.triton.offline import faults

    good = {"target": "sm_80", "width": 768, "spilled": 0, "shared": 99 << 10, "tensor_cores": 8, "multiplies": True}
    assert faults(good) == []
    assert faults({**good, "spilled": 16}) == ["spills 16 bytes"]
    assert faults({**good, "spilled": 8}) == ["spills 8 bytes"]
    assert faults({**good, "spilled": 16, "width": 1024}) == []
    assert faults({**good, "spilled": 8, "multiplies": False}) == ["spills 8 bytes"]
    assert faults({**good, "shared": 100 << 10}) == ["takes 100 KiB of shared memory, sm_80 has 99"]
    assert faults({**good, "tensor_cores": 0}) == ["multiplies outside the tensor cores"]
    assert faults({**good, "tensor_cores": 0, "multiplies": False}) == []


def test_exit_status_says_it_too():
    done = kernels_check("--only", "gfx942 merge nearest bf16 384")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gfx942 merge nearest bf16 384 ")


def test_not_in_the_interpreter():
    done = kernels_check(interpret="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stderr

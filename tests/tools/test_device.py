"""The calls for a GPU machine lose nothing: a hang, a crash, a wrong result and an exception cost their own row."""

import json
import tarfile
from pathlib import Path

import planted
import pytest

pytest.importorskip("rich", reason="the suite prints with rich")
pytest.importorskip("tokenizers", reason="the suite reads text with tokenizers")
pytest.importorskip("xdist", reason="the call runs tests on several workers")
pytest.importorskip("pytest_timeout", reason="the call gives each test a time limit")

from benchmarks.common import machine
from benchmarks.common.machine import Machine
from benchmarks.common.report import Report, Row
from benchmarks.hopper import bars, device, worker

MACHINE = Machine("NVIDIA H100", "host", 2, 2, "", 8.0, {"torch": "2"}, "abcdef0", "2026-01-01")
FAULTY_TESTS = """
import os, signal, time, pytest
@pytest.mark.parametrize("i", range(4))
def test_right(i): pass
def test_wrong(): assert 1 == 2, "planted"
def test_hangs(): time.sleep(1000)
def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def test_fails_beside_others():
    assert "PYTEST_XDIST_WORKER" not in os.environ
"""


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Makes a call with planted faults; its exit code, and the folder of its results."""
    monkeypatch.setattr(device, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(device, "MATERIAL", tmp_path / "material.pt")
    monkeypatch.setattr(device.rehearsal, "emulator", lambda: None)
    monkeypatch.setattr(worker, "SILENT", worker.SILENT | {"check": 15, "time": 15})
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # the call has workers of its own
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(device.Call, "env", {"PYTHONPATH": f"{machine.ROOT}:{Path(__file__).parent}"})

    def run(name: str, *more: str) -> tuple[int, Path]:
        code = device.main([name, "--rehearse", "planted", "--out", str(tmp_path / "out"), *more])
        with tarfile.open(next((tmp_path / "out").glob("*.tar.gz"))) as archive:
            archive.extractall(tmp_path / "results", filter="data")
        return code, next((tmp_path / "results").iterdir())

    return run


@pytest.mark.slow
def test_a_fault_costs_its_own_row(call, capsys):
    code, results = call("measure", "--only", ",".join(planted.CASES))
    assert code == 1
    report = Report.load(next(results.glob("*.json")))
    rows = {(row.case, row.contestant): row for row in report.rows}
    of_step = {who: rows[planted.STEP, who] for who in planted.ALL}
    for who in (planted.RIGHT, "chunked", "products"):
        assert rows[planted.STEP, who].seconds, who
    assert of_step[planted.WRONG].note.startswith("wrong: ")
    assert of_step[planted.RAISES].note == "wrong: RuntimeError: planted"
    assert of_step[planted.CRASHES].note == "wrong: crash: SIGSEGV"
    assert of_step[planted.HANGS].note == f"absent: hang: {planted.HANGS}"
    assert rows[planted.NEAREST, planted.RIGHT].seconds
    assert rows[planted.RATES, "copy"].gb_per_s
    failed = (results / "failed.txt").read_text()
    for who in (planted.WRONG, planted.RAISES, planted.CRASHES):
        assert f"{planted.STEP}, {who}: wrong" in failed
    assert planted.NEAREST not in failed
    assert "planted.py" in "".join(path.read_text() for path in results.glob("*.txt"))  # where it hung


@pytest.mark.slow
def test_a_test_that_hangs_or_crashes_costs_itself(call, tmp_path, monkeypatch):
    (tmp_path / "test_faulty.py").write_text(FAULTY_TESTS)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    monkeypatch.setattr(device, "ROOT", tmp_path)
    monkeypatch.setattr(device, "TESTS", ("test_faulty.py",))
    monkeypatch.setattr(device, "TEST_SECONDS", 5)
    monkeypatch.setattr(device, "LEAST_SECONDS", 1)
    monkeypatch.setitem(device.CALLS, "probe", device.tests)
    code, results = call("probe")
    assert code == 1
    lines = [json.loads(line) for line in (results / "tests.jsonl").read_text().splitlines()]
    assert sum(line["outcome"] == "passed" for line in lines) == 4
    failed = (results / "failed.txt").read_text().splitlines()
    assert {*failed} == {f"test_faulty.py::test_{what}: failed" for what in ("wrong", "hangs", "crashes")}


def test_where_no_test_file_is_wanted_none_runs(call, monkeypatch):
    ran = []
    monkeypatch.setitem(device.CALLS, "probe", device.tests)
    monkeypatch.setattr(device.Call, "run", lambda call, name, command, *_, **__: ran.append(command))
    assert call("probe", "--only", "gpu-*")[0] == 0
    assert ran == []


def test_a_call_without_time_says_what_it_left_out(call):
    code, results = call("measure", "--only", ",".join(planted.CASES), "--seconds", "0")
    assert code == 1
    failed = (results / "failed.txt").read_text()
    assert all(case in failed for case in planted.CASES)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device.main(["measure"]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_a_copy_without_git_knows_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_git", lambda *arguments: "")
    monkeypatch.setattr(machine, "STAMP", tmp_path / "commit")
    assert machine.commit() == "unknown"
    (tmp_path / "commit").write_text("abcdef0123\n")
    assert machine.commit() == "abcdef0"


# --- bars


def row(case: str, who: str, seconds: float, **more: object) -> Row:
    return Row(case, who, "step", 1, 2, 3, "bfloat16", True, ours="[" in who, seconds=seconds, **more)


def test_bars_are_met_and_missed_by_the_numbers():
    rows = [
        row(bars.STEP, bars.CUDA, 2.0, gflop_per_s=532e3, efficiency=1.02, peak_extra_bytes=400 * 2**20),
        row(bars.STEP, bars.TRITON, 4.0),
        row(bars.STEP, "eager", 13.0),
        row(bars.STEP, "eager, float32", 22.0),
        row(bars.QUIET, bars.CUDA, 1.8),
        *(row(case, bars.CUDA, 1.0, gb_per_s=rate) for case, rate in zip(bars.GRAPHS, (900, 700, 800), strict=True)),
        row(bars.STATISTICS, "statistics[cuda]", 1.0, gflop_per_s=490e3, efficiency=1.2),
        row("gpu-rates", "copy", 1.0, gb_per_s=1000),
        row("gpu-rates", "square product, bfloat16", 1.0, gflop_per_s=700e3),
        row("gpu-rates", "square product, float32", 1.0, gflop_per_s=50e3),
    ]
    found = {cells[0]: cells[1:] for cells in bars.section(Report(MACHINE, rows=rows)).cells}
    assert found["cuda, step, of the measured GEMM rate"] == ("≥ 60%", "≥ 75%", "76%", "goal")
    assert found["cuda, statistics, of the measured GEMM rate"] == ("≥ 65%", "≥ 80%", "70%", "met")
    assert found["cuda, what noise adds"] == ("≤ 15%", "≤ 10%", "11%", "met")
    assert found["best of ours, eager float32 over it"][2:] == ("11.00", "**missed**")
    assert found["best of ours, eager bfloat16 over it"][2:] == ("6.50", "goal")
    assert found["triton, eager bfloat16 over it"][2:] == ("3.25", "met")
    assert found["N = 1 to 64 in a graph, of the copy's rate"][2:] == ("70%", "met")
    assert found["cuda, step, peak extra memory"][2:] == ("419 MB", "**missed**")
    assert "forward and backward, compiled over it" not in found
    assert bars.section(Report(MACHINE)).cells == []

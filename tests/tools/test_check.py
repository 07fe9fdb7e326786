"""`smoothie-kernels check`: what breaks in one probe costs no other; results that are wrong are seen, and where."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from smoothie_kernels import fused_smoothie_step, noise
from smoothie_kernels.backends import cpu, cuda
from smoothie_kernels.check import command, cuda_kernels, machine, probes
from smoothie_kernels.check.findings import Findings, histogram, where
from smoothie_kernels.check.isolate import run_command
from smoothie_kernels.check.plan import probes_of
from smoothie_kernels.check.probes import Probe, Target
from smoothie_kernels.check.run import Result, run_here, run_isolated, run_probe
from smoothie_kernels.testing import check_step, check_topk, compare, compare_step

TARGET = Target("reference", "cpu", (torch.float32,), "cpu")
CPU = Target("cpu", "cpu", (torch.float32,), "cpu")


def check(*options: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(machine.ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "smoothie_kernels.cli", "check", *options]
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


# --- planted: each a function that another process finds


def good(found: Findings, on: Target) -> None:
    found.case("first")
    found.within("number", torch.ones(3), torch.full((3,), 1.5), 0.75)


def hangs(found: Findings, on: Target) -> None:
    good(found, on)
    found.case("the one that hangs")
    subprocess.Popen(["sleep", "987"])  # what a probe has started ends with it
    time.sleep(60)


def crashes(found: Findings, on: Target) -> None:
    good(found, on)
    found.case("the one that crashes")
    os.kill(os.getpid(), signal.SIGSEGV)


def raises(found: Findings, on: Target) -> None:
    found.case("the one that raises")
    raise ValueError("planted")


def is_wrong(found: Findings, on: Target) -> None:
    found.case("the one that is wrong")
    got, wanted = torch.zeros(130, 129), torch.zeros(130, 129)
    got[64:96, 8::8] = 3
    found.within("product", got, wanted, 0.5)


def ends(found: Findings, on: Target) -> None:
    os._exit(3)


PLANTED = [
    Probe("good", TARGET, good),
    Probe("hang", TARGET, hangs, seconds=3),
    Probe("crash", TARGET, crashes),
    Probe("error", TARGET, raises),
    Probe("wrong", TARGET, is_wrong),
    Probe("ends", TARGET, ends),
    Probe("good again", TARGET, good),
]


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> tuple[int, str, str]:
    """Exit code, output, and the file of --out, of the planted probes."""
    out, printed = tmp_path_factory.mktemp("check") / "out.jsonl", io.StringIO()
    with redirect_stdout(printed):
        code = command.report(run_isolated(PLANTED, 2), {"torch": "2"}, {"cuda": "no"}, out, time.monotonic())
    return code, printed.getvalue(), out.read_text()


def test_what_breaks_costs_no_other(reported):
    code, printed, out = reported
    assert code == 1
    found = {line["probe"]: line for line in lines_of(printed)}
    assert {name: line["outcome"] for name, line in found.items()} == {
        "good": "ok", "hang": "hang", "crash": "crash", "error": "error", "wrong": "wrong", "ends": "error",
        "good again": "ok",
    }  # fmt: skip
    assert lines_of(out) == list(found.values())
    assert {line["backend"] for line in found.values()} == {"reference"}
    figures = {"number": {"error": 0.5, "bound": 0.75, "case": "first"}}
    for name in ("good", "good again", "hang", "crash"):  # which had come as far
        assert found[name]["figures"] == figures
    assert all(0 <= line["seconds"] < 30 for line in found.values())


def test_says_what_broke_and_where(reported):
    found = {line["probe"]: line for line in lines_of(reported[1])}
    assert (found["hang"]["message"], found["hang"]["case"]) == ("stopped after 3 s", "the one that hangs")
    assert "in hangs" in found["hang"]["tail"]  # the stack
    assert (found["crash"]["message"], found["crash"]["case"]) == ("killed by SIGSEGV", "the one that crashes")
    assert "in crashes" in found["crash"]["tail"]
    assert (found["error"]["message"], found["error"]["case"]) == ("ValueError: planted", "the one that raises")
    assert "in raises" in found["error"]["tail"]
    assert found["ends"]["message"] == "exit code 3, before it had a result"
    [wrong] = found["wrong"]["wrong"]
    assert wrong == {
        "result": "product", "case": "the one that is wrong", "error": 3.0, "bound": 0.5, "elements": 512, "of": 16770,
        "row % 64": "0-31: 16", "column % 8": "0: 512", "column // 64": "0: 224, 1: 256, 2: 32",
    }  # fmt: skip


def test_ends_with_a_table_and_a_block_to_paste(reported):
    lines = reported[1].splitlines()
    assert "reference       2      1      2      1      1" in lines
    assert "CRASH reference, crash: killed by SIGSEGV; at the one that crashes" in lines
    assert "ERROR reference, ends: exit code 3, before it had a result; at its start" in lines
    assert "cuda cannot run: no" in lines
    block = lines[lines.index("--- for a bug report") :]
    assert block[1:3] == ["torch: 2", "reference, hang: hang"] or "reference, hang: hang" in block
    assert block[-1] == "---"


def test_a_probe_s_own_processes_end_with_it(reported):
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 987" not in running.splitlines()


def test_nothing_that_could_run_is_no_success(capsys):
    assert command.report(run_isolated([], 1), {}, {}, None, 0.0) == 2
    assert command.report(run_isolated([PLANTED[0]], 1), {}, {}, None, 0.0) == 0
    assert lines_of(capsys.readouterr().out)[0]["outcome"] == "ok"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_probes_go_on_without_a_file_that_cannot_be_written_to(capsys):
    results = (Result(name, "reference", "ok", 0.0, {}) for name in ("one", "two"))
    assert command.report(results, {}, {}, Path("/dev/full"), time.monotonic()) == 2
    printed = capsys.readouterr()
    assert len(lines_of(printed.out)) == 2
    assert printed.err == "smoothie-kernels check: --out cannot be written to: [Errno 28] No space left on device\n"


def test_an_interrupt_ends_the_probe_that_runs(tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "import test_check as t\n"
        "if __name__ == '__main__':\n"
        "    hang = t.Probe('hang', t.TARGET, t.hangs)\n"
        "    sys.exit(t.command.report(t.run_isolated([t.PLANTED[0], hang], 1), {}, {}, None, 0.0))\n"
    )
    log = tmp_path / "log.txt"
    process = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(machine.ROOT)}, stdout=log.open("w")
    )
    while '"good"' not in log.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    assert log.read_text().splitlines()[-2].startswith("1 probes, 0 not ok, ")
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 987" not in running.splitlines()


# --- what is really broken


def with_bad_constant(found: Findings, on: Target) -> None:
    """The cpu backend, held against a field of another constant."""
    noise.MULTIPLIER ^= 1
    probes.noise_field(found, on, [(64, 128)])


def with_bad_tile(found: Findings, on: Target) -> None:
    """A kernel that writes nothing for the last rows of a tile."""
    step_fwd = cpu.step_fwd

    def bad(inputs):
        out = step_fwd(inputs)
        out.smoothed[48:64, 5::8] = torch.nan
        out.lse[48:64] += 1
        return out

    cpu.step_fwd = bad
    probes.step(found, on, torch.float32, [(128, 70, 64)])


def with_unwritten_tokens(found: Findings, on: Target) -> None:
    step_fwd = cpu.step_fwd
    cpu.step_fwd = lambda request: step_fwd(request)._replace(tokens=torch.empty(len(request.x), dtype=torch.int64))
    probes.nearest(found, on, torch.float32, [(33, 70, 24)])


@pytest.mark.skipif(cpu.supports("cpu", torch.float32) is not None, reason="the cpu backend cannot run")
def test_what_is_broken_is_seen():
    broken = [Probe(f.__name__, CPU, f) for f in (with_bad_constant, with_bad_tile, with_unwritten_tokens)]
    found = {result.probe: result for result in run_isolated(broken, 2)}
    assert {result.outcome for result in found.values()} == {"wrong"}
    field = found["with_bad_constant"].found
    assert field["wrong"][0]["elements"] > 0.9 * 64 * 128
    assert field["figures"]["field"]["error"] > 1
    step = {wrong["result"]: wrong for wrong in found["with_bad_tile"].found["wrong"]}
    assert step.keys() == {"smoothed", "lse"}
    assert (step["smoothed"]["row % 64"], step["smoothed"]["column % 8"]) == ("48-63: 8", "5: 128")
    assert (step["lse"]["elements"], step["lse"]["row % 64"]) == (16, "48-63: 1")
    assert step["smoothed"]["error"] == "nan"
    tokens = {wrong["result"] for wrong in found["with_unwritten_tokens"].found["wrong"]}
    assert {"nearest, in the table", "own token"} <= tokens


def test_what_no_kernel_wrote_is_wrong():
    """NaN, and tokens that are none: not an error of indexing, which on a GPU would end the process."""
    compared = compare("number", torch.tensor([0.0, torch.nan, 2.0]), 1.0)
    assert compared.off.tolist() == [False, True, True]
    on = Target("reference", "cpu", (torch.float32,), "cpu")
    x, table = probes.inputs(on, 5, 40, 8, torch.float32)
    got = fused_smoothie_step(x, table, 0.1, 0.9, **probes.KEY, topk=3, backend="reference")
    given = probes.noisy(x, table, 0.1, 0.9)
    assert check_step(got, *given) == check_topk(got.topk, *given) == []
    for none in (torch.iinfo(torch.int64).max, 40, -1):
        tokens, indices = got.tokens.clone(), got.topk.indices.clone()
        tokens[3] = indices[3, 1] = none
        off = [each for each in compare_step(got._replace(tokens=tokens), *given) if each.wrong]
        assert [(each.name, each.off.nonzero().tolist()) for each in off] == [("tokens", [[3]])]
        assert any("values" in wrong for wrong in check_topk(got.topk._replace(indices=indices), *given))


def test_histograms():
    assert histogram(torch.tensor([3, 1, 2, 2, 9])) == "1: 1, 2: 2, 3: 1, 9: 1"
    assert histogram(torch.arange(0, 40, 2)).endswith("14: 1, and 12 more")
    assert where(torch.tensor(True)) == {"elements": 1, "of": 1, "row % 64": "0: 1"}
    off = torch.zeros(2, 70, 3, dtype=torch.bool)
    off[1, 0, 2] = True
    assert where(off)["row % 64"] == "6: 1"


# --- the command


@pytest.mark.slow
def test_on_the_cpu(tmp_path):
    """Without a GPU the cpu and reference backends, twenty probes and more."""
    done = check("--quick", "--out", str(tmp_path / "out.jsonl"), CUDA_VISIBLE_DEVICES="")
    lines = lines_of(done.stdout)
    assert [(line["probe"], line["outcome"]) for line in lines if line["outcome"] != "ok"] == []
    assert done.returncode == 0, done.stderr
    wanted = {"reference", *(["cpu"] if not cpu.supports("cpu", torch.float32) else [])}
    assert len(lines) >= 10 * len(wanted)
    assert {line["backend"] for line in lines} == wanted
    assert all({"probe", "backend", "outcome", "seconds", "cases", "figures"} == line.keys() for line in lines)
    assert all(line["cases"] > 0 and line["figures"] for line in lines)
    assert lines_of((tmp_path / "out.jsonl").read_text()) == lines
    assert f"torch: {torch.__version__}" in done.stdout


@pytest.mark.interpreter
def test_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    done = check("--backend", "triton", "--quick", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    lines = lines_of(done.stdout)
    assert [(line["probe"], line["outcome"]) for line in lines if line["outcome"] != "ok"] == []
    assert done.returncode == 0, done.stderr
    assert len(lines) >= 9
    assert {line["backend"] for line in lines} == {"triton"}


def test_kernels_of_cuda_in_the_emulator(hopper_library, tmp_path):
    """Each kernel once."""
    library, device = hopper_library
    emulated = library if device == "cpu" else None
    on = Target("cuda", device, (torch.bfloat16, torch.float16), "tiny", gradients=False, emulated=emulated)
    tiles = "8 resident TMA tiles"
    names = {f"raw products, cluster 2, {tiles}", f"modes of score, cluster 1, {tiles}", "prepare", "stream, D = 64"}
    names |= {"narrow, cluster 2, D = 64"}
    some = [probe for probe in probes_of(on, quick=False) if probe.name in names]
    assert len(some) == 5
    for result in run_isolated(some, 2):
        assert result.outcome == "ok", result.json()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "rocm"], "--backend must be one of cuda, cpu, triton, reference, got 'rocm'"),
        (["--backend", "cpu,rocm"], "got 'rocm'"),
        (["--out", "nowhere/at/all.jsonl"], "--out must be a file in a folder that exists, got 'nowhere/at/all.jsonl'"),
        (["--out", "."], "--out must be a file in a folder that exists, got '.'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.command(options)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1  # without the usage


def test_a_named_backend_that_cannot_run_says_why(monkeypatch, capsys):
    cannot = machine.Description({}, {}, {"cuda": "torch finds no NVIDIA GPU"})
    monkeypatch.setattr(command, "describe_isolated", lambda emulated: ("forkserver", cannot))
    assert command.command(["--backend", "cuda"]) == 2
    assert "backend 'cuda' cannot run: torch finds no NVIDIA GPU" in capsys.readouterr().err


def only_alone(emulated, path):
    if "torch._dynamo" in sys.modules:
        raise RuntimeError("a fork of a server that has touched the GPU")
    torch.save(machine.Description({}, {}, {"cuda": "planted"}), path)


def never(emulated, path):
    raise RuntimeError("no driver")


@pytest.mark.slow
def test_processes_that_cannot_be_forked_are_started(monkeypatch):
    monkeypatch.setattr(command, "_describe_to", only_alone)
    assert command.describe_isolated(None) == ("spawn", machine.Description({}, {}, {"cuda": "planted"}))
    monkeypatch.setattr(command, "_describe_to", never)
    with pytest.raises(RuntimeError, match=r"(?s)cannot say what runs on this machine: exit code 1\n.*no driver"):
        command.describe_isolated(None)


def test_all_in_one_process(capfd):
    """For compute-sanitizer. What calls as a user does is left out."""
    results = [*run_here([*PLANTED[3:5], PLANTED[0], Probe("large", TARGET, good, as_used=True)])]
    torch.set_deterministic_debug_mode("default")
    assert [(result.probe, result.outcome) for result in results] == [
        ("error", "error"), ("wrong", "wrong"), ("good", "ok"),
    ]  # fmt: skip


def test_a_plan_ends_with_its_launches():
    usual = cuda.pick_cluster, cuda.pick_chunks, cuda.RESIDENT
    with cuda_kernels.plan(4, 3, 0):
        assert (cuda.pick_cluster(9), cuda.pick_chunks(1, 2, 132), cuda.RESIDENT) == (4, 2, 0)
    assert (cuda.pick_cluster, cuda.pick_chunks, cuda.RESIDENT) == usual


def test_every_target_has_probes_of_all_its_kernels():
    sizes = {"cpu": ("cpu",), "reference": ("cpu", "gpu"), "triton": ("gpu", "tiny"), "cuda": ("gpu", "tiny")}
    for backend, of in sizes.items():
        for size in of:
            some = probes_of(Target(backend, "cuda", (torch.bfloat16, torch.float16), size), quick=False)
            names = [probe.name for probe in some]
            assert len(set(names)) == len(names) >= 20
            assert names[0] == "noise field"
            quick = probes_of(Target(backend, "cuda", (torch.bfloat16, torch.float16), size), quick=True)
            assert 9 <= len(quick) <= 17
            shapes = [shape for probe in some for shape in probe.arguments["shapes"] if len(shape) == 3]
            assert backend != "cuda" or not any(d % 8 for _, _, d in shapes)


# --- commands with a time limit


def test_a_command_and_its_end(tmp_path):
    ended = run_command(
        [sys.executable, "-c", "import os; print(os.environ['PLANTED'])"], 30, tmp_path / "log", {"PLANTED": "here"}
    )
    assert (ended.code, ended.tail, str(ended)) == (0, "here", "exit code 0")
    ended = run_command(["sh", "-c", "echo before; kill -9 $$"], 30, tmp_path / "log")
    assert (ended.code, ended.tail, str(ended)) == (-9, "before", "killed by SIGKILL")


def test_a_command_is_interrupted_before_it_is_killed(tmp_path, monkeypatch):
    polite = "import time\ntry: time.sleep(50)\nexcept KeyboardInterrupt: print('what it knows')"
    ended = run_command([sys.executable, "-c", polite], 1, tmp_path / "log")
    assert (ended.code, ended.tail, str(ended)) == (None, "what it knows", "stopped after 1 s")
    monkeypatch.setattr("smoothie_kernels.check.isolate.GRACE", 0.5)
    ended = run_command(["sh", "-c", "trap '' INT; sleep 986 & wait; sleep 986"], 0.5, tmp_path / "log")
    assert ended.code is None
    assert ended.seconds < 10
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 986" not in running.splitlines()


def test_run_probe_writes_its_outcome(tmp_path):
    run_probe(PLANTED[0], tmp_path / "found.json", 1, watchdog=False)
    torch.set_deterministic_debug_mode("default")
    assert json.loads((tmp_path / "found.json").read_text())["outcome"] == "ok"

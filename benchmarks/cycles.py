"""What the machine code of the kernels for Hopper says of their speed, without a GPU: python -m benchmarks cycles.

Compiles csrc/cuda, reads registers and spills, follows the instructions of one tile of the score kernel through its
steady state, and sets what they take beside the other limits of a multiprocessor. All of it is arithmetic.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.sections import Section
from smoothie_kernels.backends.blocks import cdiv, pick_block
from smoothie_kernels.backends.cuda import RESIDENT, SCORE, START, pick_chunks, pick_cluster, pick_rows

SOURCES = ("score", "stream", "narrow")
FLAGS = ("-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr", "-Xptxas", "-v")
MODES = {"nearest": 0, "statistics": 1, "weights": 5, "keep 4": 4}  # Mode in csrc/cuda/params.h
COUNTED = (("nearest", False), ("statistics", False), ("statistics", True), ("weights", False), ("weights", True),
           ("keep 4", True))  # fmt: skip
PIECES = {"keep 4": 8}  # of a tile's epilogue, csrc/cuda/epilogue.h; of all others four
THREADS = 2 * 128  # that make the epilogue
LOGITS = SCORE.n * SCORE.v // THREADS  # of a tile, of a thread
BOX = 64  # columns
MOST = 30_000  # instructions of a tile, before the way through them counts as lost

# A multiprocessor in a cycle: operations of the CUDA C++ Programming Guide's table of arithmetic throughput, column
# 9.0; the tensor cores' rate is that of the H200's data sheet, 989 TFLOP/s, at PROCESSORS and CLOCK.
LANES = {"issue": 128, "MUFU": 16, "integer multiply": 64, "integer, compare": 64}
PROCESSORS, CLOCK = 132, 1.83e9
TENSOR_FLOP, SHARED_BYTES, L2_BYTES = 4096, 128, 25
LIBRARY = 700e12  # flop/s of the library's products
SEESAW, REGISTERS = (
    0.80,
    240,
)  # share of the peak that FlashMLA reaches, without noise; registers of a consumer's thread
LAUNCHES = 0.1e-3  # seconds of a step in merging, launches and sums
N, V, WIDTHS = 16_384, 28_996, (384, 512, 768, 1024)
WORKSPACE = 2**28

Instruction = tuple[int, str, str, str]  # address, guard, operation, operands


class CannotCount(Exception):
    """Why the machine code cannot be made here, or not be followed."""


# --- the machine code


@dataclass(frozen=True)
class Compiled:
    """One kernel as ptxas made it."""

    name: str
    registers: int
    spilled: int
    instructions: list[Instruction]

    def count(self, operation: str) -> int:
        return sum(name.partition(".")[0] == operation for _, _, name, _ in self.instructions)


def compile_kernels() -> dict[str, Compiled]:
    """By mangled name. CannotCount where there is no nvcc, or nothing that reads what it wrote."""
    nvcc, reader = shutil.which("nvcc"), find_cuobjdump()
    if nvcc is None or reader is None:
        raise CannotCount("it takes nvcc and cuobjdump (of the CUDA toolkit, or Triton's)")
    found: dict[str, Compiled] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            output = Path(folder) / f"{source}.cubin"
            command = [nvcc, *FLAGS, f"-I{ROOT}/csrc/cuda/sm90", "-cubin", f"{ROOT}/csrc/cuda/{source}.cu"]
            log = _output([*command, "-o", str(output)])
            found |= read(log, _output([reader, "-sass", str(output)]))
    return found


def find_cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton and triton.origin:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return found


def read(log: str, listing: str) -> dict[str, Compiled]:
    """Of `ptxas -v` and `cuobjdump -sass`."""
    usage = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = [re.search(pattern, part) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
        if not all(numbers):
            raise CannotCount("ptxas does not say what a kernel takes")
        registers, spilled = (int(number[1]) for number in numbers if number)
        usage[part.partition("'")[0]] = registers, spilled
    found = {}
    for part in re.split(r"Function : ", listing)[1:]:
        name = part.split()[0]
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", part, re.MULTILINE)
        code = [(int(at, 16), guard.strip(), operation, rest.strip()) for at, guard, operation, rest in lines]
        found[name] = Compiled(name, *usage[name], code)
    return found


def kernel(compiled: dict[str, Compiled], mode: str) -> Compiled:
    """The score kernel in bfloat16."""
    wanted = re.compile(rf"score_kernelI13__nv_bfloat16LN.*4ModeE{MODES[mode]}E")
    for name, found in compiled.items():
        if wanted.search(name):
            return found
    raise CannotCount(f"there is no score kernel for {mode}")


# --- the way through one tile


def tile(code: list[Instruction], mode: str, noise: bool, boxes: int) -> Counter[str]:
    """Instructions that a warp issues for one tile, by operation: from one tile's barrier to the next one's.

    Branches are told apart by what they jump over. What is rare is left out: a better token than the best so far, the
    vocabulary's ragged end, a box that has not arrived, a second noise field. CannotCount where products or
    exponentials do not come out as many as a tile has.
    """
    at = {address: i for i, (address, *_) in enumerate(code)}
    barriers = [i for i, (_, _, name, rest) in enumerate(code) if name.startswith("BAR.SYNC") and rest.startswith("R")]
    products = [i for i, (_, _, name, _) in enumerate(code) if name.startswith("HGMMA")]
    if len(barriers) < 2 or not products:
        raise CannotCount("no two tiles were found")
    pieces, resident = PIECES.get(mode, 4), min(RESIDENT, boxes)
    box, piece, ends = 0, -1, 0
    found: Counter[str] = Counter()

    def has(names: tuple[str, ...], first: int, last: int) -> int:
        return sum(name.startswith(names) for _, _, name, _ in code[first:last])

    def forward(i: int, j: int) -> bool:
        nonlocal piece
        waits, arrivals = has(("SYNCS.PHASECHK",), i, j), has(("SYNCS.ARRIVE",), i, j)
        if j > products[-1] or (has(("BAR.SYNC", "LDG"), i, j) and not has(("MUFU",), i, j)):
            return False
        if has(("HGMMA",), i, j):  # no box in this piece
            piece += 1
            return cdiv(piece * boxes, pieces) == cdiv((piece + 1) * boxes, pieces)
        if has(("IMAD.WIDE.U32",), i, j) > 14:
            return not noise
        if waits:
            return box < resident
        if arrivals == 2:
            return box < 2
        return box - 2 < resident if arrivals else True

    def backward(i: int, j: int) -> bool:
        nonlocal box, ends
        if has(("HGMMA",), j, i):
            box += 1
            return box < cdiv((piece + 1) * boxes, pieces)
        ends += has(("SYNCS.ARRIVE",), j, i) > 0
        return ends == 1  # the last two boxes are given back

    i = barriers[0]
    while i != barriers[1] or not found:
        _, guard, name, rest = code[i]
        found[name] += 1
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if name.startswith("BRA") else None
        i += 1
        j = at.get(int(target[1], 16), i) if target else i
        if j != i and (not guard or (forward(i - 1, j) if j > i else backward(i - 1, j))):
            i = j
        if i >= len(code) or found.total() > MOST:
            raise CannotCount("the way through a tile was lost")
    exponentials = 0 if mode == "nearest" else LOGITS
    for what, wanted in (("HGMMA", 4 * boxes), ("MUFU.EX2", exponentials), ("MUFU.SIN", noise * LOGITS // 2)):
        counted = sum(number for name, number in found.items() if name.startswith(what))
        if counted != wanted:
            raise CannotCount(f"{mode}, {boxes} boxes: {counted} {what} in a tile, not {wanted}")
    return found


def kind(name: str) -> str:
    first = name.partition(".")[0]
    if name.startswith("IMAD"):
        return "integer multiply"
    if first in ("MUFU", "HGMMA", "SHFL", "LDS", "STS", "STG", "LDG"):
        return first
    if first in ("FADD", "FMUL", "FFMA"):
        return "float"
    if first.startswith("U") or first in ("R2UR", "S2UR"):
        return "uniform"
    if first in ("BRA", "BSSY", "BSYNC", "NOP", "BAR", "WARPGROUP", "SYNCS", "LDC", "CS2R"):
        return "control"
    return "integer, compare"


def of_kind(counts: Counter[str], wanted: str) -> float:
    """A logit's."""
    return sum(number for name, number in counts.items() if wanted in ("issue", kind(name))) / LOGITS


# --- limits: cycles of a multiprocessor for a logit


@dataclass(frozen=True)
class Limits:
    width: int
    tensor: float  # 2 D flop
    shared: float  # boxes written, operands of products read
    l2: float  # boxes fetched
    lanes: dict[str, float]  # by LANES

    @property
    def most(self) -> float:
        """If all of them overlap."""
        return max(self.tensor, self.shared, self.l2, *self.lanes.values())

    @property
    def in_turn(self) -> float:
        """If the threads wait for the products, and the products for the threads."""
        return max(self.tensor, self.shared, self.l2) + self.lanes["issue"]


def limits(width: int, counts: Counter[str]) -> Limits:
    boxes, tile_logits = cdiv(width, BOX), SCORE.n * SCORE.v
    box_bytes = SCORE.v * BOX * 2
    again = max(0, boxes - RESIDENT)  # boxes of x that come with every tile
    # A product of 64 rows, 128 tokens and 16 columns reads both operands; every warpgroup its own.
    operands = (64 + SCORE.v) * 16 * 2 * 2 * 4 * boxes
    return Limits(
        width,
        2 * boxes * BOX / TENSOR_FLOP,
        (operands + (boxes + again) * box_bytes) / tile_logits / SHARED_BYTES,
        (boxes / pick_cluster(cdiv(N, SCORE.n)) + again) * box_bytes / tile_logits / L2_BYTES,
        {name: of_kind(counts, name) / lanes for name, lanes in LANES.items()},
    )


@dataclass(frozen=True)
class Prediction:
    """Seconds, at best and at worst."""

    width: int
    product: float  # one, by the library
    step: tuple[float, float]
    statistics: tuple[float, float]

    @property
    def efficiency(self) -> tuple[float, float]:
        return 2 * self.product / self.step[1], 2 * self.product / self.step[0]

    @property
    def statistics_efficiency(self) -> tuple[float, float]:
        return self.product / self.statistics[1], self.product / self.statistics[0]


def seconds(cycles: float, n: int, v: int) -> float:
    """Of a pass of n rows and v tokens: blocks of rows, in chunks of the tokens, on all multiprocessors."""
    rows, tiles = cdiv(n, SCORE.n), cdiv(v, SCORE.v)
    rows = cdiv(rows, pick_cluster(rows)) * pick_cluster(rows)
    chunks = pick_chunks(rows, tiles, PROCESSORS)
    tiles_in_turn = cdiv(rows * chunks, PROCESSORS) * (cdiv(tiles, chunks) + START)
    return tiles_in_turn * SCORE.n * SCORE.v * cycles / CLOCK


def predict(weights: Limits, statistics: Limits) -> Prediction:
    """Weights of some rows and tokens, as the backend takes them, and the library's product after them."""
    width = weights.width
    block_n, block_v = pick_block(
        N, V, WORKSPACE, 2, 4 * width + 20 * cdiv(V, SCORE.v), SCORE, pick_rows(width, PROCESSORS)
    )
    product = 2 * N * V * width / LIBRARY
    shapes = [(min(block_n, N - row), min(block_v, V - token)) for row in range(0, N, block_n)
              for token in range(0, V, block_v)]  # fmt: skip
    score = [sum(seconds(cycles, *shape) for shape in shapes) for cycles in (weights.most, weights.in_turn)]
    alone = [seconds(cycles, N, V) for cycles in (statistics.most, statistics.in_turn)]
    low, high = (each + product + LAUNCHES for each in score)
    return Prediction(width, product, (low, high), (alone[0], alone[1]))


# --- tables


def sections(compiled: dict[str, Compiled]) -> dict[str, Section]:
    """By the names of the tables in the page of the docs."""
    by_width = {width: {what: tile(kernel(compiled, what[0]).instructions, *what, cdiv(width, BOX)) for what in COUNTED}
                for width in WIDTHS}  # fmt: skip
    bounds = {width: limits(width, counts["weights", True]) for width, counts in by_width.items()}
    predictions = [
        predict(bounds[width], limits(width, counts["statistics", True])) for width, counts in by_width.items()
    ]
    return {
        "compiled": Section(
            "Compiled", "", ("kernel", "registers", "spilled", "instructions", "HGMMA", "UTMALDG"),
            [*compiled_cells(compiled)],
        ),
        "instructions": Section(
            "Instructions a logit", "", ("score kernel", *(f"D = {width}" for width in WIDTHS), *_KINDS),
            [*instruction_cells(by_width)],
        ),
        "limits": Section("Cycles a logit", "", ("", *(f"D = {width}" for width in WIDTHS)), [*limit_cells(bounds)]),
        "alternatives": Section(
            "Both products, cycles a logit", "", ("", *(f"D = {width}" for width in WIDTHS)), [*other_cells(bounds)]
        ),
        "predicted": Section(
            "Predicted", "", ("", *(f"D = {width}" for width in WIDTHS)), [*prediction_cells(predictions)]
        ),
    }  # fmt: skip


def compiled_cells(compiled: dict[str, Compiled]) -> Iterator[tuple[str, ...]]:
    """Those of bfloat16."""
    kernels = {f"score, {mode}": kernel(compiled, mode) for mode in MODES}
    for name, found in compiled.items():
        if other := re.search(r"(stream|narrow)_kernelI13__nv_bfloat16", name):
            kernels[other[1]] = found
    for name, found in kernels.items():
        numbers = (found.registers, found.spilled, len(found.instructions), found.count("HGMMA"),
                   found.count("UTMALDG"))  # fmt: skip
        yield (name, *(f"{number:,}" for number in numbers))


_KINDS = ("float", "MUFU", "integer multiply", "integer, compare", "uniform", "control", "other")


def instruction_cells(by_width: dict[int, dict[tuple[str, bool], Counter[str]]]) -> Iterator[tuple[str, ...]]:
    """In all at every width; by kind at D = 768."""
    for what in COUNTED:
        mode, noise = what
        all_of = [of_kind(counts[what], "issue") for counts in by_width.values()]
        of_one = by_width[768][what]
        kinds = [of_kind(of_one, name) for name in _KINDS[:-1]]
        kinds.append(of_kind(of_one, "issue") - sum(kinds))
        yield (f"{mode}{', noise' if noise else ''}", *(f"{number:.1f}" for number in (*all_of, *kinds)))


def limit_cells(bounds: dict[int, Limits]) -> Iterator[tuple[str, ...]]:
    rows = {
        "tensor cores": [b.tensor for b in bounds.values()],
        "shared memory": [b.shared for b in bounds.values()],
        "L2": [b.l2 for b in bounds.values()],
        **{name: [b.lanes[name] for b in bounds.values()] for name in LANES},
        "**all overlap**": [b.most for b in bounds.values()],
        "**in turn**": [b.in_turn for b in bounds.values()],
    }
    for name, numbers in rows.items():
        yield (name, *(f"{number:.3f}" for number in numbers))


def other_cells(bounds: dict[int, Limits]) -> Iterator[tuple[str, ...]]:
    """The whole step as it is, and in one kernel that holds the means of 64 rows: docs/hopper.md has the derivation."""
    peak = PROCESSORS * CLOCK * TENSOR_FLOP
    library = [b.tensor * peak / LIBRARY for b in bounds.values()]
    ours = [
        f"{b.most + second:.2f} to {b.in_turn + second:.2f}" for b, second in zip(bounds.values(), library, strict=True)
    ]
    yield "score, then the library", *ours
    one, two = (
        [(2 * b.tensor, (blocks * (b.width / 8 / blocks + exchanged)) / SHARED_BYTES) for b in bounds.values()]
        for blocks, exchanged in ((1, 6), (2, 12))
    )
    for name, limit, columns in (("one block holds the means", one, 1), ("two blocks, half the columns each", two, 2)):
        cells = [
            f"{max(both):.2f} to {tensor / SEESAW:.2f}" if tensor / SEESAW > max(both) else f"{max(both):.2f}"
            for both in limit
            for tensor in both[:1]
        ]
        registers = [b.width // 4 // columns + 32 for b in bounds.values()]
        yield name, *(c if r < REGISTERS else "none" for c, r in zip(cells, registers, strict=True))
        yield f"its registers, of {REGISTERS}, without noise", *map(str, registers)


def prediction_cells(predictions: list[Prediction]) -> Iterator[tuple[str, ...]]:
    def between(low: float, high: float) -> str:
        return f"{low:.2f} to {high:.2f}"

    yield ("two products", *(f"{2e3 * p.product:.2f} ms" for p in predictions))
    yield ("step", *(f"{between(*(1e3 * s for s in p.step))} ms" for p in predictions))
    yield ("efficiency of the step", *(between(*p.efficiency) for p in predictions))
    yield ("statistics", *(f"{between(*(1e3 * s for s in p.statistics))} ms" for p in predictions))
    yield ("efficiency of statistics", *(between(*p.statistics_efficiency) for p in predictions))


def _output(command: list[str]) -> str:
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ran.returncode:
        raise CannotCount(f"{Path(command[0]).name} failed: {ran.stdout.strip()[-300:]}")
    return ran.stdout

"""What `sampling` found, as tables on the screen, JSON, Markdown, pictures, and in the docs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from benchmarks.common.compare import SAMPLING
from benchmarks.common.report import duration, size
from benchmarks.common.sections import Page, Section
from benchmarks.common.sections import fill as fill_page
from benchmarks.models import model_report
from benchmarks.models.model_report import (
    OURS,
    describe_model,
    draw_bars,
    matplotlib_missing,
    of_memory,
    slower,
    spread,
)
from benchmarks.models.sampling_cases import SUM, WHOLE
from benchmarks.models.sampling_noise import NoiseCost
from benchmarks.step.recall_report import BLUE, BROWN

PAGE = "sampling.md"  # in the folder of the docs; see `fill`
OURS_ALL = (OURS, SUM, WHOLE)
COLOURS = {OURS: BLUE, SUM: "#08306b", WHOLE: "#6baed6", "eager": "#d99a6c", "authors": BROWN}


@dataclass(frozen=True)
class Row(model_report.Row):
    """`seconds` are those of a call of `steps` steps, in proportion where fewer were timed."""

    steps: int = 0
    timed_steps: int = 0
    same_tokens: float | None = None  # the share that is equal to the eager sampler's with the same noise


@dataclass(frozen=True)
class Result(model_report.Result[Row]):
    ours: ClassVar[tuple[str, ...]] = OURS_ALL

    noise: list[NoiseCost] = field(default_factory=list)


def load(path: Path) -> Result:
    content, given = model_report.read(path, Row)
    return Result(**given, noise=[NoiseCost(**found) for found in content["noise"]])


def stem_of(result: Result) -> str:
    return f"{SAMPLING}{result.machine.stem}"


def page_of(result: Result) -> Page:
    return model_report.page("Sampling", result, sections(result))


def save(result: Result, folder: Path) -> list[Path]:
    """Writes the JSON and Markdown files; where they are."""
    return page_of(result).save(folder / stem_of(result), asdict(result))


def show(result: Result, console: Console) -> None:
    page_of(result).show(console)


# Tables


def sections(result: Result) -> list[Section]:
    found = [case_section(result, name) for name in result.cases]
    found += [size_section(result)] if over_v(result) else []
    return found + ([noise_section(result)] if result.noise else [])


def case_section(result: Result, name: str) -> Section:
    header = (
        "contestant", "timed", "call", "spread", "tokens/s", f"x {OURS}", "efficiency", "vocabulary", "memory",
        "process", "tokens", "error",
    )  # fmt: skip
    products = result.products.get(name)
    counted = f" {products.flop / 1e9:,.0f} Gflop of products a call." if products else ""
    note = f"{describe(result.cases[name])}.{counted} Table: {result.tables[name]}."
    return Section(name, note, header, [cells_of(row, len(header)) for row in result.of(name)])


def cells_of(row: Row, columns: int) -> tuple[str, ...]:
    if row.seconds is None:
        return (row.contestant, row.note, *[""] * (columns - 2))
    return (
        row.contestant,
        f"{row.timed_steps}/{row.steps}",
        duration(row.seconds),
        spread(row),
        rate(row.tokens_per_s),
        slower(row),
        f"{row.efficiency:.2f}",
        f"{row.vocabulary_share:.0%}",
        of_memory(row.peak_extra_bytes),
        of_memory(row.peak_process_bytes),
        "" if row.same_tokens is None else f"{row.same_tokens:.2%}",
        "" if row.error is None else f"{row.error:.1e}",
    )


def rate(per_second: float | None) -> str:
    count = per_second or 0.0
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def describe(case: dict[str, Any]) -> str:
    options = [
        text for name, text in (("ragged", "half of them padding"), ("bf16", "the network in bfloat16")) if case[name]
    ]
    return ", ".join([describe_model(case), *options, f"{case['solver']}, {case['steps']} steps"])


def over_v(result: Result) -> list[str]:
    """Cases that differ in V alone, the smallest first; none where there is one alone."""
    names = [name for name, case in result.cases.items() if case["over_v"] and result.of(name)]
    return sorted(names, key=lambda name: result.of(name)[0].v) if len(names) > 1 else []


def size_section(result: Result) -> Section:
    """One line per V: fused, then eager."""
    cells = []
    for name in over_v(result):
        rows = {row.contestant: row for row in result.of(name)}
        pair = [rows.get(contestant) for contestant in (OURS, "eager")]
        times = ["" if row is None or row.seconds is None else duration(row.seconds / row.steps) for row in pair]
        held = ["" if row is None else of_memory(row.peak_extra_bytes) for row in pair]
        ratio = "" if pair[1] is None else slower(pair[1])
        cells.append((f"{result.of(name)[0].v:,}", *times, ratio, *held))
    header = ("V", f"{OURS}, a step", "eager, a step", f"x {OURS}", f"{OURS}, memory", "eager, memory")
    return Section("Over V", f"{describe(result.cases[over_v(result)[0]])}.", header, cells)


def noise_section(result: Result) -> Section:
    cells: list[tuple[str, ...]] = [
        (cost.way, f"{cost.fields:.3g}", duration(cost.seconds), f"{cost.over_no_noise:.2f}",
         size(cost.stored_bytes) if cost.stored_bytes else "0")
        for cost in result.noise
    ]  # fmt: skip
    cost = result.noise[0]
    note = (
        f"One step of the vocabulary, N = {cost.n:,}, V = {cost.v:,}, D = {cost.d}, with the mean number of fields of "
        "ddpm. Stored: the step without noise and the update of the field; the fresh field is there, or is drawn."
    )
    return Section("Noise that is gathered", note, ("noise", "fields", "step", "x no noise", "stored"), cells)


# Pictures


def draw(result: Result, stem: Path) -> list[Path] | str:
    """The files drawn, or why there are none."""
    if missing := matplotlib_missing():
        return missing
    timed = [row for row in result.rows if row.seconds]
    if not timed:
        return "nothing was timed"
    speed = draw_bars(
        timed, stem, "speed", "Tokens per second, padding included", lambda row: row.tokens_per_s,
        rate, COLOURS,
    )  # fmt: skip
    held = draw_bars(
        timed, stem, "memory", "Peak memory of sampling, beyond weights and table", lambda row: row.peak_extra_bytes,
        lambda count: size(int(count)), COLOURS,
    )  # fmt: skip
    return [speed, held]


# The page of the docs


def fill(result: Result, drawn: list[Path], docs: Path) -> list[Path]:
    """Puts pictures and the tables of the cases, "sizes" and "noise" into the page; what was written."""
    tables = {name: case_section(result, name).markdown() for name in result.cases}
    if over_v(result):
        tables["sizes"] = size_section(result).markdown()
    if result.noise:
        tables["noise"] = noise_section(result).markdown()
    return fill_page(docs / PAGE, tables, result.machine, drawn, stem_of(result))

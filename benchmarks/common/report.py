"""What a run found: rows and tables on the screen, as JSON, as Markdown, and in a page of the docs."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.common.machine import Machine

WRONG = "wrong: "  # begins the note of a row without time whose results were wrong


@dataclass(frozen=True)
class Row:
    """One contestant in one case. Seconds and bytes; None where it was not measured."""

    case: str
    contestant: str
    op: str = ""
    n: int = 0
    v: int = 0
    d: int = 0
    dtype: str = ""
    noise: bool = False
    k: int | None = None  # of a top-k
    ours: bool = False
    seconds: float | None = None  # median: of the step, of a training step, or of a call of the sampler
    quartiles: tuple[float, float] | None = None
    runs: int = 0
    steps: int | None = None  # of a call of the sampler
    timed_steps: int | None = None  # of these; `seconds` is in proportion where fewer were timed
    tokens_per_s: float | None = None  # positions of targets, padding included
    floor_seconds: float | None = None  # the matrix products alone, in the same run
    efficiency: float | None = None  # floor time over this time
    ratios: dict[str, float] = field(default_factory=dict)  # another contestant's time over this time
    gflop_per_s: float | None = None  # of the products
    gb_per_s: float | None = None  # of what must be read and written at least
    vocabulary_seconds: float | None = None  # of `seconds`, what is spent on the vocabulary
    vocabulary_share: float | None = None
    peak_extra_bytes: int | None = None  # beyond what is there before: inputs; weights, table, optimizer state, batch
    peak_process_bytes: int | None = None
    same_tokens: float | None = None  # the share that is equal to the eager sampler's with the same noise
    error: float | None = None  # the largest: relative to float64, of a whole model relative to the eager step
    note: str = ""  # why it is absent, or why something was not measured
    commit: str = ""
    machine: str = ""
    versions: str = ""


def row_of(content: Mapping[str, Any]) -> Row:
    """From JSON."""
    known = {each.name: content[each.name] for each in fields(Row) if each.name in content}
    return Row(**(known | {"quartiles": known.get("quartiles") and tuple(known["quartiles"])}))


@dataclass(frozen=True)
class Section:
    """A table under a heading."""

    title: str
    note: str
    header: tuple[str, ...]
    cells: Sequence[tuple[str, ...]]
    ours: frozenset[str] = frozenset()  # first cells of lines that stand out

    def markdown(self) -> list[str]:
        rule = tuple("---:" if column else "---" for column in range(len(self.header)))
        return [f"| {' | '.join(line)} |" for line in (self.header, rule, *self.cells)]

    def show(self, console: Console) -> None:
        console.print(f"\n{self.title}", style="bold")
        console.print(self.note)
        table = Table(box=SIMPLE_HEAD)
        for column, name in enumerate(self.header):
            table.add_column(escape(name), justify="right" if column else "left", overflow="fold")
        for cells in self.cells:
            table.add_row(*map(escape, cells), style="bold green" if cells[0] in self.ours else "")
        console.print(table)


@dataclass
class Report:
    machine: Machine
    title: str = "Benchmark"
    prefix: str = ""  # begins the names of its files
    facts: list[str] = field(default_factory=list)  # more than those of the machine
    tables: dict[str, str] = field(default_factory=dict)  # what the table of a case was
    notes: dict[str, str] = field(default_factory=dict)  # what a case is
    rows: list[Row] = field(default_factory=list)
    more: dict[str, Section] = field(default_factory=dict)  # tables that are not of rows, by their names in the docs
    content: dict[str, Any] = field(default_factory=dict)  # of the JSON, next to machine, tables and rows
    red: list[str] = field(default_factory=list)  # failures that are not in rows

    @property
    def stem(self) -> str:
        """The name of the files: one per machine and commit."""
        return f"{self.prefix}{self.machine.stem}"

    @property
    def failures(self) -> list[str]:
        wrong = [row for row in self.rows if row.ours and row.note.startswith(WRONG)]
        return [f"case {row.case!r}, contestant {row.contestant!r}: {row.note}" for row in wrong] + self.red

    def of(self, case: str) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def sections(self) -> dict[str, Section]:
        return {name: case_section(name, self.of(name), self._note(name)) for name in self.tables} | self.more

    def save(self, folder: Path) -> list[Path]:
        """Writes the JSON and Markdown files; where they are."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) for row in self.rows]
        content = {"machine": asdict(self.machine), "tables": self.tables, "rows": rows, "failures": self.failures}
        pictures = sorted(path.name for path in folder.glob(f"{self.stem}-*.png"))
        data, text = (folder / f"{self.stem}.{ending}" for ending in ("json", "md"))
        data.write_text(json.dumps(content | self.content, indent=1) + "\n", encoding="utf-8")
        text.write_text(self.markdown(pictures), encoding="utf-8")
        return [data, text]

    @staticmethod
    def load(path: Path) -> "Report":
        """Machine, tables and rows of a file."""
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [row_of(each) for each in content["rows"]]
        return Report(Machine(**content["machine"]), tables=content["tables"], rows=rows)

    def markdown(self, pictures: list[str]) -> str:
        facts = (*machine_lines(self.machine), *self.facts, "How numbers are taken: [README](../README.md).")
        lines = [
            f"# {self.title}: {self.machine.processor}, commit {self.machine.commit}", "",
            *(f"- {fact}" for fact in facts), *(f"- **Red:** {failure}" for failure in self.failures), "",
            *(f"![{name}]({name})" for name in pictures),
        ]  # fmt: skip
        for section in self.sections().values():
            lines += ["", f"## {section.title}", "", section.note, "", *section.markdown()]
        return "\n".join(lines) + "\n"

    def show(self, console: Console) -> None:
        for line in machine_lines(self.machine):
            console.print(line)
        for section in self.sections().values():
            section.show(console)

    def fill(self, page: Path, drawn: list[Path]) -> list[Path]:
        """Puts tables and pictures into a page of the docs; what was written."""
        origin = [f"{self.machine.processor}; commit {self.machine.commit}; {self.machine.date[:10]}."]
        tables = {name: section.markdown() for name, section in self.sections().items()}
        return fill(page, {"origin": origin, **tables}, drawn)

    def _note(self, case: str) -> str:
        shapes = [shape(row) for row in self.of(case)[:1]]  # none where the process of a case died
        return f"{self.notes.get(case) or ''.join(shapes)}. Table: {self.tables[case]}."


def fill(page: Path, tables: Mapping[str, list[str]], drawn: list[Path]) -> list[Path]:
    """Puts tables into a page between the lines `<!-- table: NAME -->` and `<!-- end -->`, and sends its links to
    pictures of the same quantity to those drawn. What there is no table for stays as it is."""

    def table(found: re.Match[str]) -> str:
        return "\n".join([found[1], "", *tables[found[2]], "", found[3]]) if found[2] in tables else found[0]

    text = page.read_text(encoding="utf-8")
    text = re.sub(r"(<!-- table: ([\w-]+) -->)\n.*?(<!-- end -->)", table, text, flags=re.S)
    for path in drawn:
        quantity, link = path.stem.rpartition("-")[2], Path(os.path.relpath(path, page.parent)).as_posix()
        text = re.sub(rf"\]\([^()\s]*-{quantity}\.png\)", f"]({link})", text)
    page.write_text(text, encoding="utf-8")
    return [page]


# Rows as tables


def case_section(title: str, rows: list[Row], note: str) -> Section:
    """Columns that are empty in all rows are left out."""
    base = next((row for row in rows if row.ours and row.seconds), None)  # what the others' times are compared with
    columns: dict[str, Callable[[Row, float], str]] = {
        "timed": lambda row, _: f"{row.timed_steps}/{row.steps}" if row.steps else "",
        "time": lambda _, seconds: duration(seconds),
        "spread": lambda row, seconds: share(row.quartiles and (row.quartiles[1] - row.quartiles[0]) / seconds),
        "tokens/s": lambda row, _: significant(row.tokens_per_s),
        f"x {base.contestant if base else 'ours'}": lambda _, seconds: (
            f"{seconds / base.seconds:.2f}" if base and base.seconds else ""
        ),
        "efficiency": lambda row, _: "" if row.efficiency is None else f"{row.efficiency:.2f}",
        "vocabulary": lambda row, _: share(row.vocabulary_share),
        "memory": lambda row, _: size(row.peak_extra_bytes),
        "process": lambda row, _: size(row.peak_process_bytes) if row.tokens_per_s else "",
        "tokens": lambda row, _: "" if row.same_tokens is None else f"{row.same_tokens:.2%}",
        "error": lambda row, _: "" if row.error is None else f"{row.error:.1e}",
    }  # fmt: skip
    found = [{name: text(row, row.seconds) if row.seconds else "" for name, text in columns.items()} for row in rows]
    header = [name for name in columns if name == "time" or any(cells[name] for cells in found)]
    cells = [
        (row.contestant, *(texts[name] for name in header))
        if row.seconds
        else (row.contestant, row.note, *[""] * (len(header) - 1))
        for row, texts in zip(rows, found, strict=True)
    ]
    ours = frozenset(row.contestant for row in rows if row.ours)
    return Section(title, note, ("contestant", *header), cells, ours)


def compared(before: Report, after: Report) -> Section:
    """What became faster, what smaller."""
    earlier = {(row.case, row.contestant): row for row in before.rows}
    cells = [
        (row.case, row.contestant, duration(old.seconds), duration(row.seconds), f"{row.seconds / old.seconds:.2f}",
         size(old.peak_extra_bytes), size(row.peak_extra_bytes))
        for row in after.rows
        if row.seconds and (old := earlier.get((row.case, row.contestant))) and old.seconds
    ]  # fmt: skip
    note = "\n".join(
        f"{name}: {report.machine.processor}, commit {report.machine.commit}, {report.machine.date}"
        for name, report in (("before", before), ("after", after))
    )
    header = ("case", "contestant", "before", "after", "time ratio", "memory before", "memory after")
    return Section("Two results", note, header, cells)


def machine_lines(machine: Machine) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    host = "" if machine.processor.startswith(machine.host) else f"; host {machine.host}, {machine.cores} cores"
    return [
        f"{machine.processor}{host}; {machine.threads} threads, {machine.memory_gib} GiB, CPU vectors: {machine.tier}",
        f"{versions}; commit {machine.commit}; {machine.date}",
    ]


def shape(row: Row) -> str:
    noise = "" if row.op == "nearest" else ", noise" if row.noise else ", no noise"
    k = "" if row.k is None else f", K = {row.k:,}"
    return f"{row.op}, N = {row.n:,}, V = {row.v:,}, D = {row.d:,}{k}, {row.dtype}{noise}"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def size(count: float | None) -> str:
    """Bytes in MB (10^6)."""
    return "" if count is None else f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def share(part: float | None) -> str:
    return "" if part is None else f"{part:.0%}"


def significant(count: float | None) -> str:
    return "" if count is None else f"{count:,.0f}" if count >= 100 else f"{count:.3g}"

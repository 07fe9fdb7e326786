"""Results that are tables under headings: on the screen, as Markdown beside their JSON, and in a page of the docs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.common.machine import Machine
from benchmarks.common.report import machine_lines


@dataclass(frozen=True)
class Section:
    title: str
    note: str
    header: tuple[str, ...]
    cells: list[tuple[str, ...]]

    def markdown(self) -> list[str]:
        lines = [
            self.header,
            tuple("---" if column == 0 else "---:" for column in range(len(self.header))),
            *self.cells,
        ]
        return [f"| {' | '.join(line)} |" for line in lines]

    def show(self, console: Console, ours: str = "") -> None:
        """`ours`: the first cell of rows that stand out."""
        console.print(f"\n{self.title}", style="bold")
        console.print(self.note)
        table = Table(box=SIMPLE_HEAD)
        for column, name in enumerate(self.header):
            table.add_column(escape(name), justify="right" if column else "left")
        for cells in self.cells:
            table.add_row(*map(escape, cells), style="bold green" if ours and cells[0] == ours else "")
        console.print(table)


@dataclass(frozen=True)
class Page:
    """What a result says, in words."""

    title: str
    machine: Machine
    facts: list[str]  # beside those of the machine
    failures: list[str]
    sections: list[Section]
    ours: str = ""  # the first cell of rows that stand out

    def markdown(self, pictures: list[str]) -> str:
        lines = [
            f"# {self.title}",
            "",
            *(f"- {line}" for line in (*machine_lines(self.machine), *self.facts)),
            *(f"- **Red:** {failure}" for failure in self.failures),
            "",
            *(f"![{name}]({name})" for name in pictures),
        ]
        for section in self.sections:
            lines += ["", f"## {section.title}", "", section.note, "", *section.markdown()]
        return "\n".join(lines) + "\n"

    def save(self, stem: Path, content: Mapping[str, Any]) -> list[Path]:
        """Writes the content and the failures as JSON, the page as Markdown; where they are."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        pictures = sorted(path.name for path in stem.parent.glob(f"{stem.name}-*.png"))
        data, text = (stem.with_name(f"{stem.name}.{ending}") for ending in ("json", "md"))
        data.write_text(json.dumps({**content, "failures": self.failures}, indent=1) + "\n", encoding="utf-8")
        text.write_text(self.markdown(pictures), encoding="utf-8")
        return [data, text]

    def show(self, console: Console) -> None:
        for line in machine_lines(self.machine):
            console.print(line)
        for section in self.sections:
            section.show(console, self.ours)


def fill(
    page: Path, tables: Mapping[str, list[str]], machine: Machine | None, drawn: list[Path], stem: str
) -> list[Path]:
    """Puts tables into a page of the docs and copies pictures beside it; what was written.

    A table stands in the page between the lines `<!-- table: NAME -->` and `<!-- end -->`; "origin" is the machine, if
    any. What there is no table for stays as it is.
    """
    if machine is not None:
        tables = {"origin": [f"{machine.processor}; commit {machine.commit}; {machine.date[:10]}."], **tables}

    def table(found: re.Match[str]) -> str:
        return "\n".join([found[1], "", *tables[found[2]], "", found[3]]) if found[2] in tables else found[0]

    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"(<!-- table: ([\w-]+) -->)\n.*?(<!-- end -->)", table, text, flags=re.S), encoding="utf-8")
    copies = [page.with_name(path.name.replace(stem, page.stem)) for path in drawn]
    for path, copy in zip(drawn, copies, strict=True):
        shutil.copy(path, copy)
    return [page, *copies]

"""Rows of results, as a table on the screen, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.common.machine import Machine

NOISE_COLUMNS = ("case", "contestant", "with noise", "without", "cost")


@dataclass(frozen=True)
class Row:
    """One contestant in one case. Seconds and bytes; None where it was not measured."""

    case: str
    contestant: str
    op: str
    n: int
    v: int
    d: int
    dtype: str
    noise: bool
    k: int | None = None  # of a top-k
    ours: bool = False
    seconds: float | None = None  # median
    quartiles: tuple[float, float] | None = None
    runs: int = 0
    floor_seconds: float | None = None  # the matrix products alone, in the same run
    efficiency: float | None = None  # floor time over this time
    ratios: dict[str, float] = field(default_factory=dict)  # of our rows: a competitor's time over this time
    gflop_per_s: float | None = None  # of the products
    gb_per_s: float | None = None  # of what must be read and written at least
    peak_extra_bytes: int | None = None
    peak_process_bytes: int | None = None
    error: float | None = None  # of smoothed, in training of the gradients too: the largest, relative to float64
    note: str = ""  # why it is absent, or why something was not measured
    commit: str = ""
    machine: str = ""
    versions: str = ""


@dataclass(frozen=True)
class Report:
    machine: Machine
    tables: dict[str, str]  # what the table of a case was
    rows: list[Row]

    def cases(self) -> Iterator[tuple[str, list[Row]]]:
        for name, rows in groupby(self.rows, key=lambda row: row.case):
            yield name, list(rows)

    def save(self, folder: Path) -> list[Path]:
        """Writes the JSON and Markdown files; where they are."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = self.machine.stem
        pictures = sorted(path.name for path in folder.glob(f"{stem}-*.png"))
        files = {f"{stem}.json": json.dumps(asdict(self), indent=1) + "\n", f"{stem}.md": self.markdown(pictures)}
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in files]

    @staticmethod
    def load(path: Path) -> Report:
        content = json.loads(path.read_text())
        rows = [Row(**(row | {"quartiles": row["quartiles"] and tuple(row["quartiles"])})) for row in content["rows"]]
        return Report(Machine(**content["machine"]), content["tables"], rows)

    def markdown(self, pictures: list[str]) -> str:
        machine = self.machine
        lines = [
            f"# Benchmark: {machine.processor}, commit {machine.commit}",
            "",
            *(f"- {line}" for line in machine_lines(machine)),
            "- How numbers are taken: [README](../README.md). "
            "Efficiency: time of the matrix products alone over time. "
            "Error: of smoothed and of gradients, the largest, against float64.",
            "",
            *(f"![{name}]({name})" for name in pictures),
        ]
        for name, rows in self.cases():
            lines += ["", f"## {name}", "", f"{shape(rows[0])}. Table: {self.tables[name]}.", ""]
            columns = columns_of(rows)
            lines += [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
            lines += [f"| {' | '.join(cells)} |" for cells in map(cells_of, with_ratio(rows))]
        if costs := noise_costs(self.rows):
            lines += [
                "",
                "## Cost of noise",
                "",
                f"| {' | '.join(NOISE_COLUMNS)} |",
                "| --- | --- | ---: | ---: | ---: |",
            ]
            lines += [f"| {' | '.join(cells)} |" for cells in costs]
        return "\n".join(lines) + "\n"

    def show(self, console: Console) -> None:
        for line in machine_lines(self.machine):
            console.print(line)
        for name, rows in self.cases():
            console.print(f"\n{name}: {shape(rows[0])}", style="bold")
            console.print(self.tables[name])
            table = Table(box=SIMPLE_HEAD)
            for column in columns_of(rows):
                table.add_column(escape(column), justify="left" if column == "contestant" else "right", no_wrap=True)
            for row, ratio in with_ratio(rows):
                table.add_row(*map(escape, cells_of((row, ratio))), style="bold green" if row.ours else "")
            console.print(table)
        if costs := noise_costs(self.rows):
            console.print("\nCost of noise", style="bold")
            table = Table(*NOISE_COLUMNS, box=SIMPLE_HEAD)
            for cells in costs:
                table.add_row(*map(escape, cells))
            console.print(table)


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


def base_of(rows: list[Row]) -> Row | None:
    """The case's first row of ours that has a time: what the others' times are compared with."""
    return next((row for row in rows if row.ours and row.seconds), None)


def columns_of(rows: list[Row]) -> tuple[str, ...]:
    base = base_of(rows)
    ratio = f"x {base.contestant if base else 'ours'}"
    return "contestant", "time", "spread", ratio, "efficiency", "memory", "error"


def with_ratio(rows: list[Row]) -> list[tuple[Row, float | None]]:
    """Every row with its time over the base's."""
    base = base_of(rows)
    return [(row, row.seconds / base.seconds if base and base.seconds and row.seconds else None) for row in rows]


def noise_costs(rows: list[Row]) -> list[tuple[str, ...]]:
    """Where a contestant ran a case with and without noise, all else being equal: how much longer it took."""

    def key(row: Row) -> tuple[object, ...]:
        return row.contestant, row.op, row.n, row.v, row.d, row.k, row.dtype

    quiet = {key(row): row.seconds for row in rows if row.seconds and not row.noise and row.op != "nearest"}
    return [
        (row.case, row.contestant, duration(row.seconds), duration(without), f"{row.seconds / without - 1:+.0%}")
        for row in rows
        if row.seconds and row.noise and not row.contestant.startswith("products") and (without := quiet.get(key(row)))
    ]


def cells_of(row_and_ratio: tuple[Row, float | None]) -> list[str]:
    row, ratio = row_and_ratio
    if row.seconds is None or row.quartiles is None:
        return [row.contestant, row.note, "", "", "", "", ""]
    memory = "" if row.peak_extra_bytes is None else size(row.peak_extra_bytes)
    return [
        row.contestant,
        duration(row.seconds),
        f"{(row.quartiles[1] - row.quartiles[0]) / row.seconds:.0%}",
        "" if ratio is None else f"{ratio:.2f}",
        "" if row.efficiency is None else f"{row.efficiency:.2f}",
        memory,
        "" if row.error is None else f"{row.error:.1e}",
    ]


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def size(count: int) -> str:
    """Bytes in MB (10^6)."""
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"

"""Rows of files: JSON lines or arrays, CSV, Parquet. Text stays as it is: no type is guessed, no name is a pattern."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

PACKED = ".gz"
LONGEST_FIELD = 2**31 - 1  # characters; the csv module's own limit is less than a long article

Row = tuple[str, Mapping[str, Any]]  # where it is, for messages; its fields, dictionaries as dotted names


def ending(path: Path) -> str | None:
    """The key of READERS; None for another file."""
    packed = path.suffix == PACKED
    found = path.with_suffix("").suffix if packed else path.suffix
    return found if found in READERS and not (packed and found == ".parquet") else None


def read_rows(path: Path) -> Iterator[Row]:
    """All rows of a file, in order.

    Raises:
        ValueError: what is wrong, with file and line: no UTF-8, not in the file's format, a file that cannot be read.
    """
    reader = READERS[str(ending(path))]
    try:
        for where, row in reader(path):
            yield where, dict(flat(row))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data must be files that can be read, got {str(path)!r}: {error}") from error


def _json(path: Path) -> Iterator[Row]:
    """A JSON object in every line, or one array of objects."""
    lines = _lines(path)
    first = next((line for line in lines if line[1].strip()), (0, ""))
    if first[1].lstrip().startswith("["):
        rows = _parsed("".join(line for _, line in chain([first], lines)), str(path))
        for number, row in enumerate(rows, 1):
            where = f"row {number} of {path}"
            yield where, _object(row, where)
        return
    for number, line in chain([first], lines):
        if line.strip():
            where = f"line {number} of {path}"
            yield where, _object(_parsed(line, where), where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data must be JSON objects, got {where}: {error}") from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"data must be JSON objects, got {where}: {type(row).__name__}")
    return row


def _csv(path: Path) -> Iterator[Row]:
    """Fields by the names in the first line. A field is quoted as a whole or not at all, or text would be lost."""
    csv.field_size_limit(LONGEST_FIELD)
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    header = None
    try:
        for fields in rows:
            if not fields:
                continue  # an empty line
            where = f"line {rows.line_num} of {path}"
            if header is None:
                header = fields
                if len({*header}) < len(header):
                    raise ValueError(f"data must have columns of different names, got {header} in {where}")
            elif len(fields) != len(header):
                raise ValueError(f"data must have {len(header)} fields in every row, got {len(fields)} in {where}")
            else:
                yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"data must be CSV, got line {rows.line_num} of {path}: {error}") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number} of {path}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"data must be Parquet, got {str(path)!r} behind row {number}: {error}") from error


READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line, with its end."""
    with (gzip.open if path.suffix == PACKED else open)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield number, _decoded(line, number, path)


def _decoded(line: bytes, number: int, path: Path) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data must be UTF-8, got line {number} of {path}: {error}") from error


def flat(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Fields, those of dictionaries under dotted names."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}.")
        else:
            yield before + name, value

"""The sampler's file: written in a folder next to it, and moved when all texts are there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smoothie_kernels.diffusion.checkpoint import differences
from smoothie_kernels.diffusion.files import locked, named, replaced, sync

RECORD = ".options.json"  # behind the name of OUTPUT
PARTIAL = ".partial"  # likewise: a folder
# What may differ between an interrupted run and the one that goes on from it.
FREE = {"overwrite", "limit", "count"}


class SampleFile:
    """OUTPUT, a line for sample 0, 1, ..., and OUTPUT.options.json, which says how they were made.

    OUTPUT.partial/ holds both until all lines are there; then the texts replace OUTPUT, and after them the options the
    older ones. So OUTPUT is always the old file or the new one. Options without texts say that a crash came between the
    two moves, and texts without options that it came before there was a line.
    """

    def __init__(self, output: str) -> None:
        self.path = Path(os.path.realpath(output))  # a link stays one
        if not self.path.parent.is_dir() or (self.path.exists() and not self.path.is_file()):
            raise ValueError(f"output must be a file in a folder that exists, got {output!r}")
        self.notes, self.folder = (self.path.with_name(self.path.name + end) for end in (RECORD, PARTIAL))
        self.texts, self.options = self.folder / "texts.jsonl", self.folder / "options.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process writes it. Raises ValueError: one does; OSError: its folder cannot be written to."""
        with locked(self.folder):
            if self.options.exists() and not self.texts.exists():
                os.replace(self.options, self.notes)
            yield

    def start(
        self, record: Mapping[str, Any], rows: Sequence[Mapping[str, str]], samples: int, total: int, *,
        batch_size: int, overwrite: bool,
    ) -> int:  # fmt: skip
        """How many samples are there already. Nothing is changed before the first `write`.

        They are whole batches, so that a run goes on as it would have, or at least `total`. A line that is damaged, or
        another sample's, is sampled again, with all behind it.

        Raises:
            ValueError: what is there has other options or sources, and must not be overwritten.
        """
        self.record, self.kept, self.begun, self.finished = record, b"", False, False
        self.goes_on = self.options.exists()
        if not self.goes_on and (overwrite or not self.path.exists()):
            return 0
        there, notes = (self.texts, self.options) if self.goes_on else (self.path, self.notes)
        try:
            _check_record(there, notes, record)
            lines = _whole_lines(there, rows, samples)
        except ValueError:
            if not overwrite:
                raise
            self.goes_on = False
            return 0
        done = len(lines) if len(lines) >= total else len(lines) // batch_size * batch_size
        self.kept = b"".join(lines[:done])
        self.finished = not self.goes_on and done >= total and len(self.kept) == there.stat().st_size
        return done

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self._begin()
        with named(self.texts), self.texts.open("ab") as file:
            file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)

    def finish(self) -> None:
        """All lines are written: moves them."""
        if not self.finished:
            self._begin()
            sync(self.texts)
            os.replace(self.texts, self.path)
            os.replace(self.options, self.notes)
            sync(self.path.parent)
        shutil.rmtree(self.folder)

    def _begin(self) -> None:
        """The folder holds the lines that are kept, and the options."""
        if self.begun:
            return
        if self.goes_on:
            os.truncate(self.texts, len(self.kept))
        else:
            with named(self.texts):
                self.texts.write_bytes(self.kept)
        with replaced(self.options) as file:
            file.write(json.dumps(self.record, indent=2) + "\n")
        self.begun = True


def _check_record(there: Path, notes: Path, record: Mapping[str, Any]) -> None:
    try:
        before = json.loads(notes.read_text())
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise ValueError(
            f"output must be one of this command, or be overwritten, got {str(there)!r} without {notes.name}"
        )
    if other := differences(before, record, FREE):
        raise ValueError(f"options must be those of {there}, or overwrite must be given: it has {'; '.join(other)}")


def _whole_lines(there: Path, rows: Sequence[Mapping[str, str]], samples: int) -> list[bytes]:
    """The lines of samples 0, 1, ... up to the first that is damaged or another's."""
    lines: list[bytes] = []
    for number, line in enumerate(there.read_bytes().split(b"\n")[:-1]):
        try:
            made = json.loads(line)
        except ValueError:  # also where it is no UTF-8
            break
        if not isinstance(made, dict) or made.get("id") != number or not isinstance(made.get("text"), str):
            break
        row = rows[number // samples] if number // samples < len(rows) else made
        for name in ("source", "reference"):
            if made.get(name) != row.get(name):
                raise ValueError(
                    f"{name} of text {number} must be that of {there}, or overwrite must be given: it has "
                    f"{made.get(name)!r}, got {row.get(name)!r}"
                )
        lines.append(line + b"\n")
    return lines

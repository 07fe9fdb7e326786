"""What a run tells: a progress bar, lines where there is no terminal, CSV files, and trackers where asked for."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


class Table:
    """A CSV file of one row per logged step; rows of steps that a resumed run makes again are dropped."""

    def __init__(self, path: Path, done: int) -> None:
        self.path = path
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit()]
            kept = path.with_suffix(".part")  # moved when it is whole, so that a kill in between loses no row
            kept.unlink(missing_ok=True)
            for row in rows:
                if int(row["step"]) <= done:
                    _append(kept, row)
            kept.replace(path) if kept.exists() else path.unlink()

    def add(self, row: Mapping[str, object]) -> None:
        _append(self.path, {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def _append(path: Path, row: Mapping[str, object]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


class Clock:
    """Seconds of training."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


class Screen:
    """A progress bar on a terminal; elsewhere one line per report. Silent in all processes but the first."""

    def __init__(self, steps: int, done: int, *, silent: bool) -> None:
        self.steps, self.silent = steps, silent
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=True if silent else None)

    def advance(self) -> None:
        self.bar.update()

    def report(self, step: int, values: Mapping[str, float]) -> None:
        text = ", ".join(_shown(*item) for item in values.items())
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
        elif not self.silent:
            print(f"step {step:,}/{self.steps:,}: {text}", flush=True)

    def say(self, text: str) -> None:
        if not self.silent:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()


def _shown(name: str, value: float) -> str:
    return f"{name.replace('_', ' ')} {value:,.0f}" if value >= 1000 else f"{name.replace('_', ' ')} {value:.4g}"

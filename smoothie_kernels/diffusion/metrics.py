"""What a run tells: a progress bar, lines where there is no terminal, CSV files, and trackers where asked for."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from smoothie_kernels.diffusion.files import named, replaced


class Table:
    """A CSV file of one row per logged step; rows of steps that a resumed run makes again are dropped."""

    def __init__(self, path: Path, done: int) -> None:
        self.path = path
        if not path.exists():
            return
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]  # without a row that a kill cut off
        rows = [row for row in csv.DictReader(whole.splitlines()) if (row.get("step") or "").isdigit()]
        kept = [row for row in rows if int(row["step"]) <= done]
        if not kept:
            path.unlink()
        elif len(kept) < len(rows) or whole != text:
            with replaced(path) as file:
                writer = csv.DictWriter(file, list(kept[0]), extrasaction="ignore")
                writer.writeheader()
                writer.writerows(kept)

    def add(self, row: Mapping[str, object]) -> None:
        new = not self.path.exists()
        with named(self.path), self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


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

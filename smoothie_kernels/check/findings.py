"""What a probe finds: how far results were off, which elements, and the case that it was at when it ended."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from smoothie_kernels.testing import Compared, compare

MOST_WRONG = 6  # wrong results that are described; all are counted
MOST_RUNS = 8  # of a histogram


class Findings:
    """Written to a file with every case, so that a process that crashes or hangs leaves behind what it had."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cases, self.at = 0, ""
        self.figures: dict[str, dict[str, Any]] = {}  # of every result the one nearest to its bound, or beyond it
        self.wrong: list[dict[str, Any]] = []
        self.count_wrong = 0

    def case(self, *label: object) -> None:
        """What comes next."""
        self.cases, self.at = self.cases + 1, " ".join(map(str, label))
        print(self.at, file=sys.stderr)
        self.write(None)

    def take(self, *all_compared: Compared) -> None:
        for compared in all_compared:
            name, error, bound = compared.name, compared.error, compared.bound
            known = self.figures.get(name)
            if known is None or not _share(error, bound) <= _share(known["error"], known["bound"]):
                self.figures[name] = {"error": error, "bound": bound, "case": self.at}
            if compared.wrong:
                self.count_wrong += 1
                if len(self.wrong) < MOST_WRONG:
                    self.wrong.append({"result": name, "case": self.at, "error": error, "bound": bound})
                    self.wrong[-1] |= where(compared.off)
                print(f"WRONG {compared}", file=sys.stderr)

    def within(self, name: str, got: Tensor, wanted: Tensor, bound: Tensor | float) -> None:
        self.take(compare(name, (got.double() - wanted.to(got.device).double()).abs(), bound))

    def equal(self, name: str, got: Tensor, wanted: Tensor) -> None:
        """Bit for bit, but for the sign of zero."""
        wanted = wanted.to(got.device)
        compared = compare(name, (got.double() - wanted.double()).abs(), 0.0)
        self.take(compared._replace(off=got != wanted))

    def write(self, outcome: str | None, message: str = "") -> None:
        text = json.dumps(
            finite(
                {
                    "outcome": outcome, "message": message, "cases": self.cases, "case": self.at,
                    "figures": self.figures, "wrong": self.wrong, "wrong results": self.count_wrong,
                }
            )
        )  # fmt: skip
        new = self.path.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        new.replace(self.path)


def where(off: Tensor) -> dict[str, Any]:
    """How many elements are off, and where: matrix units and their tiles leave a pattern in rows and columns."""
    found: dict[str, Any] = {"elements": int(off.sum()), "of": off.numel()}
    at = off.reshape(-1, *off.shape[-1:]).nonzero() if off.dim() > 1 else off.reshape(-1, 1).nonzero()
    found["row % 64"] = histogram(at[:, 0] % 64)
    if off.dim() > 1:
        found["column % 8"] = histogram(at[:, 1] % 8)
        found["column // 64"] = histogram(at[:, 1] // 64)
    return found


def histogram(numbers: Tensor) -> str:
    """ "0-7: 16, 9: 2" has 16 each of 0 to 7, and 2 of 9; no others."""
    values, counts = numbers.cpu().unique(return_counts=True)  # type: ignore[no-untyped-call]
    runs: list[tuple[int, int, int]] = []
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if runs and runs[-1][1:] == (value - 1, count):
            runs[-1] = runs[-1][0], value, count
        else:
            runs.append((value, value, count))
    texts = [f"{first}-{last}: {count}" if last > first else f"{first}: {count}" for first, last, count in runs]
    more = len(texts) - MOST_RUNS
    return ", ".join(texts[:MOST_RUNS]) + (f", and {more} more" if more > 0 else "")


def finite(value: Any) -> Any:
    """JSON has no infinities and no NaN: they become strings."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _share(error: float, bound: float) -> float:
    """Of what is allowed; beyond everything where the error is not a number."""
    if math.isnan(error):
        return math.inf
    return error / max(bound, 1e-300)

"""Two result files side by side: what became faster, what smaller."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.common.machine import commit_of
from benchmarks.common.report import Report, duration, size

RESULTS = Path(__file__).parents[1] / "results"
OTHERS = "recall-", "training-", "sampling-"  # begin the names of what two git refs do not mean


def find(names: tuple[str, str], folder: Path = RESULTS) -> tuple[Path, Path]:
    """The two files: each a path, or a git ref with a result in `folder`; of two refs on the same machine."""
    before, after = (_candidates(name, folder) for name in names)
    pairs = [(a, b) for a in before for b in after]
    if len(pairs) > 1:
        pairs = [(a, b) for a, b in pairs if a.stem.rpartition("-")[0] == b.stem.rpartition("-")[0]]
    if len(pairs) != 1:
        found = ", ".join(path.name for path in [*before, *after])
        raise ValueError(f"{names[0]} and {names[1]} do not name one pair of results of one machine, but: {found}")
    return pairs[0]


def _candidates(name: str, folder: Path) -> list[Path]:
    if name.endswith(".json"):
        found = [path for path in (Path(name),) if path.is_file()]
    else:
        of_commit = sorted(folder.glob(f"*-{commit_of(name)}.json"))
        found = [path for path in of_commit if not path.name.startswith(OTHERS)]
    if not found:
        raise ValueError(f"{name!r} is no .json file, and no result of commit {commit_of(name)} is in {folder}")
    return found


def show(before: Report, after: Report, console: Console) -> None:
    console.print(f"before: {before.machine.processor}, commit {before.machine.commit}, {before.machine.date}")
    console.print(f"after:  {after.machine.processor}, commit {after.machine.commit}, {after.machine.date}")
    table = Table(box=SIMPLE_HEAD)
    for column in ("case", "contestant", "before", "after", "time ratio", "memory before", "memory after"):
        table.add_column(column, justify="left" if column in ("case", "contestant") else "right")
    earlier = {(row.case, row.contestant): row for row in before.rows}
    for row in after.rows:
        old = earlier.get((row.case, row.contestant))
        if old is None or old.seconds is None or row.seconds is None:
            continue
        ratio = row.seconds / old.seconds
        style = "green" if ratio < 0.95 else "red" if ratio > 1.05 else ""
        memory = [size(peak) for peak in (old.peak_extra_bytes, row.peak_extra_bytes)]
        times = [duration(old.seconds), duration(row.seconds), f"[{style or 'none'}]{ratio:.2f}[/]"]
        table.add_row(row.case, row.contestant, *times, *memory)
    console.print(table)

"""What the texts of a trained model are worth, over steps, by solver: one line of a CSV for every call of all samples.

Beside the CSV lies a JSON of the same name that says what its lines are of; another model, text or machine is refused.
"""

import argparse
import csv
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common.machine import Machine
from benchmarks.common.pictures import BLUE, BROWN, GREY, finish, panels
from benchmarks.common.report import Section
from benchmarks.step.recall import in_order

METRICS = {"bleu": "BLEU", "rougeL": "ROUGE-L", "distinct2": "distinct bigrams"}
DRAWN = ("bleu", "rougeL")
COLOURS = {"re-noise": BLUE, "ddim": BROWN, "ddpm": GREY, "sde": "#d99a6c"}


@dataclass(frozen=True)
class Call:
    """What is different from line to line. `patience` is that of stop_after and shrink_after; 0 is never."""

    solver: str
    steps: int
    seed: int
    patience: int = 0


@dataclass(frozen=True)
class Line(Call):
    bleu: float = 0.0  # 0 to 100, of lower-cased text
    rougeL: float = 0.0  # 0 to 1
    distinct2: float = 0.0  # 0 to 1
    seconds_per_sample: float = 0.0
    mean_calls: float = 0.0  # of the model, for a sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def listed(kind: type) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",")]

    add = parser.add_argument
    add("checkpoint", help="folder of a checkpoint or of a training run, or a Hugging Face name")
    add("--data", required=True, help="a shipped sample, a folder, a file or a Hugging Face name")
    add("--split", default="validation", help="of --data")
    add("--samples", type=int, default=64, help="the first texts of the split, one sample of each")
    add("--batch-size", type=int, default=16, help="samples at once")
    add("--steps", type=listed(int), default=[10, 20, 50, 100, 200], help="separated by commas")
    add("--solvers", type=listed(str), default=["re-noise", "ddim", "ddpm", "sde"], help="likewise")
    add("--seeds", type=int, default=3, help="how many")
    patience = "stop_after and shrink_after, separated by commas; 0, which is never, is the default"
    add("--patience", type=listed(int), default=[0], help=patience)
    add("--out", type=Path, required=True, help="CSV file; goes on where it is there")


class Session:
    """A model with its tokenizer, sources and references."""

    def __init__(self, given: argparse.Namespace) -> None:
        from smoothie_kernels.diffusion.data import load_text
        from smoothie_kernels.diffusion.pipeline import SmoothiePipeline

        self.batch_size = given.batch_size
        self.pipeline = SmoothiePipeline.from_pretrained(given.checkpoint, device=given.device)
        if not self.pipeline.model.config.condition_layers:
            raise ValueError(f"CHECKPOINT must be a model with a source, got {given.checkpoint!r} without")
        text = load_text(given.data, given.split)
        text = text.select(range(min(given.samples, len(text))))
        self.sources, self.references = list(text["source"]), [[target] for target in text["target"]]
        self._generate(self.sources[:1], Call("re-noise", 1, 0))  # makes the Vocabulary

    def run(self, call: Call) -> Line:
        from smoothie_kernels.diffusion import scores

        start = time.perf_counter()
        found = self._generate(self.sources, call)
        seconds, texts = time.perf_counter() - start, [sample.text for sample in found]
        return Line(
            **asdict(call),
            bleu=scores.bleu(texts, self.references, lowercase=True),
            rougeL=scores.rouge(texts, self.references)["rougeL"],
            distinct2=scores.distinct(texts)["distinct2"],
            seconds_per_sample=seconds / len(texts),
            mean_calls=statistics.fmean(sample.steps for sample in found),
        )

    def _generate(self, sources: list[str], call: Call) -> Any:
        looks = call.patience or None
        return self.pipeline(
            sources, truncate=True, batch_size=self.batch_size, solver=call.solver, steps=call.steps,
            seed=call.seed, stop_after=looks, shrink_after=looks,
        )  # fmt: skip


def measure(given: argparse.Namespace, machine: Machine, progress: Callable[[str], None]) -> list[Line]:
    """Adds what is missing to the CSV; all its lines. `given` are the options of the command."""
    calls = [Call(*each) for each in product(given.solvers, given.steps, range(given.seeds), given.patience)]
    if not calls:
        raise ValueError(f"there is nothing to sample, with --seeds {given.seeds}")
    calls.sort(key=lambda call: (call.seed, call.steps))  # short ones first, so that there is a picture early
    record = {name: getattr(given, name) for name in ("data", "split", "samples", "batch_size")}
    record |= {**_model(given.checkpoint), "machine": machine.processor, "threads": machine.threads}
    done = {Call(*astuple(line)[:4]): line for line in resume(given.out, record)}
    wanted = [call for call in calls if call not in done]
    if not wanted:
        return [*done.values()]
    session = Session(given)
    with given.out.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for i, call in enumerate(wanted):
            progress(f"{i + 1} of {len(wanted)}: {call.solver}, {call.steps} steps, seed {call.seed}")
            done[call] = session.run(call)
            writer.writerow(astuple(done[call]))
            file.flush()
    return [*done.values()]


def resume(out: Path, record: dict[str, Any]) -> list[Line]:
    """The lines of an earlier run of the same; ValueError where it was of something else. What was half written when it
    was killed is taken out."""
    if out.suffix != ".csv":
        raise ValueError(f"--out must be a .csv file, got {out}")
    notes, names = out.with_suffix(".json"), [each.name for each in fields(Line)]
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        out.write_text(",".join(names) + "\n", encoding="utf-8")
    before = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
    for name in sorted({*before, *record}):
        if before.get(name) != record.get(name):
            raise ValueError(f"--out {out} is of another {name}: {before.get(name)!r}, not {record.get(name)!r}")
    header, *lines = out.read_text(encoding="utf-8").rpartition("\n")[0].split("\n")
    if header.split(",") != names:
        raise ValueError(f"--out {out} must have the columns {','.join(names)}")
    out.write_text("\n".join([header, *lines, ""]), encoding="utf-8")
    kinds: list[Any] = [each.type for each in fields(Line)]
    return [Line(*(kind(value) for kind, value in zip(kinds, row, strict=True))) for row in csv.reader(lines)]


def _model(checkpoint: str) -> dict[str, str]:
    """What tells a model from another."""
    from smoothie_kernels.diffusion.pipeline import newest_checkpoint

    folder = newest_checkpoint(checkpoint)
    weights = Path(folder) / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""
    return {"checkpoint": Path(folder).name, "sha256": digest}


# Tables


def sections(lines: list[Line], given: argparse.Namespace) -> dict[str, Section]:
    """By the name of their block in the page: one for every metric, and what patience saves where there is some."""
    of = f"{given.samples} samples of {given.data}, {given.split}"
    found = {f"quality-{name}": metric_section(lines, name, of) for name in METRICS}
    return found | ({"patience": patience_section(lines, of)} if any(line.patience for line in lines) else {})


def metric_section(lines: list[Line], metric: str, of: str) -> Section:
    """One line per solver, one column per number of steps; without patience."""
    steps = sorted({line.steps for line in lines})
    cells = []
    for solver in in_order(line.solver for line in lines):
        values = (of_seeds(lines, metric, solver, count) for count in steps)
        cells.append((solver, *(text(metric, found) if found else "" for found in values)))
    note = f"{of}; the mean over seeds, and how far apart the outermost are."
    return Section(METRICS[metric], note, ("solver", *(f"{count} steps" for count in steps)), cells)


def patience_section(lines: list[Line], of: str) -> Section:
    header = ("solver", "steps", "patience", "BLEU", "ROUGE-L", "model calls", "s a sample", "x without")
    cells: list[tuple[str, ...]] = []
    for solver, steps, patience in in_order((line.solver, line.steps, line.patience) for line in lines):
        bleu, rouge, calls, seconds = (
            of_seeds(lines, name, solver, steps, patience)
            for name in ("bleu", "rougeL", "mean_calls", "seconds_per_sample")
        )
        spent, whole = statistics.fmean(seconds), of_seeds(lines, "seconds_per_sample", solver, steps)
        times = (
            f"{statistics.fmean(calls):.1f}",
            f"{spent:.3g}",
            f"{spent / statistics.fmean(whole):.2f}" if whole else "",
        )
        of_call = (solver, f"{steps}", f"{patience or 'none'}")
        cells.append((*of_call, text("bleu", bleu), text("rougeL", rouge), *times))
    note = (
        f"{of}. A sample is done when its text was the same for so many steps; what is behind its end leaves likewise."
    )
    return Section("Patience", note, header, cells)


def of_seeds(lines: list[Line], name: str, solver: str, steps: int, patience: int = 0) -> list[float]:
    wanted = (solver, steps, patience)
    return [getattr(line, name) for line in lines if (line.solver, line.steps, line.patience) == wanted]


def text(metric: str, values: list[float]) -> str:
    digits = 1 if metric == "bleu" else 3
    apart = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{apart}"


# The picture


def draw(lines: list[Line], samples: int, stem: Path) -> list[Path]:
    """The file drawn: a line per solver, the seeds as a band; dashed over the model's calls where there is patience."""
    figure, both = panels(1, len(DRAWN), (9.6, 3.8))
    steps = sorted({line.steps for line in lines})
    for axes, metric in zip(both, DRAWN, strict=True):
        for solver, patience in in_order((line.solver, line.patience) for line in lines):
            of = [line for line in lines if (line.solver, line.patience) == (solver, patience)]
            counts = sorted({line.steps for line in of})
            groups = [of_seeds(of, metric, solver, count, patience) for count in counts]
            calls = [statistics.fmean(of_seeds(of, "mean_calls", solver, count, patience)) for count in counts]
            name, colour = f"{solver}, patience {patience}" if patience else solver, COLOURS.get(solver, GREY)
            means = [statistics.fmean(group) for group in groups]
            axes.plot(calls, means, "o--" if patience else "o-", color=colour, markersize=3, linewidth=1.4, label=name)
            axes.fill_between(calls, [*map(min, groups)], [*map(max, groups)], color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_xticks(steps, [f"{count}" for count in steps])
        axes.minorticks_off()
        axes.set_xlabel("calls of the model")
        axes.set_title(f"{METRICS[metric]}, {samples} samples", loc="left", fontsize=10)
    return [finish(figure, stem.with_name(f"{stem.name}-quality.png"))]

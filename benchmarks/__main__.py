"""Command line: `python -m benchmarks --help` lists the commands."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from benchmarks.common import compare, machine, sections
from benchmarks.common.embeddings import Material, NoEmbeddings, load_material, synthetic
from benchmarks.common.report import Report
from benchmarks.hopper import bars
from benchmarks.models import (
    curve,
    quality,
    sampling,
    sampling_cases,
    sampling_noise,
    sampling_report,
    training,
    training_cases,
    training_report,
    whole,
)
from benchmarks.step import cases, pictures, recall, recall_report
from benchmarks.step.check import CheckFailed
from benchmarks.step.contestants import CONTESTANTS
from benchmarks.step.suite import STAGES, Suite

SYNTHETIC = (30_522, 768)  # V, D of BERT


def main() -> int:
    arguments = parse()
    console, errors = console_for(sys.stdout), console_for(sys.stderr)
    try:
        if arguments.command == "list":
            list_cases(console)
            return 0
        if arguments.command == "compare":
            before, after = compare.find((arguments.before, arguments.after))
            compare.show(Report.load(before), Report.load(after), console)
            return 0
        if arguments.command == "curve":
            console.print(curve.draw(arguments.run, arguments.picture))
            return 0
        if arguments.command == "bars":
            return show_bars(arguments, console)
        prepare(arguments)
        commands = {
            "run": run, "recall": measure_recall, "training": measure_training, "sampling": measure_sampling,
            "quality": measure_quality,
        }  # fmt: skip
        return commands[arguments.command](arguments, console, errors)
    except (NoEmbeddings, compare.NoResult, curve.NoRun, ValueError) as error:
        errors.print(f"benchmarks: {error}", style="bold red")
        return 2


def console_for(stream: TextIO) -> Console:
    """As wide as the terminal; a file or pipe has no width of its own."""
    return Console(file=stream, width=None if stream.isatty() else 120, highlight=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="cases and contestants")
    run = commands.add_parser("run", help="check, measure, report")
    run.add_argument("--cases", default="", help="names or shell patterns, separated by commas")
    run.add_argument("--full", action="store_true", help="more shapes, types and times of the schedule")
    run.add_argument("--repeats", type=int, help="timed runs of every contestant; by default about 1.5 seconds of them")
    of_top = commands.add_parser("recall", help="top-k: what is found, how much it weighs, how far its mean is off")
    of_top.add_argument("--docs", type=Path, help=f"folder of {recall_report.PAGE}, which gets pictures and tables")
    steps = commands.add_parser("training", help="whole training steps, fused and eager: time, memory, loss curves")
    calls = commands.add_parser("sampling", help="sampling, fused and eager: time, memory, what noise costs")
    for each, report in ((steps, training_report), (calls, sampling_report)):
        each.add_argument("--docs", type=Path, help=f"folder of {report.PAGE}, which gets pictures and tables")
        each.add_argument("--cases", default="", help="names or shell patterns, separated by commas")
        each.add_argument("--full", action="store_true", help="a large batch too")
        each.add_argument("--repeats", type=int, help="timed runs of every contestant; by default 2 to 10")
        each.add_argument(
            "--keep-going", action="store_true", help="a wrong result of ours costs that case its times; write as we go"
        )
    for each in (run, of_top, steps, calls):
        each.add_argument(
            "--embeddings",
            help="a Hugging Face name, a model's folder, a .safetensors file, a packed .pt file, or 'synthetic'",
        )
        each.add_argument("--out", type=Path, default=compare.RESULTS, help="folder of the result files")
    of_texts = add_quality(commands)
    for each in (run, of_top, steps, calls, of_texts):
        each.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        each.add_argument("--threads", type=int, help="of PyTorch and the kernels; by default PyTorch's own choice")
    of_report = commands.add_parser(
        "bars", help="what a GPU's result file says of the bars that the kernels are held to"
    )
    of_report.add_argument("result", type=Path, help=".json file of `benchmarks.hopper measure`")
    of_report.add_argument("--docs", type=Path, help=f"folder of {bars.PAGE}, which gets the table")
    of_run = commands.add_parser("curve", help="draw the losses of a training run")
    of_run.add_argument("run", type=Path, help="folder that `smoothie-kernels train` wrote")
    of_run.add_argument("picture", type=Path, help="file to draw into, .png or .svg")
    of_two = commands.add_parser("compare", help="two results: .json files, or git refs that have a result file")
    of_two.add_argument("before")
    of_two.add_argument("after")
    return parser.parse_args()


def add_quality(commands: Any) -> argparse.ArgumentParser:
    def listed(kind: type) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",")]

    parser: argparse.ArgumentParser = commands.add_parser("quality", help="what a model's texts are worth, over steps")
    parser.add_argument("checkpoint", help="folder of a checkpoint or of a training run, or a Hugging Face name")
    parser.add_argument("--data", required=True, help="a shipped sample, a folder, a file or a Hugging Face name")
    parser.add_argument("--split", default="validation", help="of --data")
    parser.add_argument("--samples", type=int, default=64, help="the first texts of the split, one sample of each")
    parser.add_argument("--batch-size", type=int, default=16, help="samples at once")
    parser.add_argument("--steps", type=listed(int), default=[10, 20, 50, 100, 200], help="separated by commas")
    parser.add_argument("--solvers", type=listed(str), default=["re-noise", "ddim", "ddpm", "sde"], help="likewise")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument(
        "--patience", type=listed(int), default=[0],
        help="stop_after and shrink_after, separated by commas; 0, which is never, is the default",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="CSV file; goes on where it is there")
    parser.add_argument("--docs", type=Path, help=f"folder of {sampling_report.PAGE}, which gets picture and tables")
    return parser


def list_cases(console: Console) -> None:
    table = Table(
        Column("case", overflow="fold"), "group", "N", "V", "D", "K", "type", "noise", "what for", box=SIMPLE_HEAD
    )
    for case in cases.CASES.values():
        sizes = (f"{case.n:,}", *("table" if size is None else f"{size:,}" for size in (case.v, case.d)))
        noise = "" if not cases.OPS[case.op].noise else f"t = {case.t}" if case.t else str(case.std)
        k = str(case.k) if case.op == "topk" else ""
        table.add_row(case.name, case.group, *sizes, k, str(case.dtype).removeprefix("torch."), noise, case.why)
    console.print(table)
    console.print("Without --cases, `run` takes the groups default and sweep; --full adds full.\n")
    table = Table("contestant", "what", box=SIMPLE_HEAD)
    for contestant in CONTESTANTS.values():
        table.add_row(escape(contestant.name), contestant.what)
    console.print(table)


def prepare(arguments: argparse.Namespace) -> None:
    if arguments.command in ("training", "sampling", "quality"):
        whole.flush_denormals()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA GPU")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def read_material(arguments: argparse.Namespace, console: Console) -> Material:
    console.print("reading the embedding table and the text ...")
    if arguments.embeddings == "synthetic":
        return synthetic(*SYNTHETIC)
    packed = arguments.embeddings and arguments.embeddings.endswith(".pt")
    return Material.load(Path(arguments.embeddings)) if packed else load_material(arguments.embeddings)


def check_docs(folder: Path | None, page: str) -> None:
    if folder and not (folder / page).is_file():
        raise ValueError(f"--docs {folder}: there is no {page}")


def measure_recall(arguments: argparse.Namespace, console: Console, errors: Console) -> int:
    start = time.monotonic()
    check_docs(arguments.docs, recall_report.PAGE)
    material, plan = read_material(arguments, console), recall.Plan()
    with progress_bar(console) as bar:
        task = bar.add_task("", total=plan.parts)
        result = recall.measure(
            material, machine.describe(arguments.device), arguments.device, plan,
            lambda what, parts: bar.update(task, advance=parts, description=what),
        )  # fmt: skip
    return conclude(recall_report, result, arguments, console, errors, start)


def measure_training(arguments: argparse.Namespace, console: Console, errors: Console) -> int:
    def curves(plan: Any, result: Any, material: Material, progress: whole.Progress) -> None:
        found = training.train_curves(plan.curve, plan.curve_steps, material, arguments.device, progress)
        result.curves.append(found)

    return measure_models(arguments, console, errors, (training, training_cases, training_report), curves)


def measure_sampling(arguments: argparse.Namespace, console: Console, errors: Console) -> int:
    def noise(plan: Any, result: Any, material: Material, progress: whole.Progress) -> None:
        progress("noise that is gathered", 0)
        result.noise.extend(sampling_noise.measure(material, plan.noise, arguments.device))
        progress("noise that is gathered", 1)

    return measure_models(arguments, console, errors, (sampling, sampling_cases, sampling_report), noise)


def measure_models(
    arguments: argparse.Namespace, console: Console, errors: Console, modules: tuple[Any, Any, Any],
    last: Callable[[Any, Any, Material, whole.Progress], None],
) -> int:  # fmt: skip
    """All cases of a plan, then what comes `last`; the modules are those that measure, plan and report."""
    measuring, cases, report = modules
    start = time.monotonic()
    check_docs(arguments.docs, report.PAGE)
    patterns = filter(None, arguments.cases.split(","))
    plan = cases.plan(arguments.device, full=arguments.full, patterns=patterns, repeats=arguments.repeats)
    material = read_material(arguments, console)
    result = report.Result(whole.with_transformers(machine.describe(arguments.device)))
    with tempfile.TemporaryDirectory() as folder, progress_bar(console) as bar:
        task = bar.add_task("", total=plan.parts)

        def progress(what: str, parts: float) -> None:
            bar.update(task, advance=parts, description=what)

        for case in plan.cases:
            try:
                measuring.measure(
                    result, case, material, Path(folder), arguments.device, plan.repeats,
                    keep_going=arguments.keep_going, progress=progress,
                )  # fmt: skip
            except CheckFailed as error:
                errors.print(f"check failed, no speed is reported: {escape(str(error))}", style="bold red")
                return 1
            if arguments.keep_going:
                report.save(result, arguments.out)
        last(plan, result, material, progress)
    return conclude(report, result, arguments, console, errors, start)


def show_bars(arguments: argparse.Namespace, console: Console) -> int:
    check_docs(arguments.docs, bars.PAGE)
    report = Report.load(arguments.result)
    section = bars.section(report)
    section.show(console)
    if arguments.docs:
        page = arguments.docs / bars.PAGE
        tell(sections.fill(page, {"bars": section.markdown()}, report.machine, [], ""), [], console)
    return 0


def measure_quality(arguments: argparse.Namespace, console: Console, errors: Console) -> int:
    start, out = time.monotonic(), arguments.out
    check_docs(arguments.docs, sampling_report.PAGE)
    names = ("checkpoint", "data", "split", "samples", "batch_size")
    settings = quality.Settings(**{name: getattr(arguments, name) for name in names})
    calls = quality.plan(arguments.solvers, arguments.steps, arguments.seeds, arguments.patience)
    surroundings = whole.with_transformers(machine.describe(arguments.device))
    with progress_bar(console) as bar:
        task = bar.add_task("", total=len(calls))
        lines = quality.measure(
            settings, calls, out, surroundings, arguments.device,
            lambda what, parts: bar.update(task, advance=parts, description=what or None),
        )  # fmt: skip
    stem = out.with_suffix("")
    drawn = quality.draw(lines, settings, stem)
    quality.page_of(lines, settings, surroundings).show(console)
    written = [out]
    if arguments.docs:
        written += quality.fill(lines, settings, drawn if isinstance(drawn, list) else [], stem, arguments.docs)
    tell(written, drawn, console)
    console.print(f"took {time.monotonic() - start:.0f} s")
    return 0


def conclude(
    report: Any, result: Any, arguments: argparse.Namespace, console: Console, errors: Console, start: float
) -> int:
    """Pictures, files, the page of the docs, and the tables on the screen; `report` is the module of that result."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    drawn = report.draw(result, arguments.out / report.stem_of(result))
    written = report.save(result, arguments.out)
    report.show(result, console)
    if arguments.docs:
        written += report.fill(result, drawn if isinstance(drawn, list) else [], arguments.docs)
    tell(written, drawn, console)
    for failure in result.failures():
        errors.print(f"red: {escape(failure)}", style="bold red")
    console.print(f"took {time.monotonic() - start:.0f} s")
    return 1 if result.failures() else 0


def run(arguments: argparse.Namespace, console: Console, errors: Console) -> int:
    start = time.monotonic()
    chosen = cases.select(filter(None, arguments.cases.split(",")), full=arguments.full)
    material = read_material(arguments, console)
    report = Report(machine.describe(arguments.device), {}, [])
    with tempfile.TemporaryDirectory() as folder, progress_bar(console) as bar:
        material.save(Path(folder) / "material.pt")
        suite = Suite(
            material, Path(folder) / "material.pt", report.machine, arguments.device, arguments.repeats
        )  # fmt: skip
        task = bar.add_task("", total=STAGES * sum(len(case.contestants) for case in chosen))
        for case in chosen:
            try:
                note, rows = suite.run(case, lambda what, stages: bar.update(task, advance=stages, description=what))
            except CheckFailed as error:
                errors.print(f"check failed, no speed is reported: {escape(str(error))}", style="bold red")
                return 1
            report.tables[case.name] = note
            report.rows.extend(rows)
    publish(report, arguments.out, console)
    console.print(f"took {time.monotonic() - start:.0f} s")
    return 0


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def publish(report: Report, folder: Path, console: Console) -> None:
    """Pictures, files, and the table on the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw(report.rows, folder / report.machine.stem)
    written = report.save(folder)
    report.show(console)
    tell(written, drawn, console)


def tell(written: list[Path], drawn: list[Path] | str, console: Console) -> None:
    """What files there are, and why there are no pictures."""
    if isinstance(drawn, str):
        console.print(f"no pictures: {drawn}")
    for path in [*written, *(drawn if isinstance(drawn, list) else [])]:
        console.print(f"written: {path}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

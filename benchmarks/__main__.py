"""Command line: `python -m benchmarks --help` lists the commands."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.markup import escape

from benchmarks.common import machine
from benchmarks.common.case import select
from benchmarks.common.embeddings import Material, load_material, synthetic
from benchmarks.common.race import CheckFailed, Suite
from benchmarks.common.report import Report, Section, compared, fill
from benchmarks.hopper import bars
from benchmarks.models import curve, quality, sampling, training
from benchmarks.step import race as step
from benchmarks.step import recall

SYNTHETIC = (30_522, 768)  # V, D of BERT
RESULTS = machine.ROOT / "benchmarks" / "results"
RACES: Mapping[str, Any] = {"run": step, "training": training, "sampling": sampling}  # commands, and their modules


def main() -> int:
    arguments = parse()
    console, errors = console_for(sys.stdout), console_for(sys.stderr)
    try:
        if arguments.command in ("training", "sampling", "quality"):
            machine.flush_denormals()
        if getattr(arguments, "device", "cpu") == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch sees no CUDA GPU")
        if getattr(arguments, "threads", None):
            torch.set_num_threads(arguments.threads)
        docs, page = getattr(arguments, "docs", None), getattr(arguments, "page", "")
        if docs and not (docs / page).is_file():
            raise ValueError(f"--docs {docs}: there is no {page}")
        command: Callable[..., int] = arguments.call
        return command(arguments, console)
    except CheckFailed as error:
        errors.print(f"check failed, no speed is reported: {escape(str(error))}", style="bold red")
        return 1
    except (ValueError, OSError) as error:
        errors.print(f"benchmarks: {error}", style="bold red", markup=False)
        return 2


def console_for(stream: TextIO) -> Console:
    """As wide as the terminal; a file or pipe has no width of its own."""
    return Console(file=stream, width=None if stream.isatty() else 120, highlight=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, what: str, call: Callable[..., int], page: str = "") -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=what)
        command.set_defaults(call=call, page=page)
        if page:
            command.add_argument("--docs", type=Path, help=f"folder of {page}, which gets tables and pictures")
        return command

    def measures(command: argparse.ArgumentParser) -> None:
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--threads", type=int, help="of PyTorch and the kernels; by default PyTorch's own choice")

    def reports(command: argparse.ArgumentParser) -> None:
        measures(command)
        kinds = "a Hugging Face name, a model's folder, a .safetensors file, a packed .pt file, or 'synthetic'"
        command.add_argument("--embeddings", help=kinds)
        command.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")

    add("list", "cases and contestants", list_cases)
    for name, module in RACES.items():
        command = add(name, (module.__doc__ or "").partition("\n")[0], measure, module.PAGE)
        command.add_argument("--cases", default="", help="names or shell patterns, separated by commas")
        command.add_argument("--full", action="store_true", help="more cases")
        command.add_argument("--repeats", type=int, help="timed runs of every contestant; by default the case's own")
        keep_going = "a wrong result of ours costs that case its times; write as we go"
        command.add_argument("--keep-going", action="store_true", help=keep_going)
        reports(command)
    what = "top-k: what is found, how much it weighs, how far its mean is off"
    reports(add("recall", what, measure_recall, recall.PAGE))
    command = add("quality", "what a model's texts are worth, over steps", measure_quality, sampling.PAGE)
    quality.add_arguments(command)
    measures(command)
    for name, what, call, page, paths in (
        ("bars", "which bars a GPU's result meets", show_bars, bars.PAGE,
         {"result": ".json file of `benchmarks.hopper measure`"}),
        ("curve", "draw the losses of a training run", draw_curve, "",
         {"run": "folder that `smoothie-kernels train` wrote", "picture": "file to draw into, .png or .svg"}),
        ("compare", "two results: what became faster, what smaller", compare, "",
         {"before": ".json file", "after": ".json file"}),
    ):  # fmt: skip
        command = add(name, what, call, page)
        for path, text in paths.items():
            command.add_argument(path, type=Path, help=text)
    return parser.parse_args()


def list_cases(arguments: argparse.Namespace, console: Console) -> int:
    note = 'Without --cases, those of the device run, "cpu" or "cuda"; --full adds its "full" ones.'
    for name, module in RACES.items():
        cells = []
        for case in module.CASES.values():
            sizes = ("table" if size is None else f"{size:,}" for size in (case.n, case.v, case.d))
            cells.append((case.name, ", ".join(case.groups), *sizes, case.why))
        Section(f"python -m benchmarks {name}", note, ("case", "run", "N", "V", "D", "what for"), cells).show(console)
        cells = [(each.name, each.what) for each in module.Race.contestants.values()]
        Section("Its contestants", "", ("contestant", "what"), cells).show(console)
    return 0


def measure(arguments: argparse.Namespace, console: Console) -> int:
    """All cases of a kind, and what comes after them."""
    module = RACES[arguments.command]
    patterns = filter(None, arguments.cases.split(","))
    cases = select(module.CASES, arguments.device, full=arguments.full, patterns=patterns)
    with suite_of(arguments, console) as suite:
        report = Report(suite.machine, module.TITLE, module.PREFIX)
        for case in cases:
            module.Race(suite, case).run(report)
            if suite.keep_going:
                report.save(arguments.out)
        module.conclude(suite, report, cases)
    return conclude(report, arguments, console, lambda stem: module.draw(report, stem))


def measure_recall(arguments: argparse.Namespace, console: Console) -> int:
    with suite_of(arguments, console) as suite:
        result = recall.measure(suite, recall.Plan())
    report = recall.report_of(result, suite)
    return conclude(report, arguments, console, lambda stem: recall.draw(result, stem))


def measure_quality(arguments: argparse.Namespace, console: Console) -> int:
    here, out = machine.describe(arguments.device, "transformers"), arguments.out
    with console.status("") as status:
        lines = quality.measure(arguments, here, status.update)
    sections = quality.sections(lines, arguments)
    Report(here, more=sections).show(console)
    drawn = pictures(lambda: quality.draw(lines, arguments.samples, out.with_suffix("")), console)
    tables = {name: section.markdown() for name, section in sections.items()}
    tell([out, *drawn, *(fill(arguments.docs / arguments.page, tables, drawn) if arguments.docs else [])], console)
    return 0


def show_bars(arguments: argparse.Namespace, console: Console) -> int:
    report = Report.load(arguments.result)
    report.more["bars"] = bars.section(report)
    report.more["bars"].show(console)
    if arguments.docs:
        tell(report.fill(arguments.docs / arguments.page, []), console)
    return 0


def draw_curve(arguments: argparse.Namespace, console: Console) -> int:
    console.print(curve.draw(arguments.run, arguments.picture))
    return 0


def compare(arguments: argparse.Namespace, console: Console) -> int:
    compared(Report.load(arguments.before), Report.load(arguments.after)).show(console)
    return 0


@contextmanager
def suite_of(arguments: argparse.Namespace, console: Console) -> Iterator[Suite]:
    start, packages = time.monotonic(), () if arguments.command in ("run", "recall") else ("transformers",)
    console.print("reading the embedding table and the text ...")
    if arguments.embeddings == "synthetic":
        material = synthetic(*SYNTHETIC)
    elif arguments.embeddings and arguments.embeddings.endswith(".pt"):
        material = Material.load(Path(arguments.embeddings))
    else:
        material = load_material(arguments.embeddings)
    here = machine.describe(arguments.device, *packages)
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        yield Suite(
            material, here, Path(folder), arguments.device, getattr(arguments, "repeats", None),
            getattr(arguments, "keep_going", False), progress=lambda what: status.update(escape(what)),
        )  # fmt: skip
    console.print(f"took {time.monotonic() - start:.0f} s")


def conclude(
    report: Report, arguments: argparse.Namespace, console: Console, draw: Callable[[Path], list[Path]]
) -> int:
    """Pictures, files, the page of the docs, and the tables on the screen. Red where a result is wrong."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    drawn = pictures(lambda: draw(arguments.out / report.stem), console)
    written = [*report.save(arguments.out), *drawn]
    report.show(console)
    if arguments.page and arguments.docs:
        written += report.fill(arguments.docs / arguments.page, drawn)
    tell(written, console)
    for failure in report.failures:
        console_for(sys.stderr).print(f"red: {escape(failure)}", style="bold red")
    return 1 if report.failures else 0


def pictures(draw: Callable[[], list[Path]], console: Console) -> list[Path]:
    try:
        return draw()
    except ImportError as error:
        console.print(f"no pictures: {error}")
        return []


def tell(written: list[Path], console: Console) -> None:
    for path in written:
        console.print(f"written: {path}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

"""`smoothie-kernels check`: whether the kernels are right on this machine.

Calls every kernel of every backend that can run here, from the simplest up, and holds the results against float64. Each
probe is a process of its own with a time limit, so that a crash or a hang costs no other. One line of JSON a probe, as
it ends; then a table, and what a report of a bug needs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from smoothie_kernels.arguments import Parser
from smoothie_kernels.check import machine
from smoothie_kernels.check.isolate import Call, run_calls
from smoothie_kernels.check.plan import probes_of
from smoothie_kernels.check.probes import Target
from smoothie_kernels.check.run import Result, run_here, run_isolated

AT_ONCE = 8  # probes: each has memory and a context on the GPU. 16 took as long on an H100
DESCRIBE_SECONDS = 60.0
STARTS = ("forkserver", "spawn")
OUTCOMES = ("ok", "wrong", "error", "crash", "hang")


def command(argv: Sequence[str] | None = None) -> int:
    """0 where all is ok, 1 where a probe is not, 2 where nothing could run."""
    parser = Parser(prog="smoothie-kernels check", description=__doc__)
    parser.add_argument(
        "--backend", action="append", default=[], metavar="NAME",
        help=f"one or more of {', '.join(machine.BACKENDS)}; several times, or with commas. Without it all that can "
        "run; on a machine without a GPU cpu and reference",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="the simplest probes of every kernel, in one type")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the lines of JSON go there as well")
    parser.add_argument("--in-process", action="store_true", help="all in one process: for compute-sanitizer")
    parser.add_argument("--emulated", type=Path, help=argparse.SUPPRESS)  # a library of tests/compiled.py
    arguments, unknown_options = parser.parse_known_args(argv)
    parser.refuse(unknown_options)
    names = [name for several in arguments.backend for name in several.split(",")]
    if unknown := [name for name in names if name not in machine.BACKENDS]:
        parser.error(f"--backend must be one of {', '.join(machine.BACKENDS)}, got {unknown[0]!r}")
    if arguments.out and (arguments.out.is_dir() or not arguments.out.resolve().parent.is_dir()):
        parser.error(f"--out must be a file in a folder that exists, got {str(arguments.out)!r}")

    begin = time.monotonic()
    start = "in this process"
    try:
        if arguments.in_process:
            known, targets, reasons = machine.describe(arguments.emulated)
        else:
            start, (known, targets, reasons) = describe_isolated(arguments.emulated)
    except RuntimeError as reason:
        print(f"smoothie-kernels check: {reason}", file=sys.stderr)
        return 2
    if missing := [name for name in names if name in reasons]:
        for name in missing:
            print(f"smoothie-kernels check: backend {name!r} cannot run: {reasons[name]}", file=sys.stderr)
        return 2
    chosen = [targets[name] for name in machine.BACKENDS if name in targets and name in (names or usual(targets))]
    probes = [probe for target in chosen for probe in probes_of(target, arguments.quick)]
    at_once = min(AT_ONCE, os.cpu_count() or 1)
    results = run_here(probes) if arguments.in_process else run_isolated(probes, at_once, start)
    return report(results, known, reasons, arguments.out, begin)


def usual(targets: dict[str, Target]) -> list[str]:
    """Not what runs in an emulator or an interpreter."""
    return [name for name, target in targets.items() if target.size != "tiny"]


def describe_isolated(emulated: Path | None) -> tuple[str, machine.Description]:
    """machine.describe, by a process of its own: a driver may hang, and this process stays without it. Also how such
    processes have to start: a fork cannot use a GPU that its server has touched."""
    with tempfile.TemporaryDirectory(prefix="smoothie-check-") as folder:
        path = Path(folder, "machine.pt")
        call = Call(_describe_to, (emulated, path), DESCRIBE_SECONDS, Path(folder, "log.txt"))
        for start in STARTS:
            [(_, ended)] = run_calls([call], 1, start)
            if ended.code == 0:
                description: machine.Description = torch.load(path, weights_only=False)
                return start, description
    raise RuntimeError(f"cannot say what runs on this machine: {ended}\n{ended.tail}")


def _describe_to(emulated: Path | None, path: Path) -> None:
    torch.save(machine.describe(emulated), path)


def report(
    results: Generator[Result], known: dict[str, Any], reasons: dict[str, str], out: Path | None, begin: float
) -> int:
    """Prints every result as it comes, then all. A probe that was not reached when the user interrupts is left out.
    Where `out` cannot be written to, the probes go on without it."""
    ended: list[Result] = []
    stopped, unwritten = False, ""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for result in results:
            ended.append(result)
            print(result.json(), flush=True)
            if out and not unwritten:
                try:
                    with out.open("a", encoding="utf-8") as file:
                        file.write(result.json() + "\n")
                except OSError as error:
                    unwritten = f"smoothie-kernels check: --out cannot be written to: {error}"
                    print(unwritten, file=sys.stderr)
    except KeyboardInterrupt:
        stopped = True
    finally:
        results.close()
        signal.signal(signal.SIGTERM, before)
    print(f"\n{table(ended)}\n")
    bad = [result for result in ended if result.outcome != "ok"]
    for result in bad:
        print(describe_result(result))
    for name, reason in reasons.items():
        print(f"{name} cannot run: {reason}")
    print("\n--- for a bug report")
    for name, value in known.items():
        print(f"{name}: {value}")
    for result in bad:
        print(f"{result.backend}, {result.probe}: {result.outcome}")
    print(f"{len(ended)} probes, {len(bad)} not ok, {time.monotonic() - begin:.0f} s{', interrupted' * stopped}")
    print("---")
    return 130 if stopped else 1 if bad else 0 if ended and not unwritten else 2


def table(results: Iterable[Result]) -> str:
    counts: dict[str, dict[str, int]] = {}
    for result in results:
        of = counts.setdefault(result.backend, dict.fromkeys(OUTCOMES, 0))
        of[result.outcome] += 1
    rows = [["backend", *OUTCOMES], *([name, *map(str, of.values())] for name, of in counts.items())]
    return "\n".join(f"{row[0]:<10}" + "".join(f"{cell:>7}" for cell in row[1:]) for row in rows)


def describe_result(result: Result) -> str:
    """Of what is not ok, the first thing to look at."""
    found = result.found
    text = f"{result.outcome.upper():<6}{result.backend}, {result.probe}: "
    if result.outcome != "wrong":
        return f"{text}{found['message']}; at {found.get('case') or 'its start'}"
    first, *_ = found["wrong"]
    places = "; ".join(f"{name} {first[name]}" for name in first if "%" in name or "//" in name)
    return (
        f"{text}{found['wrong results']} results in {found['cases']} cases. {first['case']}: {first['result']} is off "
        f"by {first['error']:.3g} ({first['bound']:.3g} is allowed) in {first['elements']} of {first['of']}; {places}"
    )

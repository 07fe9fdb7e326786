"""The `smoothie-kernels` command."""

import codecs
import io
import json
import os
import platform
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch

import smoothie_kernels
from smoothie_kernels import dispatch
from smoothie_kernels.arguments import Parser
from smoothie_kernels.check.isolate import signal_name

ROOT = Path(smoothie_kernels.__file__).parents[1]
COMMANDS = {  # their modules, the extras that these need, and what they do
    "check": ("check.command", None, "check every kernel on this machine against float64"),
    "train": ("diffusion.train", "train", "train a Smoothie model on text"),
    "sample": ("diffusion.sample_command", "train", "sample texts from a trained model"),
    "evaluate": ("diffusion.evaluate", "evaluate", "score generated texts"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    name = " ".join(["smoothie-kernels", *argv[:1]])
    status = 0
    try:
        status = _main(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # of stdout: a full disk, or a pipe whose reader has ended
        if not status:  # else the command has said it
            print(f"{name}: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python's last flush cannot fail
        return status or 1
    return status


def _main(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return run(argv[0], argv[1:])
    parser = Parser(prog="smoothie-kernels", description=smoothie_kernels.__doc__)
    parser.add_argument("--version", action="version", version=smoothie_kernels.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say which backends can run here, and why the others cannot")
    for name, (_, _, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    parser.parse_args(argv)
    print(doctor())
    return 0


def run(name: str, arguments: list[str]) -> int:
    """A command of its own. Packages that only some of them need may be missing."""
    where, extra, _ = COMMANDS[name]
    try:
        module = import_module(f"smoothie_kernels.{where}")
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        install = f"pip install '.[{extra}]' in a clone of smoothie-kernels"
        print(f"smoothie-kernels {name} needs the package {error.name}: {install}", file=sys.stderr)
        return 2
    codecs.register_error("json", _escaped)
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a letter must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="json")
    status: int = module.command(arguments)
    return status


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Letters that an encoding lacks, as JSON writes them: lines of JSON stay what they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def doctor() -> str:
    """One line per device and backend: "yes", or what is missing."""
    lines = [
        f"smoothie-kernels {smoothie_kernels.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    ]
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        fatal = _fatal(device)
        name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        lines.append(f"\n{device} tensors ({name}):")
        for backend in (*dispatch.BACKENDS, *dispatch.BY_NAME):
            dtype = torch.bfloat16 if backend == "cuda" else torch.float32
            reason = fatal.get(backend) or dispatch.load(backend).supports(device, dtype)
            lines.append(f"  {backend:<10} {_detail(backend) if reason is None else f'no: {reason}'}")
    if len(devices) == 1:
        lines.append("\ncuda tensors: torch sees no GPU")
    lines.append("\nsmoothie-kernels check: whether the kernels are right on this machine")
    return "\n".join(lines)


ASK = """
import sys
sys.path.insert(0, sys.argv[1])
from smoothie_kernels import dispatch

for backend in sys.argv[3:]:
    print(backend, flush=True)
    dispatch.load(backend).supports(sys.argv[2], None)
"""


def _fatal(device: str) -> dict[str, str]:
    """The backends that end a process by being asked what they support, such as by loading a damaged library."""
    names, found = [*dispatch.BACKENDS, *dispatch.BY_NAME], {}
    while names:
        command = [sys.executable, "-c", ASK, str(ROOT), device, *names]
        asked = subprocess.run(command, capture_output=True, text=True)
        seen = asked.stdout.split()
        if not asked.returncode or not seen:
            break
        end = signal_name(-asked.returncode) if asked.returncode < 0 else asked.stderr.strip().rpartition("\n")[2]
        found[seen[-1]] = f"loading it ends a process: {end}"
        names = names[len(seen) :]
    return found


def _detail(backend: str) -> str:
    if backend == "cuda":
        return 'by its name alone, backend="cuda"'
    if backend != "cpu":
        return "yes"
    from smoothie_kernels.backends import cpu

    return f"yes: {cpu.tier() or cpu.tiers()[0]} (this processor runs {', '.join(cpu.tiers())})"


if __name__ == "__main__":  # torchrun -m
    sys.exit(main())

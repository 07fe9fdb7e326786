"""The `smoothie-kernels` command."""

import argparse
import platform
import sys

import torch

import smoothie_kernels
from smoothie_kernels import dispatch


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="smoothie-kernels", description=smoothie_kernels.__doc__)
    parser.add_argument("--version", action="version", version=smoothie_kernels.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say which backends can run here, and why the others cannot")
    commands.add_parser("train", help="train a Smoothie model on text", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "train":
        return train(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    print(doctor())
    return 0


def train(arguments: list[str]) -> int:
    """The trainer's command, whose packages are not needed by anything else."""
    try:
        from smoothie_kernels.diffusion import train as trainer
    except ModuleNotFoundError as error:
        print(
            f"smoothie-kernels train needs the package {error.name}: pip install 'smoothie-kernels[train]'",
            file=sys.stderr,
        )
        return 2
    return trainer.command(arguments)


def doctor() -> str:
    """One line per device and backend: "yes", or what is missing."""
    lines = [
        f"smoothie-kernels {smoothie_kernels.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    ]
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        lines.append(f"\n{device} tensors ({name}):")
        for backend in dispatch.BACKENDS:
            reason = dispatch.load(backend).supports(device, torch.float32)
            lines.append(f"  {backend:<10} {_detail(backend) if reason is None else f'no: {reason}'}")
    if len(devices) == 1:
        lines.append("\ncuda tensors: torch sees no GPU")
    return "\n".join(lines)


def _detail(backend: str) -> str:
    if backend != "cpu":
        return "yes"
    from smoothie_kernels.backends import cpu

    return f"yes: {cpu.tier() or cpu.tiers()[0]} (this processor runs {', '.join(cpu.tiers())})"


if __name__ == "__main__":  # torchrun -m
    sys.exit(main())

"""Builds test_step.cpp with the kernel's own sources and flags, and runs it. Needs no torch.

PYTHONPATH=. python tests/cpp/build.py [address,undefined | thread]     with these sanitizers
"""

import subprocess
import sys
from pathlib import Path

import setup

TEST = "tests/cpp/test_step.cpp"


def build(sanitizers: str) -> Path:
    folder = setup.ROOT / "build" / "-".join(["cpp", *filter(None, sanitizers.split(","))])
    flags = [*setup.FLAGS, "-pthread"]
    if sanitizers:
        flags += ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    test = folder / "test_step"
    setup.run_ninja(
        folder, setup.ninja_file(setup.find_compiler(), flags, {TEST: [], **setup.KERNEL_SOURCES}, [], test)
    )
    return test


def main(sanitizers: str = "") -> None:
    try:
        test = build(sanitizers)
    except setup.CannotBuild as reason:
        sys.exit(f"cannot build {TEST}: {reason}")
    sys.exit(subprocess.run([test], check=False).returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Builds the kernels for Hopper against an emulator of it, for a CPU.

PYTHONPATH=. python tests/cuda/build.py [address,undefined]     builds and runs the emulator's own tests, without torch
"""

import platform
import subprocess
import sys
from pathlib import Path

import setup

TEST, EMULATOR = "tests/cuda/test_emulator.cpp", "tests/cuda/emulator.cpp"
FOLDER = setup.ROOT / "build" / "cuda-emulator"
# Instructions of x86-64-v3, as Linux names them.
V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}


def flags(sanitizers: str = "") -> list[str]:
    """Besides those of setup.py."""
    flags = ["-Wno-unknown-pragmas", "-Wno-psabi", "-DSMOOTHIE_EMULATED", f"-I{setup.ROOT}/tests/cuda"]
    cpu = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and cpu.is_file():
        found = next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "")
        if set(found.split()) >= V3:
            flags.append("-march=x86-64-v3")
    if sanitizers:
        flags += ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    return flags


def build_test(sanitizers: str = "") -> Path:
    folder = FOLDER.with_name("-".join([FOLDER.name, *filter(None, sanitizers.split(","))]))
    test = folder / "test_emulator"
    sources: dict[str, list[str]] = {TEST: [], EMULATOR: []}
    all_flags = [*setup.FLAGS, *flags(sanitizers)]
    setup.run_ninja(folder, setup.ninja_file(setup.find_compiler(), all_flags, sources, [], test))
    return test


def library(folder: Path = FOLDER) -> Path:
    """The kernels and their operators on a CPU, in a library as setup.py builds one for a GPU; anew where needed."""
    torch_flags, link_flags = setup.torch_flags(setup.find_torch(setup.package_folders()))
    kernels = sorted((setup.ROOT / "csrc/cuda").glob("*.cu"))
    sources: dict[str, list[str]] = {str(kernel.relative_to(setup.ROOT)): ["-xc++"] for kernel in kernels}
    sources |= {"csrc/cuda/bindings.cpp": [], EMULATOR: []}
    output = folder / "libsmoothie_kernels_cuda.so"
    all_flags = [*torch_flags, *flags()]
    text = setup.ninja_file(setup.find_compiler(), all_flags, sources, link_flags, output)
    setup.run_ninja(folder / "library", text)
    return output


def main(sanitizers: str = "") -> None:
    try:
        test = build_test(sanitizers)
    except setup.CannotBuild as reason:
        sys.exit(f"cannot build {TEST}: {reason}")
    sys.exit(subprocess.run([test], check=False).returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])

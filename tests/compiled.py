"""Compiles what tests need in C++: the tests without torch, and the kernels for Hopper against an emulator of it.

PYTHONPATH=. python tests/compiled.py cpu [address,undefined | thread]     builds and runs tests/cpp, with sanitizers
PYTHONPATH=. python tests/compiled.py emulator [address,undefined]         builds and runs tests/cuda
"""

import platform
import subprocess
import sys
from pathlib import Path

import setup

BUILD = setup.ROOT / "build"
MATRIX_UNIT = "tests/cuda/emulator/matrix_unit.cpp"
# Instructions of x86-64-v3, as Linux names them.
V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}


def sources(pattern: str) -> dict[str, list[str]]:
    return {str(path.relative_to(setup.ROOT)): [] for path in sorted(setup.ROOT.glob(pattern))}


def emulator_flags() -> list[str]:
    """Those that the emulator and the kernels in it need, with setup.py's."""
    flags = ["-Wno-unknown-pragmas", "-Wno-psabi", "-DSMOOTHIE_EMULATED", f"-I{setup.ROOT}/tests/cuda"]
    cpu = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and cpu.is_file():
        found = next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "")
        if set(found.split()) >= V3:
            flags.append("-march=x86-64-v3")
    return flags


def cpp_tests() -> dict[str, tuple[list[str], dict[str, list[str]]]]:
    """By name: flags and sources."""
    emulator = sources("tests/cuda/*.cpp") | sources("tests/cuda/emulator/*.cpp")
    return {
        "cpu": (["-pthread"], {"tests/cpp/test_step.cpp": [], **setup.KERNEL_SOURCES}),
        "emulator": (emulator_flags(), emulator),
    }


def build_test(name: str, sanitizers: str = "") -> Path:
    folder = BUILD / "-".join([f"test-{name}", *filter(None, sanitizers.split(","))])
    flags, files = cpp_tests()[name]
    flags = [*setup.FLAGS, *flags]
    if sanitizers:
        flags += ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        if MATRIX_UNIT in files:  # loops over arrays of fixed sizes, three quarters of the time
            files[MATRIX_UNIT] = ["-O3", "-fno-sanitize=all"]
    setup.run_ninja(folder, setup.ninja_file(setup.find_compiler(), flags, files, [], folder / "test"))
    return folder / "test"


def emulated_library() -> Path:
    """The CUDA library for a CPU, with the emulator in it, as setup.py builds one for a GPU; anew where it is stale."""
    torch_flags, link_flags = setup.torch_flags(setup.find_torch(setup.package_folders()))
    files: dict[str, list[str]] = {kernel: ["-xc++"] for kernel in setup.cuda_sources()}
    files |= {"csrc/cuda/bindings.cpp": [], **sources("tests/cuda/emulator/*.cpp")}
    folder = BUILD / "emulated-library"
    output = folder / setup.CUDA_LIBRARY
    flags = [*torch_flags, *emulator_flags()]
    setup.run_ninja(folder, setup.ninja_file(setup.find_compiler(), flags, files, link_flags, output))
    return output


def main(name: str, sanitizers: str = "") -> None:
    try:
        test = build_test(name, sanitizers)
    except setup.CannotBuild as reason:
        sys.exit(f"cannot build the C++ tests {name!r}: {reason}")
    sys.exit(subprocess.run([test], check=False).returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])

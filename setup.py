"""Builds the compiled backends. Metadata is in pyproject.toml.

The CPU library is plain C++17 against the LibTorch stable ABI: one build serves every torch >= 2.10 and every Python.
torch is only looked up on disk, never imported (an isolated build has none), and nothing probes for a GPU. Where the
compiler or torch's headers are missing, installation goes on without the library; `smoothie-kernels doctor` says so.

Environment: CXX is the compiler; TORCH_DIR the folder of torch, where it is not among this Python's packages;
SMOOTHIE_KERNELS_BUILD=0 skips the build, =1 makes a failed build an error.
"""

import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)
TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"  # hides all newer functions
CPU_LIBRARY = "libsmoothie_kernels_cpu.so"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# GCC's own AVX-512 headers trip the first two (GCC bug 105593); Clang does not know the second.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
# The kernel without torch, and what each file is compiled with besides: one instruction set a file.
KERNEL_SOURCES = {"csrc/cpu/tiers.cpp": [], "csrc/cpu/step_scalar.cpp": ["-ffp-contract=fast", "-Wno-psabi"]}
if platform.machine() == "x86_64":
    KERNEL_SOURCES["csrc/cpu/step_avx2.cpp"] = ["-mavx2", "-mfma", "-mf16c"]
    KERNEL_SOURCES["csrc/cpu/step_avx512.cpp"] = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    KERNEL_SOURCES["csrc/cpu/step_avx512.cpp"] += ["-mfma", "-mf16c"]


class CannotBuild(Exception):
    """Why the library cannot be built here."""


def package_folders() -> list[str]:
    """Where torch may be: also outside an isolated build's own path, and outside a virtual environment."""
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    paths = [sysconfig.get_path(name, vars=v) for v in (None, base) for name in ("purelib", "platlib")]
    return [*sys.path, *paths, site.getusersitepackages()]


def find_torch(folders: Iterable[str]) -> Path:
    """The folder of an installed torch that is new enough, without importing it."""
    given = os.environ.get("TORCH_DIR")
    for torch in [Path(given)] if given else [Path(folder) / "torch" for folder in folders]:
        if not (torch / "version.py").is_file():
            continue
        found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (torch / "version.py").read_text())
        if not found or (int(found[2]), int(found[3])) < MIN_TORCH:
            raise CannotBuild(f"torch {found[1] if found else '?'} in {torch} is older than 2.10")
        if not (torch / "include/torch/csrc/stable/library.h").is_file():
            raise CannotBuild(f"torch in {torch} has no C++ headers")
        return torch
    raise CannotBuild("torch >= 2.10 is not installed; install it first, then install smoothie-kernels again")


def find_compiler() -> str:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")
    if not compiler.strip() or not shutil.which(shlex.split(compiler)[0]):
        raise CannotBuild("no C++ compiler found (set CXX, or install g++ or clang++)")
    return compiler


def ninja_file(
    compiler: str, flags: list[str], sources: Mapping[str, list[str]], link_flags: list[str], output: Path
) -> str:
    def quote(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def path(name: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(name))

    objects = {source: Path(Path(source).stem + ".o") for source in sources}
    lines = [
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d {quote(flags)} $flags -c $in -o $out",
        "  description = compile $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} {quote(flags)} $in {quote(link_flags)} -o $out",
        "  description = link $out",
    ]
    for source, own_flags in sources.items():
        lines += [f"build {objects[source]}: compile {path(ROOT / source)}", f"  flags = {quote(own_flags)}"]
    lines.append(f"build {path(output)}: link {' '.join(map(str, objects.values()))}")
    return "\n".join(lines) + "\n"


def run_ninja(folder: Path, text: str) -> None:
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if not ninja:
        raise CannotBuild("ninja is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(text)
    if subprocess.run([ninja, "-C", str(folder)], check=False).returncode:
        raise CannotBuild("the compiler failed; its messages are above")


def build_cpu_library(output: Path, folder: Path) -> None:
    torch = find_torch(package_folders())
    includes = [f"-isystem{torch}/include", f"-isystem{torch}/include/torch/csrc/api/include"]
    # libtorch_cpu is in the process already when the library is loaded: found by name, no run path.
    link_flags = ["-shared", f"-L{torch}/lib", "-ltorch_cpu"]
    sources = {"csrc/cpu/bindings.cpp": [], **KERNEL_SOURCES}
    run_ninja(folder, ninja_file(find_compiler(), [*FLAGS, TORCH_TARGET, *includes], sources, link_flags, output))


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], CPU_LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("SMOOTHIE_KERNELS_BUILD", "")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            if wanted == "0":
                raise CannotBuild("SMOOTHIE_KERNELS_BUILD=0")
            output.parent.mkdir(parents=True, exist_ok=True)
            build_cpu_library(output, Path(self.build_temp))
        except CannotBuild as reason:
            for stale in (
                output,
                ROOT / self.get_ext_filename(ext.name),
            ):  # an earlier build does not fit these sources
                stale.unlink(missing_ok=True)
            if wanted == "1":
                raise SystemExit(f"smoothie-kernels: cannot build the CPU library: {reason}") from reason
            print(f"smoothie-kernels: installing without the CPU library: {reason}", file=sys.stderr)


class AnyPython(bdist_wheel):
    """The library knows nothing of Python: one wheel for every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":  # tests import this file for its tables
    setup(
        ext_modules=[Extension("smoothie_kernels.cpu_library", sources=[], optional=True)],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
    )

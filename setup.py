"""Builds the compiled backends. Metadata is in pyproject.toml.

The CPU library is plain C++17 against the LibTorch stable ABI: one build serves every torch >= 2.10 and every Python.
torch is only looked up on disk, never imported (an isolated build has none), and nothing probes for a GPU. Where the
compiler or torch's headers are missing, installation goes on without the library; `smoothie-kernels doctor` says so.

Environment: CXX picks the compiler; SMOOTHIE_KERNELS_BUILD=0 skips the build, =1 makes a failed build an error.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MIN_TORCH = (2, 10)
CPU_LIBRARY = "libsmoothie_kernels_cpu.so"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# GCC's own AVX-512 headers trip these two (GCC bug 105593).
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
CPU_SOURCES = {"bindings": [], "tiers": [], "step_scalar": ["-ffp-contract=fast", "-Wno-psabi"]}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_SOURCES["step_avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_SOURCES["step_avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]


class CannotBuild(Exception):
    """Why the library cannot be built here."""


def find_torch() -> Path:
    """The folder of an installed torch that is new enough, without importing it."""
    places = [os.environ.get("TORCH_DIR"), *sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for place in filter(None, places):
        torch = Path(place) if (Path(place) / "include/torch").is_dir() else Path(place) / "torch"
        header = torch / "include/torch/headeronly/version.h"
        if not header.is_file():
            continue
        text = header.read_text()
        version = tuple(int(re.search(rf"TORCH_VERSION_{part} (\d+)", text)[1]) for part in ("MAJOR", "MINOR"))
        if version < MIN_TORCH:
            raise CannotBuild(f"torch {version[0]}.{version[1]} at {torch} is older than 2.10")
        return torch
    raise CannotBuild("torch >= 2.10 is not installed; install it first, then install smoothie-kernels again")


def ninja_file(torch: Path, compiler: str, output: Path) -> str:
    flags = [*FLAGS, f"-isystem{torch}/include", f"-isystem{torch}/include/torch/csrc/api/include"]
    lines = [
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d {shlex.join(flags)} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # libtorch_cpu is in the process already when the library is loaded: found by name, no run path.
        f"  command = {compiler} -shared -Wl,--as-needed $in -L{torch}/lib -ltorch_cpu -o $out",
    ]
    lines += [
        f"build {name}.o: compile {ROOT.resolve()}/csrc/cpu/{name}.cpp\n  flags = {shlex.join(flags)}"
        for name, flags in CPU_SOURCES.items()
    ]
    lines.append(f"build {output}: link {' '.join(f'{name}.o' for name in CPU_SOURCES)}")
    return "\n".join(lines) + "\n"


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], CPU_LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("SMOOTHIE_KERNELS_BUILD", "")
        try:
            if wanted == "0":
                raise CannotBuild("SMOOTHIE_KERNELS_BUILD=0")
            self.build_library(ext)
        except CannotBuild as reason:
            if wanted == "1":
                raise SystemExit(f"smoothie-kernels: cannot build the CPU library: {reason}") from reason
            print(f"smoothie-kernels: installing without the CPU library: {reason}", file=sys.stderr)

    def build_library(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if not compiler or not shutil.which(shlex.split(compiler)[0]):
            raise CannotBuild("no C++ compiler found (set CXX, or install g++ or clang++)")
        ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
        if not ninja:
            raise CannotBuild("ninja is not installed")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(find_torch(), compiler, output))
        if subprocess.run([ninja, "-C", str(build)], check=False).returncode:
            raise CannotBuild("the compiler failed; its messages are above")


class AnyPython(bdist_wheel):
    """The library knows nothing of Python: one wheel for every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("smoothie_kernels.cpu_library", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)

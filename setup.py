"""Builds the compiled backends. Metadata is in pyproject.toml.

Both libraries are C++17 against the LibTorch stable ABI: one build serves every torch >= 2.10 and every Python.
torch is only looked up on disk, never imported (an isolated build has none), and nothing probes for a GPU: the CUDA
library, for Hopper alone, is built where nvcc is, against any build of torch. Where something is missing, installation
goes on without the library that needs it; `smoothie-kernels doctor` says so.

SMOOTHIE_WATCHDOG=1 adds a second CUDA library, whose kernels end with an error where they would hang: `smoothie-kernels
check` takes it.

Environment: CXX is the C++ compiler, NVCC that of CUDA; TORCH_DIR the folder of torch, where it is not among this
Python's packages; SMOOTHIE_KERNELS_BUILD=0 skips both builds, =1 makes a failed build an error, but not a missing nvcc;
SMOOTHIE_KERNELS_CUDA=0 leaves the CUDA library out.
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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)
TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"  # hides all newer functions
CPU_LIBRARY, CUDA_LIBRARY = "libsmoothie_kernels_cpu.so", "libsmoothie_kernels_cuda.so"
WATCHDOG_LIBRARY, WATCHDOG_FLAG = "libsmoothie_kernels_cuda_watchdog.so", "-DSMOOTHIE_WATCHDOG"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# GCC's own AVX-512 headers trip the first two (GCC bug 105593); Clang does not know the second.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
# The kernel without torch, and what each file is compiled with besides: one instruction set a file. Vector tiers fuse
# what their sources say, so that moving code does not change a bit.
KERNEL_SOURCES = {"csrc/cpu/tiers.cpp": [], "csrc/cpu/step_scalar.cpp": ["-ffp-contract=fast", "-Wno-psabi"]}
if platform.machine() == "x86_64":
    KERNEL_SOURCES["csrc/cpu/step_avx2.cpp"] = ["-mavx2", "-mfma", "-mf16c", "-ffp-contract=off"]
    KERNEL_SOURCES["csrc/cpu/step_avx512.cpp"] = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    KERNEL_SOURCES["csrc/cpu/step_avx512.cpp"] += ["-mfma", "-mf16c", "-ffp-contract=off"]

# In a build's folder, a link to ROOT: nvcc hands names to a shell, where ROOT's may have a quote or dollar.
TREE = "tree"
MIN_NVCC = (12, 5)  # cudaGetDriverEntryPointByVersion
# Messages of the assembler are kept next to the object: tests/cuda/check.py reads registers, spills and warnings there.
NVCC_FLAGS = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr", "-Xptxas=-v"]
NVCC_FLAGS += [f"-I{TREE}/csrc/cuda/sm90", "-Xcompiler=-fPIC,-fvisibility=hidden"]


class CannotBuild(Exception):
    """Why a library cannot be built here."""


class LeftOut(CannotBuild):
    """Why nobody expects the library here: no error, not even where libraries are wanted."""


def package_folders() -> list[str]:
    """Where torch may be: also outside an isolated build's own path, and outside a virtual environment."""
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    paths = [sysconfig.get_path(name, vars=v) for v in (None, base) for name in ("purelib", "platlib")]
    return [*sys.path, *paths, site.getusersitepackages()]


def find_torch(folders: Iterable[str]) -> Path:
    """The folder of an installed torch that is new enough, without importing it."""
    given = os.environ.get("TORCH_DIR")
    if given and not (Path(given) / "version.py").is_file():
        raise CannotBuild(f"TORCH_DIR must be the folder of an installed torch, got {given}, which has no version.py")
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


def find_nvcc() -> list[str]:
    """nvcc, and what NVCC has after it."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    words = shlex.split(os.environ.get("NVCC", "")) or [found or "nvcc"]
    if not shutil.which(words[0]):
        raise LeftOut("no nvcc found (set NVCC or CUDA_HOME, or put it on the PATH)")
    release = re.search(r"release ((\d+)\.(\d+))", _output([*words, "--version"]))
    if not release or (int(release[2]), int(release[3])) < MIN_NVCC:
        raise LeftOut(f"nvcc {release[1] if release else '?'} is older than {MIN_NVCC[0]}.{MIN_NVCC[1]}")
    return words


def find_toolkit(nvcc: list[str]) -> Path:
    """nvcc's own folder is asked of it: what the PATH has may be a script or a link."""
    plan = _output([*nvcc, "--dryrun", "any.cu"])  # prints what it would do; there need be no such file
    found = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if not found:
        raise CannotBuild(f"{nvcc[0]} does not say where its toolkit is")
    return Path(found[1].strip()).resolve()


def _output(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout


def _quote(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def ninja_file(
    compiler: str,
    flags: list[str],
    sources: Mapping[str, list[str]],
    link_flags: list[str],
    output: Path,
    compilers: Mapping[str, str] | None = None,
) -> str:
    """compilers: of files whose names end so, instead of `compiler` and `flags`; what they say goes to a .log."""

    def path(name: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(name))

    def rule(name: str, command: str) -> list[str]:
        depfile = ["  depfile = $out.d", "  deps = gcc"]
        return [f"rule {name}", f"  command = {command}", "  description = compile $in", *depfile]

    steps = "-MMD -MF $out.d $flags -c $in -o $out"
    compilers = compilers or {}
    lines = rule("compile", f"{compiler} {_quote(flags)} {steps}")
    for ending, command in compilers.items():
        lines += rule(f"compile{ending}", f"{command} {steps} > $out.log 2>&1 || (cat $out.log; false)")
    lines += ["rule link", f"  command = {compiler} {_quote(flags)} $in {_quote(link_flags)} -o $out"]
    lines += ["  description = link $out"]
    objects = {source: Path(Path(source).stem + ".o") for source in sources}
    for source, own_flags in sources.items():
        ending = Path(source).suffix if Path(source).suffix in compilers else ""
        lines += [
            f"build {objects[source]}: compile{ending} {path(Path(TREE, source))}",
            f"  flags = {_quote(own_flags)}",
        ]
    lines.append(f"build {path(output)}: link {' '.join(map(str, objects.values()))}")
    return "\n".join(lines) + "\n"


def run_ninja(folder: Path, text: str, targets: Iterable[str] = ()) -> None:
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if not ninja:
        raise CannotBuild("ninja is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TREE).unlink(missing_ok=True)
    (folder / TREE).symlink_to(ROOT, target_is_directory=True)
    (folder / "build.ninja").write_text(text)
    if subprocess.run([ninja, "-C", str(folder), *targets], stdout=2, check=False).returncode:  # to stderr
        raise CannotBuild("the compiler failed; its messages are above")


def torch_flags(torch: Path) -> tuple[list[str], list[str]]:
    """To compile, and to link. libtorch_cpu is in the process when a library is loaded: found by name, no run path."""
    includes = [f"-isystem{torch}/include", f"-isystem{torch}/include/torch/csrc/api/include"]
    return [*FLAGS, TORCH_TARGET, *includes], ["-shared", f"-L{torch}/lib", "-ltorch_cpu"]


def build_cpu_library(output: Path, folder: Path) -> None:
    flags, link_flags = torch_flags(find_torch(package_folders()))
    sources = {"csrc/cpu/bindings.cpp": [], **KERNEL_SOURCES}
    run_ninja(folder, ninja_file(find_compiler(), flags, sources, link_flags, output))


def cuda_sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu"))


def cuda_ninja_file(output: Path, *nvcc_flags: str) -> str:
    if os.environ.get("SMOOTHIE_KERNELS_CUDA") == "0":
        raise LeftOut("SMOOTHIE_KERNELS_CUDA=0")
    nvcc, compiler = find_nvcc(), find_compiler()
    flags, link_flags = torch_flags(find_torch(package_folders()))
    toolkit = find_toolkit(nvcc)
    folders = [toolkit / "lib64", toolkit / "lib", *toolkit.glob("targets/*/lib")]
    link_flags += [f"-L{folder}" for folder in folders if folder.is_dir()]
    # The runtime's functions stay this library's own: torch may have brought others of the same names.
    link_flags += ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL", "-Wl,--no-undefined"]
    sources: dict[str, list[str]] = {source: [] for source in ("csrc/cuda/bindings.cpp", *cuda_sources())}
    compilers = {".cu": _quote([*nvcc, *NVCC_FLAGS, *nvcc_flags])}
    return ninja_file(compiler, flags, sources, link_flags, output, compilers)


def build_cuda_library(output: Path, folder: Path) -> None:
    run_ninja(folder, cuda_ninja_file(output))


def build_watchdog_library(output: Path, folder: Path) -> None:
    run_ninja(folder, cuda_ninja_file(output, WATCHDOG_FLAG))


class Library(NamedTuple):
    title: str
    file: str
    build: Callable[[Path, Path], None]


LIBRARIES = {
    "cpu": Library("CPU library", CPU_LIBRARY, build_cpu_library),
    "cuda": Library("CUDA library", CUDA_LIBRARY, build_cuda_library),
    "cuda_watchdog": Library("CUDA library with a watchdog", WATCHDOG_LIBRARY, build_watchdog_library),
}


def asked_for() -> set[str]:
    """Names of LIBRARIES."""
    return LIBRARIES.keys() - (set() if os.environ.get("SMOOTHIE_WATCHDOG") == "1" else {"cuda_watchdog"})


def _switched_off() -> bool:
    return os.environ.get("SMOOTHIE_KERNELS_BUILD") == "0"


class BuildKernels(build_ext):
    def run(self) -> None:
        self.failures: list[str] = []
        for name in LIBRARIES.keys() - asked_for():
            self.remove_earlier(f"smoothie_kernels.{name}")
        super().run()
        if self.failures:  # only now: what could be built is in its place
            raise SystemExit("\n".join(self.failures))

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        return os.path.join(*folders, LIBRARIES[name].file)

    def remove_earlier(self, name: str) -> None:
        """What an earlier build left does not fit these sources. Where nothing is to be built, an editable installation
        keeps what it has."""
        for folder in [Path(self.build_lib)] if _switched_off() else [Path(self.build_lib), ROOT]:
            (folder / self.get_ext_filename(name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("SMOOTHIE_KERNELS_BUILD", "")
        name = ext.name.rpartition(".")[2]
        title, _, build = LIBRARIES[name]
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        if _switched_off():
            self.remove_earlier(ext.name)
            print(f"smoothie-kernels: not building the {title}: SMOOTHIE_KERNELS_BUILD=0", file=sys.stderr)
            return
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            build(output, Path(self.build_temp) / name)
        except CannotBuild as reason:
            self.remove_earlier(ext.name)
            if wanted == "1" and not isinstance(reason, LeftOut):
                self.failures.append(f"smoothie-kernels: cannot build the {title}: {reason}")
            else:
                print(f"smoothie-kernels: installing without the {title}: {reason}", file=sys.stderr)


class AnyPython(bdist_wheel):
    """The library knows nothing of Python: one wheel for every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":  # tests import this file for its tables
    setup(
        ext_modules=[Extension(f"smoothie_kernels.{name}", sources=[], optional=True) for name in sorted(asked_for())],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
    )

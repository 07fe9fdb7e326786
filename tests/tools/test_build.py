"""What installs where, and what is imported: without a compiler, without torch's headers, without optional packages."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import setup

NO_COMPILER = "no C++ compiler found"


@pytest.fixture
def project(tmp_path):
    """A copy of what is installed from, in a folder with a space, without anything built."""
    copy = tmp_path / "a copy"
    for folder in ("csrc", "smoothie_kernels"):
        shutil.copytree(setup.ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(setup.ROOT / file, copy)
    return copy


def run(folder, *arguments, **environment):
    names = ("CXX", "NVCC", "TORCH_DIR", "SMOOTHIE_KERNELS_BUILD", "SMOOTHIE_WATCHDOG")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    clean["SMOOTHIE_KERNELS_CUDA"] = "0"  # test_cuda_build.py builds that library
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=clean | environment, capture_output=True, text=True
    )


def fake_torch(folder: Path, version: str = "2.10.0", headers: bool = True) -> Path:
    torch = folder / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text("raise RuntimeError('the build imported torch')")
    (torch / "version.py").write_text(f"__version__ = '{version}'\n")
    if headers:
        (torch / "include/torch/csrc/stable").mkdir(parents=True)
        (torch / "include/torch/csrc/stable/library.h").touch()
    return torch


# --- Finding torch and the compiler


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.10.0a0+git1234", "3.0.1"])
def test_finds_torch_without_importing_it(tmp_path, version):
    torch = fake_torch(tmp_path, version)
    assert setup.find_torch(["/nonexistent", str(tmp_path)]) == torch


def test_finds_the_torch_of_this_python():
    assert (setup.find_torch(setup.package_folders()) / "lib").is_dir()


@pytest.mark.parametrize(
    ("version", "headers", "message"),
    [
        ("2.9.1", True, "torch 2.9.1 in .* is older than 2.10"),
        ("1.13.1+cu117", True, "is older than 2.10"),
        ("2.10.0", False, "has no C.. headers"),
    ],
)
def test_says_what_is_wrong_with_torch(tmp_path, version, headers, message):
    fake_torch(tmp_path, version, headers)
    with pytest.raises(setup.CannotBuild, match=message):
        setup.find_torch([str(tmp_path)])


def test_says_that_there_is_no_torch(tmp_path):
    with pytest.raises(setup.CannotBuild, match=r"torch >= 2.10 is not installed; install it first"):
        setup.find_torch([str(tmp_path)])


def test_torch_dir_comes_before_everything(tmp_path, monkeypatch):
    near, far = fake_torch(tmp_path / "near"), fake_torch(tmp_path / "far")
    monkeypatch.setenv("TORCH_DIR", str(far))
    assert setup.find_torch([str(near.parent)]) == far
    monkeypatch.setenv("TORCH_DIR", "/nonexistent")
    with pytest.raises(setup.CannotBuild, match="TORCH_DIR must be the folder of an installed torch, got /nonexistent"):
        setup.find_torch([str(near.parent)])


def test_says_that_there_is_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++ -O2")
    with pytest.raises(setup.CannotBuild, match=re.escape(NO_COMPILER)):
        setup.find_compiler()


def test_says_that_there_is_no_ninja(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(setup.CannotBuild, match="ninja is not installed"):
        setup.run_ninja(tmp_path, "")


# --- What is compiled


def test_each_instruction_set_has_its_file(tmp_path, monkeypatch):
    written = {}
    monkeypatch.setenv("TORCH_DIR", str(fake_torch(tmp_path)))
    monkeypatch.setattr(setup, "find_compiler", lambda: "c++")
    monkeypatch.setattr(setup, "run_ninja", lambda folder, text: written.update(text=text))
    setup.build_cpu_library(tmp_path / "out.so", tmp_path / "build")
    rules, *builds = written["text"].split("\nbuild ")
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in rules
    assert "-mavx" not in rules
    assert "-ffast-math" not in written["text"]  # NaN rows and the sums of far rows need IEEE arithmetic
    with_avx512 = [build.split(":")[0] for build in builds if "-mavx512f" in build]
    assert with_avx512 == (["step_avx512.o"] if "csrc/cpu/step_avx512.cpp" in setup.KERNEL_SOURCES else [])
    compiled = {build.split(":")[0].replace(".o", ".cpp") for build in builds[:-1]}
    assert compiled <= {path.name for path in (setup.ROOT / "csrc/cpu").glob("*.cpp")}


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a compiler")
def test_names_with_spaces_dollars_and_quotes(tmp_path):
    folder = tmp_path / "a $b: c's"
    folder.mkdir()
    source = folder / "one.cpp"
    source.write_text('extern "C" const char* text() { return TEXT; }')
    output = folder / "lib one.so"
    flags = ["-fPIC", '-DTEXT="a $ b"']
    setup.run_ninja(folder / "build", setup.ninja_file("c++", flags, {str(source): []}, ["-shared"], output))
    assert b"a $ b" in output.read_bytes()


# --- Installing without the library


def test_no_compiler_is_no_error(project):
    done = run(project, "setup.py", "build_ext", "--inplace", CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert f"installing without the CPU library: {NO_COMPILER}" in done.stderr


def test_no_compiler_is_an_error_where_the_library_is_wanted(project):
    done = run(project, "setup.py", "build_ext", "--inplace", CXX="/nonexistent", SMOOTHIE_KERNELS_BUILD="1")
    assert done.returncode == 1
    assert f"cannot build the CPU library: {NO_COMPILER}" in done.stderr


def test_a_failed_build_leaves_no_older_library(project):
    library = project / "smoothie_kernels" / setup.CPU_LIBRARY
    library.touch()
    done = run(project, "setup.py", "build_ext", "--inplace", CXX="false")  # a compiler that always fails
    assert done.returncode == 0, done.stderr
    assert "the compiler failed; its messages are above" in done.stderr
    assert not library.exists()


def test_build_does_not_import_torch(project, tmp_path):
    torch = fake_torch(tmp_path / "site")
    done = run(project, "setup.py", "build_ext", CXX="/nonexistent", PYTHONPATH=str(torch.parent))
    assert NO_COMPILER in done.stderr, done.stderr  # torch was found before the compiler was missed
    assert "imported torch" not in done.stderr


def test_distributions(project):
    (project / "smoothie_kernels" / setup.CPU_LIBRARY).touch()  # an editable installation's: it stays out of the wheel
    done = run(project, "setup.py", "-q", "sdist", "bdist_wheel", SMOOTHIE_KERNELS_BUILD="0")
    assert done.returncode == 0, done.stderr
    (wheel,), (source,) = (project / "dist").glob("*.whl"), (project / "dist").glob("*.tar.gz")
    assert wheel.name.startswith("smoothie_kernels-0.1.0-py3-none-")
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = project / "smoothie_kernels"
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".typed")]
    files += [path for path in (package / "diffusion" / "samples").rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(project)) for path in files}
    assert installed == wanted
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(project)) for path in (project / "csrc").rglob("*.*")}
    assert wanted | sources | {"setup.py", "LICENSE"} <= packed


# --- What is imported

HIDE = """
import sys

class Hide:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        hidden = name.partition(".")[0] in ("triton", "transformers", "datasets", "numpy")
        return None if hidden else self.finder.find_spec(name, *rest)

sys.meta_path[:] = map(Hide, sys.meta_path)
"""


def test_runs_without_library_and_optional_packages(project):
    code = """
import torch
from smoothie_kernels import cli, fused_smoothie_step
from smoothie_kernels.backends import cpu
assert not cpu.LIBRARY.exists()
step = fused_smoothie_step(torch.randn(3, 8), torch.randn(20, 8), 0.5, 1.0, seed=1)
assert step.smoothed.isfinite().all()
print(cli.doctor())
"""
    done = run(project, "-W", "ignore", "-c", HIDE + code, PYTHONPATH=str(project))
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  "))
    assert lines["cpu"].startswith("no: it was not built: install a C++ compiler")
    assert lines["reference"] == "yes"
    assert lines["triton"].startswith("no: ")


def test_import_is_light():
    code = """
import sys, torch
before = set(sys.modules)
import smoothie_kernels
new = set(sys.modules) - before
heavy = {"triton", "transformers", "datasets", "torch._dynamo", "torch._inductor"} & new
assert not heavy, heavy
"""
    done = run(setup.ROOT, "-c", code, PYTHONPATH=str(setup.ROOT))
    assert done.returncode == 0, done.stderr

"""Compiled libraries that cannot be loaded: the backend says why, "auto" takes another, and doctor survives a crash."""

import os
import re
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from smoothie_kernels import cli, dispatch, fused_smoothie_step
from smoothie_kernels.backends import cpu, cuda
from smoothie_kernels.backends.shared_library import missing_bytes

built = pytest.mark.skipif(not cpu.LIBRARY.is_file(), reason="the CPU library is not built")
RISC_V, X86_64 = 0xF3, 0x3E
FOREIGN = struct.pack("=H", X86_64 if os.uname().machine == "riscv64" else RISC_V)
DAMAGED = {  # made of the whole library and its mapped part; what is said
    "cut in its header": (lambda whole, mapped: whole[:40], "file too short"),
    "cut in its table": (lambda whole, mapped: whole[:100], "file too short|cannot read file data"),
    "table beyond any file": (lambda whole, mapped: whole[:32] + b"\xff" * 8 + whole[40:], "."),
    "half": (lambda whole, mapped: mapped[: len(mapped) // 2], "the file is cut short by [0-9,]+ bytes"),
    "all but a byte": (lambda whole, mapped: mapped[:-1], "the file is cut short by 1 bytes"),
    "empty": (lambda whole, mapped: b"", "file too short"),
    "text": (lambda whole, mapped: b"version https://git-lfs.github.com/spec/v1\n" * 4, "invalid ELF header"),
    "other architecture": (lambda whole, mapped: whole[:18] + FOREIGN + whole[20:], "cannot open shared object file"),
    "missing symbol": (
        lambda whole, mapped: whole.replace(b"\0torch_library_impl\0", b"\0torch_library_none\0"),
        "undefined symbol: torch_library_none",
    ),
}


def use(path: Path, monkeypatch) -> None:
    """Both compiled backends have this library, and a GPU to use it on."""
    monkeypatch.setattr(cpu, "LIBRARY", path)
    monkeypatch.setattr(cuda, "LIBRARY", path)
    monkeypatch.setattr(cuda, "_why_no_gpu", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    dispatch._that_run.cache_clear()
    monkeypatch.setattr(cpu, "_ops", cpu._ops.__wrapped__)


def check_refused(reason: str) -> None:
    assert cpu.supports("cpu", torch.float32) == cuda.supports("cuda", torch.bfloat16) == reason
    x, table = torch.randn(3, 8), torch.randn(20, 8)
    found, wanted = (fused_smoothie_step(x, table, 0.5, 1.0, seed=1, backend=name) for name in ("auto", "reference"))
    dispatch._that_run.cache_clear()
    assert torch.equal(found.smoothed, wanted.smoothed)
    with pytest.raises(RuntimeError) as error:
        fused_smoothie_step(x, table, 0.5, 1.0, backend="cpu")
    assert str(error.value) == f"backend 'cpu' cannot run on cpu tensors of torch.float32: {reason}"
    with pytest.raises(RuntimeError) as error:
        cpu.tiers()
    assert str(error.value) == reason


@built
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged(kind, tmp_path, monkeypatch):
    path, whole = tmp_path / cpu.LIBRARY.name, cpu.LIBRARY.read_bytes()
    path.write_bytes(whole[:2000])
    mapped = whole[: 2000 + missing_bytes(path)]
    make, said = DAMAGED[kind]
    path.write_bytes(make(whole, mapped))
    use(path, monkeypatch)
    reason = cpu.supports("cpu", torch.float32)
    before, after = f"its library cannot be loaded ({path}: ", "): install smoothie-kernels again"
    assert reason.startswith(before)
    assert reason.endswith(after)
    assert re.search(said, reason.removeprefix(before))
    check_refused(reason)


def test_a_folder(tmp_path, monkeypatch):
    use(tmp_path, monkeypatch)
    check_refused(f"its library cannot be loaded ({tmp_path}: Is a directory): install smoothie-kernels again")


def test_another_library(tmp_path, monkeypatch):
    path = tmp_path / "libother.so"
    path.write_bytes((Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so").read_bytes())
    use(path, monkeypatch)
    reason = "it has none of this package's operators): install smoothie-kernels again"
    check_refused(f"its library cannot be loaded ({path}: {reason}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path, monkeypatch):
    path = tmp_path / "library.so"
    path.touch(mode=0)
    use(path, monkeypatch)
    check_refused(f"its library cannot be loaded ({path}: Permission denied): install smoothie-kernels again")


def test_a_mount_without_execution(tmp_path, monkeypatch):
    """Mounting needs root: the loader's word for it."""
    path = tmp_path / "library.so"
    path.touch()
    said = f"{path}: failed to map segment from shared object"

    def load(path):
        raise OSError(f"Could not load this library: {path}") from OSError(said)

    use(path, monkeypatch)
    monkeypatch.setattr(torch.ops, "load_library", load)
    reason = "failed to map segment from shared object): install smoothie-kernels again"
    check_refused(f"its library cannot be loaded ({path}: {reason}")


@built
def test_a_whole_library_misses_nothing():
    assert missing_bytes(cpu.LIBRARY) == 0
    assert missing_bytes(Path(__file__)) == 0  # for the loader to refuse


def test_doctor_asks_a_package_in_a_zip(tmp_path, monkeypatch):
    path = tmp_path / "package.zip"
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("smoothie_kernels/__init__.py", "")
        package.writestr("smoothie_kernels/dispatch.py", "def load(name): raise SystemExit('planted')")
    monkeypatch.setattr(cli, "ROOT", path)
    assert "\n  cpu        no: loading it ends a process: planted\n" in cli.doctor()


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a compiler")
def test_doctor_names_what_crashes(tmp_path, monkeypatch):
    """It asks a copy of the package whose CPU library ends the process that loads it."""
    package, source = tmp_path / "smoothie_kernels", tmp_path / "crash.c"
    shutil.copytree(cli.ROOT / package.name, package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "diffusion"))
    source.write_text("#include <signal.h>\n__attribute__((constructor)) static void end(void) { raise(SIGBUS); }\n")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", package / cpu.LIBRARY.name], check=True)
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    said = cli.doctor()
    assert "\n  cpu        no: loading it ends a process: SIGBUS\n" in said
    assert "\n  reference  yes\n" in said

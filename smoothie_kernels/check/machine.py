"""What runs here: devices, versions, libraries, and of every backend why it cannot run."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch

import smoothie_kernels
from smoothie_kernels import dispatch
from smoothie_kernels.backends import cpu, cuda, triton
from smoothie_kernels.check.probes import Target

ROOT = Path(smoothie_kernels.__file__).parents[1]
BACKENDS = (*dispatch.BY_NAME, *dispatch.BACKENDS)
USUAL = {"cpu": torch.float32, "reference": torch.float32}  # the type of quick probes; of other backends bfloat16
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


def use_library(target: Target, watchdog: bool) -> None:
    """Has backend "cuda" load this one. Both define the same operators: a process has one of them."""
    if target.emulated:
        cuda.LIBRARY, cuda.DEVICE = target.emulated, "cpu"
    elif watchdog and cuda.WATCHDOG_LIBRARY.exists():
        cuda.LIBRARY = cuda.WATCHDOG_LIBRARY


def find_targets(emulated: Path | None) -> tuple[dict[str, Target], dict[str, str]]:
    """Of the backends that can run, where they do; of the others, why they cannot. Asks for the GPU."""
    gpu = torch.cuda.is_available()
    if emulated:
        cuda.LIBRARY, cuda.DEVICE = emulated, "cpu"
    targets, reasons = {}, {}
    for name in BACKENDS:
        interpreted = name == "triton" and not gpu and os.environ.get("TRITON_INTERPRET") == "1"
        tiny = interpreted or (name == "cuda" and emulated is not None)
        device = "cpu" if tiny or name == "cpu" or (name == "reference" and not gpu) else "cuda"
        module, usual = dispatch.load(name), USUAL.get(name, torch.bfloat16)
        reason = module.supports(device, usual)
        if reason:
            reasons[name] = reason
            continue
        others = (dtype for dtype in DTYPES if dtype != usual and not module.supports(device, dtype))
        gradients = name != "cuda" or not triton.supports(device, usual)
        size = "tiny" if tiny else "gpu" if device == "cuda" else "cpu"
        targets[name] = Target(name, device, (usual, *others), size, gradients, emulated if name == "cuda" else None)
    return targets, reasons


class Description(NamedTuple):
    known: dict[str, Any]  # what a report of a bug needs
    targets: dict[str, Target]
    reasons: dict[str, str]  # why the other backends cannot run


def describe(emulated: Path | None) -> Description:
    targets, reasons = find_targets(emulated)
    known: dict[str, Any] = {
        "smoothie_kernels": smoothie_kernels.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "CUDA or HIP of torch": torch.version.cuda or torch.version.hip,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": f"{_processor()}, {os.cpu_count()} cores",
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(index)
            known[f"gpu {index}"] = (
                f"{of.name}, capability {of.major}.{of.minor}, {of.multi_processor_count} multiprocessors, "
                f"{of.total_memory / 2**30:.0f} GiB"
            )
        known["driver"] = next((Path(p).read_text().splitlines()[0] for p in DRIVERS if Path(p).is_file()), None)
    if not cpu.supports("cpu", None):
        known["tiers"] = " ".join(cpu.tiers())
    for library in (cpu.LIBRARY, cuda.LIBRARY, cuda.WATCHDOG_LIBRARY):
        known[library.name] = "there" if library.exists() else "not built"
    known |= {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("TRITON_", "SMOOTHIE_"))}
    return Description(known, targets, reasons)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of a checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())

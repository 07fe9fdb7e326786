"""What the numbers were taken on, and of what."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import smoothie_kernels as sk
from smoothie_kernels.backends import cpu

ROOT = Path(__file__).parents[2]
CPUINFO = Path("/proc/cpuinfo")
STAMP = ROOT / "build" / "device" / "commit"  # of a copy without git: `benchmarks.hopper pack` writes it


@dataclass(frozen=True)
class Machine:
    """One run's surroundings; the same in all of its rows."""

    processor: str  # the GPU where the run is on one
    host: str
    cores: int
    threads: int
    tier: str  # vectors of this package's CPU library
    memory_gib: float
    versions: dict[str, str]
    commit: str
    date: str

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|cpu|processor", " ", self.processor.lower())).strip("-")

    @property
    def versions_line(self) -> str:
        return " ".join(f"{name}={number}" for name, number in self.versions.items())

    @property
    def stem(self) -> str:
        """The name of the result files: one per machine and commit."""
        return f"{self.slug or 'unknown'}-{self.commit[:7]}"


def flush_denormals() -> None:
    """Denormal numbers are zero from now on: cross-entropy's gradient is full of them, and processors crawl over each.

    Only before PyTorch has started its threads: they take this over from the one that starts them, and never again.
    """
    torch.set_flush_denormal(True)


def describe(device: str, *packages: str) -> Machine:
    """With the versions of more packages."""
    host = _cpu_model()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return Machine(
        processor=torch.cuda.get_device_name() if device == "cuda" else f"{host}, {os.cpu_count()} cores",
        host=host,
        cores=os.cpu_count() or 0,
        threads=torch.get_num_threads(),
        tier=(cpu.tier() or cpu.tiers()[0]) if cpu.supports("cpu", torch.float32) is None else "not built",
        memory_gib=round(memory / 2**30, 1),
        versions={"smoothie_kernels": sk.__version__, "torch": torch.__version__, "python": platform.python_version()}
        | {name: found for name in ("triton", "pykeops", *packages) if (found := _version(name))}
        | ({"cuda": str(torch.version.cuda)} if device == "cuda" else {}),
        commit=commit()
        + (
            "+dirty" if _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results") else ""
        ),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def commit() -> str:
    """Seven digits, or "unknown". A copy without git may have a file that says of which it is."""
    found = _git("rev-parse", "HEAD") or (STAMP.read_text(encoding="utf-8") if STAMP.is_file() else "unknown")
    return found[:7]


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:(.*)", CPUINFO.read_text(), re.M) if CPUINFO.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

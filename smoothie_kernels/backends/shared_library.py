"""Loads a compiled library, or says why it cannot be loaded."""

import struct
from functools import cache
from pathlib import Path

import torch

ELF = b"\x7fELF\x02"  # of 64 bits; others are left to the loader, which refuses them
PT_LOAD = 1


@cache
def why_not(path: Path, build: str) -> str | None:
    """Why the library cannot be loaded, None once it is; looked at once a process. build: what to do to have it."""
    try:
        lacking = missing_bytes(path)
    except FileNotFoundError:
        return f"it was not built: {build}"
    except OSError as error:
        return _cannot(path, error.strerror)
    if lacking:
        return _cannot(path, f"the file is cut short by {lacking:,} bytes")
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:  # torch's own does not say why
        return _cannot(path, str(error.__cause__ or error).removeprefix(f"{path}: "))
    operators = getattr(torch.ops, path.stem.removeprefix("lib").removesuffix("_watchdog"))
    return None if hasattr(operators, "gaussian") else _cannot(path, "it has none of this package's operators")


def missing_bytes(path: Path) -> int:
    """How many bytes behind the file's end its program headers map: reading one would be a SIGBUS, not an error."""
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or not header.startswith(ELF):
            return 0
        (table,), (size, count) = struct.unpack_from("=Q", header, 32), struct.unpack_from("=HH", header, 54)
        length = file.seek(0, 2)
        if size != 56 or table + size * count > length:
            return 0
        file.seek(table)
        entries = file.read(size * count)
    ends = [entry[2] + entry[5] for entry in struct.iter_unpack("=II6Q", entries) if entry[0] == PT_LOAD]
    lacking: int = max(ends, default=0) - length
    return max(0, lacking)


def _cannot(path: Path, reason: object) -> str:
    return f"its library cannot be loaded ({path}: {reason}): install smoothie-kernels again"

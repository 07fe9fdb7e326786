"""Files that a crash at any moment leaves old or new, and folders that one process at a time writes to."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

logger = logging.getLogger("smoothie_kernels")
_held: dict[tuple[int, int], int] = {}  # descriptors of this process's locked folders, by device and inode


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, created where it is missing, belongs to this process until the block ends, or the process does.

    A folder that was created here and is empty at the end is removed.

    Raises:
        ValueError: another process has locked it; it is a file.
        OSError: it cannot be created or opened.
    """
    while True:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output must be a folder, got the file {str(folder)!r}")
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            identity = (status.st_dev, status.st_ino)
            if identity in _held:
                yield
                return
            try:
                _lock(descriptor, folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"output must be written by one process at a time, got {str(folder)!r} in use"
                ) from None
            if not (folder.exists() and os.path.samestat(status, folder.stat())):
                continue  # its last owner removed it before the lock was taken
            _held[identity] = descriptor
            try:
                yield
            finally:
                del _held[identity]
                if created:
                    with suppress(OSError):  # it is not empty, or gone
                        folder.rmdir()
            return
        finally:
            os.close(descriptor)


@contextmanager
def in_turn(path: Path, mode: str) -> Iterator[IO[bytes]]:
    """The open file; other processes that open it in turn wait for the end of the block."""
    with named(path), path.open(mode) as file:
        _lock(file.fileno(), path, fcntl.LOCK_EX)
        yield file


def _lock(descriptor: int, path: Path, how: int) -> None:
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        raise
    except OSError as error:  # network file systems that lock no folders
        logger.warning("%s cannot be locked (%s): start no second process that writes to it", path, error.strerror)


def _release_in_child() -> None:
    """A worker that outlives a killed parent must not keep the lock."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


@contextmanager
def replaced(path: Path) -> Iterator[IO[str]]:
    """A text file that replaces `path` when the block ends, whole and on the disk; an error leaves `path` as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with named(partial), partial.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the operating system name the file, which those of writing do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """The file's bytes, or the folder's names, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that appear whole or not at all, and their hashes."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial-"


def sha256(path: Path) -> str:
    """Hash of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process holds the lock of this file, which is made and left behind.

    Raises:
        BlockingIOError: if another one holds it; OSError if it cannot be made.
    """
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that takes its name when it is complete and on disk; what a killed process left of it is removed.

    Not `durable`, it may be lost with the power, but is whole where it is there: for one file of very many.

    Raises:
        OSError: if it cannot be written; what had the name before is untouched.
    """
    if durable:  # looking through a folder of very many takes long
        for old in path.parent.glob(f"{PARTIAL}{path.name}.*"):
            old.unlink(missing_ok=True)
    temporary = path.with_name(f"{PARTIAL}{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)

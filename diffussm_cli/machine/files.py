"""Files that appear whole or not at all, their hashes, and locks."""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

PARTIAL, LOCK = ".partial-", ".lock"


def content(folder: Path) -> set[str]:
    """Names in a folder, besides locks and unfinished files. Raises OSError."""
    return {p.name for p in folder.iterdir() if not p.name.startswith((LOCK, PARTIAL))}


def sha256(path: Path) -> str:
    """Hash of a file, read in blocks. Raises OSError, also for what is no regular file: a pipe would be waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process holds the lock of this file, which is made and left behind.

    Raises:
        BlockingIOError: if another one holds it.
        OSError: if it cannot be made, or the file system has no locks.
    """
    lock = FileLock(str(path), timeout=0, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        lock.acquire()
    except Timeout as e:
        raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path)) from e
    except (NotImplementedError, OSError) as e:
        if getattr(e, "filename", None) is not None:
            raise
        raise OSError(errno.ENOLCK, "this file system has no file locks (flock)", str(path)) from e
    try:
        yield
    finally:
        lock.release()


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
        OSError: naming the file, if it cannot be written; what had the name before is untouched.
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
    except OSError as e:
        if str(e.filename) in ("None", str(temporary)):  # a full disk names no file
            e.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A small text file in UTF-8, by `whole_file`. Raises OSError."""
    with whole_file(path) as file:
        file.write(text.encode())


def tensors_header(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """What comes before the tensors of a safetensors file.

    Args:
        tensors: name to dtype (as safetensors spells it), shape and number of bytes, in the order of the file.
    """
    entries, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        start, end = end, end + size
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

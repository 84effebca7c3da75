"""Atomic file writes, file hashes and locks."""

import contextlib
import errno
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from diffussm_cli.errors import ConfigError

PARTIAL, LOCK = ".partial-", ".lock"


def content(folder: Path) -> set[str]:
    """Names in a folder, except locks and unfinished files. Raises OSError."""
    return {p.name for p in folder.iterdir() if not p.name.startswith((LOCK, PARTIAL))}


def default_cache() -> Path | None:
    """DIFFUSSM_CACHE, or this program's folder in the user's cache folder; None if the user has no home folder."""
    try:
        chosen = os.environ.get("DIFFUSSM_CACHE")
        return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffussm")
    except RuntimeError:
        return None


def check_path(path: Path, option: str, suffixes: Sequence[str]) -> None:
    """Raises ConfigError for a file to write of another kind than these, or in a folder that does not exist."""
    if path.suffix not in suffixes:
        raise ConfigError(f"{option}: {str(path)!r} must end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: there is no folder {str(path.parent)!r}")


def sha256(path: Path) -> str:
    """Hash of a file, read in blocks. Raises OSError, also if it is not a regular file: reading a pipe would block."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` exclusively. The file is created if needed and never deleted.

    Raises:
        BlockingIOError: if another process holds it.
        OSError: if it cannot be created, or the file system has no locks.
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


@contextlib.contextmanager
def held_folder(folder: Path, rank: int = 0) -> Iterator[None]:
    """Hold the lock of one rank in a folder, which is created if needed, and removed again if no file was written.

    Raises:
        BlockingIOError: if another process holds it.
        OSError: if the folder cannot be written.
    """
    lock, made = folder / f"{LOCK}-{rank}", [p for p in (folder, *folder.parents) if not p.exists()]
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(lock))
            yield
        finally:
            stack.close()
            with contextlib.suppress(OSError):
                if made and not content(folder):
                    lock.unlink(missing_ok=True)
                    for path in made:
                        path.rmdir()


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk; Windows can flush neither a folder nor a file that is open to be read."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Write a file that takes its name only when complete and on disk; leftovers of a killed process are removed.

    If not `durable`, a power failure may lose the file. This is faster, for one file of very many.

    Raises:
        OSError: if the file cannot be written; the error names it, and an earlier file of that name is untouched.
    """
    if durable:  # listing a folder of very many files takes long
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
        if str(e.filename) in ("None", str(temporary)):  # the error of a full disk names no file
            e.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 text file by `whole_file`. Raises OSError."""
    with whole_file(path) as file:
        file.write(text.encode())


def tensors_header(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """The header of a safetensors file: everything before the tensors.

    Args:
        tensors: (dtype as safetensors spells it, shape, number of bytes) by name, in the order of the file.
    """
    entries, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        start, end = end, end + size
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

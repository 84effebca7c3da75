"""Atomic file writes, file hashes and locks."""

import contextlib
import errno
import glob
import hashlib
import os
import stat
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from diffussm_cli.errors import ConfigError

PARTIAL, LOCK = ".partial-", ".lock"


def content(folder: Path) -> set[str]:
    """Names in a folder, except locks and unfinished files. Raises OSError."""
    return {p.name for p in folder.iterdir() if not p.name.startswith((LOCK, PARTIAL))}


def default_cache() -> Path | None:
    """DIFFUSSM_CACHE, or this program's folder in the user's cache folder; None if the user has no
    home folder.
    """
    try:
        chosen = os.environ.get("DIFFUSSM_CACHE")
        return Path(
            chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffussm"
        )
    except RuntimeError:
        return None


def check_output(
    path: Path,
    option: str,
    suffixes: Sequence[str] = (),
    reads: Iterable[str | os.PathLike | None] = (),
    replaces: Collection[str] = (),
    makes: Path | None = None,
) -> None:
    """Check a file that a command is going to write, so that no work is lost and nothing is
    overwritten by mistake.

    Args:
        option: the option that gave the path, for the error.
        suffixes: the endings that the file may have; empty: any.
        reads: files and folders that the command reads. A path that does not exist, or is None, is
            passed over.
        replaces: names of files that the command may overwrite in a folder that it reads, because
            it wrote them itself.
        makes: a folder that the command makes if it is missing; the file may lie in it.

    Raises:
        ConfigError: if the file has another ending, its folder is missing or cannot be written, it
            is a folder, a link or a device, or the command reads it.
    """
    if suffixes and path.suffix not in suffixes:
        raise ConfigError(f"{option}: {str(path)!r} must end in {' or '.join(suffixes)}")

    # The place.
    folder = path.parent
    if makes is not None and not makes.exists() and folder.resolve() == makes.resolve():
        return
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name that is too long
        raise ConfigError(f"{option}: there is no folder {str(folder)!r}")
    if path.is_symlink():
        target = os.readlink(path)
        raise ConfigError(
            f"{option}: {str(path)!r} is a link to {target!r} and would be replaced; "
            "name another file"
        )
    if os.path.lexists(path) and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or pipe"
        raise ConfigError(f"{option}: cannot write {str(path)!r}: it is {what}; name a file")

    # What the command reads stays as it is.
    for source in (Path(name) for name in reads if name):
        if not path.exists() or not source.exists():
            continue
        in_folder = (
            source.is_dir()
            and path.name not in replaces
            and path.resolve().is_relative_to(source.resolve())
        )
        if in_folder or path.samefile(source):
            raise ConfigError(f"{option}: {str(path)!r} is read by this command; name another file")

    # A file that appears and disappears shows whether the folder can be written.
    trial = path.with_name(f"{PARTIAL}{path.name}.{os.getpid()}")
    try:
        trial.unlink(missing_ok=True)
        trial.touch(exist_ok=False)
        trial.unlink(missing_ok=True)  # another process may have removed it
    except OSError as e:
        raise ConfigError(f"{option}: cannot write {str(path)!r}: {e.strerror}") from e


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file of a user for reading. Raises OSError, also for a pipe or device, which might
    block for ever.
    """
    # of Unix, of Windows
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)
    mode = os.fstat(handle).st_mode
    if stat.S_ISDIR(mode):
        os.close(handle)
        raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file", str(path))
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: str | os.PathLike, most: int) -> bytes:
    """The content of a file of a user. Raises OSError as `open_regular`, ValueError for more than
    `most` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content


def sha256(path: Path) -> str:
    """Hash of a file, read in blocks. Raises OSError as `open_regular`."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
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
    # a soft lock would outlive a killed process
    lock = FileLock(str(path), timeout=0, fallback_to_soft=False)
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
    """Hold the lock of one rank in a folder, which is created if needed. Both are removed again if
    they are new and no file was written.

    Raises:
        BlockingIOError: if another process holds it.
        OSError: if the folder cannot be written.
    """
    lock = folder / f"{LOCK}-{rank}"
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    is_new = not lock.exists()

    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(lock))
            except BlockingIOError:
                made, is_new = [], False  # the other process has made them
                raise
            yield
        finally:
            stack.close()
            with contextlib.suppress(OSError):
                if is_new and not content(folder):
                    lock.unlink(missing_ok=True)
                    for path in made:
                        path.rmdir()


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk; Windows can flush neither a folder nor a file that is
    open to be read.
    """
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Write a file that takes its name only when complete and on disk; leftovers of a killed
    process are removed. Of several processes that write it at once, the last one counts.

    If not `durable`, a power failure may lose the file. This is faster, for one file of very many.
    A link of that name is replaced by the file; its target is not touched.

    Raises:
        OSError: if the file cannot be written, or a device has its name; the error names it, and an
            earlier file of that name is untouched.
    """
    if os.path.lexists(path) and stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFCHR, stat.S_IFBLK):
        raise OSError(errno.EINVAL, "it is a device, not a file", str(path))
    if durable:  # listing a folder of very many files takes long
        _remove_leftovers(path)

    # Written beside it, and put in its place once it is complete. The name is taken by no other
    # process, not even by one with the same number on another machine or in another container.
    number = int.from_bytes(os.urandom(7), "big")
    temporary = path.with_name(f"{PARTIAL}{path.name}.{number}")
    try:
        with temporary.open("xb") as file:  # never through a link that somebody has put there
            if durable:
                with contextlib.suppress(OSError):  # where there are no locks, nobody removes it
                    _lock(file.fileno())
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


def _remove_leftovers(path: Path) -> None:
    """Remove the partial files of a file that no living process has locked."""
    for old in path.parent.glob(f"{PARTIAL}{glob.escape(path.name)}.*"):
        # not of another file, as NAME.gz
        if not old.name.removeprefix(f"{PARTIAL}{path.name}.").isdecimal():
            continue
        if sys.platform == "win32" or old.is_symlink():  # Windows removes no file that is open
            with contextlib.suppress(OSError):
                old.unlink()
            continue

        with contextlib.suppress(OSError):
            handle = os.open(old, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                _lock(handle)
                old.unlink()
            finally:
                os.close(handle)


def _lock(handle: int) -> None:
    """Lock an open file for as long as it is open; Windows needs no lock. Raises OSError if another
    process has locked it, or if the file system has no locks.
    """
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 text file by `whole_file`. Raises OSError."""
    with whole_file(path) as file:
        file.write(text.encode())

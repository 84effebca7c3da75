"""What a user can fix. Each message is one line that names the option or field, its value and the remedy."""

import contextlib
import errno
from collections.abc import Iterator

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # a write() names no file with these


class DiffussmError(Exception):
    """Base of all errors that the command line shows as one line, without a traceback."""


class ConfigError(DiffussmError):
    """A preset, an option or a combination of them that cannot be run."""


class DataError(DiffussmError):
    """A missing, empty, damaged or unsuitable data set."""


class RunError(DiffussmError):
    """A run folder, checkpoint or weights file that cannot be read, written or continued."""


def reason(error: BaseException) -> str:
    """The first line of what an error says, and the second after a colon; its name if it says nothing."""
    said = getattr(error, "strerror", None) or str(error).strip().replace(":\n", ":")
    return f"{' '.join((said.splitlines() or [type(error).__name__])[0].split()):.200}"


def system_reason(error: OSError) -> str | None:
    """What the operating system says of a file, in words; None if the error names no file and no disk."""
    if error.errno is None or error.strerror is None:  # raised by a library, or by a mistake of ours
        return None
    if error.errno in DISK_ERRORS:
        return f"{error.strerror}; what was saved before is intact"
    return error.strerror if error.filename is not None else None


@contextlib.contextmanager
def writing(line: str, error: type[DiffussmError] = RunError) -> Iterator[None]:
    """Inside, an error of the operating system becomes `error`: the line, the file if the line lacks it, the reason.

    Any other error passes through, so the block may do more than write.
    """
    try:
        yield
    except OSError as e:
        said = system_reason(e)
        if said is None:
            raise
        file = "" if e.filename is None or str(e.filename) in line else f"{e.filename}: "
        raise error(f"{line}: {file}{said}") from e


@contextlib.contextmanager
def reading(line: str, error: type[DiffussmError] = RunError, remedy: str = "") -> Iterator[None]:
    """Inside, whatever is wrong with a file becomes `error`: the line, the reason, the remedy.

    Covers errors of the operating system, text that is not UTF-8, and what parsers raise. The block must hold nothing
    but the reading and parsing of the file: a ValueError of our own would be blamed on it.
    """
    try:
        yield
    except UnicodeDecodeError as e:
        raise error(f"{line}: it is not text in UTF-8{remedy}") from e
    except RecursionError as e:
        raise error(f"{line}: it is nested too deeply{remedy}") from e
    except (OSError, ValueError) as e:
        raise error(f"{line}: {reason(e)}{remedy}") from e

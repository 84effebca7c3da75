"""Members of uncompressed tar shards, which may come from strangers, in the order of the file."""

import contextlib
import functools
import os
import tarfile
from collections.abc import Callable, Iterator

from diffussm_cli.errors import DataError, reason
from diffussm_cli.machine.files import open_regular

MAX_HEADER_BYTES = 1 << 20  # of a long name or of extended attributes, which tarfile reads at once
# bytes after the end mark in which content is looked for; they are usually a few zeros
AFTER_END = 1 << 20
CUT = f"it ends within a block of {tarfile.BLOCKSIZE} bytes, as a file does that is cut off"
PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENDED = (*PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class Damaged(DataError):
    """A tar file that cannot be read from some place on."""


Read = Callable[[int], bytes]


class _Header(tarfile.TarInfo):
    """A header that is checked before tarfile acts on it."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.TruncatedHeaderError as e:
            raise tarfile.ReadError(CUT) from e
        except tarfile.InvalidHeaderError as e:
            # tarfile itself would take it for the end of the archive
            raise tarfile.ReadError(str(e)) from e
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name!r:.80} has the size {member.size}")
        if member.type in EXTENDED and member.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {member.size} bytes")
        return member


def members(path: str | os.PathLike) -> Iterator[tuple[tarfile.TarInfo, Read]]:
    """Yield the members of a tar file, each with a function that reads up to a number of bytes of a
    regular one.

    Raises:
        Damaged: at the place from which the file is damaged, with the reason. What came before is
            good.
    """
    with _damage(), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        with tarfile.TarFile(fileobj=file, tarinfo=_Header) as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps every header in memory
                length = member.size if member.isreg() else 0
                # extended attributes may hold another size
                if not 0 <= length <= size - member.offset_data:
                    is_cut = size % tarfile.BLOCKSIZE
                    raise tarfile.ReadError(CUT if is_cut else "unexpected end of data")
                yield member, functools.partial(_read, tar, member)
            file.seek(min(tar.offset, size))
            if file.read(AFTER_END).strip(b"\0"):
                raise tarfile.ReadError(
                    "more content after the end of the archive, as of two joined files"
                )


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    content = tar.extractfile(member)
    assert content is not None, "asked of regular files only"
    return content.read(most)


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError) as e:
        raise Damaged(f"damaged from here on, or not an uncompressed tar file: {reason(e)}") from e


def key_of(name: str) -> str:
    """The WebDataset key: the path up to the first dot of the file name."""
    folder, slash, leaf = name.rpartition("/")
    return folder + slash + leaf.partition(".")[0]

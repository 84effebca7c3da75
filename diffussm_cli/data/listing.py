"""List the images of a folder or archive in a fixed order, and every other file with the reason why it is ignored.

Four layouts: one folder per class; a flat folder (no classes); WebDataset shards (*.tar), where KEY.cls holds the
label of KEY.jpg as an integer, and .json and .txt files are passed over; parquet shards (parquet.py). Shards are read
in place.
"""

import hashlib
import io
import json
import os
import stat
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffussm_cli.data import parquet
from diffussm_cli.data.images import SUFFIXES, read_image
from diffussm_cli.errors import DataError

MAX_FILE_BYTES = 1 << 28
MAX_CLASS = 1 << 20
UNREADABLE = "cannot be read"
COMPANIONS = (".cls", ".json", ".txt")
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")


class Entry(NamedTuple):
    """The location of an image in a source."""

    name: str  # path relative to the source, with forward slashes; ARCHIVE/MEMBER or ARCHIVE/ROW in a shard
    label: int
    size: int  # in bytes; -1 if unknown; of its row group in a parquet shard
    archive: str = ""  # the shard that holds it; empty if it is a separate file
    offset: int = 0  # of the content in a tar file, in bytes; the row in a parquet shard
    column: str = ""  # of a parquet shard


def skipped_text(skipped: Iterable[tuple[int | None, str, str]]) -> str:
    """One line of JSON per image that is left out: its index (None if it was never listed), name and reason."""
    return "".join(json.dumps({"index": i, "file": name, "reason": why}) + "\n" for i, name, why in skipped)


@dataclass(frozen=True)
class Listing:
    """The images of a source in order, and the files that were ignored."""

    root: Path
    entries: list[Entry]
    class_names: tuple[str, ...]
    ignored: list[tuple[str, str]]  # name, reason
    columns: Mapping[str, str] = field(default_factory=dict)  # of parquet shards: those that the user has named

    def text(self) -> Iterator[bytes]:
        """One line of JSON per image: name, label, bytes."""
        return (json.dumps([e.name, e.label, e.size]).encode() + b"\n" for e in self.entries)

    def sha256(self) -> str:
        """Hash of `text`."""
        digest = hashlib.sha256()
        for line in self.text():
            digest.update(line)
        return digest.hexdigest()


def list_source(source: Path, option: str = "SOURCE", columns: Mapping[str, str] = {}) -> Listing:
    """List a folder, one .tar or .parquet file, or a pattern of .parquet files. No image is decoded.

    Args:
        columns: names of columns of parquet shards, from `named_columns`; the others are found by their usual names.

    Raises:
        DataError: if the source is missing, unreadable, or holds no images.
    """
    try:
        if source.suffix == ".tar" and source.is_file():
            listing = _list_archives(source.parent, [source.name], [])
        elif source.suffix == ".parquet" and not source.is_dir():
            shards = parquet.shard_names(sorted(path.name for path in source.parent.glob(source.name)))
            listing = _list_parquet(source.parent, shards, [], columns)
        else:
            listing = _list_folder(source, columns)
    except DataError as e:
        raise DataError(f"{option}: {e}") from e
    if not listing.entries:
        looked_for = ", ".join((*SUFFIXES, ".tar", ".parquet"))
        raise DataError(f"{option}: no images in {str(source)!r} (looked for {looked_for})")
    if columns and not listing.entries[0].column:
        named = ", ".join(columns.values())
        raise DataError(f"{option}: the columns {named} are named, but {str(source)!r} holds no parquet shards")
    return listing


def read_entry(root: Path, entry: Entry, size: tuple[int, int] | None, channels: int = 3) -> np.ndarray:
    """Read an image, upright and cropped to `size` (height, width) if given: uint8 (height, width, channels).

    Raises:
        DataError: with a message that begins with the name of the entry.
    """
    name = Path(entry.name)
    content = read_content(root, entry)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about large and odd files; real problems raise errors
        return read_image(name, size, channels, io.BytesIO(content))


def read_content(root: Path, entry: Entry) -> bytes:
    """Read the bytes of an image file. Raises DataError with a message that begins with the name of the entry."""
    path, name = root / (entry.archive or entry.name), Path(entry.name)
    if path.suffix == ".parquet":
        try:
            return parquet.read_row(path, entry.offset, entry.column)
        except DataError as e:
            raise DataError(f"{name}: {e}") from e
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{name}: not a regular file")
        if entry.size > MAX_FILE_BYTES:
            raise DataError(f"{name}: {entry.size} bytes, more than the limit of {MAX_FILE_BYTES}")
        with path.open("rb") as file:
            file.seek(entry.offset)
            content = file.read(entry.size)
    except OSError as e:
        raise DataError(f"{name}: cannot be read: {e.strerror}") from e
    if not content:
        raise DataError(f"{name}: the file is empty")
    return content


# ------------------------------------------------------------------------------------------------- folders
def _list_folder(root: Path, columns: Mapping[str, str]) -> Listing:
    try:
        names = sorted(os.listdir(root))
    except OSError as e:
        raise DataError(f"cannot read the folder {str(root)!r}: {e.strerror}") from e
    ignored: list[tuple[str, str]] = []
    folders = {n for n in names if not n.startswith(".") and os.path.isdir(root / n)}
    classes = [n for n in sorted(folders) if not _leads_back(root / n, root, ignored)]
    files = [n for n in names if n not in folders]
    archives = [n for n in files if _is_archive(n)]
    if classes:
        entries = _list_classes(root, classes, ignored)
        ignored += [(n, "not in a class folder") for n in files]
        return Listing(root, entries, tuple(classes), ignored)
    if archives:
        ignored += [(n, "a file next to tar shards") for n in files if not _is_archive(n)]
        return _list_archives(root, archives, ignored)
    shards = parquet.shard_names(files)
    if shards:
        ignored += [(n, "a file next to parquet shards") for n in files if n not in shards]
        return _list_parquet(root, shards, ignored, columns)
    return Listing(root, list(_entries(root, files, 0, ignored)), (), ignored)


def _is_archive(name: str) -> bool:
    return name.endswith(".tar") and not name.startswith(".")


def _leads_back(folder: Path, root: Path, ignored: list[tuple[str, str]]) -> bool:
    """Whether a class folder is a link to a folder that contains it."""
    loops = folder.is_symlink() and root.resolve().is_relative_to(folder.resolve())
    if loops:
        ignored.append((folder.name, "a link to a folder that contains it"))
    return loops


def _list_classes(root: Path, classes: list[str], ignored: list[tuple[str, str]]) -> list[Entry]:
    entries: list[Entry] = []
    for label, name in enumerate(classes):
        found = list(_entries(root, _files_below(root, name, ignored), label, ignored))
        if not found:
            unreadable = next((reason for n, reason in ignored if n == name), "holds no images")
            raise DataError(f"the class folder {str(root / name)!r} {unreadable}")
        entries += found
    return entries


def _files_below(root: Path, folder: str, ignored: list[tuple[str, str]]) -> list[str]:
    """All files below root/folder, sorted by the parts of their paths; links to folders are not followed."""
    found: list[str] = []

    def unreadable(e: OSError) -> None:
        ignored.append((os.path.relpath(e.filename, root), f"{UNREADABLE}: {e.strerror}"))

    for parent, folders, names in os.walk(root / folder, onerror=unreadable):
        below = os.path.relpath(parent, root)
        for name in [n for n in folders if n.startswith(".") or os.path.islink(os.path.join(parent, n))]:
            reason = "a hidden folder" if name.startswith(".") else "a link to a folder, not followed"
            ignored.append((f"{below}/{name}", reason))
            folders.remove(name)
        found += [f"{below}/{name}" for name in names]
    return sorted(found, key=lambda name: name.split("/"))


def _entries(root: Path, names: list[str], label: int, ignored: list[tuple[str, str]]) -> Iterator[Entry]:
    """Yield the files that may be images, and add the others to `ignored`."""
    for name in names:
        path = root / name
        if path.name.startswith("."):
            ignored.append((name, "a hidden file"))
            continue
        try:
            found = path.stat()
        except OSError:
            found = None  # a broken link counts as an unreadable image if it has the suffix of one
        if found and not stat.S_ISREG(found.st_mode):
            ignored.append((name, "not a regular file"))
        elif path.suffix.lower() in SUFFIXES or (found and _begins_as_image(path)):
            yield Entry(name, label, found.st_size if found else -1)
        else:
            ignored.append((name, "not an image by its name or first bytes"))


def _begins_as_image(path: Path) -> bool:
    """Whether a regular file without an image suffix begins like an image."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith(MAGIC) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


# ------------------------------------------------------------------------------------------------ archives
def _list_archives(root: Path, archives: list[str], ignored: list[tuple[str, str]]) -> Listing:
    entries: list[Entry] = []
    labels: dict[str, int] = {}
    for archive in archives:
        try:
            with tarfile.open(root / archive, "r:") as tar:
                _list_members(tar, archive, entries, labels, ignored)
        except (tarfile.TarError, OSError, ValueError) as e:
            ignored.append((archive, f"damaged from here on, or not an uncompressed tar file: {e}"))
    if not labels:
        return Listing(root, entries, (), ignored)
    entries = [e._replace(label=labels.get(key_of(e.name), -1)) for e in entries]
    without = next((e.name for e in entries if e.label < 0), None)
    if without is not None:
        raise DataError(f"{without} has no .cls file, but other images have one; label all of them or none")
    return Listing(root, entries, tuple(str(i) for i in range(max(labels.values()) + 1)), ignored)


def _list_parquet(root: Path, shards: list[str], ignored: list[tuple[str, str]], columns: Mapping[str, str]) -> Listing:
    parquet.forget()
    rows, class_names = parquet.list_rows(root, shards, columns)
    entries = [Entry(f"{shard}/{row:07d}", label, size, shard, row, column) for shard, row, column, label, size in rows]
    return Listing(root, entries, class_names, ignored, columns)


def _list_members(tar: tarfile.TarFile, archive: str, entries: list[Entry], labels: dict, ignored: list) -> None:
    """Add the images of one archive to `entries`, and its labels to `labels` by key."""
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps every header in memory
        name = f"{archive}/{member.name}"
        suffix = name.removeprefix(key_of(name)).lower()
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            ignored.append((name, "a link, device or sparse file in an archive"))
        elif suffix == ".cls":
            labels[key_of(name)] = _class_of(name, tar.extractfile(member).read(32))  # type: ignore[union-attr]
        elif suffix in SUFFIXES:
            entries.append(Entry(name, 0, member.size, archive, member.offset_data))
        elif suffix not in COMPANIONS:
            ignored.append((name, "not an image by its name"))


def key_of(name: str) -> str:
    """The WebDataset key: the path up to the first dot of the file name."""
    folder, slash, leaf = name.rpartition("/")
    return folder + slash + leaf.partition(".")[0]


def _class_of(name: str, content: bytes) -> int:
    try:
        label = int(content)
    except ValueError:
        label = -1
    if not 0 <= label < MAX_CLASS:
        raise DataError(f"{name} must hold an integer from 0 to {MAX_CLASS - 1}, not {content!r:.40}")
    return label

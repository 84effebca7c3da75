"""The images of a source: where each of them lies, and its pixels."""

import functools
import hashlib
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffussm_cli.data import arrays, cifar, parquet
from diffussm_cli.data.images import fit_array, open_image, read_image
from diffussm_cli.data.listing.left_out import CAPTIONS, JSON, LeftOut, kind_of
from diffussm_cli.errors import DataError
from diffussm_cli.machine.files import open_regular

MAX_FILE_BYTES = 1 << 28
OF_FRAMES = (".gif", ".tif", ".tiff", ".webp")  # files that may hold several images
LOOKED_AT = 1000  # number of these files that are opened


class Entry(NamedTuple):
    """The location of an image in a source."""

    # path relative to the source, with forward slashes; ARCHIVE/MEMBER or ARCHIVE/ROW in a shard
    name: str
    label: int
    # in bytes; -1 if unknown; of its row group in a parquet shard, of its pixels in an array
    size: int
    archive: str = ""  # the shard that holds it; empty if it is a separate file
    offset: int = 0  # of the content in a tar file, in bytes; the row of a table or array
    column: str = ""  # of a parquet shard; the array of an .npz file


def is_array(entry: Entry) -> bool:
    """Whether an image lies in an array of an .npz file, or in a batch of CIFAR's, which has no
    name.
    """
    return entry.archive.lower().endswith((".npz", ".bin"))


@dataclass(frozen=True)
class Listing:
    """The images of a source in order, and all else that it holds."""

    root: Path
    entries: list[Entry]
    class_names: tuple[str, ...]
    ignored: list[tuple[str, str]]  # name and reason of every file that is not used
    # of parquet shards or .npz files: those that the user has named
    columns: Mapping[str, str] = field(default_factory=dict)
    # what else is not used, which is counted only: there may be one for every image
    unread: tuple[LeftOut, ...] = ()

    def text(self) -> Iterator[bytes]:
        """One line of JSON per image: name, label, bytes."""
        return (json.dumps([e.name, e.label, e.size]).encode() + b"\n" for e in self.entries)

    def sha256(self) -> str:
        """Hash of `text`."""
        digest = hashlib.sha256()
        for line in self.text():
            digest.update(line)
        return digest.hexdigest()

    def arrays_sha256(self) -> str:
        """Hash of the pixels of .npz files and of CIFAR's batches, whose sizes in `text` are always
        the same; empty for other images. Raises DataError.
        """
        contents = []
        for name, array in sorted({(e.archive, e.column) for e in self.entries if is_array(e)}):
            path = self.root / name
            checksum = arrays.checksum(path, array) if array else cifar.checksum(path)
            contents.append([name, array, checksum])
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest() if contents else ""

    def places(self) -> set[tuple[str, int, str]]:
        """Where the images lie, by whatever path the source was named: the real path of a file, and
        the place and column in a shard.
        """
        real_folder = functools.cache(os.path.realpath)

        def real(name: str) -> str:
            folder, leaf = os.path.split(self.root / name)
            path = os.path.join(real_folder(folder), leaf)
            return os.path.realpath(path) if os.path.islink(path) else path

        files = {name: real(name) for name in {e.archive or e.name for e in self.entries}}
        return {(files[e.archive or e.name], e.offset, e.column) for e in self.entries}

    def left_out(self, with_text: bool = False, known: Collection[str] = ()) -> list[LeftOut]:
        """What is not used, counted by reason.

        Args:
            with_text: whether captions are read.
            known: names of files that the caller knows, and which are no part of the data.
        """
        counts: Counter[tuple[str, str]] = Counter()
        examples: dict[tuple[str, str], str] = {}
        for name, reason in self.ignored:
            if name not in known:
                group = kind_of(name), reason
                counts[group] += 1
                examples.setdefault(group, name)
        files = [LeftOut(n, *group, examples[group]) for group, n in counts.items()]

        used = (CAPTIONS, JSON) if with_text else ()
        return files + [part for part in self.unread if part.reason not in used] + self._films

    @functools.cached_property
    def _films(self) -> list[LeftOut]:
        """Files of several images, of which the first is read; of very many files, some are opened.

        They are opened only for those who tell what is left out, and once.
        """
        files = [e for e in self.entries if e.name.lower().endswith(OF_FRAMES)]
        opened = files[:: -(-len(files) // LOOKED_AT) or 1]
        films = [e.name for e in opened if has_frames(self.root, e)]
        some = (
            "" if len(opened) == len(files) else f"of {len(opened):,} files that were looked at; "
        )
        why = f"{some}all frames or pages but the first"
        return [LeftOut(len(films), "film", why, films[0])] if films else []


def read_entry(
    root: Path, entry: Entry, size: tuple[int, int] | None, channels: int = 3
) -> np.ndarray:
    """Read an image, upright and cropped to `size` (height, width) if given: uint8 (height, width,
    channels).

    Raises:
        DataError: with a message that begins with the name of the entry.
    """
    name = Path(entry.name)
    pixels = _pixels(root, entry)
    if pixels is not None:
        return fit_array(pixels, size, channels)
    content = read_content(root, entry)
    with warnings.catch_warnings():
        # Pillow warns about large and odd files; real problems raise errors
        warnings.simplefilter("ignore")
        return read_image(name, size, channels, io.BytesIO(content))


def entry_size(root: Path, entry: Entry) -> tuple[int, int]:
    """(height, width) of an image as it is stored; of a file, only the header is decoded.

    Raises:
        DataError: with a message that begins with the name of the entry.
    """
    pixels = _pixels(root, entry)
    if pixels is not None:
        return pixels.shape[0], pixels.shape[1]
    content = io.BytesIO(read_content(root, entry))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        with open_image(Path(entry.name), content) as image:
            return image.height, image.width


def has_frames(root: Path, entry: Entry) -> bool:
    """Whether a file holds more than one image, as a film or a document does; the first is read."""
    if entry.size > MAX_FILE_BYTES:
        return False  # as below
    try:
        # Of a separate file, only what tells the number of frames is read.
        content = io.BytesIO(read_content(root, entry)) if entry.archive else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above
            with open_image(root / entry.name, content) as image:
                return getattr(image, "is_animated", False)
    except DataError:  # it is named when it is read
        return False


def _pixels(root: Path, entry: Entry) -> np.ndarray | None:
    """The pixels of an image in a file of arrays, uint8 (height, width, 1 or 3); None of another.

    Raises DataError.
    """
    if not is_array(entry):
        return None

    path = root / entry.archive
    try:
        if entry.column:
            return arrays.mapped(path, entry.column)[entry.offset]
        return cifar.read_image(path, entry.offset)
    except DataError as e:
        raise DataError(f"{entry.name}: {e}") from e


def read_content(root: Path, entry: Entry) -> bytes:
    """Read the bytes of an image file. Raises DataError with a message that begins with the name of
    the entry.
    """
    path = root / (entry.archive or entry.name)
    name = Path(entry.name)
    if entry.column:
        try:
            return parquet.read_row(path, entry.offset, entry.column)
        except DataError as e:
            raise DataError(f"{name}: {e}") from e

    try:
        with open_regular(path) as file:
            if entry.size > MAX_FILE_BYTES:
                raise DataError(
                    f"{name}: {entry.size} bytes, more than the limit of {MAX_FILE_BYTES}"
                )
            file.seek(entry.offset)
            content = file.read(entry.size)
    except OSError as e:
        raise DataError(f"{name}: cannot be read: {e.strerror}") from e

    if not content:
        raise DataError(f"{name}: the file is empty")
    return content

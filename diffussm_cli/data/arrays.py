"""Read and write the arrays of .npz files in blocks of rows, without pickle and without loading
whole arrays.
"""

import functools
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from diffussm_cli.errors import DataError, reason
from diffussm_cli.machine.files import whole_file

HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# up to SMALL bytes any compression ratio is accepted, above it 200:1
SMALL, MOST_PACKED = 1 << 26, 200
MOST_UNPACKED = 1 << 31  # bytes of compressed images that are kept in memory
LOCAL_HEADER = struct.Struct("<26x2H")  # of a member of a zip file: lengths of its name and extra
DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    KeyError,
    NotImplementedError,
    RuntimeError,
    zlib.error,
)


class Rows(NamedTuple):
    """An array in a file, not read yet."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, start: int, stop: int, count: int = 256) -> Iterator[np.ndarray]:
        """Read rows start..stop in blocks of up to `count`. Raises DataError."""
        row = self.dtype.itemsize * math.prod(self.shape[1:])
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as file:
                _header(file)
                _skip(file, start * row)

                for first in range(start, stop, count):
                    n = min(count, stop - first)
                    content = file.read(n * row)
                    if len(content) != n * row:
                        raise EOFError("it ends too early")
                    yield np.frombuffer(content, self.dtype).reshape(n, *self.shape[1:])
        except DAMAGED as e:
            raise DataError(f"{self.path}: {self.name} cannot be read: {reason(e)}") from e

    def read_all(self) -> np.ndarray:
        """Read a small array completely. Raises DataError."""
        return np.concatenate(
            [np.empty((0, *self.shape[1:]), self.dtype), *self.read(0, self.shape[0])]
        )

    def is_stored(self) -> bool:
        """Whether the file holds the array as it is, not compressed. Raises DataError."""
        return self._place() is not None

    def mapped(self) -> np.ndarray:
        """The array, mapped if it is stored as it is, otherwise read completely. Raises
        DataError.
        """
        place = self._place()
        if place is None:
            return self.read_all()
        try:
            return np.memmap(self.path, self.dtype, "r", place, self.shape)
        except (OSError, ValueError) as e:
            raise DataError(f"{self.path}: {self.name} cannot be read: {reason(e)}") from e

    def _place(self) -> int | None:
        """Where in the file the values begin, in bytes; None if they are compressed."""
        try:
            with zipfile.ZipFile(self.path) as archive, open(self.path, "rb") as raw:
                info = archive.getinfo(f"{self.name}.npy")
                if info.compress_type != zipfile.ZIP_STORED:
                    return None

                # The values stand after two headers: that of the member, and that of the array.
                with archive.open(info) as file:
                    _header(file)
                    header = file.tell()
                raw.seek(info.header_offset)
                lengths = LOCAL_HEADER.unpack(raw.read(LOCAL_HEADER.size))
                return info.header_offset + LOCAL_HEADER.size + sum(lengths) + header
        except (*DAMAGED, struct.error) as e:
            raise DataError(f"{self.path}: {self.name} cannot be read: {reason(e)}") from e


def open_npz(path: Path) -> dict[str, Rows]:
    """List the arrays of a .npz file by name, without reading them. Declared sizes are checked
    first.

    Raises:
        DataError: if the file is not a .npz, holds objects, or has an extreme compression ratio.
    """
    arrays = {}
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as file:
                    shape, fortran, dtype = _header(file)
                    size = file.tell() + dtype.itemsize * math.prod(shape)

                if dtype.hasobject or fortran or min(shape, default=-1) < 0:
                    kind = (
                        "objects"
                        if dtype.hasobject
                        else "an array of an unsupported order or shape"
                    )
                    raise DataError(f"{path}: {info.filename} holds {kind}")

                if size != info.file_size:
                    raise DataError(
                        f"{path}: {info.filename} declares {shape} of {dtype} but unpacks to "
                        f"{info.file_size} bytes"
                    )
                if size > SMALL and size > MOST_PACKED * info.compress_size:
                    raise DataError(
                        f"{path}: {info.filename} unpacks to {size} bytes from "
                        f"{info.compress_size}: a zip bomb"
                    )

                name = info.filename.removesuffix(".npy")
                arrays[name] = Rows(path, name, shape, dtype)
    except DAMAGED as e:
        raise DataError(f"{path}: cannot be read as .npz: {reason(e)}") from e
    return arrays


def checksum(path: Path, name: str) -> int:
    """The CRC-32 of an array of a .npz file, which stands in the directory of the file. Raises
    DataError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.getinfo(f"{name}.npy").CRC
    except DAMAGED as e:
        raise DataError(f"{path}: {name} cannot be read: {reason(e)}") from e


@functools.lru_cache(64)
def mapped(path: Path, name: str) -> np.ndarray:
    """The images in an array of a .npz file, uint8 (n, H, W, 1 or 3), kept for the next call.

    Raises DataError.
    """
    return image_rows(open_npz(path)[name]).mapped()


def forget() -> None:
    """Read all files again, which may have changed."""
    mapped.cache_clear()


def image_rows(rows: Rows) -> Rows:
    """An array of images, checked to be uint8 (n, H, W, C) or (n, H, W), as (n, H, W, 1 or 3).

    Raises DataError.
    """
    if rows.dtype.kind == "f":
        raise DataError(
            f"{rows.path}: {rows.name} holds {rows.dtype}, not uint8: "
            "save floor(255 x + 0.5) if x lies in [0, 1], floor(127.5 x + 128) if x lies in [-1, 1]"
        )
    if len(rows.shape) == 3:
        rows = rows._replace(shape=(*rows.shape, 1))

    fits = len(rows.shape) == 4 and rows.shape[3] in (1, 3) and 0 not in rows.shape
    if rows.dtype.str != "|u1" or not fits:
        raise DataError(
            f"{rows.path}: {rows.name} is {rows.dtype} of shape {rows.shape}, "
            "not uint8 (n, H, W, 3)"
        )
    return rows


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"format {version} is not supported")
    return HEADERS[version](file)


def _skip(file: IO[bytes], size: int) -> None:
    while size > 0:
        size -= len(file.read(min(size, 1 << 20))) or size


# shape, dtype, blocks of rows
Written = tuple[tuple[int, ...], np.dtype | type, Iterable[np.ndarray]]


def write_npz(path: Path, arrays: Mapping[str, Written]) -> None:
    """Write a .npz file for numpy and the ADM evaluator; it gets its name only when complete.
    Raises OSError.
    """
    with (
        whole_file(path) as target,
        zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for name, (shape, dtype, blocks) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                npy.write_array_header_1_0(
                    file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                )

                rows = 0
                for block in blocks:
                    file.write(np.ascontiguousarray(block, dtype).tobytes())
                    rows += len(block)
                assert rows == shape[0], f"{name}: {rows} rows, not {shape[0]}"

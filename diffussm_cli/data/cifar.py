"""The binary version of CIFAR-10 and CIFAR-100, as its authors publish it.

A file is a row of records: one label (CIFAR-100: the coarse one, then the fine one) of a byte, and
an image of 32 x 32 pixels, plane by plane. The Python version is pickles, which are never loaded.
"""

import functools
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffussm_cli.errors import DataError, reading
from diffussm_cli.machine.files import open_regular, read_regular

SIDE, PIXELS = 32, 3 * 32 * 32
MAX_NAMES_BYTES = 1 << 16
PICKLES = re.compile(r"data_batch_\d+|test_batch|batches\.meta|train|test|meta")
PICKLED = (
    "CIFAR's Python version is pickles, which are never read; take its binary version "
    "(cifar-10-binary.tar.gz), or give torchvision's dataset to diffussm.train"
)


class Kind(NamedTuple):
    """One of the two data sets."""

    name: str
    training: re.Pattern[str]  # names of files
    test: re.Pattern[str]
    labels: int  # of a record, in bytes; the last one is the class
    classes: int
    names: str  # the file of the names of classes


KINDS = (
    Kind(
        "CIFAR-10",
        re.compile(r"data_batch_\d+\.bin"),
        re.compile(r"test_batch\.bin"),
        1,
        10,
        "batches.meta.txt",
    ),
    Kind(
        "CIFAR-100",
        re.compile(r"train\.bin"),
        re.compile(r"test\.bin"),
        2,
        100,
        "fine_label_names.txt",
    ),
)


def kind_of_file(path: Path) -> Kind | None:
    """Of which data set a file is by its name, and by its size if the name alone says little."""
    for kind in KINDS:
        if kind.training.fullmatch(path.name) or kind.test.fullmatch(path.name):
            is_sure = kind.name == "CIFAR-10" or (path.parent / kind.names).is_file()
            fits = path.is_file() and path.stat().st_size % (kind.labels + PIXELS) == 0
            return kind if is_sure or fits else None
    return None


def is_pickle(path: Path) -> bool:
    """Whether a file is a batch of the Python version."""
    if not PICKLES.fullmatch(path.name):
        return False
    try:
        with open_regular(path) as file:
            return file.read(2) == b"\x80\x02"
    except OSError:
        return False


def class_names(root: Path, kind: Kind) -> tuple[str, ...]:
    """The names of the classes from the file beside the batches, or else numbers.

    Raises DataError.
    """
    path = root / kind.names
    if not os.path.lexists(path):
        return tuple(map(str, range(kind.classes)))

    with reading(f"{path}: cannot be read", DataError):
        text = read_regular(path, MAX_NAMES_BYTES).decode()
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(names) != kind.classes or len(set(names)) != kind.classes:
        raise DataError(f"{path}: holds {len(names)} names, not {kind.classes} different ones")
    return names


def read_labels(path: Path) -> list[int]:
    """The class of every image. Raises DataError for a damaged file."""
    kind = kind_of_file(path)
    assert kind is not None, "asked of a file of CIFAR"
    labels = records(path)["labels"][:, -1]
    if labels.max() >= kind.classes:
        has = f"but {kind.name} has {kind.classes} classes"
        raise DataError(f"{path}: holds the label {labels.max()}, {has}")
    return labels.tolist()


def checksum(path: Path) -> int:
    """The CRC-32 of all records of a file. Raises DataError."""
    return zlib.crc32(records(path).tobytes())


def read_image(path: Path, row: int) -> np.ndarray:
    """An image, uint8 (32, 32, 3). Raises DataError."""
    return records(path)["image"][row].reshape(3, SIDE, SIDE).transpose(1, 2, 0)


@functools.lru_cache(16)
def records(path: Path) -> np.ndarray:
    """The records of a file, mapped, with the fields labels, uint8 (1 or 2,), and image, uint8
    (3072,).

    Raises DataError.
    """
    with reading(f"{path}: cannot be read", DataError):
        open_regular(path).close()
        kind = kind_of_file(path)
        if kind is None:
            raise ValueError("it is no longer a file of CIFAR")

        layout = np.dtype([("labels", np.uint8, (kind.labels,)), ("image", np.uint8, (PIXELS,))])
        size = path.stat().st_size
        if not size or size % layout.itemsize:
            raise ValueError(f"{size} bytes are no records of {layout.itemsize}; it is cut off")
        return np.memmap(path, layout, "r")


def training_files(names: Sequence[str]) -> list[str]:
    """The files of the training set, or those of the test set if there are no others."""
    training = [n for n in names if any(kind.training.fullmatch(n) for kind in KINDS)]
    return training or list(names)

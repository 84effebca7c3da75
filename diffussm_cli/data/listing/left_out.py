"""What is not used of the things that a user gave: the reasons, and the line that counts them."""

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from diffussm_cli.data.images import SUFFIXES

UNREADABLE = "cannot be read"
SHARDS = (".tar", ".parquet")
NAMED = 20  # number of classes that a line lists

# Names that say what a file or folder is, and reasons why it is not used.
CAPTIONS = "captions, which only a run with text reads: data.text, or --text of encode"
SIDECAR = (
    "beside an image, and not read: captions stand in NAME.txt, metadata.jsonl or metadata.csv"
)
SIDECARS = (".json", ".caption", ".txt")  # in small or large letters
JSON = "of a .json file, only captions are read, by a run with text"
FIELDS = "of metadata files, only file_name, captions and label are read"
NESTED = "a shard in a shard, which is not read; unpack the outer one"
PER_CLASS = "no class; unpack each shard into a folder of its name, or add KEY.cls"
LABEL_ALONE = "of shards, of no image"
OURS = "beside samples of diffussm, and none of them"
HIDDEN = "a hidden file"
NO_IMAGE = "not an image by its name or first bytes"
TABLES = (
    "dataset.json",
    "metadata.parquet",
    "labels.csv",
    "labels.json",
    "labels.txt",
)
TABLE = (
    "labels or captions that are not read: classes are folders, or stand beside captions in "
    "metadata.jsonl or metadata.csv"
)
COMPRESSED = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
UNPACKING = {  # commands that keep the archive; a tar file that they leave is read in place
    ".zip": "unzip -q {file} -d {stem}",
    ".gz": "gunzip -k {file}",
    ".tgz": "gunzip -k {file}",
    ".bz2": "bunzip2 -k {file}",
    ".xz": "unxz -k {file}",
    ".zst": "unzstd {file}",
}
FOREIGN = (
    ".npy",
    ".h5",
    ".hdf5",
    ".mdb",
    ".lmdb",
    ".arrow",
    ".tfrecord",
    ".tfrecords",
    ".pkl",
    ".pickle",
)
KINDS = {  # of files, by their ends
    COMPRESSED: "a compressed archive, which is not read; unpack it first",
    (".npz",): "arrays beside images or shards, which are read instead",
    FOREIGN: "a format that is not read; save the images as files, or in tar or parquet shards",
}


class LeftOut(NamedTuple):
    """What is not used of the things that a user gave, for one reason."""

    number: int
    kind: str  # image, shard, file, column, line, ...
    reason: str
    example: str = ""  # the name of one of them


def left_out_line(source: str | Path, parts: Iterable[LeftOut]) -> str:
    """One line that counts what is not used of `source`, with the reasons; empty if everything is
    used.
    """
    texts = []
    for number, kind, reason, example in parts:
        things = f"{number:,} {kind}{'' if number == 1 else 's'}"
        named = f", such as {example!r:.120}" if number > 1 else f": {example!r:.120}"
        texts.append(f"{things} ({reason}{named if example else ''})")
    return f"left out of {str(source)!r}: {', '.join(texts)}" if texts else ""


def some_of(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def empty_classes(names: Sequence[str], labels: Sequence[int] | Tensor) -> str:
    """One line about the classes of which there is no image, as between the labels 0, 10 and 20;
    empty if there are none, or no labels are known.
    """
    numbers = set(np.unique(np.asarray(labels)).tolist())
    empty = [name for place, name in enumerate(names) if place not in numbers]
    if not empty or not numbers:
        return ""
    have = "has" if len(empty) == 1 else "have"
    return f"{len(empty):,} of {len(names):,} classes {have} no image: {some_of(empty, NAMED)}"


def skipped_text(skipped: Iterable[tuple[int | None, str, str]]) -> str:
    """One line of JSON per image that is left out: its index (None if it was never listed), name
    and reason.
    """
    return "".join(
        json.dumps({"index": i, "file": name, "reason": why}) + "\n" for i, name, why in skipped
    )


def unpacking(path: str | Path) -> str:
    """How to unpack an archive: what follows "unpack it first", a command if one is known."""
    stem, suffix = os.path.splitext(path)
    command = UNPACKING.get(suffix.lower())
    if command is None:
        return ""
    return ": " + command.format(file=shlex.quote(str(path)), stem=shlex.quote(stem))


def kind_of(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    return "image" if suffix in SUFFIXES else "shard" if suffix in SHARDS else "file"


def reason_for(name: str, otherwise: str) -> str:
    """Why a file is not used: what its name says, or else the reason that its place gives."""
    leaf = name.rpartition("/")[2]
    if leaf.startswith("."):
        return HIDDEN
    if leaf.lower() in TABLES:
        return TABLE
    return next((why for ends, why in KINDS.items() if leaf.lower().endswith(ends)), otherwise)


def counted(unread: Mapping[str, int]) -> tuple[LeftOut, ...]:
    return tuple(LeftOut(count, "file", reason) for reason, count in unread.items())

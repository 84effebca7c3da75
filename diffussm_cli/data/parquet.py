"""Images in parquet shards, as the hub stores image sets: a column of images, and perhaps one of integer labels.

An image is a struct with `bytes`, or bytes alone. Shards are read by row groups, of which the last few are kept. So
reading in order is cheap; in random order, every image costs the decoding of its group (in the hub's sets, 100 images).
"""

import contextlib
import functools
import itertools
import json
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffussm_cli.errors import DataError, reason

IMAGES, LABELS = ("image", "img", "jpg", "png"), ("label", "labels", "fine_label", "cls")  # names of columns
MAX_GROUP_BYTES = 1 << 31  # of a row group
_reading = threading.Lock()  # threads that want the same row group decode it once


def shard_names(names: Sequence[str]) -> list[str]:
    """The parquet files among names. Raises DataError if they belong to several splits of a data set."""
    shards = [n for n in names if n.endswith(".parquet") and not n.startswith(".")]
    splits = sorted({n.partition("-")[0] for n in shards if re.search(r"-\d+-of-\d+\.parquet$", n)})
    if len(splits) > 1:
        raise DataError(f"the parquet shards are of {', '.join(splits)}; choose one: '{splits[0]}-*.parquet'")
    return shards


def list_rows(path: Path) -> tuple[list[int] | None, list[int], tuple[str, ...]]:
    """The labels of the rows, if any, the bytes of their row groups, and the class names that the schema has.

    Raises:
        DataError: if the shard cannot be read or a label is not a class.
    """
    _open.cache_clear()  # files may have changed since an earlier listing
    _images.cache_clear()
    file, _, label, starts = _open(path)
    sizes = [file.metadata.row_group(g).total_byte_size for g in range(file.num_row_groups)]
    names: tuple[str, ...] = ()
    with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):  # most schemas have no such entry
        names = tuple(json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"][label]["names"])
    with _damage(path):
        labels = file.read(columns=[label])[0].to_pylist() if label else None
    for row, value in enumerate(labels or ()):
        if type(value) is not int or not 0 <= value < (len(names) or 1 << 20):
            classes = f"from 0 to {len(names) - 1}" if names else "of at least 0"
            raise DataError(f"{path.name}: row {row} has {label} {value}, which must be a number {classes}")
    return labels, [n for n, a, b in zip(sizes, starts, starts[1:]) for _ in range(a, b)], names


def read_row(path: Path, row: int) -> bytes:
    """The content of the image file in a row. Raises DataError."""
    with _reading:
        *_, starts = _open(path)
        group = next(g for g, end in enumerate(starts[1:]) if row < end)
        value = _images(path, group)[row - starts[group]].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise DataError("the image is null" if content is None else "the image is not stored as bytes")
    return content


@functools.lru_cache(16)
def _open(path: Path) -> tuple[Any, str, str | None, list[int]]:
    """An open shard, its columns of images and labels, and the first row of every group, followed by the last's end."""
    with _damage(path):
        from pyarrow import types
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(path, memory_map=True)
    schema = file.schema_arrow
    image = next((n for n in IMAGES if n in schema.names), None)
    if image is None:
        raise DataError(f"{path.name}: none of its columns is {', '.join(IMAGES)}: {', '.join(schema.names):.200}")
    label = next((n for n in LABELS if n in schema.names and types.is_integer(schema.field(n).type)), None)
    counts = (file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))
    return file, image, label, [0, *itertools.accumulate(counts)]


@functools.lru_cache(4)
def _images(path: Path, group: int) -> Any:
    """The column of images of a row group."""
    file, image, *_ = _open(path)
    if file.metadata.row_group(group).total_byte_size > MAX_GROUP_BYTES:
        raise DataError(f"row group {group} is larger than the limit of {MAX_GROUP_BYTES} bytes")
    with _damage(path):
        return file.read_row_group(group, columns=[image])[0]


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as e:
        raise DataError("parquet shards need pyarrow: pip install 'diffussm[parquet]'") from e
    except Exception as e:  # pyarrow's errors have no class in common
        raise DataError(f"{path.name}: not a readable parquet file: {reason(e)}") from e

"""Images in parquet shards, as the hub stores image sets: a column of images, and perhaps of integer labels and texts.

An image is a struct with `bytes`, or bytes alone. Shards are read by row groups, of which the last few are kept. So
reading in order is cheap; in random order, every image costs the decoding of its group (in the hub's sets, 100 images).
"""

import contextlib
import functools
import itertools
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffussm_cli.errors import DataError, reason

USUAL = {  # names of columns
    "image": ("image", "img", "jpg", "png"),
    "label": ("label", "labels", "fine_label", "cls"),
    "text": ("text", "caption", "captions"),
}
MAX_GROUP_BYTES = 1 << 31  # of a row group
_reading = threading.Lock()  # threads that want the same row group decode it once


def shard_names(names: Sequence[str]) -> list[str]:
    """The parquet files among names. Raises DataError if they belong to several splits of a data set."""
    shards = [n for n in names if n.endswith(".parquet") and not n.startswith(".")]
    splits = sorted({n.partition("-")[0] for n in shards if re.search(r"-\d+-of-\d+\.parquet$", n)})
    if len(splits) > 1:
        raise DataError(f"the parquet shards are of {', '.join(splits)}; choose one: '{splits[0]}-*.parquet'")
    return shards


def find_column(path: Path, kind: str, given: Mapping[str, str], needed: bool = True) -> str | None:
    """The column of images, labels or texts, the given one or the first with a usual name; None without one.

    Raises:
        DataError: if there is no such column although it is needed or given, naming those of the shard.
    """
    columns = {column.name: str(column.type) for column in _open(path)[0].schema_arrow}
    names = (given[kind],) if kind in given else USUAL[kind]
    fitting = [n for n in names if n in columns and (kind != "label" or re.match("u?int", columns[n]))]
    if not fitting and (needed or kind in given):
        asked = ", ".join(names) + (" with integers" if kind == "label" else "")
        remedy = f"; name one by {kind}=NAME (data.columns, or --columns of encode)"
        raise DataError(f"{path.name}: none of its columns is {asked}: {', '.join(columns):.200}{remedy}")
    return fitting[0] if fitting else None


def list_rows(path: Path, label: str | None) -> tuple[list[int] | None, list[int], tuple[str, ...]]:
    """The labels of the rows, if any, the bytes of their row groups, and the class names that the schema has.

    Raises:
        DataError: if the shard cannot be read or a label is not a class.
    """
    file, starts = _open(path)
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


def read_row(path: Path, row: int, column: str) -> bytes:
    """The content of the image file in a row. Raises DataError."""
    with _reading:
        _, starts = _open(path)
        group = next(g for g, end in enumerate(starts[1:]) if row < end)
        value = _column(path, group, column)[row - starts[group]].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise DataError("the image is null" if content is None else "the image is not stored as bytes")
    return content


def read_texts(path: Path, given: Mapping[str, str], needed: bool = True) -> Iterator[Any]:
    """What the column of texts holds in each row; nothing without one, unless it is `needed`. Raises DataError."""
    column = find_column(path, "text", given, needed)
    for group in range(len(_open(path)[1]) - 1) if column else ():
        yield from _column(path, group, column).to_pylist()


def forget() -> None:
    """Read all files again, which may have changed."""
    _open.cache_clear()
    _column.cache_clear()


@functools.lru_cache(16)
def _open(path: Path) -> tuple[Any, list[int]]:
    """An open shard, and the first row of every row group, followed by the last's end."""
    with _damage(path):
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(path, memory_map=True)
    counts = (file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))
    return file, [0, *itertools.accumulate(counts)]


@functools.lru_cache(4)
def _column(path: Path, group: int, name: str) -> Any:
    """A column of a row group."""
    file, _ = _open(path)
    if file.metadata.row_group(group).total_byte_size > MAX_GROUP_BYTES:
        raise DataError(f"row group {group} is larger than the limit of {MAX_GROUP_BYTES} bytes")
    with _damage(path):
        return file.read_row_group(group, columns=[name])[0]


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as e:
        raise DataError("parquet shards need pyarrow: pip install 'diffussm[parquet]'") from e
    except Exception as e:  # pyarrow's errors have no class in common
        raise DataError(f"{path.name}: not a readable parquet file: {reason(e)}") from e

"""Images in parquet shards, as the hub stores image sets: a column of images, and perhaps of labels
and texts.

An image is a struct with `bytes`, or bytes alone. Labels are integers, or names, which are then the
classes. Shards are read by row groups, of which the last few are kept. So reading in order is
cheap; in random order, every image costs the decoding of its group (in the hub's sets, 100 images).

A shard of a few bytes may stand for gigabytes: of rows, or of copies of one value. So rows are
counted before they are listed, and a row group is decoded in small parts, until it exceeds its
limit.
"""

import contextlib
import functools
import itertools
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffussm_cli.errors import DataError, install, reason
from diffussm_cli.machine.files import open_regular

USUAL = {  # names of columns
    "image": ("image", "img", "jpg", "png"),
    "label": ("label", "labels", "fine_label", "cls"),
    "text": ("text", "caption", "captions"),
}
MAX_GROUP_BYTES = 1 << 31  # of a column of a row group, decoded
MAX_CLASS, MAX_NAME = 1 << 20, 255  # number of classes, characters of the name of one
PART_BYTES, PART_ROWS = 1 << 20, 64  # that are decoded at a time
EMBED = "save the data set with the images embedded as bytes"
TEXT = r"(large_)?string(_view)?|dictionary<values=(large_)?string,.*"
BINARY = r"null|(large_)?binary(_view)?|fixed_size_binary.*|dictionary<values=(large_)?binary,.*"
_reading = threading.Lock()  # threads that want the same row group decode it once


def column_names(path: Path) -> list[str]:
    """The names of all columns of a shard. Raises DataError."""
    return _open(path)[0].schema_arrow.names


def find_column(path: Path, kind: str, named: Mapping[str, str], needed: bool = True) -> str | None:
    """The column of images, labels or texts, the given one or the first with a usual name; None
    without one.

    Raises:
        DataError: if there is no such column although it is needed or given, naming those of the
            shard; or if images are not stored as bytes.
    """
    with _damage(path):
        columns = {column.name: column.type for column in _open(path)[0].schema_arrow}

    names = (named[kind],) if kind in named else USUAL[kind]
    present = [n for n in names if n in columns]
    fitting = sorted(present, key=lambda n: _is_text(columns[n])) if kind == "label" else present
    if kind == "label":  # integers first
        fitting = [n for n in fitting if _is_integer(columns[n]) or _is_text(columns[n])]
    elif kind == "image":
        fitting = [n for n in present if _holds_bytes(columns[n])]

    if present and not fitting and kind == "image":
        what = f"{columns[present[0]]}"
        raise DataError(
            f"{path.name}: the column {present[0]} holds {what:.80}, not image files as bytes; "
            f"{EMBED}"
        )

    if not fitting and (needed or kind in named):
        asked = ", ".join(names) + (" with integers or names" if kind == "label" else "")
        remedy = f"; name one by {kind}=NAME (data.columns, or --columns of encode)"
        raise DataError(
            f"{path.name}: none of its columns is {asked}: {', '.join(columns):.200}{remedy}"
        )
    return fitting[0] if fitting else None


def _is_integer(kind: Any) -> bool:
    return bool(re.match("u?int", str(kind)))


def _is_text(kind: Any) -> bool:
    return bool(re.fullmatch(TEXT, str(kind)))


def _holds_bytes(kind: Any) -> bool:
    """Whether values of a type are bytes, or structs with a field `bytes` of bytes."""
    fields = (
        {field.name: field.type for field in kind.fields}
        if str(kind).startswith("struct")
        else {"bytes": kind}
    )
    return bool(re.fullmatch(BINARY, str(fields.get("bytes"))))


class Row(NamedTuple):
    """The place and label of an image."""

    shard: str
    row: int
    column: str
    label: int
    size: int  # of its row group, in bytes


def list_rows(
    root: Path, shards: Sequence[str], named: Mapping[str, str]
) -> tuple[list[Row], tuple[str, ...]]:
    """The images of shards in order, and the class names: those of the schema, the sorted labels,
    or numbers.

    Raises:
        DataError: if a shard cannot be read, a label is not a class, or shards have different
            classes.
    """
    rows: list[Row] = []
    labels: list[Any] = []
    kinds: set[tuple[str, tuple[str, ...]]] = set()
    for name in shards:
        path = root / name
        image = find_column(path, "image", named)
        label = find_column(path, "label", named, needed=False)
        assert image is not None, "it is needed"

        kind = _classes(path, label)
        labels += _labels(path, label, kind[1]) if label else []
        kinds.add(kind)
        rows += (Row(name, row, image, 0, size) for row, size in enumerate(_sizes(path)))

    if len(kinds) > 1:
        raise DataError(
            f"the parquet shards of {str(root)!r} have different classes; "
            "take those of one data set"
        )

    # Places of labels among the names.
    what, names = next(iter(kinds), ("", ()))
    if what == "names":
        names = tuple(sorted(set(labels)))
        if len(names) > MAX_CLASS:
            raise DataError(
                f"the labels of {str(root)!r} are {len(names)} different names, "
                f"more than {MAX_CLASS}"
            )
        places = {label: place for place, label in enumerate(names)}
        labels = [places[label] for label in labels]
    elif what and not names and labels:
        names = tuple(map(str, range(1 + max(labels))))

    if labels:
        rows = [row._replace(label=label) for row, label in zip(rows, labels)]
    return rows, names


def _sizes(path: Path) -> list[int]:
    """The bytes of the row group of every row. Raises DataError if there are more rows than bytes
    in the file.
    """
    file, starts = _open(path)
    size = path.stat().st_size
    if starts[-1] > size:
        raise DataError(
            f"{path.name}: {starts[-1]} rows in {size} bytes cannot be images of their own"
        )
    groups = (file.metadata.row_group(g).total_byte_size for g in range(file.num_row_groups))
    return [size for size, a, b in zip(groups, starts, starts[1:]) for _ in range(a, b)]


def _classes(path: Path, label: str | None) -> tuple[str, tuple[str, ...]]:
    """What the labels of a shard are, "numbers", "names" or nothing, and the class names in its
    schema, if any.
    """
    schema = _open(path)[0].schema_arrow
    if label is None:
        return "", ()
    if _is_text(schema.field(label).type):
        return "names", ()
    names: Any = ()
    # most schemas have no such entry
    with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    is_list = isinstance(names, list) and all(isinstance(name, str | int) for name in names)
    return "numbers", tuple(map(str, names)) if is_list else ()


def _labels(path: Path, label: str, names: Sequence[str]) -> Iterator[int | str]:
    """The labels of the rows of a shard. Raises DataError for one that is not a class."""
    is_text = _is_text(_open(path)[0].schema_arrow.field(label).type)
    for row, value in enumerate(_values(path, label)):
        if is_text and (not isinstance(value, str) or len(value) > MAX_NAME):
            limit = f"which must be a name of at most {MAX_NAME} characters"
            raise DataError(f"{path.name}: row {row} has {label} {value!r:.40}, {limit}")

        if not is_text and (type(value) is not int or not 0 <= value < (len(names) or MAX_CLASS)):
            classes = f"from 0 to {len(names) - 1}" if names else "of at least 0"
            raise DataError(
                f"{path.name}: row {row} has {label} {value}, which must be a number {classes}"
            )
        yield value


def read_row(path: Path, row: int, column: str) -> bytes:
    """The content of the image file in a row. Raises DataError."""
    with _reading:
        _, starts = _open(path)
        group = next(g for g, end in enumerate(starts[1:]) if row < end)
        value = _column(path, group, column)[row - starts[group]].as_py()

    content, place = (
        (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    )

    if content is None:
        raise DataError(
            f"the image is stored as a path, {place!r:.80}; {EMBED}"
            if place
            else "the image is null"
        )
    return content


def read_texts(path: Path, named: Mapping[str, str], needed: bool = True) -> Iterator[Any]:
    """What the column of texts holds in each row; nothing without one, unless it is `needed`.
    Raises DataError.
    """
    column = find_column(path, "text", named, needed)
    if column:
        yield from _values(path, column)


def _values(path: Path, column: str) -> Iterator[Any]:
    """The values of a column, row by row. Raises DataError, also for text that is not UTF-8, which
    it counts.
    """
    row = 0
    wrong = []
    for group in range(len(_open(path)[1]) - 1):
        for part in _parts(path, group, column):
            try:
                values = part.to_pylist()
            except UnicodeDecodeError:
                wrong += [row + i for i in range(len(part)) if not _is_utf8(part[i])]

            if not wrong:
                yield from values
            row += len(part)

    if wrong:
        raise DataError(
            f"{path.name}: {len(wrong)} of {row} rows of {column} are not UTF-8, "
            f"such as row {wrong[0]}"
        )


def _is_utf8(value: Any) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def forget() -> None:
    """Read all files again, which may have changed."""
    _open.cache_clear()
    _column.cache_clear()


@functools.lru_cache(16)
def _open(path: Path) -> tuple[Any, list[int]]:
    """An open shard, and the first row of every row group, followed by the last's end."""
    with _damage(path):
        from pyarrow.parquet import ParquetFile

        open_regular(path).close()
        file = ParquetFile(path, memory_map=True)
        counts = (file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))
        return file, [0, *itertools.accumulate(counts)]


@functools.lru_cache(4)
def _column(path: Path, group: int, name: str) -> Any:
    """A column of a row group."""
    with _damage(path):
        from pyarrow import chunked_array

        kind = _open(path)[0].schema_arrow.field(name).type
    return chunked_array(_parts(path, group, name), kind)


def _parts(path: Path, group: int, name: str) -> Iterator[Any]:
    """A column of a row group, in arrays of about PART_BYTES. Raises DataError if they exceed
    MAX_GROUP_BYTES.
    """
    file, starts = _open(path)
    claimed = file.metadata.row_group(group).total_byte_size
    decoded = 0
    average = claimed // max(1, starts[group + 1] - starts[group])
    rows = max(1, min(PART_ROWS, PART_BYTES // max(1, average)))

    with _damage(path):
        batches = file.iter_batches(rows, [group], [name])
    while True:
        with _damage(path):
            part = next(batches, None)
        if part is None:
            return
        decoded += part.nbytes
        if max(claimed, decoded) > MAX_GROUP_BYTES:
            raise DataError(
                f"row group {group} is larger than the limit of {MAX_GROUP_BYTES} bytes"
            )
        yield part.column(0)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except ImportError as e:
        raise DataError(f"parquet shards need pyarrow: {install('parquet')}") from e
    except Exception as e:  # pyarrow's errors have no class in common
        raise DataError(f"{path.name}: not a readable parquet file: {reason(e)}") from e

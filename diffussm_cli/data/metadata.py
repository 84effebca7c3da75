"""metadata.jsonl and metadata.csv: one record per image, as Hugging Face's image folders have them.

A record has `file_name`, relative to the folder of the file, and perhaps `text` or `caption`, and
`label`.
"""

import csv
import functools
import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffussm_cli.errors import DataError, reading
from diffussm_cli.machine.files import open_regular, read_regular

NAMES = ("metadata.jsonl", "metadata.csv")  # of several in a folder, the first is read
FILE_NAME = "file_name"
TEXTS, LABEL = ("text", "caption"), "label"
MAX_BYTES = 1 << 28


def metadata_in(folder: Path) -> Path | None:
    """The file that describes images in a folder and below, if there is one."""
    return next((folder / n for n in NAMES if os.path.lexists(folder / n)), None)


def captions_in(folder: Path) -> Path | None:
    """As `metadata_in`, if the file holds more than labels."""
    path = metadata_in(folder)
    fields = fields_of(path) if path else set()
    return None if LABEL in fields and not fields & set(TEXTS) else path


def fields_of(path: Path) -> set[str]:
    """The fields of all records, each of which may lack some. What cannot be read has none; its
    reader will say so.
    """
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
        return set(_fields_of(path, status.st_size, status.st_mtime_ns))
    except OSError:
        return set()


@functools.lru_cache(1024)
def _fields_of(path: Path, size: int, changed: int) -> frozenset[str]:  # noqa: ARG001
    """As `fields_of`. A file is asked for its fields several times, and read once while its size
    and its time of change stay the same.
    """
    with open_regular(path) as file:
        text = file.read(MAX_BYTES).decode("utf-8-sig", "replace")

    if path.suffix == ".csv":
        try:
            return frozenset(_header(csv.reader(io.StringIO(text), skipinitialspace=True)))
        except csv.Error:
            return frozenset()
    return frozenset().union(*map(_fields_in, text.split("\n")))


def _fields_in(line: str) -> Iterable[str]:
    """The fields of one record; none if it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return ()
    return record if isinstance(record, dict) else ()


def may_hold_labels(path: Path) -> bool:
    """Whether a file has a field of labels, or is a table of another separator, which
    `read_metadata` refuses.
    """
    fields = fields_of(path)
    is_split = path.suffix != ".csv" or FILE_NAME in fields
    return LABEL in fields or not (is_split or all(FILE_NAME not in name for name in fields))


def read_metadata(path: Path, folder: str, where: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The name of each image relative to the root of a source, its line and its record.

    Args:
        folder: that of the file, relative to the root.
        where: what errors call the file.

    Raises:
        DataError: naming the line that is damaged or has no `file_name`, or for a table without
            this column.
    """
    with reading(f"{where}: cannot be read", DataError):
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")

    records = _of_csv(text, where) if path.suffix == ".csv" else _of_lines(text, where)
    for number, record in records:
        name = record.get(FILE_NAME) if isinstance(record, Mapping) else None
        if not isinstance(name, str):
            kind = "a row" if path.suffix == ".csv" else "an object"
            what = f'is not {kind} with "file_name", and "text" or "label"'
            raise DataError(f"{where}: line {number}: {what}")
        yield posixpath.normpath(posixpath.join(folder, name)), number, dict(record)


def _of_lines(text: str, where: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with reading(f"{where}: line {number}", DataError):
                record = json.loads(line)
            yield number, record


def _header(rows: Iterable[list[str]]) -> list[str]:
    """The names of columns, without spaces at their ends, which the first row that is not blank
    holds.
    """
    return [name.strip() for name in next(filter(any, rows), [])]


def _of_csv(text: str, where: str) -> Iterator[tuple[int, Any]]:
    # As spreadsheets and people write tables, with spaces after their commas.
    rows = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        # The columns, which a file without rows has too.
        columns = _header(rows)
        line_of_columns = rows.line_num
        if columns and FILE_NAME not in columns:
            what = f"has no column {FILE_NAME}; its columns must be separated by commas"
            raise DataError(f"{where}: {what}")

        for row in filter(None, rows):
            if len(row) != len(columns):
                what = f"has not {len(columns)} values, as line {line_of_columns}"
                raise DataError(f"{where}: line {rows.line_num}: {what}")
            yield rows.line_num, {name: value or None for name, value in zip(columns, row)}
    except csv.Error as e:
        raise DataError(f"{where}: line {rows.line_num}: {e}") from e

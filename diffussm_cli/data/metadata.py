"""metadata.jsonl and metadata.csv: one record per image, as Hugging Face's image folders have them.

A record has `file_name`, relative to the folder of the file, and perhaps `text` or `caption`, and
`label`.
"""

import csv
import io
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffussm_cli.errors import DataError, reading
from diffussm_cli.machine.files import open_regular, read_regular

NAMES = ("metadata.jsonl", "metadata.csv")  # of several in a folder, the first is read
FILE_NAME = "file_name"
TEXTS, LABEL = ("text", "caption"), "label"
MAX_BYTES, MAX_LINE_BYTES = 1 << 28, 1 << 16


def metadata_in(folder: Path) -> Path | None:
    """The file that describes images in a folder and below, if there is one."""
    return next((folder / n for n in NAMES if os.path.lexists(folder / n)), None)


def captions_in(folder: Path) -> Path | None:
    """As `metadata_in`, if the file holds more than labels."""
    path = metadata_in(folder)
    fields = fields_of(path) if path else set()
    return None if LABEL in fields and not fields & set(TEXTS) else path


def fields_of(path: Path) -> set[str]:
    """The fields of the first record; none if it cannot be read, which its reader will say."""
    try:
        with open_regular(path) as file:
            first = file.readline(MAX_LINE_BYTES).decode("utf-8-sig")
        if path.suffix == ".csv":
            return set(_names(next(csv.reader([first], skipinitialspace=True), [])))
        record = json.loads(first)
    except (OSError, ValueError, RecursionError, csv.Error):
        return set()
    return set(record) if isinstance(record, dict) else set()


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


def _names(columns: Sequence[str]) -> list[str]:
    """The names of columns without spaces at their ends."""
    return [name.strip() for name in columns]


def _of_csv(text: str, where: str) -> Iterator[tuple[int, Any]]:
    # As spreadsheets and people write tables, with spaces after their commas.
    file = io.StringIO(text, newline="")
    rows = csv.DictReader(file, strict=True, skipinitialspace=True)
    while True:
        try:
            rows.fieldnames = _names(rows.fieldnames or [])
            row = next(rows, None)
        except csv.Error as e:
            raise DataError(f"{where}: line {rows.line_num}: {e}") from e

        # The first line, which a file without rows has too.
        columns = rows.fieldnames or ()
        if columns and FILE_NAME not in columns:
            what = f"has no column {FILE_NAME}; its columns must be separated by commas"
            raise DataError(f"{where}: {what}")
        if row is None:
            return

        # None stands for a value too many, and for one that is missing.
        if None in row or None in row.values():
            what = f"has not {len(columns)} values, as line 1"
            raise DataError(f"{where}: line {rows.line_num}: {what}")
        yield rows.line_num, {name: value or None for name, value in row.items()}

"""Captions beside the images of a folder or archive.

metadata.jsonl     in a folder: one object per line, `file_name` and `text`, a string or a list (as Hugging Face's)
NAME.txt           beside NAME.png, if there is no metadata.jsonl: one caption per line
KEY.txt, KEY.json  in a WebDataset shard: one caption per line, and the fields `text` or `caption`
text, caption      columns of a parquet shard: a string or a list
"""

import contextlib
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffussm_cli.data import parquet
from diffussm_cli.data.listing import MAX_FILE_BYTES, Listing, key_of
from diffussm_cli.data.text import plain
from diffussm_cli.errors import DataError, reading

METADATA = "metadata.jsonl"
MAX_TEXT_BYTES = 1 << 20  # of the captions of one image


def read_captions(listing: Listing, needed: bool = True) -> dict[str, tuple[str, ...]]:
    """The captions of images by the name of their entry, without duplicates; images without one are missing.

    Raises:
        DataError: for a file of captions that is not UTF-8, is damaged or too large; if captions are `needed`, for
            parquet shards without a column of texts.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for name, texts in _all(listing, needed):
        found[name] += filter(None, map(plain, texts))
    return {name: tuple(dict.fromkeys(texts)) for name, texts in found.items() if texts}


def _all(listing: Listing, needed: bool) -> Iterator[tuple[str, Iterable[str]]]:
    """Names of entries with captions of theirs."""
    root = listing.root
    archives = dict.fromkeys(e.archive for e in listing.entries if e.archive)
    if archives:
        names = {key_of(e.name): e.name for e in listing.entries}
        for archive in archives:
            shard = (
                _in_parquet(listing, archive, needed) if archive.endswith(".parquet") else _in_archive(root, archive)
            )
            yield from ((names[key], texts) for key, texts in shard if key in names)
    elif os.path.isfile(root / METADATA):
        yield from _in_metadata(root / METADATA)
    else:
        for entry in listing.entries:
            path = (root / entry.name).with_suffix(".txt")
            if path.is_file():
                with reading(f"data.text: {path}: cannot be read", DataError):
                    yield entry.name, _bounded(path.read_bytes(), MAX_TEXT_BYTES).decode().splitlines()


def _in_metadata(path: Path) -> Iterator[tuple[str, list[str]]]:
    with reading(f"data.text: {path}: cannot be read", DataError):
        lines = _bounded(path.read_bytes(), MAX_FILE_BYTES).decode().split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with reading(f"data.text: {path}: line {number}", DataError):
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
                    raise ValueError('is not an object with "file_name" and "text"')
                yield record["file_name"], _texts(record)


def _in_parquet(listing: Listing, shard: str, needed: bool) -> Iterator[tuple[str, list[str]]]:
    try:
        for row, found in enumerate(parquet.read_texts(listing.root / shard, listing.columns, needed)):
            name = f"{shard}/{row:07d}"
            with reading(name, DataError):
                yield name, _texts({"text": found})
    except DataError as e:
        raise DataError(f"data.text: {e}") from e


def _in_archive(root: Path, archive: str) -> Iterator[tuple[str, list[str]]]:
    with (
        contextlib.suppress(tarfile.TarError),
        tarfile.open(root / archive, "r:") as tar,
    ):  # as the listing: up to damage
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps every header in memory
            name = f"{archive}/{member.name}"
            key = key_of(name)
            suffix = name.removeprefix(key).lower()
            if member.isreg() and suffix in (".txt", ".json"):
                with reading(f"data.text: {name}: cannot be read", DataError):
                    content = tar.extractfile(member).read(MAX_TEXT_BYTES + 1)  # type: ignore[union-attr]
                    text = _bounded(content, MAX_TEXT_BYTES).decode()
                    yield key, text.splitlines() if suffix == ".txt" else _texts(json.loads(text))


def _bounded(content: bytes, most: int) -> bytes:
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content


def _texts(record: Any) -> list[str]:
    """The captions in a JSON object. Raises ValueError if they are not text."""
    found = record.get("text", record.get("caption")) if isinstance(record, dict) else None
    texts: list[Any] = found if isinstance(found, list) else [] if found is None else [found]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"a caption must be text, not {wrong[0]!r:.40}")
    return texts

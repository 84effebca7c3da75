"""Captions beside the images of a folder or archive.

metadata.jsonl     in the folder of an image, or above it: one object per line, `text`, a string or
                   a list, and `file_name` relative to the folder of this file (as Hugging Face's)
metadata.csv       the same as a table
NAME.txt           beside NAME.png, if no captions lie in such a file in its folder or above: one
                   caption per line
KEY.txt, KEY.json  in a WebDataset shard: one caption per line, and the fields `text` or `caption`
text, caption      columns of a parquet shard: a string or a list
"""

import contextlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffussm_cli.data import parquet
from diffussm_cli.data.listing import LeftOut, Listing
from diffussm_cli.data.metadata import captions_in, read_metadata
from diffussm_cli.data.tar import Damaged, key_of, members
from diffussm_cli.data.text import plain
from diffussm_cli.errors import DataError, reading
from diffussm_cli.machine.files import read_regular

MAX_TEXT_BYTES = 1 << 20  # of the captions of one image


def read_captions(
    listing: Listing, needed: bool = True, left_out: list[LeftOut] | None = None
) -> dict[str, tuple[str, ...]]:
    """The captions of images by the name of their entry, without duplicates; images without one are
    missing.

    Args:
        needed: raise an error for parquet shards without a column of texts.
        left_out: gets what is not used of the captions, by reason.

    Raises:
        DataError: for a file of captions that is not UTF-8, is damaged or too large.
    """
    # All captions, by the name of an image or by a key in a shard.
    texts_of: dict[str, list[str]] = defaultdict(list)
    unused: list[LeftOut] = []
    archives = dict.fromkeys(e.archive for e in listing.entries if e.archive)
    if any(name.lower().endswith((".npz", ".bin")) for name in archives):
        return {}  # arrays have none
    parts = (
        [_in_folders(listing.root, [e.name for e in listing.entries], unused)]
        if not archives
        else []
    )
    for archive in archives:
        in_parquet = archive.lower().endswith(".parquet")
        parts.append(
            _in_parquet(listing, archive, needed)
            if in_parquet
            else _in_archive(listing.root, archive)
        )
    for name, texts in itertools.chain.from_iterable(parts):
        texts_of[name] += filter(None, map(plain, texts))

    # Those of the images.
    names = {e.name: key_of(e.name) if archives else e.name for e in listing.entries}
    if left_out is not None:
        used = set(names.values())
        strange = [name for name, texts in texts_of.items() if texts and name not in used]
        left_out += unused
        left_out += (
            [LeftOut(len(strange), "caption", "of no image in the source", strange[0])]
            if strange
            else []
        )
    captions = {name: tuple(dict.fromkeys(texts_of.get(key, ()))) for name, key in names.items()}
    return {name: texts for name, texts in captions.items() if texts}


def _in_folders(
    root: Path, names: Sequence[str], unused: list[LeftOut]
) -> Iterator[tuple[str, list[str]]]:
    """Captions of image files: from a file of metadata in a folder that contains them, or else
    from their own .txt.
    """
    described: dict[str, bool] = {}  # folders, by whether they or one above have such a file

    def is_described(folder: str) -> bool:
        if folder not in described:
            has_metadata = captions_in(root / folder) is not None
            # asked in any case: the folders above are read too
            above = bool(folder) and is_described(folder.rpartition("/")[0])
            described[folder] = has_metadata or above
        return described[folder]

    # Every image has its own file, ...
    passed_over = []
    for name in names:
        path = (root / name).with_suffix(".txt")
        if not os.path.lexists(path):
            is_described(name.rpartition("/")[0])
        elif is_described(name.rpartition("/")[0]):
            passed_over.append(os.path.relpath(path, root))
        else:
            with reading(f"data.text: {path}: cannot be read", DataError):
                yield name, read_regular(path, MAX_TEXT_BYTES).decode("utf-8-sig").splitlines()

    if passed_over:
        metadata = next(file for f in described if (file := captions_in(root / f)))
        why = f"beside a {metadata.name}, which is read instead"
        unused.append(LeftOut(len(passed_over), "file", why, passed_over[0]))

    # ... or is one of those that a file describes.
    for folder in described:
        description = captions_in(root / folder)
        if description is not None:
            yield from _in_metadata(description, folder)


def _in_metadata(path: Path, folder: str) -> Iterator[tuple[str, list[str]]]:
    """Names of images, relative to the root of the source, with their captions; `folder` is that of
    the file.
    """
    where = f"data.text: {path}"
    for name, number, record in read_metadata(path, folder, where):
        with reading(f"{where}: line {number}", DataError):
            texts = _texts(record)
        yield name, texts


def _in_parquet(listing: Listing, shard: str, needed: bool) -> Iterator[tuple[str, list[str]]]:
    try:
        for row, value in enumerate(
            parquet.read_texts(listing.root / shard, listing.columns, needed)
        ):
            name = f"{shard}/{row:07d}"
            with reading(name, DataError):
                yield name, _texts({"text": value})
    except DataError as e:
        raise DataError(f"data.text: {e}") from e


def _in_archive(root: Path, archive: str) -> Iterator[tuple[str, list[str]]]:
    with contextlib.suppress(Damaged):  # as the listing: up to the damage
        for member, read in members(root / archive):
            name = f"{archive}/{member.name}"
            key = key_of(name)
            suffix = name.removeprefix(key).lower()
            if not member.isreg() or suffix not in (".txt", ".json"):
                continue

            with reading(f"data.text: {name}: cannot be read", DataError):
                if member.size > MAX_TEXT_BYTES:
                    raise ValueError(f"it has more than {MAX_TEXT_BYTES} bytes")
                text = read(MAX_TEXT_BYTES).decode("utf-8-sig")
                yield key, text.splitlines() if suffix == ".txt" else _texts(json.loads(text))


def _texts(record: Any) -> list[str]:
    """The captions in a JSON object. Raises ValueError if they are not text."""
    value = record.get("text", record.get("caption")) if isinstance(record, dict) else None
    texts: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"a caption must be text, not {wrong[0]!r:.40}")
    return texts

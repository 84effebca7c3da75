"""Lists the images in tar and parquet shards."""

import codecs
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffussm_cli.data import parquet
from diffussm_cli.data.images import SUFFIXES
from diffussm_cli.data.listing.beside import without_overviews
from diffussm_cli.data.listing.entries import Entry, Listing
from diffussm_cli.data.listing.left_out import (
    CAPTIONS,
    JSON,
    LABEL_ALONE,
    NESTED,
    PER_CLASS,
    LeftOut,
    counted,
    kind_of,
    reason_for,
)
from diffussm_cli.data.listing.splits import refuse_splits
from diffussm_cli.data.tar import Damaged, key_of, members
from diffussm_cli.errors import DataError

MAX_CLASS = 1 << 20
# of parquet shards, by kind; why one may not be read
COLUMNS = {"image": "", "label": "", "text": CAPTIONS}


def list_archives(root: Path, archives: list[str], ignored: list[tuple[str, str]]) -> Listing:
    entries: list[Entry] = []
    labels: dict[str, int] = {}
    unread: Counter[str] = Counter()
    for archive in archives:
        try:
            _list_members(root, archive, entries, labels, ignored, unread)
        except Damaged as e:
            ignored.append((archive, str(e)))
    entries = without_overviews(entries, ignored)

    if not labels:
        entries, names, parts = _classes_in_folders(root, entries)
        if not names:
            parts += _classes_in_names(archives)
        return Listing(root, entries, names, ignored, unread=(*parts, *counted(unread)))
    entries = [e._replace(label=labels.get(key_of(e.name), -1)) for e in entries]
    without = next((e.name for e in entries if e.label < 0), None)
    if without is not None:
        raise DataError(
            f"{without} has no .cls file, but other images have one; label all of them or none"
        )

    names = tuple(str(i) for i in range(max(labels.values()) + 1))
    strange = sorted(labels.keys() - {key_of(e.name) for e in entries})
    parts = [LeftOut(len(strange), "label", LABEL_ALONE, f"{strange[0]}.cls")] if strange else []
    return Listing(root, entries, names, ignored, unread=(*parts, *counted(unread)))


def _list_members(
    root: Path,
    archive: str,
    entries: list[Entry],
    labels: dict[str, int],
    ignored: list[tuple[str, str]],
    unread: Counter[str],
) -> None:
    """Add the images of one archive to `entries`, and its labels to `labels` by key. Raises
    DataError.
    """
    known: set[str] = set()

    for member, read in members(root / archive):
        name = f"{archive}/{member.name}"
        key = key_of(name)
        suffix = name.removeprefix(key).lower()
        if member.isdir():
            continue

        if not member.isreg() or member.issparse():
            ignored.append((name, "a link, device or sparse file in an archive"))
        elif suffix == ".cls" or suffix in SUFFIXES:
            if name in known:
                raise DataError(
                    f"{name} stands twice in the archive; give every image a name of its own"
                )
            known.add(name)
            if suffix == ".cls":
                labels[key] = _class_of(name, read(32))
            else:
                entries.append(Entry(name, 0, member.size, archive, member.offset_data))
        elif suffix in (".txt", ".json"):
            unread[CAPTIONS if suffix == ".txt" else JSON] += 1
        else:
            otherwise = NESTED if kind_of(name) == "shard" else "not an image by its name"
            ignored.append((name, reason_for(name, otherwise)))


def _class_of(name: str, content: bytes) -> int:
    try:
        label = int(content.removeprefix(codecs.BOM_UTF8))
    except ValueError:
        label = -1
    if not 0 <= label < MAX_CLASS:
        raise DataError(
            f"{name} must hold an integer from 0 to {MAX_CLASS - 1}, not {content!r:.40}"
        )
    return label


def _classes_in_folders(
    root: Path, entries: Sequence[Entry]
) -> tuple[list[Entry], tuple[str, ...], list[LeftOut]]:
    """The entries with the labels of the folders in which they lie, and the names of these classes;
    what is not used of the folders.

    Folders that hold all images, as of a packed data set, are no classes. Raises DataError for
    splits.
    """
    # The folders of each image, without those that all images share.
    paths = [[p for p in e.name.split("/")[1:-1] if p != "."] for e in entries]
    shared = 0
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        shared += 1

    paths = [path[shared:] for path in paths]
    names = tuple(sorted({path[0] for path in paths if path}))
    if not names:
        return list(entries), (), []
    unpacked = "unpack the shards and give one of them"
    refuse_splits(root / entries[0].archive, (), map("/".join, paths), unpacked)

    # Classes, if each image lies in one.
    outside = sum(not path for path in paths)
    if outside:
        why = f"no class, as {outside:,} images lie in none"
        return list(entries), (), [LeftOut(len(names), "folder", why, names[0])]
    places = {name: place for place, name in enumerate(names)}
    return [e._replace(label=places[path[0]]) for e, path in zip(entries, paths)], names, []


def _classes_in_names(archives: Sequence[str]) -> list[LeftOut]:
    """Names of shards that are no numbers of one series but classes, as of ImageNet's
    n01440764.tar.
    """
    stems = [os.path.splitext(os.path.basename(name))[0] for name in archives]
    words = {re.sub(r"\d+", "", stem) for stem in stems}
    of_imagenet = all(re.fullmatch(r"n\d{8}", stem) for stem in stems)
    is_named = len(archives) > 1 and (of_imagenet or len(words) > 1)
    return [LeftOut(len(archives), "shard name", PER_CLASS, archives[0])] if is_named else []


def list_parquet(
    root: Path, shards: list[str], ignored: list[tuple[str, str]], columns: Mapping[str, str]
) -> Listing:
    parquet.forget()
    rows, class_names = parquet.list_rows(root, shards, columns)
    entries = [
        Entry(f"{shard}/{row:07d}", label, size, shard, row, column)
        for shard, row, column, label, size in rows
    ]
    return Listing(
        root, entries, class_names, ignored, columns, _unread_columns(root, shards, columns)
    )


def _unread_columns(
    root: Path, shards: Sequence[str], columns: Mapping[str, str]
) -> tuple[LeftOut, ...]:
    """The columns of parquet shards that are not read, or only by runs with text."""
    reasons: dict[str, str] = {}
    for path in (root / name for name in shards):
        used = {
            parquet.find_column(path, kind, columns, needed=False): why
            for kind, why in COLUMNS.items()
        }
        reasons |= {
            name: used.get(name, "of parquet shards, which is not read")
            for name in parquet.column_names(path)
        }

    examples = {why: name for name, why in reversed(reasons.items()) if why}
    counts = Counter(why for why in reasons.values() if why)
    return tuple(LeftOut(n, "column", why, examples[why]) for why, n in counts.items())

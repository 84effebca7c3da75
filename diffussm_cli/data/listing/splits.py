"""Names of shards and folders that tell a split of a data set, train, validation or test, or how
many shards there are.
"""

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffussm_cli.errors import DataError

SPLITS = {  # words that name a split of a data set
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
SPLIT_FOLDER = re.compile(
    rf"({'|'.join(SPLITS)})(?:[AB]|\d\d+|[_-]?(?:set|images|imgs|data))?", re.IGNORECASE
)

NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)(?:-\w+)?(\.\w+)")  # train-00000-of-00004.parquet
NUMBERS = 5  # that a line lists


def split_of(shard: str) -> tuple[str, str]:
    """The split that the name of a shard tells, if any, and a pattern for the shards of this
    split.
    """
    suffix = os.path.splitext(shard)[1]

    # As the hub names shards: train-00000-of-00004.parquet.
    numbered = re.match(r"(.+)-\d+-of-\d+\.parquet$", shard)
    if numbered:
        return numbered[1], f"{numbered[1]}-*.parquet"

    # Any other name, with a word such as train in it.
    for word in re.finditer(r"[a-z]+", shard.removesuffix(suffix), re.IGNORECASE):
        if word[0].lower() in SPLITS:
            rest = re.match(r"[^a-zA-Z0-9]?(.*)", shard[word.end() :].removesuffix(suffix))
            begin = shard[: word.end() + (rest.start(1) if rest else 0)]
            return SPLITS[word[0].lower()], begin + (f"*{suffix}" if rest and rest[1] else suffix)
    return "", ""


def split_folder(name: str) -> str:
    """The split that the name of a folder tells; empty if it tells none."""
    match = SPLIT_FOLDER.fullmatch(name)
    return SPLITS[match[1].lower()] if match else ""


def one_split(shards: Sequence[str]) -> list[str]:
    """The shards themselves. Raises DataError if their names tell several splits of a data set."""
    splits = dict(sorted(filter(lambda split: split[0], map(split_of, shards))))
    if len(splits) > 1:
        chosen = splits.get("train") or next(iter(splits.values()))
        raise DataError(f"the shards are of {', '.join(splits)}; choose one: {chosen!r}")
    return list(shards)


def refuse_gaps(shards: Sequence[str], begin: str) -> None:
    """Raises DataError if shards are missing of a series whose names say how many there are, as
    after an interrupted download.

    Args:
        begin: what stands before the pattern of those that are there, which is the remedy.
    """
    # The numbers that are there, of each series.
    series: dict[tuple[str, str, str], set[str]] = {}
    for name, number, count, suffix in (m.groups() for m in map(NUMBERED.fullmatch, shards) if m):
        series.setdefault((name, count, suffix), set()).add(number)

    for (name, count, suffix), present in series.items():
        numbers = set(map(int, present))
        total = int(count)
        lacks = total - len(numbers)
        if lacks <= 0:
            continue

        # The first of those that are not, counted from 0 or 1.
        first = int(0 not in numbers and total in numbers)
        absent = (i for i in range(first, first + total) if i not in numbers)
        width = min(map(len, present))
        some = ", ".join(f"{i:0{width}}" for i in itertools.islice(absent, NUMBERS))
        more = f" and {lacks - NUMBERS:,} more" if lacks > NUMBERS else ""

        pattern = f"{begin}{name}-*{suffix}"
        are = "is" if lacks == 1 else "are"
        raise DataError(
            f"of the {total:,} shards {pattern!r}, {lacks:,} {are} missing: {some}{more}; fetch "
            "what is missing, or choose the shards that are there by this pattern"
        )


def refuse_splits(
    root: Path, classes: Sequence[str], folders: Iterable[str], remedy: str = ""
) -> None:
    """Raises DataError if folders that would become classes, or parts of one, are splits of a data
    set.

    Args:
        folders: those of the images, relative to the root.
        remedy: by default, to give the path of one of them.
    """
    # The splits below each folder that holds some.
    below: dict[str, dict[str, str]] = {}
    for folder in dict.fromkeys(folders):
        parts = folder.split("/")
        for i, part in enumerate(parts):
            named = SPLIT_FOLDER.fullmatch(part)
            if named:
                splits = below.setdefault("/".join(parts[:i]), {})
                splits.setdefault(SPLITS[named[1].lower()], part)

    several = {parent: splits for parent, splits in below.items() if len(splits) > 1}
    if len(classes) == 1 and SPLIT_FOLDER.fullmatch(classes[0]):
        several |= {"": below[""]}
    if not several:
        return

    # The first of them is named.
    parent, splits = next(iter(several.items()))
    where = root / parent
    names = sorted(splits.values())
    others = ", and other folders in it do too" if len(several) > 1 else ""
    kind = "the splits" if len(names) > 1 else "only the split"
    remedy = remedy or f"give one: {str(where / splits.get('train', names[0]))!r}"
    raise DataError(
        f"{str(where)!r} holds {kind} {', '.join(names)} of a data set, not classes{others}; "
        f"{remedy}"
    )

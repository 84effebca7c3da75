"""Labels in a file beside images: metadata.jsonl or metadata.csv with a field `label`, or one of
the lists of ImageNet's validation images.
"""

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffussm_cli.data.listing.arrays import class_list
from diffussm_cli.data.listing.entries import Entry
from diffussm_cli.data.listing.left_out import LeftOut
from diffussm_cli.data.listing.shards import MAX_CLASS
from diffussm_cli.data.metadata import LABEL, may_hold_labels, metadata_in, read_metadata
from diffussm_cli.errors import DataError, reading
from diffussm_cli.machine.files import read_regular

MAX_LIST_BYTES = 1 << 24
# Lists of the classes of ImageNet's validation images. The numbers of the ground truth of ILSVRC
# begin at 1, those of others at 0.
GROUND_TRUTH = r".*validation_ground_truth\.txt"
LISTS = re.compile(rf"{GROUND_TRUTH}|.*synset_labels\.txt|val(?:_map)?\.txt|LOC_val_solution\.csv")


class Labels(NamedTuple):
    """Labels of images by the names of their entries."""

    labels: Mapping[str, int | str]
    file: str  # what errors call the file
    first: int = 0  # the smallest number of a class

    def of(self, entries: Sequence[Entry]) -> tuple[list[Entry], tuple[str, ...]]:
        """The entries with their labels, and the names of the classes.

        Raises:
            DataError: for an image without a label, and for names among numbers.
        """
        values = [self.labels.get(e.name) for e in entries]
        without = next((e.name for e, value in zip(entries, values) if value is None), None)
        if without is not None:
            raise DataError(
                f"{without} has no label in {self.file}, but other images have one; label all of "
                "them or none"
            )

        labels = [value for value in values if value is not None]
        if len({isinstance(label, str) for label in labels}) > 1:
            raise DataError(f"{self.file}: some labels are numbers and some are names")

        classes = class_list(labels)[self.first :]
        places = {name: place for place, name in enumerate(classes)}
        return [e._replace(label=places[str(v)]) for e, v in zip(entries, labels)], classes

    def unused(self, entries: Sequence[Entry]) -> list[LeftOut]:
        """Labels of images that the source has not."""
        strange = self.labels.keys() - {e.name for e in entries}
        why = f"of {os.path.basename(self.file)}, of no image in the source"
        return [LeftOut(len(strange), "label", why, min(strange))] if strange else []


def labels_beside(root: Path, entries: Sequence[Entry], files: Sequence[str]) -> Labels | None:
    """The labels of images that files in their folders, or above, hold; None if there are none.

    Args:
        files: those in the root, among which a list of ImageNet's may be.

    Raises:
        DataError: for a damaged file, and for one that does not fit the images.
    """
    folders = {""}
    for folder in {e.name.rpartition("/")[0] for e in entries}:
        parts = folder.split("/")
        folders |= {"/".join(parts[:i]) for i in range(1, len(parts) + 1)}

    # Files of metadata, in any of the folders.
    described = [(f, path) for f in sorted(folders) if (path := metadata_in(root / f))]
    paths = [(folder, path) for folder, path in described if may_hold_labels(path)]
    if paths:
        labels: dict[str, int | str] = {}
        for folder, path in paths:
            for name, number, record in read_metadata(path, folder, str(path)):
                label = _label(record.get(LABEL), f"{path}: line {number}", path.suffix == ".csv")
                if label is not None:
                    _add(labels, name, label, f"{path}: line {number}")
        return Labels(labels, str(paths[0][1]))

    # Lists of labels, beside the images.
    lists = [name for name in files if LISTS.fullmatch(name)]
    return _of_list(root / lists[0], entries) if lists else None


def _add(labels: dict[str, Any], name: str, label: int | str, where: str) -> None:
    """Keep the label of an image. Raises DataError if it has another one already."""
    if labels.setdefault(name, label) != label:
        raise DataError(
            f"{where}: {name} has the label {label!r:.40} here, but {labels[name]!r:.40} before; "
            "give it one label"
        )


def _label(value: Any, where: str, is_text: bool) -> int | str | None:
    """A whole number or a name. Raises DataError.

    Args:
        is_text: whether numbers are written as text.
    """
    if is_text and isinstance(value, str):
        value = value.strip()
    if is_text and isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
        value = int(value)
    is_class = isinstance(value, str) or (type(value) is int and 0 <= value < MAX_CLASS)
    if value is not None and (not is_class or value == ""):
        raise DataError(
            f"{where}: the label {value!r:.40} must be a name, or a whole number from 0 to "
            f"{MAX_CLASS - 1}"
        )
    return value


def _of_list(path: Path, entries: Sequence[Entry]) -> Labels | None:
    """The labels in a list of ImageNet's: by name of an image, or one per line in their order."""
    with reading(f"{path}: cannot be read", DataError):
        text = read_regular(path, MAX_LIST_BYTES).decode("utf-8-sig")
    rows = list(_rows(text, path))

    # By name, with or without its end; or in order.
    first = 1 if re.fullmatch(GROUND_TRUTH, path.name) else 0
    if rows and len(rows[0]) == 1:
        if len(rows) != len(entries):
            raise DataError(
                f"{path}: holds {len(rows)} labels for {len(entries)} images; it must name the "
                "class of each image in the order of their names"
            )
        labels = {e.name: row[0] for e, row in zip(entries, rows)}
    else:
        by_stem: dict[str, str] = {}
        for name, label in rows:
            _add(by_stem, os.path.splitext(name)[0], label, str(path))
        stems = {e.name: os.path.splitext(e.name)[0] for e in entries}
        labels = {name: by_stem.pop(stem) for name, stem in stems.items() if stem in by_stem}
        labels |= by_stem

    values = {name: _label(label, str(path), is_text=True) for name, label in labels.items()}
    if first and 0 in values.values():
        raise DataError(f"{path}: holds the label 0, but the classes of ILSVRC begin at 1")
    return Labels({n: v for n, v in values.items() if v is not None}, str(path), first)


def _rows(text: str, path: Path) -> Iterator[list[str]]:
    """A label, or the name of an image and its label. Raises DataError."""
    if path.suffix == ".csv":
        for row in csv.DictReader(text.splitlines()):
            words = (row.get("PredictionString") or "").split()
            if not row.get("ImageId") or not words:
                raise DataError(f"{path}: {row} has no ImageId and PredictionString")
            yield [row["ImageId"], words[0]]
        return

    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if len(words) not in (1, 2):
            raise DataError(f"{path}: line {number} must hold a label, or a name and a label")
        yield words

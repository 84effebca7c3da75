"""Lists the images in .npz files, and in the binary version of CIFAR."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffussm_cli.data import arrays, cifar
from diffussm_cli.data.listing.entries import Entry, Listing
from diffussm_cli.data.listing.left_out import LeftOut
from diffussm_cli.data.listing.shards import MAX_CLASS
from diffussm_cli.data.listing.splits import one_split
from diffussm_cli.errors import DataError

# Arrays by their usual names: images, and the labels that go with them.
USUAL = (
    ("images", "labels"),
    ("image", "label"),
    ("x", "y"),
    ("train_images", "train_labels"),
    ("x_train", "y_train"),
    ("X_train", "y_train"),
    ("arr_0", "arr_1"),
)
NOT_READ = "of each .npz file, only one array of images and its labels are read"


def array_files(root: Path, files: Sequence[str]) -> list[str]:
    """The files that hold arrays of images: .npz files, or else batches of CIFAR."""
    shown = [name for name in files if not name.startswith(".")]
    packed = [name for name in shown if name.lower().endswith(".npz")]
    return packed or [name for name in shown if cifar.kind_of_file(root / name)]


def list_arrays(
    root: Path,
    names: Sequence[str],
    ignored: list[tuple[str, str]],
    columns: Mapping[str, str],
) -> Listing:
    """List the images of files from `array_files`. Raises DataError."""
    if names[0].lower().endswith(".npz"):
        return _list_npz(root, one_split(names), ignored, columns)
    return _list_cifar(root, names, ignored)


# --------------------------------------------------------------------------------------------- .npz
def _list_npz(
    root: Path,
    names: Sequence[str],
    ignored: list[tuple[str, str]],
    columns: Mapping[str, str],
) -> Listing:
    arrays.forget()
    entries: list[Entry] = []
    labels: list[int | str] = []
    others: list[str] = []
    packed = 0
    for name in names:
        rows_by_name = arrays.open_npz(root / name)
        image, label = _chosen(root / name, rows_by_name, columns)

        rows = arrays.image_rows(rows_by_name[image])
        size = math.prod(rows.shape[1:])
        packed += 0 if rows.is_stored() else size * rows.shape[0]
        entries += (Entry(f"{name}/{i:07d}", 0, size, name, i, image) for i in range(rows.shape[0]))
        labels += _labels(rows_by_name[label], rows.shape[0]) if label else []
        others += [f"{name}: {other}" for other in sorted(rows_by_name.keys() - {image, label})]

    if packed > arrays.MOST_UNPACKED:
        raise DataError(
            f"{str(root / names[0])!r}: the images unpack to {packed:,} bytes, and at most "
            f"{arrays.MOST_UNPACKED:,} are kept in memory; save them with numpy.savez, which does "
            "not compress"
        )
    if labels and len(labels) != len(entries):
        raise DataError(f"of the .npz files in {str(root)!r}, some have labels and others none")

    classes = class_list(labels)
    places = {name: place for place, name in enumerate(classes)}
    entries = [e._replace(label=places[str(label)]) for e, label in zip(entries, labels)] or entries
    unread = (LeftOut(len(others), "array", NOT_READ, others[0]),) if others else ()
    return Listing(root, entries, classes, ignored, columns, unread)


def _chosen(
    path: Path, rows_by_name: Mapping[str, arrays.Rows], columns: Mapping[str, str]
) -> tuple[str, str | None]:
    """The names of the array of images, and of that of the labels if there is one.

    Raises DataError.
    """
    wrong = [name for kind, name in columns.items() if name not in rows_by_name or kind == "text"]
    usual = next(((x, y) for x, y in USUAL if x in rows_by_name), None)
    image = columns.get("image", usual[0] if usual else None)
    if wrong or image is None:
        missing = wrong[0] if wrong else ", ".join(x for x, _ in USUAL)
        has = ", ".join(sorted(rows_by_name)) or "nothing"
        raise DataError(
            f"{path}: holds {has:.200}, not {missing}; name the arrays by image=NAME,label=NAME "
            "(data.columns, or --columns of encode)"
        )

    partner = next((y for x, y in USUAL if x == image and y in rows_by_name), None)
    return image, columns.get("label", partner)


def _labels(rows: arrays.Rows, images: int) -> list[int] | list[str]:
    """One integer or name per image. Raises DataError."""
    what = f"{rows.path}: {rows.name} is {rows.dtype} of shape {rows.shape}"
    is_number = rows.dtype.kind in "iu"
    if rows.shape not in ((images,), (images, 1)) or not (is_number or rows.dtype.kind == "U"):
        raise DataError(f"{what}, not one integer or name for each of {images} images")
    values = rows.read_all().reshape(-1)
    if is_number and values.size and not 0 <= int(values.min()) <= int(values.max()) < MAX_CLASS:
        raise DataError(f"{what} from {values.min()} to {values.max()}; labels begin at 0")
    return values.tolist()


def class_list(labels: Sequence[int | str]) -> tuple[str, ...]:
    """The classes of labels: the numbers up to the largest, or the sorted names."""
    if not labels or isinstance(labels[0], str):
        return tuple(sorted(set(map(str, labels))))
    return tuple(map(str, range(1 + max(map(int, labels)))))


# -------------------------------------------------------------------------------------------- CIFAR
def _list_cifar(root: Path, names: Sequence[str], ignored: list[tuple[str, str]]) -> Listing:
    used = cifar.training_files(names)
    kinds = {cifar.kind_of_file(root / name) for name in used}
    kind = kinds.pop()
    if kinds or kind is None:
        raise DataError(f"{str(root)!r} holds CIFAR-10 and CIFAR-100; give one of their folders")
    cifar.records.cache_clear()

    entries = [
        Entry(f"{name}/{i:05d}", label, cifar.PIXELS, name, i)
        for name in used
        for i, label in enumerate(cifar.read_labels(root / name))
    ]
    ignored += [
        (n, f"the test set of {kind.name}; give the file to read it")
        for n in names
        if n not in used
    ]
    unread = () if kind.labels == 1 else (LeftOut(1, "column", "the coarse labels of CIFAR-100"),)
    return Listing(root, entries, cifar.class_names(root, kind), ignored, unread=unread)

"""Lists the images of a folder: one folder per class, or without classes, or its shards."""

import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffussm_cli.data.cifar import PICKLED, is_pickle
from diffussm_cli.data.images import SUFFIXES
from diffussm_cli.data.listing.arrays import array_files, list_arrays
from diffussm_cli.data.listing.beside import without_overviews
from diffussm_cli.data.listing.entries import Entry, Listing
from diffussm_cli.data.listing.labels import Labels, labels_beside
from diffussm_cli.data.listing.left_out import (
    CAPTIONS,
    FIELDS,
    HIDDEN,
    NO_IMAGE,
    OURS,
    SIDECAR,
    SIDECARS,
    TABLES,
    UNREADABLE,
    counted,
    kind_of,
    left_out_line,
    reason_for,
    some_of,
)
from diffussm_cli.data.listing.shards import list_archives, list_parquet
from diffussm_cli.data.listing.splits import one_split, refuse_gaps, refuse_splits
from diffussm_cli.data.metadata import LABEL, TEXTS, fields_of, metadata_in
from diffussm_cli.data.metadata import NAMES as METADATA
from diffussm_cli.data.samples import BESIDE, holds_samples
from diffussm_cli.errors import DataError
from diffussm_cli.machine.files import open_regular

MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
COLUMNS = 3  # number of columns of metadata that a line lists


def list_folder(
    root: Path, names: Sequence[str], columns: Mapping[str, str], are_chosen: bool = False
) -> Listing:
    """List the files and folders with these names.

    Args:
        are_chosen: whether the user has chosen them, and not all of a folder. Then no shards of a
            series are missed.

    Raises:
        DataError: for what cannot be listed, or is not clear.
    """
    ignored: list[tuple[str, str]] = []
    unread: Counter[str] = Counter()

    # What lies at the top.
    inner = [n for n in names if not n.startswith(".") and os.path.isdir(root / n)]
    folders = [n for n in inner if not _is_passed_over(root / n, root, ignored)]
    files = [n for n in names if n not in set(inner)]
    shards = [
        n
        for n in files
        if kind_of(n) == "shard" and not n.startswith(".") and n.lower() not in TABLES
    ]

    # One folder per class.
    classes = {
        name: _entries(root, _files_below(root, name, ignored), ignored, unread) for name in folders
    }
    if any(classes.values()):
        entries = [e for images in classes.values() for e in images]
        labels = labels_beside(root, entries, ())
        if labels:
            refuse_splits(root, (), map(_folder_of, entries))
            entries = _entries(root, files, ignored, unread) + entries
            return _with_labels(root, entries, labels, ignored, unread)

        entries = _labelled(root, classes, ignored)
        for name in files:
            if name in METADATA:
                _count_metadata(root / name, unread, ignored)
            else:
                ignored.append((name, reason_for(name, "not in a class folder")))
        return Listing(root, entries, tuple(classes), ignored, unread=counted(unread))

    # No folder holds images, but perhaps one holds shards, as in a repository of the hub.
    flat = [] if shards else _entries(root, files, ignored, unread)
    stacks = [] if shards or flat else array_files(root, files)
    if stacks:
        ignored = [(name, reason) for name, reason in ignored if name not in stacks]
        ignored += [(name, "a folder without images") for name in folders]
        if not are_chosen:
            refuse_gaps(stacks, os.path.join(root, ""))
        return list_arrays(root, stacks, ignored, columns)

    if folders and not shards and not flat:
        shards = _shards_below(root, ignored)
        if not shards:
            unreadable = next(
                (reason for n, reason in ignored if n == folders[0]), "holds no images"
            )
            rest = left_out_line(root, Listing(root, [], (), ignored).left_out())
            raise DataError(
                f"the class folder {str(root / folders[0])!r} {unreadable}{rest and '; '}{rest}"
            )
        ignored = [(name, reason) for name, reason in ignored if name not in set(shards)]
        files = []
    elif folders:
        ignored += [(name, "a folder without images") for name in folders]

    # Shards, or images without classes.
    if not shards:
        labels = labels_beside(root, flat, files) if flat else None
        if labels:
            return _with_labels(root, flat, labels, ignored, unread)
        return Listing(root, flat, (), ignored, unread=counted(unread))

    tars = [name for name in shards if name.lower().endswith(".tar")]
    kind = "tar" if tars else "parquet"
    used = one_split(tars or shards)
    if not are_chosen:
        refuse_gaps(used, os.path.join(root, ""))
    ignored += [
        (n, reason_for(n, f"a file next to {kind} shards")) for n in files if n not in set(used)
    ]
    return (
        list_archives(root, used, ignored) if tars else list_parquet(root, used, ignored, columns)
    )


def _with_labels(
    root: Path,
    entries: Sequence[Entry],
    labels: Labels,
    ignored: list[tuple[str, str]],
    unread: Counter[str],
) -> Listing:
    """The listing of images whose labels stand in a file. Raises DataError."""
    ignored = [(name, why) for name, why in ignored if str(root / name) != labels.file]
    labelled, class_names = labels.of(entries)
    parts = (*labels.unused(entries), *counted(unread))
    return Listing(root, labelled, class_names, ignored, unread=parts)


def _is_passed_over(folder: Path, root: Path, ignored: list[tuple[str, str]]) -> bool:
    """Whether a folder cannot be a class: a link to a folder that contains it, or a folder of the
    system.
    """
    loops = folder.is_symlink() and root.resolve().is_relative_to(folder.resolve())
    if loops:
        ignored.append((folder.name, "a link to a folder that contains it"))
    elif folder.name in SYSTEM:
        ignored.append((folder.name, "a folder that the system made"))
    return loops or folder.name in SYSTEM


def _labelled(
    root: Path, classes: Mapping[str, list[Entry]], ignored: list[tuple[str, str]]
) -> list[Entry]:
    """The images of all classes, with their labels. Raises DataError for splits, and for a class
    without images.
    """
    entries = [e._replace(label=i) for i, images in enumerate(classes.values()) for e in images]
    with_images = [name for name, images in classes.items() if images]
    refuse_splits(root, with_images, map(_folder_of, entries))

    for name, images in classes.items():
        if not images:
            why = next((reason for n, reason in ignored if n == name), "holds no images")
            shards = [n for n, _ in ignored if n.startswith(f"{name}/") and kind_of(n) == "shard"]
            hint = (
                f", but shards; give this folder, or move it away: {shards[0]!r:.80}"
                if shards
                else ""
            )
            raise DataError(f"the class folder {str(root / name)!r} {why}{hint}")
    return entries


def _folder_of(entry: Entry) -> str:
    return entry.name.rpartition("/")[0]


def _shards_below(root: Path, ignored: list[tuple[str, str]]) -> list[str]:
    """Shards in one folder below the root. Raises DataError if several folders hold some."""
    shards = [n for n, reason in ignored if kind_of(n) == "shard" and reason == NO_IMAGE]
    folders = sorted({n.rpartition("/")[0] for n in shards})
    if len(folders) > 1:
        some = ", ".join(repr(str(root / folder)) for folder in folders[:3])
        raise DataError(
            f"{str(root)!r} holds shards in {len(folders)} folders; give one of them: {some}"
        )
    return shards


def _files_below(root: Path, folder: str, ignored: list[tuple[str, str]]) -> list[str]:
    """All files below root/folder, sorted by the parts of their paths; links to folders are not
    followed.
    """
    files: list[str] = []

    def unreadable(e: OSError) -> None:
        ignored.append((os.path.relpath(e.filename, root), f"{UNREADABLE}: {e.strerror}"))

    def reason_against(name: str, path: str) -> str:
        if name.startswith("."):
            return "a hidden folder"
        if os.path.islink(path):
            return "a link to a folder, not followed"
        return "a folder that the system made" if name in SYSTEM else ""

    for parent, folders, names in os.walk(root / folder, onerror=unreadable):
        below = os.path.relpath(parent, root).replace(os.sep, "/")
        for name in list(folders):
            reason = reason_against(name, os.path.join(parent, name))
            if reason:
                ignored.append((f"{below}/{name}", reason))
                folders.remove(name)
        files += [f"{below}/{name}" for name in names]
    return sorted(files, key=lambda name: name.split("/"))


def _entries(
    root: Path, names: list[str], ignored: list[tuple[str, str]], unread: Counter[str]
) -> list[Entry]:
    """The files that may be images, with label 0; the others are added to `ignored` or counted in
    `unread`.
    """
    entries, others = [], []
    for name in names:
        path = root / name
        if path.name.startswith("."):
            ignored.append((name, HIDDEN))
            continue

        try:
            status = path.stat()
        except OSError:
            status = None  # a broken link counts as an unreadable image if it has the suffix of one

        if status and not stat.S_ISREG(status.st_mode):
            ignored.append((name, "not a regular file"))
        elif path.suffix.lower() in SUFFIXES or (status and _begins_as_image(path)):
            entries.append(Entry(name, 0, status.st_size if status else -1))
        else:
            others.append(name)

    # What diffussm wrote beside images.
    samples = {f for f in set(map(_folder_of, entries)) if holds_samples(root / f)}
    entries = without_overviews(entries, ignored, samples)

    # Captions are used by runs with text.
    stems = {os.path.splitext(e.name)[0] for e in entries} if others else ()
    for name in others:
        stem, suffix = os.path.splitext(name)
        folder, _, leaf = name.rpartition("/")
        if leaf in METADATA:
            _count_metadata(root / name, unread, ignored)
        elif suffix == ".txt" and stem in stems:
            unread[CAPTIONS] += 1
        elif leaf in BESIDE and folder in samples:
            ignored.append((name, OURS))
        elif is_pickle(root / name):
            ignored.append((name, PICKLED))
        else:
            is_sidecar = suffix.lower() in SIDECARS and stem in stems
            ignored.append((name, reason_for(name, SIDECAR if is_sidecar else NO_IMAGE)))
    return entries


def _count_metadata(path: Path, unread: Counter[str], ignored: list[tuple[str, str]]) -> None:
    """Count a file of metadata by what of it may not be used: captions, and other fields."""
    first = metadata_in(path.parent)
    if first is not None and first.name != path.name:
        ignored.append((path.name, f"beside a {first.name}, which is read instead"))
        return

    fields = fields_of(path)
    if not fields or fields & set(TEXTS):
        unread[CAPTIONS] += 1
    others = [f"{name!r:.40}" for name in sorted(fields - {"file_name", LABEL, *TEXTS})]
    if others:
        unread[f"{FIELDS}; not {some_of(others, COLUMNS)}"] += 1


def _begins_as_image(path: Path) -> bool:
    """Whether a file without an image suffix begins like an image."""
    try:
        with open_regular(path) as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith(MAGIC) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")

"""List the images of a folder or archive in a fixed order, and all else in it with the reason why
it is not used.

Four layouts: one folder per class; a flat folder (no classes); WebDataset shards (*.tar), where
KEY.cls holds the label of KEY.jpg as an integer; parquet shards (parquet.py). Shards are read in
place.
"""

import codecs
import fnmatch
import hashlib
import io
import json
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffussm_cli.data import parquet
from diffussm_cli.data.images import SUFFIXES, read_image
from diffussm_cli.data.tar import Damaged, key_of, members
from diffussm_cli.errors import DataError
from diffussm_cli.machine.files import open_regular

MAX_FILE_BYTES = 1 << 28
MAX_CLASS = 1 << 20
UNREADABLE = "cannot be read"
METADATA = "metadata.jsonl"
SHARDS = (".tar", ".parquet")
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")

# Names that say what a file or folder is, and reasons why it is not used.
CAPTIONS = "captions, which only a run with text reads"
JSON = "of a .json file, only captions are read, by a run with text"
HIDDEN = "a hidden file"
NO_IMAGE = "not an image by its name or first bytes"
TABLES = (
    "dataset.json",
    "metadata.csv",
    "metadata.parquet",
    "labels.csv",
    "labels.json",
    "labels.txt",
)
TABLE = f"labels or captions that are not read: classes are folders, captions stand in {METADATA}"
COMPRESSED = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
FOREIGN = (
    ".npz",
    ".npy",
    ".h5",
    ".hdf5",
    ".mdb",
    ".lmdb",
    ".arrow",
    ".tfrecord",
    ".tfrecords",
    ".pkl",
    ".pickle",
)
KINDS = {  # of files, by their ends
    COMPRESSED: "a compressed archive, which is not read; unpack it first",
    FOREIGN: "a format that is not read; save the images as files, or in tar or parquet shards",
}
# of parquet shards, by kind; why one may not be read
COLUMNS = {"image": "", "label": "", "text": CAPTIONS}
SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
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


class Entry(NamedTuple):
    """The location of an image in a source."""

    # path relative to the source, with forward slashes; ARCHIVE/MEMBER or ARCHIVE/ROW in a shard
    name: str
    label: int
    size: int  # in bytes; -1 if unknown; of its row group in a parquet shard
    archive: str = ""  # the shard that holds it; empty if it is a separate file
    offset: int = 0  # of the content in a tar file, in bytes; the row in a parquet shard
    column: str = ""  # of a parquet shard


def skipped_text(skipped: Iterable[tuple[int | None, str, str]]) -> str:
    """One line of JSON per image that is left out: its index (None if it was never listed), name
    and reason.
    """
    return "".join(
        json.dumps({"index": i, "file": name, "reason": why}) + "\n" for i, name, why in skipped
    )


class LeftOut(NamedTuple):
    """What is not used of the things that a user gave, for one reason."""

    number: int
    kind: str  # image, shard, file, column, line, ...
    reason: str
    example: str = ""  # the name of one of them


def left_out_line(source: str | Path, parts: Iterable[LeftOut]) -> str:
    """One line that counts what is not used of `source`, with the reasons; empty if everything is
    used.
    """
    texts = []
    for number, kind, reason, example in parts:
        things = f"{number:,} {kind}{'' if number == 1 else 's'}"
        named = f", such as {example!r:.120}" if number > 1 else f": {example!r:.120}"
        texts.append(f"{things} ({reason}{named if example else ''})")
    return f"left out of {str(source)!r}: {', '.join(texts)}" if texts else ""


@dataclass(frozen=True)
class Listing:
    """The images of a source in order, and all else that it holds."""

    root: Path
    entries: list[Entry]
    class_names: tuple[str, ...]
    ignored: list[tuple[str, str]]  # name and reason of every file that is not used
    # of parquet shards: those that the user has named
    columns: Mapping[str, str] = field(default_factory=dict)
    # what else is not used, which is counted only: there may be one for every image
    unread: tuple[LeftOut, ...] = ()

    def text(self) -> Iterator[bytes]:
        """One line of JSON per image: name, label, bytes."""
        return (json.dumps([e.name, e.label, e.size]).encode() + b"\n" for e in self.entries)

    def sha256(self) -> str:
        """Hash of `text`."""
        digest = hashlib.sha256()
        for line in self.text():
            digest.update(line)
        return digest.hexdigest()

    def left_out(self, with_text: bool = False, own: Collection[str] = ()) -> list[LeftOut]:
        """What is not used, counted by reason.

        Args:
            with_text: whether captions are read.
            own: names of files that the caller knows, and which are no part of the data.
        """
        counts: Counter[tuple[str, str]] = Counter()
        examples: dict[tuple[str, str], str] = {}
        for name, reason in self.ignored:
            if name not in own:
                group = _kind(name), reason
                counts[group] += 1
                examples.setdefault(group, name)
        files = [LeftOut(n, *group, examples[group]) for group, n in counts.items()]
        return files + [
            part for part in self.unread if not (with_text and part.reason in (CAPTIONS, JSON))
        ]


def list_source(source: Path, option: str = "SOURCE", columns: Mapping[str, str] = {}) -> Listing:
    """List a folder, one .tar or .parquet file, or a pattern of names in a folder. No image is
    decoded.

    Args:
        columns: names of columns of parquet shards, from `named_columns`; the others are found by
            their usual names.

    Raises:
        DataError: if the source is missing, unreadable, holds several splits of a data set, or no
            images.
    """
    try:
        root, names = _names_in(source)
        listing = _list_folder(root, names, columns)
    except DataError as e:
        raise DataError(f"{option}: {e}") from e

    if not listing.entries:
        looked_for = ", ".join((*SUFFIXES, *SHARDS))
        rest = left_out_line(source, listing.left_out())
        raise DataError(
            f"{option}: no images in {str(source)!r} (looked for {looked_for}){rest and '; '}{rest}"
        )

    if columns and not listing.entries[0].column:
        named = ", ".join(columns.values())
        raise DataError(
            f"{option}: the columns {named} are named, but {str(source)!r} holds no parquet shards"
        )
    return listing


def read_entry(
    root: Path, entry: Entry, size: tuple[int, int] | None, channels: int = 3
) -> np.ndarray:
    """Read an image, upright and cropped to `size` (height, width) if given: uint8 (height, width,
    channels).

    Raises:
        DataError: with a message that begins with the name of the entry.
    """
    name = Path(entry.name)
    content = read_content(root, entry)
    with warnings.catch_warnings():
        # Pillow warns about large and odd files; real problems raise errors
        warnings.simplefilter("ignore")
        return read_image(name, size, channels, io.BytesIO(content))


def read_content(root: Path, entry: Entry) -> bytes:
    """Read the bytes of an image file. Raises DataError with a message that begins with the name of
    the entry.
    """
    path, name = root / (entry.archive or entry.name), Path(entry.name)
    if entry.column:
        try:
            return parquet.read_row(path, entry.offset, entry.column)
        except DataError as e:
            raise DataError(f"{name}: {e}") from e

    try:
        with open_regular(path) as file:
            if entry.size > MAX_FILE_BYTES:
                raise DataError(
                    f"{name}: {entry.size} bytes, more than the limit of {MAX_FILE_BYTES}"
                )
            file.seek(entry.offset)
            content = file.read(entry.size)
    except OSError as e:
        raise DataError(f"{name}: cannot be read: {e.strerror}") from e

    if not content:
        raise DataError(f"{name}: the file is empty")
    return content


# -------------------------------------------------------------------------------------------- names
def _names_in(source: Path) -> tuple[Path, list[str]]:
    """The folder of a source, and the names in it that were asked for, sorted."""
    whole = os.path.isdir(source)
    root = source if whole or not source.name else source.parent
    if not whole and os.path.exists(source):
        return root, [_single_file(source)]

    # A folder, or a pattern of names in it.
    pattern = not whole and bool(re.search(r"[*?\[]", source.name))
    try:
        names = sorted(os.listdir(root if whole or pattern else source))
    except OSError as e:
        hint = (
            "; a pattern may stand in the last part of a path only"
            if re.search(r"[*?]", str(root))
            else ""
        )
        raise DataError(
            f"cannot read the folder {str(root if pattern else source)!r}: {e.strerror}{hint}"
        ) from e
    if pattern:
        names = fnmatch.filter(names, source.name)
        if not names:
            raise DataError(
                f"no images in {str(source)!r}: the pattern fits no name in {str(root)!r}"
            )
    return root, names


def _single_file(source: Path) -> str:
    """The name of a file that is a shard. Raises DataError for any other."""
    if source.suffix.lower() not in SHARDS:
        what = next(
            (why for ends, why in KINDS.items() if source.name.lower().endswith(ends)), "a file"
        )
        raise DataError(f"{str(source)!r} is {what}; give a folder, or a .tar or .parquet file")
    if not os.path.isfile(source):
        raise DataError(f"{str(source)!r} is not a regular file")
    return source.name


def _kind(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    return "image" if suffix in SUFFIXES else "shard" if suffix in SHARDS else "file"


def _reason(name: str, otherwise: str) -> str:
    """Why a file is not used: what its name says, or else the reason that its place gives."""
    leaf = name.rpartition("/")[2]
    if leaf.startswith("."):
        return HIDDEN
    if leaf.lower() in TABLES:
        return TABLE
    return next((why for ends, why in KINDS.items() if leaf.lower().endswith(ends)), otherwise)


def _split_of(shard: str) -> tuple[str, str]:
    """The split that the name of a shard tells, if any, and a pattern for the shards of this
    split.
    """
    suffix = os.path.splitext(shard)[1]
    numbered = re.match(r"(.+)-\d+-of-\d+\.parquet$", shard)
    if numbered:
        return numbered[1], f"{numbered[1]}-*.parquet"
    for word in re.finditer(r"[a-z]+", shard.removesuffix(suffix), re.IGNORECASE):
        if word[0].lower() in SPLITS:
            rest = re.match(r"[^a-zA-Z0-9]?(.*)", shard[word.end() :].removesuffix(suffix))
            begin = shard[: word.end() + (rest.start(1) if rest else 0)]
            return SPLITS[word[0].lower()], begin + (f"*{suffix}" if rest and rest[1] else suffix)
    return "", ""


def _one_split(shards: Sequence[str]) -> list[str]:
    """The shards themselves. Raises DataError if their names tell several splits of a data set."""
    found = dict(sorted(filter(lambda split: split[0], map(_split_of, shards))))
    if len(found) > 1:
        chosen = found.get("train") or next(iter(found.values()))
        raise DataError(f"the shards are of {', '.join(found)}; choose one: {chosen!r}")
    return list(shards)


def _refuse_splits(root: Path, classes: Sequence[str], entries: Sequence[Entry]) -> None:
    """Raises DataError if folders that would become classes, or parts of one, are splits of a data
    set.
    """
    # The splits below each folder that holds some.
    below: dict[str, dict[str, str]] = {}
    for folder in dict.fromkeys(e.name.rpartition("/")[0] for e in entries):
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
    where, names = root / parent, sorted(splits.values())
    others = ", and other folders in it do too" if len(several) > 1 else ""
    kind = "the splits" if len(names) > 1 else "only the split"
    raise DataError(
        f"{str(where)!r} holds {kind} {', '.join(names)} of a data set, not classes{others}; "
        f"give one: {str(where / splits.get('train', names[0]))!r}"
    )


# ------------------------------------------------------------------------------------------ folders
def _list_folder(root: Path, names: Sequence[str], columns: Mapping[str, str]) -> Listing:
    """List the files and folders with these names."""
    ignored: list[tuple[str, str]] = []
    unread: Counter[str] = Counter()
    inner = [n for n in names if not n.startswith(".") and os.path.isdir(root / n)]
    folders = [n for n in inner if not _is_passed_over(root / n, root, ignored)]
    files = [n for n in names if n not in set(inner)]
    shards = [
        n
        for n in files
        if _kind(n) == "shard" and not n.startswith(".") and n.lower() not in TABLES
    ]

    # One folder per class.
    classes = {
        name: _entries(root, _files_below(root, name, ignored), ignored, unread) for name in folders
    }
    if any(classes.values()):
        entries = _labelled(root, classes, ignored)
        for name in files:
            if name == METADATA:
                unread[CAPTIONS] += 1
            else:
                ignored.append((name, _reason(name, "not in a class folder")))
        return Listing(root, entries, tuple(classes), ignored, unread=_counted(unread))

    # No folder holds images, but perhaps one holds shards, as in a repository of the hub.
    flat = [] if shards else _entries(root, files, ignored, unread)
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
        return Listing(root, flat, (), ignored, unread=_counted(unread))
    tars = [name for name in shards if name.lower().endswith(".tar")]
    kind = "tar" if tars else "parquet"
    used = _one_split(tars or shards)
    ignored += [
        (n, _reason(n, f"a file next to {kind} shards")) for n in files if n not in set(used)
    ]
    return (
        _list_archives(root, used, ignored) if tars else _list_parquet(root, used, ignored, columns)
    )


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
    entries = [e._replace(label=i) for i, found in enumerate(classes.values()) for e in found]
    _refuse_splits(root, [name for name, found in classes.items() if found], entries)

    for name, found in classes.items():
        if not found:
            why = next((reason for n, reason in ignored if n == name), "holds no images")
            shards = [n for n, _ in ignored if n.startswith(f"{name}/") and _kind(n) == "shard"]
            hint = (
                f", but shards; give this folder, or move it away: {shards[0]!r:.80}"
                if shards
                else ""
            )
            raise DataError(f"the class folder {str(root / name)!r} {why}{hint}")
    return entries


def _shards_below(root: Path, ignored: list[tuple[str, str]]) -> list[str]:
    """Shards in one folder below the root. Raises DataError if several folders hold some."""
    shards = [n for n, reason in ignored if _kind(n) == "shard" and reason == NO_IMAGE]
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
    found: list[str] = []

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
        found += [f"{below}/{name}" for name in names]
    return sorted(found, key=lambda name: name.split("/"))


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
            found = path.stat()
        except OSError:
            found = None  # a broken link counts as an unreadable image if it has the suffix of one
        if found and not stat.S_ISREG(found.st_mode):
            ignored.append((name, "not a regular file"))
        elif path.suffix.lower() in SUFFIXES or (found and _begins_as_image(path)):
            entries.append(Entry(name, 0, found.st_size if found else -1))
        else:
            others.append(name)

    # Captions are used by runs with text.
    stems = {os.path.splitext(e.name)[0] for e in entries} if others else ()
    for name in others:
        stem, suffix = os.path.splitext(name)
        if name.rpartition("/")[2] == METADATA or (suffix == ".txt" and stem in stems):
            unread[CAPTIONS] += 1
        else:
            ignored.append((name, _reason(name, NO_IMAGE)))
    return entries


def _counted(unread: Mapping[str, int]) -> tuple[LeftOut, ...]:
    return tuple(LeftOut(count, "file", reason) for reason, count in unread.items())


def _begins_as_image(path: Path) -> bool:
    """Whether a file without an image suffix begins like an image."""
    try:
        with open_regular(path) as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith(MAGIC) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


# ----------------------------------------------------------------------------------------- archives
def _list_archives(root: Path, archives: list[str], ignored: list[tuple[str, str]]) -> Listing:
    entries: list[Entry] = []
    labels: dict[str, int] = {}
    unread: Counter[str] = Counter()
    for archive in archives:
        try:
            _list_members(root, archive, entries, labels, ignored, unread)
        except Damaged as e:
            ignored.append((archive, str(e)))

    if not labels:
        return Listing(root, entries, (), ignored, unread=_counted(unread))
    entries = [e._replace(label=labels.get(key_of(e.name), -1)) for e in entries]
    without = next((e.name for e in entries if e.label < 0), None)
    if without is not None:
        raise DataError(
            f"{without} has no .cls file, but other images have one; label all of them or none"
        )

    names = tuple(str(i) for i in range(max(labels.values()) + 1))
    return Listing(root, entries, names, ignored, unread=_counted(unread))


def _list_parquet(
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
            ignored.append((name, _reason(name, "not an image by its name")))


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

"""A store of latents as a whole: begun once, completed shard by shard, checked, and never changed.

A shard is complete once it and its record have their names. A shard that is deleted is encoded
again by the command that made the store, with the same bytes.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffussm_cli.data.latents.manifest import (
    IGNORED,
    LISTING,
    MANIFEST,
    SAME_COMMAND,
    StoreSettings,
    first_difference,
    manifest_text,
    read_settings,
)
from diffussm_cli.data.latents.shard import (
    ShardRecord,
    damage,
    is_there,
    read_record,
    record_name,
    shard_name,
)
from diffussm_cli.data.listing import Listing, skipped_text
from diffussm_cli.errors import DataError
from diffussm_cli.events import Event, Stage
from diffussm_cli.machine.files import (
    content,
    held_folder,
    open_regular,
    sha256,
    whole_file,
    write_text,
)
from diffussm_cli.machine.processes import World


@dataclass(frozen=True)
class Store:
    """The settings of a complete store, and the records of its shards."""

    root: Path
    settings: StoreSettings
    records: tuple[ShardRecord, ...]

    @property
    def skipped(self) -> int:
        """Number of images that could not be read."""
        return sum(len(record.skipped) for record in self.records)

    @property
    def statistics(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and standard deviation (C,) of the latents in model space; None if not recorded."""
        spans = (len(self.settings.span(i)) for i in range(len(self.records)))
        images = np.array([n - len(r.skipped) for n, r in zip(spans, self.records)], float)
        records = [r for r, n in zip(self.records, images) if n]
        if not records or not all(r.mean for r in records):
            return None

        # The variance of all is the mean of the shards' variances plus the variance of their means.
        weights = images[images > 0] / images.sum()
        means = np.array([r.mean for r in records])
        deviations = np.array([r.std for r in records])
        mean = weights @ means
        return mean, np.sqrt(weights @ (deviations**2 + means**2) - mean**2)


def read_store(root: Path, option: str) -> Store:
    """Read the settings and records of a complete store; `option` has given the folder.

    Raises:
        DataError: if a file is missing or damaged. The shards are not looked at.
    """
    settings = read_settings(root, option)
    try:
        records = tuple(read_record(root, settings, i) for i in range(settings.shards))
    except FileNotFoundError as e:
        raise DataError(f"{option}: {str(root)!r} is not finished; {SAME_COMMAND}") from e
    return Store(root, settings, records)


# ------------------------------------------------------------------------------------------ writing
@contextlib.contextmanager
def writing_to(root: Path) -> Iterator[None]:
    """Turn an OSError in the block into a DataError that says how to continue."""
    try:
        yield
    except OSError as e:
        raise DataError(
            f"TARGET: cannot write to {str(root)!r}: {e.strerror}; finished shards are kept, "
            f"and the same command continues from there"
        ) from e


@contextlib.contextmanager
def locked_store(root: Path, world: World) -> Iterator[None]:
    """Lock a folder for writing, with one lock per rank.

    Raises:
        DataError: if the folder cannot be written, holds other files, or another process is writing
            to it.
    """
    with contextlib.ExitStack() as stack:
        try:
            if root.exists() and content(root) and not content(root) & {MANIFEST, LISTING}:
                other = "is not empty and holds no latents; choose another folder"
                raise DataError(f"TARGET: {str(root)!r} {other}")

            stack.enter_context(held_folder(root, world.rank))
        except BlockingIOError as e:
            remedy = "wait for it, or stop it first"
            raise DataError(f"TARGET: another process is writing to {str(root)!r}; {remedy}") from e
        except OSError as e:
            raise DataError(f"TARGET: cannot write to {str(root)!r}: {e.strerror}") from e

        yield


def begin(root: Path, listing: Listing, settings: StoreSettings) -> None:
    """Start a new store, or check that an existing one was begun with the same source and settings.

    Raises:
        DataError: if it was begun with others, naming the first difference; or if the folder cannot
            be written.
    """
    exists = (root / MANIFEST).exists()
    if exists:
        check_same_request(root, listing, settings)

    # The manifest comes last: a store that has one has been begun.
    with writing_to(root):
        if not (root / LISTING).exists():
            with whole_file(root / LISTING) as file:
                file.writelines(listing.text())
        if not exists:
            ignored = [(None, name, reason) for name, reason in listing.ignored]
            write_text(root / IGNORED, skipped_text(ignored))
            write_text(root / MANIFEST, manifest_text(settings))


def check_same_request(root: Path, listing: Listing, settings: StoreSettings) -> None:
    """Raises DataError, naming the first difference, if a store was begun with another request."""
    begun = read_settings(root, "TARGET")
    if begun.source_sha256 != settings.source_sha256:
        change = _first_change(root, listing)
        raise DataError(f"TARGET: {str(root)!r} was begun with another SOURCE: {change}")
    if begun.arrays_sha256 not in ("", settings.arrays_sha256):  # earlier versions kept none
        raise DataError(
            f"TARGET: {str(root)!r} was begun with another SOURCE: the pixels in "
            f"{str(listing.root)!r} have changed; use another TARGET"
        )

    begun = dataclasses.replace(begun, arrays_sha256=settings.arrays_sha256)
    difference = first_difference(begun, settings)
    if difference:
        begun_with = f"was begun with other settings: {difference}"
        raise DataError(f"TARGET: {str(root)!r} {begun_with}; use another TARGET")


def _first_change(root: Path, listing: Listing) -> str:
    """The first line in which a listing differs from that of the store."""
    try:
        with open_regular(root / LISTING) as old:
            lines = itertools.zip_longest(old, listing.text(), fillvalue=b"nothing")

            for place, (before, after) in enumerate(lines):
                if before != after:
                    was, now = (x.decode(errors="replace").strip()[:120] for x in (before, after))
                    return f"image {place} was {was} and is now {now} (name, label, bytes)"
    except OSError as e:
        return f"its {LISTING} cannot be read: {e.strerror}"
    return f"its {LISTING} was changed"


def missing_shards(root: Path, settings: StoreSettings) -> list[int]:
    """The shards that are still to be encoded."""
    return [i for i in range(settings.shards) if not is_there(root, settings, i)]


def remove_if_unreadable(store: Store) -> None:
    """Remove a store without a readable image, and raise a DataError that names the first one."""
    if store.skipped < store.settings.images:
        return
    with writing_to(store.root):
        for name in content(store.root):
            (store.root / name).unlink()
    first = store.records[0].skipped[0]
    none = f"none of the {store.settings.images} images can be read"
    raise DataError(f"SOURCE: {none}, such as {first.file}: {first.reason}")


# ------------------------------------------------------------------------------------------- damage
def verify(root: Path) -> Iterator[tuple[str, str | None]]:
    """Check the listing and every shard; yields (file name, what is wrong with it or None).

    Raises:
        DataError: if the store is missing or not finished.
    """
    settings = read_settings(root, "--verify")
    if not all((root / record_name(i)).exists() for i in range(settings.shards)):
        raise DataError(f"--verify: {str(root)!r} is not finished; {SAME_COMMAND}")
    yield LISTING, _wrong_hash(root / LISTING, settings.source_sha256)
    for i in range(settings.shards):
        yield damage(root, settings, i) or (shard_name(i), None)


def _wrong_hash(path: Path, expected: str) -> str | None:
    try:
        return None if sha256(path) == expected else "its sha256 differs from the manifest"
    except OSError as e:
        return f"cannot be read: {e.strerror}"


def verify_store(root: Path | str) -> Generator[Event, None, int]:
    """Check the listing and every shard of a complete store.

    Yields:
        events.

    Returns:
        The number of files.

    Raises:
        DataError: naming the damaged files, and the command that encodes them again.
    """
    root = Path(root)
    yield Stage("checking")
    checked = list(verify(root))
    damaged = [f"{name} ({problem})" for name, problem in checked if problem]

    if damaged:
        some = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        command = read_settings(root, "--verify").command(root)
        raise DataError(
            f"--verify: {len(damaged)} of {len(checked)} files are damaged: {some}; "
            f"delete them, and encode them again from the same images: {command}"
        )
    return len(checked)

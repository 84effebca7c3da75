"""The images of a run: listed, compared with those it began with, and decoded once before that."""

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from diffussm_cli import runs
from diffussm_cli.config import BUILTIN, HUB, PYTHON, Config
from diffussm_cli.data.builtin import InMemory
from diffussm_cli.data.folder import ImageFolder, unreadable_images
from diffussm_cli.data.latents.manifest import MANIFEST
from diffussm_cli.data.latents.reading import LatentStore
from diffussm_cli.data.listing import Listing
from diffussm_cli.data.opening import (
    content_hashes,
    count_shared,
    doubts,
    latent_statistics,
    open_held_out,
    open_source,
    text_hash,
    vae_hash,
)
from diffussm_cli.data.source import Part, Source, undivided
from diffussm_cli.errors import ConfigError, DataError, RunError
from diffussm_cli.events import Event, Message, Stage, Warned
from diffussm_cli.machine.files import sha256
from diffussm_cli.machine.processes import World, gather
from diffussm_cli.training.measure import HELD_OUT
from diffussm_cli.training.resuming import refuse_other_data

FIRST = ("path", "images", "sha256")  # facts of the images that a run began with
NAMED = 5  # number of unreadable images that an error lists

# Index, name and reason of an image that cannot be read; no index if it was not even listed.
Skipped = tuple[int | None, str, str]


def list_images(
    root: Path | None,
    config: Config,
    dataset: Dataset | None = None,
    listing: Listing | None = None,
) -> Generator[Event, None, Source]:
    """Open the data of a run, as `open_source` does, and tell what is not used of them.

    Raises DiffussmError.
    """
    yield Stage("listing")
    try:
        source = open_data(root, config, dataset, listing)
    except ConfigError:
        refuse_other_data(root, config)
        raise

    # What is wrong with them, and what is not used of them.
    if isinstance(config.data.held_out, str) and config.data.held_out:
        # a mistake shows now, even if nothing is measured
        held_out = open_held_out(config, source)
        assert held_out is not None, "a folder or store"
        yield from _compare_held_out(held_out, source, root, config)
    if source.left_out:
        yield Message(source.left_out)
    yield from map(Warned, doubts(source, config))
    return source


def _compare_held_out(
    held_out: Source, source: Source, root: Path | None, config: Config
) -> Iterator[Event]:
    """Raises ConfigError if held-out images are trained on; a run that did so from its beginning
    cannot change it any more, and is warned.
    """
    shared = count_shared(held_out, source)
    if not shared:
        return
    d = config.data
    line = (
        f"data.held_out: {shared:,} of {len(held_out):,} images in {d.held_out!r} are also in "
        f"data.path {d.path!r}"
    )
    if root is None or not runs.list_checkpoints(root):
        raise ConfigError(f"{line}; name a folder of other images, or a share such as 0.05")
    yield Warned(f"{line}, so the held-out loss of this run is not of unseen images")


def open_data(
    root: Path | None,
    config: Config,
    dataset: Dataset | None = None,
    listing: Listing | None = None,
) -> Source:
    """As `open_source`.

    Raises DataError, which also says where the images of this run were before.
    """
    try:
        return open_source(config, dataset, listing)
    except DataError as e:
        before = None if root is None else runs.read_data(root)
        if before is None or before["path"] == data_place(config):
            raise
        raise DataError(
            f"{e}; the run has read {before['path']!r}: give it as --data, or where it is now"
        ) from e


def data_place(config: Config) -> str:
    """`data.path` as an absolute path; names of sets and objects as they are."""
    path = config.data.path
    if not path or path.startswith((BUILTIN, HUB, PYTHON)):
        return path
    return os.path.abspath(path)


def completed(config: Config, source: Source) -> Config:
    """The configuration with what is found in the data.

    Raises ConfigError if it cannot be saved.
    """
    data = dataclasses.replace(
        config.data,
        class_names=source.class_names,
        text_sha256=text_hash(config, source),
        vae_sha256=vae_hash(source),
        **latent_statistics(source),
    )
    config = dataclasses.replace(config, data=data)
    runs.check_config(config)
    return config


def compare_data(
    source: Source, config: Config, root: Path, before: Mapping[str, Any] | None
) -> Generator[Event, None, dict[str, Any]]:
    """The facts of the images for RUN/data.json.

    `before` is what the file says when a run continues; `first` keeps what the run began with. The
    facts are `checked` if all images were decoded before, and are still the same.
    """
    # The images as they are now.
    images = undivided(source)
    identity = ""
    if isinstance(images, ImageFolder):
        identity = images.listing.sha256()
    elif isinstance(images, LatentStore):
        identity = sha256(images.root / MANIFEST)
    elif isinstance(images, InMemory):
        identity = images.sha256()
    facts = {"path": data_place(config), "images": len(images), "sha256": identity, "checked": True}
    content = content_hashes(config, source)
    facts["content"] = content
    if before is None:
        return facts | {"first": {name: facts[name] for name in FIRST}}

    # Those of the last session, which may not be those of the beginning.
    first = before.get("first") or {name: before[name] for name in FIRST}
    # Earlier versions did not hash built-in sets, and nobody can hash a Dataset.
    is_same = before["sha256"] in ("", identity) and before["images"] == len(images)
    if not is_same:
        began = "began with" if before["sha256"] == first["sha256"] else "was trained on last"
        number = f"{before['images']:,} then, {len(images):,} now"
        if before["images"] == len(images):
            number = f"{len(images):,} as before, with other names, labels or sizes"
        yield Warned(
            f"data.path: the images in {config.data.path!r} are not those that {root} {began} "
            f"({number}); from here on they come in another order{_other_share(source)}"
        )
        return facts | {"checked": False, "first": first}

    # What a list does not show, and earlier versions did not record.
    recorded = before.get("content")
    recorded = recorded if isinstance(recorded, dict) else {}
    changed = [name for name, value in content.items() if recorded.get(name, value) != value]
    for name in changed:
        yield Warned(
            f"data.path: the {name} in {config.data.path!r} are not those that {root} was trained "
            f"on last{'' if name == 'captions' else _other_share(source)}"
        )
    is_same = not set(changed) - {"captions"}
    return facts | {"checked": before["checked"] and is_same, "first": first}


def _other_share(source: Source) -> str:
    """What follows for held-out images if a source is another one than before; empty if no share of
    it is held out.
    """
    if not isinstance(source, Part):
        return ""
    return (
        f", and data.held_out={source.share:g} may now hold out images that it was trained on, "
        "so the held-out loss is not of unseen images any more"
    )


def leave_out_unreadable(
    source: Source, config: Config, root: Path, world: World, fresh: bool
) -> Generator[Event, None, list[Skipped] | None]:
    """Decode every image before a run begins, so that no bad one ends it after days.

    On resume, use the run's record, unless the images have changed or one of them has ended the
    run.

    Returns:
        index, name and reason of each image that is left out, for the record of the run; None if
        its record stays as it is.

    Raises:
        DataError: naming the images that cannot be read, unless data.skip_unreadable is set.
    """
    images = undivided(source)
    if not isinstance(images, ImageFolder):
        return None
    if world.size > 1 and len(set(gather(images.listing.sha256(), world))) > 1:
        raise DataError(f"data.path: not all processes see the same files in {config.data.path!r}")

    skips = config.data.skip_unreadable
    was_not_set = skips and not (root / runs.SKIPPED).exists()  # when the run began

    # Decode them all, or read what the run has recorded.
    news = None
    if fresh or gather(was_not_set, world)[0]:
        skipped = yield from unreadable_images(images, world)
        if skipped and not skips:
            some = reasons_in_words([(name, reason) for _, name, reason in skipped[:NAMED]])
            more = "; ..." if len(skipped) > NAMED else ""
            raise DataError(
                f"data.path: {len(skipped)} of {len(images)} images in {config.data.path!r} cannot "
                f"be read: {some}{more}; skip them: --set data.skip_unreadable=true"
            )

        # A run that continues may hold out a share of fewer images than before.
        share = _other_share(source)
        before = _skipped_before(root) if share else None
        if before is not None and before != {name for i, name, _ in skipped if i is not None}:
            yield Warned(f"data.skip_unreadable: other images are left out than before{share}")
        news = skipped if skips else None
    elif skips:
        skipped = gather(runs.read_skipped(root) if world.rank == 0 else None, world)[0]
    else:
        return None

    images.leave_out({i: name for i, name, _ in skipped if i is not None})
    return news


def _skipped_before(root: Path) -> set[str] | None:
    """The names of the images that a run has left out so far; None if it has no checkpoint, or they
    are not known.
    """
    if not runs.list_checkpoints(root):
        return None
    if not (root / runs.SKIPPED).exists():
        return set()
    with contextlib.suppress(RunError):
        return {name for i, name, _ in runs.read_skipped(root) if i is not None}
    return None


def reasons_in_words(reasons: Sequence[tuple[str, str]]) -> str:
    """Names with their reasons, in one line; a remedy that all of them share stands once."""
    remedies = {reason.partition("; ")[2] for _, reason in reasons}
    if len(remedies) > 1 or remedies == {""}:
        return "; ".join(f"{name}: {reason}" for name, reason in reasons)
    without = (f"{name}: {reason.partition('; ')[0]}" for name, reason in reasons)
    return "; ".join([*without, *remedies])


@contextlib.contextmanager
def remedies(source: Source, root: Path, facts: Mapping[str, Any], world: World) -> Iterator[None]:
    """Name the remedies if an image cannot be read any more; a resume will check all images."""
    try:
        yield
    except DataError as e:
        if not isinstance(undivided(source), ImageFolder) or str(e).startswith(HELD_OUT):
            raise

        if world.rank == 0:
            with contextlib.suppress(OSError):
                runs.write_data(root, {**facts, "checked": False})

        command = f"diffussm train --resume --out {shlex.quote(str(root))}"
        raise DataError(
            f"data.path: {e}; restore the image, or skip what cannot be read with --set "
            f"data.skip_unreadable=true; then continue with: {command}"
        ) from e

"""Turn a store of format 1, which earlier versions wrote, into one of this version, in place.

Format 1 kept the hash of every shard and the number of images skipped in it in manifest.json, and
all skipped images in skipped.jsonl. Only an unfinished store had records beside its shards, as all
stores have now. The shards are the same, and are neither read nor changed.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from diffussm_cli.data.latents.manifest import (
    EARLIER_FORMAT,
    IGNORED,
    MANIFEST,
    MAX_JSON_BYTES,
    StoreSettings,
    manifest_text,
    read_manifest,
)
from diffussm_cli.data.latents.shard import ShardRecord, parse_record, record_name, write_record
from diffussm_cli.data.latents.store import locked_store, writing_to
from diffussm_cli.data.listing import skipped_text
from diffussm_cli.errors import DataError
from diffussm_cli.events import Event, Message
from diffussm_cli.machine.files import read_regular, write_text
from diffussm_cli.machine.processes import ALONE

SKIPPED = "skipped.jsonl"


def convert_store(root: Path | str) -> Generator[Event, None, None]:
    """Convert a store of an earlier version; one of this version stays as it is.

    Yields:
        events.

    Raises:
        DataError: if the store is missing or damaged, cannot be written, or another process
            is writing to it.
    """
    root = Path(root)
    read_manifest(root, "TARGET")
    with locked_store(root, ALONE):
        converted = yield from convert_if_earlier(root)
    if not converted:
        yield Message(f"{root} needs no conversion")


def convert_if_earlier(root: Path) -> Generator[Event, None, bool]:
    """Convert a store that this process has locked, if it is of an earlier version.

    The manifest comes last, so that a conversion that was interrupted is done again.

    Returns:
        Whether it was of an earlier version.
    """
    if not (root / MANIFEST).exists():
        return False
    values = read_manifest(root, "TARGET")
    if values["format"] != EARLIER_FORMAT:
        return False
    settings: StoreSettings = values["settings"]
    skipped = _read_skipped(root, values)
    records = _records(root, values, skipped)

    with writing_to(root):
        for shard, record in records.items():
            if not (root / record_name(shard)).exists():
                write_record(root, shard, record)
        if not (root / IGNORED).exists():
            ignored = [(None, line["file"], line["reason"]) for line in skipped[None]]
            write_text(root / IGNORED, skipped_text(ignored))
        (root / SKIPPED).unlink(missing_ok=True)
        write_text(root / MANIFEST, manifest_text(settings))

    yield Message(f"{root} is converted from an earlier version; its shards are unchanged")
    lost = len(values["shards"]) - len(records)
    if lost:
        why = f"{SKIPPED} is damaged, and {lost} shards have skipped images"
        yield Message(f"{why}; encode them again by: {settings.command(root)}")
    return True


def _read_skipped(root: Path, values: Mapping[str, Any]) -> dict[int | None, list[dict[str, Any]]]:
    """The lines of skipped.jsonl by shard, under None those of files that are not images.

    There are no lines if the file does not match its hash in the manifest.
    """
    lines: dict[int | None, list[dict[str, Any]]] = defaultdict(list)
    try:
        text = read_regular(root / SKIPPED, MAX_JSON_BYTES)
        if hashlib.sha256(text).hexdigest() != values["skipped_sha256"]:
            return lines

        for line in map(json.loads, text.splitlines()):
            index = line["index"]
            shard = None if index is None else index // values["settings"].shard_size
            lines[shard].append({name: line[name] for name in ("index", "file", "reason")})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        lines.clear()
    return lines


def _records(
    root: Path, values: Mapping[str, Any], skipped: Mapping[int | None, list[dict[str, Any]]]
) -> dict[int, ShardRecord]:
    """The records of the shards in a manifest, except those whose skipped images are not known.

    Raises:
        DataError: if the manifest is damaged.
    """
    settings = values["settings"]
    try:
        if len(values["shards"]) not in (0, settings.shards):
            raise ValueError
        return {
            i: parse_record({**shard, "skipped": skipped[i]}, settings, i)
            for i, shard in enumerate(values["shards"])
            if shard["skipped"] == len(skipped[i])
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise DataError(f"TARGET: {root / MANIFEST} is damaged") from e

"""Find damage in a store, and encode the damaged shards again."""

import json
import shlex
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from diffussm_cli.config import named_columns
from diffussm_cli.data.latents import encoding
from diffussm_cli.data.latents.manifest import LISTING, SKIPPED, ShardRecord, StoreSettings, read_manifest, shard_name
from diffussm_cli.data.latents.shard import first_not_finite, map_shard
from diffussm_cli.data.listing import list_source
from diffussm_cli.data.vae import read_facts
from diffussm_cli.errors import DataError
from diffussm_cli.events import Event, Message, Stage
from diffussm_cli.machine.files import sha256, whole_file
from diffussm_cli.machine.processes import ALONE


def verify(store: Path) -> Iterator[tuple[str, str | None]]:
    """Check every file of a finished store; yields (file name, what is wrong with it or None).

    Raises:
        DataError: if the store is missing or not finished.
    """
    manifest = read_manifest(store, "--verify")
    if not manifest.complete:
        raise DataError(f"--verify: {str(store)!r} is not finished; run the same diffussm encode command again")
    yield LISTING, _wrong_hash(store / LISTING, manifest.settings.source_sha256)
    yield SKIPPED, _wrong_hash(store / SKIPPED, manifest.skipped_sha256)
    for i, record in enumerate(manifest.shards):
        yield shard_name(i), _wrong_shard(store, manifest.settings, i, record)


def _wrong_hash(path: Path, expected: str) -> str | None:
    try:
        return None if sha256(path) == expected else "its sha256 differs from the manifest"
    except OSError as e:
        return f"cannot be read: {e.strerror}"


def _wrong_shard(store: Path, settings: StoreSettings, shard: int, record: ShardRecord) -> str | None:
    wrong = _wrong_hash(store / shard_name(shard), record.sha256)
    if wrong is None:
        try:
            row = first_not_finite(map_shard(store, settings, shard))
            return None if row is None else f"row {row} holds numbers that are not finite"
        except DataError as e:
            return str(e)
    return wrong


def damaged_shards(store: Path) -> list[int]:
    """Shards to encode again. If skipped.jsonl is damaged, they include all shards with skipped images."""
    manifest = read_manifest(store, "--repair")
    wrong = {name for name, problem in verify(store) if problem}
    unlisted = [SKIPPED in wrong and record.skipped > 0 for record in manifest.shards]
    return [i for i, lost in enumerate(unlisted) if lost or shard_name(i) in wrong]


def repair_store(
    store: Path | str,
    source: Path | str,
    vae: str | None = None,
    *,
    workers: int | None = None,
    device: str = "auto",
) -> Generator[Event, None, list[int]]:
    """Encode the damaged shards of a finished store again, in place.

    Args:
        source: the images that the store was made from.
        vae: another name or folder of the same VAE.

    Yields:
        events.

    Returns:
        The indices of the shards.

    Raises:
        DiffussmError: if the source or the VAE is not that of the store.
    """
    store, source = Path(store), Path(source)
    old = read_manifest(store, "--repair").settings
    yield Stage("checking")
    shards = damaged_shards(store)
    yield Stage("listing")
    listing = list_source(source, columns=named_columns(old.columns, "--repair"))
    with encoding.open_store(store, source, ALONE):
        yield Stage("loading the VAE")
        loaded = encoding.load_vae_on(read_facts(vae or old.vae), old.precision, device)
        same = ("precision", "flip", "batch_size", "shard_size", "vae", "columns")
        kept = {name: getattr(old, name) for name in same}
        captions = encoding.open_captions(listing, old.text, old.text_tokens)
        kept |= captions.settings if captions else {}
        encoding.check_same_request(store, old, encoding.make_settings(listing, old.resolution, loaded, kept), listing)
        encoder = encoding.Encoder(listing, old, store, loaded, encoding.decoding_processes(workers), captions=captions)
        yield from repair(encoder, shards)
    yield Message(f"{len(shards)} shards of {store} encoded again")
    return list(shards)


def verify_store(store: Path | str) -> Generator[Event, None, int]:
    """Check every file of a finished store against its hash.

    Yields:
        events.

    Returns:
        The number of files.

    Raises:
        DataError: naming the damaged files.
    """
    yield Stage("checking")
    checked = list(verify(Path(store)))
    damaged = [f"{name} ({problem})" for name, problem in checked if problem]
    if damaged:
        some = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        remedy = f"diffussm encode --repair SOURCE {shlex.quote(str(store))}"
        raise DataError(f"--verify: {len(damaged)} of {len(checked)} files are damaged: {some}; repair with: {remedy}")
    return len(checked)


def repair(encoder: encoding.Encoder, shards: Sequence[int]) -> Iterator[Event]:
    """Encode damaged shards of a finished store again, in place. Raises DataError.

    On the machine that wrote the shards, their bytes are restored; if rounding differs, the manifest gets new hashes.
    """
    store, settings = encoder.store, encoder.settings
    manifest = read_manifest(store, "--repair")
    records = [{"sha256": s.sha256, "skipped": [], "mean": s.mean, "std": s.std} for s in manifest.shards]
    if any(s.skipped for i, s in enumerate(manifest.shards) if i not in shards):
        _read_skipped(store, settings.shard_size, records)
    yield from encoder.write(shards)
    for i in shards:
        records[i] = encoding.read_record(store, i)
    with whole_file(store / LISTING) as file:
        file.writelines(encoder.listing.text())
    encoding.write_manifest(store, settings, records, encoder.listing.ignored)


def _read_skipped(store: Path, shard_size: int, records: list[dict]) -> None:
    """Add the lines of skipped.jsonl to the records of their shards. Raises DataError."""
    try:
        for line in (store / SKIPPED).read_text(encoding="utf-8").splitlines():
            skipped = json.loads(line)
            if skipped["index"] is not None:
                records[skipped["index"] // shard_size]["skipped"].append(skipped)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as e:
        raise DataError(f"{store / SKIPPED}: damaged; delete it and repair again") from e

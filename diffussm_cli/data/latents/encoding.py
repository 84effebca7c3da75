"""Encode images into a store of latents, shard by shard, by one or more processes. Interruptions change no bytes.

A shard is complete once it has its final name. Its hash and its skipped images stay in shard-NNNNN.json until all
shards exist and the manifest includes them. The batches of a shard do not depend on the process that encodes it.

B batch   C channels   H x W grid
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffussm_cli.config import DEFAULT_VAE, ModelConfig, named_columns
from diffussm_cli.data.captions import read_captions
from diffussm_cli.data.images import to_model_space
from diffussm_cli.data.latents.manifest import (
    LISTING,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SKIPPED,
    Manifest,
    StoreSettings,
    first_difference,
    manifest_text,
    read_manifest,
    read_shard,
    shard_name,
)
from diffussm_cli.data.latents.shard import empty_shard, header, shard_bytes, statistics
from diffussm_cli.data.listing import Entry, LeftOut, Listing, left_out_line, list_source, read_entry, skipped_text
from diffussm_cli.data.text import Texts, check_complete, open_encoder
from diffussm_cli.data.vae import VAE, VAEFacts, load_vae, read_facts
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.events import Event, Message, Progress, Stage
from diffussm_cli.machine.device import helpers, is_out_of_memory, keep_freed_memory, pick_device, pick_dtype
from diffussm_cli.machine.files import (
    PARTIAL,
    content,
    held_folder,
    open_regular,
    read_regular,
    sha256,
    whole_file,
    write_text,
)
from diffussm_cli.machine.processes import ALONE, World, own_cores, read_world

POLL_SECONDS = 0.2
LASTING = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
MAX_CAPTIONS = 5  # stored per image


@dataclass(frozen=True)
class Encoder:
    """Encodes the images of a source into shards."""

    listing: Listing
    settings: StoreSettings
    store: Path
    vae: VAE
    workers: int
    strict: bool = False
    captions: "StoredCaptions | None" = None

    def write(self, shards: Sequence[int]) -> Iterator[Progress]:
        """Encode and write shards in order. Raises DataError; finished shards are kept."""
        total, done, missed = sum(len(self.settings.span(i)) for i in shards), 0, 0
        yield Progress(0, total)
        batches = iter(_loader(self, shards))
        with helpers() as writer:  # one shard is written while the next one is encoded
            written: Future | None = None
            for shard in shards:
                arrays, skipped = empty_shard(self.settings, shard), []
                for span in _batch_spans(self.settings, shard):
                    found = self._encode(span, arrays, *_next(batches))
                    skipped += found
                    done, missed = done + len(span), missed + len(found)
                    yield Progress(done, total, news=f"{missed} skipped")
                if written:
                    written.result()
                written = writer.submit(write_shard, self.store, self.settings, shard, arrays, skipped)
            if written:
                written.result()

    def _encode(self, span: range, arrays: dict, pixels: np.ndarray, reasons: dict[int, str], gone: str) -> list[dict]:
        """Encode one batch into its rows of a shard; returns the skipped images. Raises DataError."""
        if gone:
            remedy = "restore it; finished shards are kept, and the same command continues from there"
            raise DataError(f"SOURCE: {str(self.listing.root)!r} changes while it is encoded: {gone}; {remedy}")
        first = span.start % self.settings.shard_size
        rows = slice(first, first + len(span))
        on_device = torch.from_numpy(pixels).to(self.vae.device).permute(0, 3, 1, 2)
        images = to_model_space(on_device)
        moments = {"": self._moments(images)}
        if self.settings.flip:
            moments["_mirrored"] = self._moments(images.flip(-1))
        for suffix, pair in moments.items():
            half = [m.to(torch.float16) for m in pair]
            finite = torch.stack([_all_finite(m) for m in half]).all(0).cpu().numpy()
            reasons |= {i: "its latents are not finite in float16" for i, f in zip(span, finite) if not f}
            for name, values in zip(("mean", "std"), half):
                arrays[name + suffix][rows] = values.cpu().numpy()
        readable = np.array([i not in reasons for i in span])
        for name in arrays:
            if name.startswith(("mean", "std")):
                arrays[name][rows][~readable] = 0
        arrays["readable"][rows], arrays["index"][rows] = readable, span
        arrays["label"][rows] = [self.listing.entries[i].label for i in span]
        if self.captions is not None:
            arrays["captions"][rows], arrays["text"][rows] = self.captions.vectors(span, self.settings.captions)
        skipped = [{"index": i, "file": self.listing.entries[i].name, "reason": reasons[i]} for i in sorted(reasons)]
        if skipped and self.strict:
            raise DataError(f"--strict: {skipped[0]['file']}: {skipped[0]['reason']}")
        return skipped

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self.vae.encode(images)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            size = self.settings.batch_size
            raise DataError(f"--batch-size: {size} does not fit into the memory of {self.vae.device}; reduce it") from e


@dataclass(frozen=True)
class StoredCaptions:
    """The captions of every image of a source, at most MAX_CAPTIONS each, and their encoder."""

    texts: Texts
    captions: list[tuple[str, ...]]

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of StoreSettings."""
        encoder = self.texts.encoder
        return {
            "text": encoder.name,
            "text_sha256": encoder.sha256,
            "text_width": encoder.width,
            "text_tokens": self.texts.tokens,
            "captions": max(map(len, self.captions)),
            "captions_sha256": hashlib.sha256(json.dumps(self.captions).encode()).hexdigest(),
        }

    def vectors(self, span: range, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The number of captions of some images, (B,), and their vectors, zeros behind them: (B, most, 1 + K, E)."""
        own = [self.captions[i] for i in span]
        parts = self.texts.embed([caption for part in own for caption in part]).split([len(part) for part in own])
        vectors = np.zeros((len(own), most, *parts[0].shape[1:]), np.float16)
        for row, part in zip(vectors, parts):
            row[: len(part)] = part.numpy()
        return np.array([len(part) for part in own]), vectors


def open_captions(
    listing: Listing, name: str | None, tokens: int, unused: list[LeftOut] | None = None
) -> StoredCaptions | None:
    """The captions of a source for the text encoder `name`; None without one. `unused` gets what of them is not used.

    Raises:
        DataError: for missing captions.
    """
    if name is None:
        return None
    known = read_captions(listing, left_out=unused)
    surplus = sum(max(0, len(texts) - MAX_CAPTIONS) for texts in known.values())
    if unused is not None and surplus:
        unused.append(LeftOut(surplus, "caption", f"after the first {MAX_CAPTIONS} of an image"))
    captions = [known.get(e.name, ())[:MAX_CAPTIONS] for e in listing.entries]
    check_complete(captions, lambda i: listing.entries[i].name, f"--text: {str(listing.root)!r}")
    encoder = open_encoder(name)
    return StoredCaptions(Texts(encoder, ModelConfig(text_width=encoder.width, text_tokens=tokens)), captions)


def _all_finite(moments: Tensor) -> Tensor:
    """Whether all values of an image are finite: (B, ...) to (B,)."""
    return moments.isfinite().flatten(1).all(1)


# ------------------------------------------------------------------------------------------------ decoding
class _Batches(Dataset):
    """Batches of decoded pixels (B, height, width, 3), and why images could not be read, by place in the source.

    A third value says that the source is gone, and why; then the images of the batch say nothing.
    """

    def __init__(self, listing: Listing, resolution: tuple[int, int], spans: list[range]):
        self.root, self.resolution, self.spans = Path(os.path.abspath(listing.root)), resolution, spans
        self.entries = [[listing.entries[i] for i in span] for span in spans]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, k: int) -> tuple[np.ndarray, dict[int, str], str]:
        span, entries, reasons = self.spans[k], self.entries[k], {}
        pixels = np.zeros((len(span), *self.resolution, 3), np.uint8)
        for row, (place, entry) in enumerate(zip(span, entries)):
            try:
                pixels[row] = read_entry(self.root, entry, self.resolution)
            except DataError as e:
                why = str(e).removeprefix(f"{Path(entry.name)}: ")
                if _is_gone(entry, e):
                    return pixels, {}, f"{entry.name}: {why}"
                reasons[place] = why
        return pixels, reasons, ""


def _is_gone(entry: Entry, error: BaseException) -> bool:
    """Whether an image was there when it was listed, and its file can no longer be read at all.

    A lack of permission is a lasting fault of the image. Any other error of the system may pass: a folder is
    renamed, or a disk loses its connection.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return entry.size >= 0 and cause is not None and cause.errno not in (None, *LASTING)


def _loader(encoder: Encoder, shards: Sequence[int]) -> DataLoader:
    """Batches in order, decoded by spawned processes, which share no threads or devices with this one."""
    spans = [span for shard in shards for span in _batch_spans(encoder.settings, shard)]
    batches = _Batches(encoder.listing, encoder.settings.resolution, spans)
    workers = min(encoder.workers, len(spans))
    context = "spawn" if workers else None
    return DataLoader(
        batches, batch_size=None, num_workers=workers, collate_fn=_as_it_is, multiprocessing_context=context
    )


def _as_it_is(batch: Any) -> Any:
    """Do not convert arrays to tensors: arrays go through pipes, and containers often have little shared memory."""
    return batch


def _next(batches: Iterator) -> Any:
    try:
        return next(batches)
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        raise DataError("--workers: a process that decodes images was killed, perhaps out of memory; use fewer") from e


def _batch_spans(settings: StoreSettings, shard: int) -> list[range]:
    span = settings.span(shard)
    return [span[i : i + settings.batch_size] for i in range(0, len(span), settings.batch_size)]


# ------------------------------------------------------------------------------------------------- writing
def write_shard(store: Path, settings: StoreSettings, shard: int, arrays: dict, skipped: list[dict]) -> None:
    """Write one shard and its record; the record first, so that no shard lacks one. Raises DataError."""
    path = store / shard_name(shard)
    try:
        with whole_file(path) as file:
            file.write(header(settings, shard))
            for array in arrays.values():
                file.write(memoryview(array).cast("B"))
            file.flush()
            record = {"sha256": sha256(Path(file.name)), "skipped": skipped, **statistics(settings, arrays)}
            write_text(_record_path(store, shard), json.dumps(record))
    except OSError as e:
        raise _unwritable(store, e) from e


def _record_path(store: Path, shard: int) -> Path:
    return store / f"shard-{shard:05d}.json"


def _unwritable(store: Path, e: OSError) -> DataError:
    return DataError(
        f"TARGET: cannot write to {str(store)!r}: {e.strerror}; finished shards are kept, "
        f"and the same command continues from there"
    )


def unfinished(store: Path, settings: StoreSettings, world: World) -> list[int]:
    """The shards of this process that are still missing."""
    mine = range(world.rank, settings.shards, world.size)
    missing = [i for i in mine if not ((store / shard_name(i)).exists() and _record_path(store, i).exists())]
    return [] if missing and read_manifest(store, "TARGET").complete else missing  # the manifest includes the records


def lost_shards(store: Path, manifest: Manifest) -> list[int] | None:
    """The shards of a finished store that are missing or have another size; None for an unfinished one."""
    if not manifest.complete:
        return None
    return [i for i in range(manifest.settings.shards) if not _has_size(store, manifest.settings, i)]


def _has_size(store: Path, settings: StoreSettings, shard: int) -> bool:
    path = store / shard_name(shard)
    return path.is_file() and path.stat().st_size == shard_bytes(settings, shard)


def begin(store: Path, listing: Listing, settings: StoreSettings, world: World) -> Manifest:
    """Open an existing store or start a new one; only rank 0 starts one, and the other ranks wait for it.

    Raises:
        DataError: if the store was begun with other settings, naming the first difference.
    """
    while world.rank and not (store / MANIFEST).exists():
        time.sleep(POLL_SECONDS)
    if (store / MANIFEST).exists():
        manifest = read_manifest(store, "TARGET")
        check_same_request(store, manifest.settings, settings, listing)
        return manifest
    manifest = Manifest(settings)
    try:
        with whole_file(store / LISTING) as file:
            file.writelines(listing.text())
        write_text(store / MANIFEST, manifest_text(manifest))
    except OSError as e:
        raise _unwritable(store, e) from e
    return manifest


def check_same_request(store: Path, old: StoreSettings, new: StoreSettings, listing: Listing) -> None:
    """Raises DataError if settings or source differ, naming the first difference."""
    if old.source_sha256 != new.source_sha256:
        raise DataError(f"TARGET: {str(store)!r} was begun with another SOURCE: {_first_change(store, listing)}")
    difference = first_difference(old, new)
    if difference:
        raise DataError(f"TARGET: {str(store)!r} was begun with other settings: {difference}; use another TARGET")


def _first_change(store: Path, listing: Listing) -> str:
    """The first line in which a listing differs from that of the store."""
    try:
        with open_regular(store / LISTING) as old:
            for place, lines in enumerate(itertools.zip_longest(old, listing.text(), fillvalue=b"nothing")):
                if lines[0] != lines[1]:
                    was, now = (line.decode(errors="replace").strip()[:120] for line in lines)
                    return f"image {place} was {was} and is now {now} (name, label, bytes)"
    except OSError as e:
        return f"its {LISTING} cannot be read: {e.strerror}"
    return f"its {LISTING} was changed"


def finish(store: Path, settings: StoreSettings, ignored: list[tuple[str, str]]) -> Manifest:
    """Write skipped.jsonl and the manifest, and remove the records, once all shards exist.

    Raises:
        DataError: if a file cannot be read or written, or if no image could be read; the store is then removed.
    """
    records = [read_record(store, shard) for shard in range(settings.shards)]
    skipped = [s for record in records for s in record["skipped"]]
    if len(skipped) == settings.images:
        for name in content(store):
            (store / name).unlink()
        first = f"{skipped[0]['file']}: {skipped[0]['reason']}"
        raise DataError(f"SOURCE: none of the {settings.images} images can be read, such as {first}")
    return write_manifest(store, settings, records, ignored)


def write_manifest(store: Path, settings: StoreSettings, records: list[dict], ignored: list) -> Manifest:
    """Write skipped.jsonl and manifest.json from the records of all shards. Raises DataError."""
    skipped = [(s["index"], s["file"], s["reason"]) for record in records for s in record["skipped"]]
    try:
        write_text(store / SKIPPED, skipped_text(skipped + [(None, name, reason) for name, reason in ignored]))
        shards = tuple(read_shard(r | {"skipped": len(r["skipped"])}) for r in records)
        manifest = Manifest(settings, shards, sha256(store / SKIPPED))
        write_text(store / MANIFEST, manifest_text(manifest))
        _tidy(store)
    except OSError as e:
        raise _unwritable(store, e) from e
    return manifest


def _tidy(store: Path) -> None:
    """Remove the records, which the manifest now includes, and partial files of killed processes."""
    for path in [*store.glob("shard-*.json"), *store.glob(f"{PARTIAL}*")]:
        path.unlink(missing_ok=True)


def read_record(store: Path, shard: int) -> dict:
    path = _record_path(store, shard)
    try:
        record = json.loads(read_regular(path, MAX_MANIFEST_BYTES))
        assert isinstance(record["sha256"], str)
        assert isinstance(record["skipped"], list)
        read_shard(record | {"skipped": 0})
        return record
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as e:
        raise DataError(f"{path}: damaged; delete {shard_name(shard)} and run the same command again") from e


# ------------------------------------------------------------------------------------------------ a whole store
def encode_images(
    source: Path | str,
    target: Path | str,
    resolution: tuple[int, int] = (256, 256),
    vae: str = DEFAULT_VAE,
    *,
    columns: Sequence[str] = (),
    text: str | None = None,
    text_tokens: int = 0,
    precision: str = "fp32",
    flip: bool = True,
    batch_size: int = 64,
    shard_size: int = 4096,
    workers: int | None = None,
    strict: bool = False,
    device: str = "auto",
) -> Generator[Event, None, Manifest | None]:
    """Encode a source into a store. The same call resumes after an interruption; torchrun's processes share the shards.

    Args:
        source: one folder per class, a flat folder, tar shards, or parquet shards (also a pattern of them).
        resolution: (height, width) in pixels; images are cropped as ADM does.
        vae: a hub name or a folder.
        columns: of parquet shards, such as `image=photo`; those not given are found by their usual names.
        flip: also encode the horizontal flip of every image.
        workers: number of processes that decode images; by default one per core of this process, at most 16.
        strict: raise an error for the first unusable file, instead of skipping it.

    Yields:
        events.

    Returns:
        The manifest; None on processes other than the first.

    Raises:
        DiffussmError: for anything that a user can fix; before the VAE is loaded where possible.
    """
    from diffussm_cli.data.latents.repair import repair  # it imports this module

    source, target, world = Path(source), Path(target), read_world()
    yield Stage("listing")
    listing = list_source(source, columns=named_columns(columns, "--columns"))
    if strict and listing.ignored:
        raise DataError(f"--strict: {listing.ignored[0][0]}: {listing.ignored[0][1]}")
    with open_store(target, source, world):
        yield Stage("loading the VAE")
        facts = read_facts(vae)
        check_resolution(resolution, facts)
        loaded = load_vae_on(facts, precision, device)
        unused: list[LeftOut] = []
        captions = open_captions(listing, text, text_tokens, unused)
        options = {"precision": precision, "flip": flip, "batch_size": batch_size, "shard_size": shard_size}
        options["columns"] = tuple(columns)
        settings = make_settings(listing, resolution, loaded, options | (captions.settings if captions else {}))
        encoder = Encoder(listing, settings, target, loaded, decoding_processes(workers), strict, captions)
        missing = lost_shards(target, begin(target, listing, settings, world))
        if missing is None:
            yield from encode(encoder, world)
        elif missing and world.rank == 0:
            yield Message(f"{len(missing)} shards of {target} are missing or cut off, and encoded again")
            yield from repair(encoder, missing)
        elif not missing:
            yield Message(f"{target} is complete already")
    if world.rank:
        return None
    manifest = read_manifest(target, "TARGET")
    unused = [*listing.left_out(with_text=captions is not None), *unused]
    yield from _summary(target, manifest, source, unused)
    return manifest


def encode(encoder: Encoder, world: World) -> Iterator[Event]:
    """Write the missing shards of this process; rank 0 then waits for the others and writes the manifest.

    Raises:
        DataError: if the store cannot be written, or for the first skipped image if `strict`.
    """
    store, settings = encoder.store, encoder.settings
    yield from encoder.write(unfinished(store, settings, world))
    if world.rank == 0:
        while unfinished(store, settings, ALONE):
            yield Stage("waiting for the other processes")  # the caller may stop here
            time.sleep(POLL_SECONDS)
        finish(store, settings, encoder.listing.ignored)


def _summary(store: Path, manifest: Manifest, source: Path, unused: Sequence[LeftOut]) -> Iterator[Event]:
    """Report what is in the store, and in one line what is not."""
    skipped = sum(s.skipped for s in manifest.shards)
    settings = manifest.settings
    classes = f" of {len(settings.class_names)} classes" if settings.class_names else ""
    yield Message(f"{settings.images - skipped} images{classes} in {store}")
    unread = [LeftOut(skipped, "image", f"not encoded; reasons in {store / SKIPPED}")] if skipped else []
    line = left_out_line(source, [*unread, *unused])
    if line:
        yield Message(line)


def load_vae_on(facts: VAEFacts, precision: str, device: str) -> VAE:
    """Load the VAE on the device of this process. Raises DiffussmError."""
    keep_freed_memory()
    where = pick_device(device)
    return load_vae(facts, where, pick_dtype(precision, where))


def make_settings(listing: Listing, resolution: tuple[int, int], vae: VAE, options: Mapping[str, Any]) -> StoreSettings:
    """The settings of a store for a source; `options` are the fields that the user chooses."""
    facts = vae.facts
    values: dict[str, Any] = {
        "source_sha256": listing.sha256(),
        "images": len(listing.entries),
        "class_names": listing.class_names,
        "resolution": resolution,
        "vae": facts.name,
        "vae_config_sha256": facts.config_sha256,
        "vae_weights_sha256": vae.weights_sha256,
        "channels": facts.channels,
        "downsample": facts.downsample,
        "scale": facts.scale,
        "shift": facts.shift,
    }
    return StoreSettings(**{**values, **options})


def decoding_processes(workers: int | None) -> int:
    """The number of processes that decode images, by default one per core of this process."""
    return min(16, own_cores()) if workers is None else workers


# -------------------------------------------------------------------------------------------- before work
def check_resolution(resolution: tuple[int, int], facts: VAEFacts) -> None:
    """Raises ConfigError for a resolution that the VAE cannot take."""
    if any(side % facts.downsample for side in resolution):
        height, width = resolution
        raise ConfigError(
            f"--resolution: {height}x{width} must be a multiple of {facts.downsample}, the downsampling of {facts.name}"
        )


@contextlib.contextmanager
def open_store(store: Path, source: Path, world: World) -> Iterator[None]:
    """Lock a folder for writing, with one lock per rank.

    Raises:
        DataError: if the folder cannot be written, holds other files, or another process is writing to it.
    """
    if store.resolve().is_relative_to(source.resolve()):
        raise DataError(f"TARGET: {str(store)!r} lies inside SOURCE; choose a folder outside it")
    with contextlib.ExitStack() as stack:
        try:
            if store.exists() and content(store) and not content(store) & {MANIFEST, LISTING}:
                raise DataError(f"TARGET: {str(store)!r} is not empty and holds no latents; choose another folder")
            stack.enter_context(held_folder(store, world.rank))
        except BlockingIOError as e:
            message = f"TARGET: another process is writing to {str(store)!r}; wait for it, or stop it first"
            raise DataError(message) from e
        except OSError as e:
            raise DataError(f"TARGET: cannot write to {str(store)!r}: {e.strerror}") from e
        yield

"""Decode the images of a source, encode them in batches, and write shard after shard.

The batches of a shard do not depend on the process that encodes it, so its bytes do not either.

B batch   C channels   H x W grid   K text tokens   E width of text vectors
"""

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffussm_cli.config import ModelConfig
from diffussm_cli.data.captions import read_captions
from diffussm_cli.data.images import to_model_space
from diffussm_cli.data.latents.manifest import StoreSettings
from diffussm_cli.data.latents.shard import Skipped, empty_shard, write_shard
from diffussm_cli.data.latents.store import writing_to
from diffussm_cli.data.listing import Entry, LeftOut, Listing, read_entry
from diffussm_cli.data.text import Texts, check_complete, open_encoder
from diffussm_cli.data.vae import VAE
from diffussm_cli.errors import DataError
from diffussm_cli.events import Progress
from diffussm_cli.machine.device import helpers, is_out_of_memory

# Errors of the system that are lasting faults of an image; any other may pass.
LASTING = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
MAX_CAPTIONS = 5  # stored per image


class Batch(NamedTuple):
    """Decoded images of consecutive places in a source."""

    pixels: np.ndarray  # (B, height, width, 3) uint8; zeros where an image could not be read
    reasons: dict[int, str]  # why images could not be read, by place in the source
    gone: str = ""  # why the source is gone, if it is; then the batch says nothing of its images


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
        total = sum(len(self.settings.span(i)) for i in shards)
        done = 0
        missed = 0
        yield Progress(0, total)
        batches = iter(_loader(self, shards))

        # One shard is written while the next one is encoded.
        with helpers() as writer:
            written: Future | None = None
            for shard in shards:
                arrays = empty_shard(self.settings, shard)
                skipped: list[Skipped] = []
                for span in _batch_spans(self.settings, shard):
                    unreadable = self._encode(span, arrays, _next(batches))
                    skipped += unreadable
                    done += len(span)
                    missed += len(unreadable)
                    yield Progress(done, total, news=f"{missed} skipped")

                if written:
                    written.result()
                written = writer.submit(self._save, shard, arrays, skipped)
            if written:
                written.result()

    def _save(self, shard: int, arrays: dict[str, np.ndarray], skipped: list[Skipped]) -> None:
        with writing_to(self.store):
            write_shard(self.store, self.settings, shard, arrays, skipped)

    def _encode(self, span: range, arrays: dict[str, np.ndarray], batch: Batch) -> list[Skipped]:
        """Encode one batch into its rows of a shard; returns the skipped images."""
        if batch.gone:
            source = str(self.listing.root)
            raise DataError(
                f"SOURCE: {source!r} changes while it is encoded: {batch.gone}; restore it; "
                "finished shards are kept, and the same command continues from there"
            )

        # The posterior of each image, and of its horizontal flip.
        first = span.start % self.settings.shard_size
        rows = slice(first, first + len(span))
        on_device = torch.from_numpy(batch.pixels).to(self.vae.device).permute(0, 3, 1, 2)
        images = to_model_space(on_device)
        moments = {"": self._moments(images)}
        if self.settings.flip:
            moments["_mirrored"] = self._moments(images.flip(-1))

        # In float16 large numbers become infinite.
        reasons = dict(batch.reasons)
        for suffix, pair in moments.items():
            half = [m.to(torch.float16) for m in pair]
            finite = torch.stack([_all_finite(m) for m in half]).all(0).cpu().numpy()
            for i in itertools.compress(span, ~finite):
                reasons[i] = "its latents are not finite in float16"
            for name, values in zip(("mean", "std"), half):
                arrays[name + suffix][rows] = values.cpu().numpy()

        # Skipped images keep their places, with zeros.
        readable = np.array([i not in reasons for i in span])
        for name in arrays:
            if name.startswith(("mean", "std")):
                arrays[name][rows][~readable] = 0
        arrays["readable"][rows] = readable
        arrays["index"][rows] = span
        arrays["label"][rows] = [self.listing.entries[i].label for i in span]
        if self.captions is not None:
            numbers, vectors = self.captions.vectors(span, self.settings.captions)
            arrays["captions"][rows] = numbers
            arrays["text"][rows] = vectors

        skipped = [Skipped(i, self.listing.entries[i].name, reasons[i]) for i in sorted(reasons)]
        if skipped and self.strict:
            raise DataError(f"--strict: {skipped[0].file}: {skipped[0].reason}")
        return skipped

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self.vae.encode(images)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            size = self.settings.batch_size
            device = self.vae.device
            line = f"--batch-size: {size} does not fit into the memory of {device}; reduce it"
            raise DataError(line) from e


def _all_finite(moments: Tensor) -> Tensor:
    """Whether all values of an image are finite: (B, ...) to (B,)."""
    return moments.isfinite().flatten(1).all(1)


# ----------------------------------------------------------------------------------------- captions
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
        """The number of captions of each image, (B,), and their vectors, (B, most, 1 + K, E).

        Behind the captions of an image stand zeros.
        """
        captions = [self.captions[i] for i in span]
        numbers = [len(texts) for texts in captions]
        embedded = self.texts.embed([text for texts in captions for text in texts]).split(numbers)
        vectors = np.zeros((len(captions), most, *embedded[0].shape[1:]), np.float16)
        for row, part in zip(vectors, embedded):
            row[: len(part)] = part.numpy()
        return np.array(numbers), vectors


def open_captions(
    listing: Listing,
    name: str | None,
    tokens: int,
    device: torch.device,
    unused: list[LeftOut] | None = None,
) -> StoredCaptions | None:
    """The captions of a source for the text encoder `name` on `device`; None without one.

    `unused` gets what of them is not used.

    Raises:
        DataError: for missing captions.
    """
    if name is None:
        return None

    # The captions, which no image may lack.
    known = read_captions(listing, left_out=unused)
    surplus = sum(max(0, len(texts) - MAX_CAPTIONS) for texts in known.values())
    if unused is not None and surplus:
        unused.append(LeftOut(surplus, "caption", f"after the first {MAX_CAPTIONS} of an image"))
    captions = [known.get(e.name, ())[:MAX_CAPTIONS] for e in listing.entries]
    check_complete(captions, lambda i: listing.entries[i].name, f"--text: {str(listing.root)!r}")

    encoder = open_encoder(name, device)
    sizes = ModelConfig(text_width=encoder.width, text_tokens=tokens)
    return StoredCaptions(Texts(encoder, sizes), captions)


# ----------------------------------------------------------------------------------------- decoding
class _Batches(Dataset):
    """The batches of a source."""

    def __init__(self, listing: Listing, resolution: tuple[int, int], spans: list[range]):
        self.root = Path(os.path.abspath(listing.root))
        self.resolution = resolution
        self.spans = spans
        self.entries = [[listing.entries[i] for i in span] for span in spans]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, k: int) -> Batch:
        span = self.spans[k]
        pixels = np.zeros((len(span), *self.resolution, 3), np.uint8)
        reasons = {}

        for row, (place, entry) in enumerate(zip(span, self.entries[k])):
            try:
                pixels[row] = read_entry(self.root, entry, self.resolution)
            except DataError as e:
                why = str(e).removeprefix(f"{Path(entry.name)}: ")
                if _is_gone(entry, e):
                    return Batch(pixels, {}, f"{entry.name}: {why}")
                reasons[place] = why

        return Batch(pixels, reasons)


def _is_gone(entry: Entry, error: BaseException) -> bool:
    """Whether an image was there when it was listed, and its file can no longer be read at all.

    A lack of permission is a lasting fault of the image. Any other error of the system may pass: a
    folder is renamed, or a disk loses its connection.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return entry.size >= 0 and cause is not None and cause.errno not in (None, *LASTING)


def _loader(encoder: Encoder, shards: Sequence[int]) -> DataLoader:
    """Batches in order, decoded by spawned processes; they share no threads or devices with this
    one.
    """
    spans = [span for shard in shards for span in _batch_spans(encoder.settings, shard)]
    batches = _Batches(encoder.listing, encoder.settings.resolution, spans)
    workers = min(encoder.workers, len(spans))
    context = "spawn" if workers else None
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # it gets a batch: there is no batch_size
        multiprocessing_context=context,
    )


def _as_it_is(batch: Batch) -> Batch:
    """Keep arrays, which go through pipes: tensors need shared memory, and containers have
    little.
    """
    return batch


def _next(batches: Iterator[Batch]) -> Batch:
    try:
        return next(batches)
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        killed = "a process that decodes images was killed, perhaps out of memory"
        raise DataError(f"--workers: {killed}; use fewer") from e


def _batch_spans(settings: StoreSettings, shard: int) -> list[range]:
    span = settings.span(shard)
    return [span[i : i + settings.batch_size] for i in range(0, len(span), settings.batch_size)]

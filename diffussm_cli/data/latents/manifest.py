"""The settings of a store of latents, and the manifest that records the hash of every file.

STORE/manifest.json           the settings and the hash of every other file
STORE/listing.jsonl           one line per image of the source: name, label, bytes
STORE/skipped.jsonl           images that could not be read and files that are not images, with the reason
STORE/shard-NNNNN.safetensors images N * shard_size .. of the source: mean and standard deviation of the posterior
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffussm_cli.data.vae import usable_scale
from diffussm_cli.errors import DataError
from diffussm_cli.machine.files import read_regular

MANIFEST, LISTING, SKIPPED = "manifest.json", "listing.jsonl", "skipped.jsonl"
FORMAT = 1
MAX_MANIFEST_BYTES = 1 << 28
MAX_WORDS = 1 << 16  # width of text vectors, tokens, captions of an image
PRECISIONS = ("fp32", "bf16")  # of the VAE


@dataclass(frozen=True)
class StoreSettings:
    """Everything that determines the bytes of a store, apart from the device and library versions."""

    source_sha256: str  # of listing.jsonl
    images: int
    class_names: tuple[str, ...]
    resolution: tuple[int, int]  # height, width in pixels
    vae: str
    vae_config_sha256: str
    vae_weights_sha256: str
    channels: int
    downsample: int
    scale: tuple[float, ...]  # one per channel; model space is (z - shift) * scale
    shift: tuple[float, ...]
    flip: bool
    precision: str
    batch_size: int
    shard_size: int
    text: str | None = None  # the text encoder; None: no captions are stored
    text_sha256: str = ""
    text_width: int = 0
    text_tokens: int = 0
    captions: int = 0  # stored per image at most
    captions_sha256: str = ""  # of all captions
    columns: tuple[str, ...] = ()  # of parquet shards: those that were named, as image=photo

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_size)

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of a latent."""
        height, width = self.resolution
        return self.channels, height // self.downsample, width // self.downsample

    def span(self, shard: int) -> range:
        """Places in the source of the images in a shard."""
        return range(shard * self.shard_size, min(self.images, (shard + 1) * self.shard_size))


@dataclass(frozen=True)
class ShardRecord:
    """A shard's entry in the manifest."""

    sha256: str
    skipped: int
    mean: tuple[float, ...] = ()  # of each channel in model space; empty in stores of earlier versions
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """manifest.json; `shards` is empty while the store is being written."""

    settings: StoreSettings
    shards: tuple[ShardRecord, ...] = ()
    skipped_sha256: str = ""

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.settings.shards

    @property
    def statistics(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and standard deviation (C,) of the latents in model space; None if a shard does not tell them."""
        spans = (len(self.settings.span(i)) for i in range(len(self.shards)))
        images = np.array([n - s.skipped for n, s in zip(spans, self.shards)], float)
        told = [s for s, n in zip(self.shards, images) if n]
        if not told or not all(s.mean for s in told):
            return None
        weights = images[images > 0] / images.sum()
        means, deviations = (np.array([getattr(s, name) for s in told]) for name in ("mean", "std"))
        mean = weights @ means
        return mean, np.sqrt(weights @ (deviations**2 + means**2) - mean**2)


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def manifest_text(manifest: Manifest) -> str:
    """A manifest as JSON, with more facts for people who read the file. It is one that `read_manifest` accepts."""
    import diffusers

    from diffussm_cli import __version__

    skipped = sum(s.skipped for s in manifest.shards)
    values = {
        "format": FORMAT,
        "complete": manifest.complete,
        "settings": dataclasses.asdict(manifest.settings),
        "dtype": "float16",
        "crop": "ADM: halve by boxes, resize bicubically, cut the middle",
        "counts": {"images": manifest.settings.images - skipped, "skipped": skipped},
        "skipped_sha256": manifest.skipped_sha256,
        "shards": [{"file": shard_name(i), **dataclasses.asdict(s)} for i, s in enumerate(manifest.shards)],
        "versions": {"diffussm": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    text = json.dumps(values, indent=1) + "\n"
    assert len(text) <= MAX_MANIFEST_BYTES, "its reader must accept it"
    assert _parsed(json.loads(text)) == manifest, "its reader must accept it"
    return text


def read_manifest(store: Path, option: str) -> Manifest:
    """Read the manifest of a store; `option` is the option that gave the folder.

    Raises:
        DataError: if the manifest is missing, is damaged or has another format.
    """
    path = store / MANIFEST
    try:
        values = json.loads(read_regular(path, MAX_MANIFEST_BYTES))
        if values["format"] != FORMAT:
            raise DataError(f"{option}: {path} has format {values['format']}, but this version reads {FORMAT}")
        return _parsed(values)
    except OSError as e:
        raise DataError(f"{option}: cannot read {str(path)!r}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise DataError(f"{option}: {path} is damaged; run the command that made the store in an empty folder") from e


def _parsed(values: dict[str, Any]) -> Manifest:
    """A manifest from its JSON. Raises ValueError, KeyError, TypeError, OverflowError."""
    settings = _settings(values["settings"])
    manifest = Manifest(settings, tuple(map(read_shard, values["shards"])), str(values["skipped_sha256"]))
    if manifest.complete is not values["complete"]:
        raise ValueError
    if any(len(numbers) not in (0, settings.channels) for s in manifest.shards for numbers in (s.mean, s.std)):
        raise ValueError
    return manifest


def read_shard(values: dict[str, Any]) -> ShardRecord:
    """The record of a shard from its JSON. Raises ValueError, KeyError, TypeError, OverflowError."""
    mean, std = (tuple(map(float, values.get(name, ()))) for name in ("mean", "std"))
    if not all(map(math.isfinite, mean + std)):
        raise ValueError
    return ShardRecord(str(values["sha256"]), int(values["skipped"]), mean, std)


def _settings(values: dict[str, Any]) -> StoreSettings:
    """Check the settings, so that no manifest can demand absurd memory. Raises ValueError, KeyError, TypeError."""
    lists = {k: tuple(values[k]) for k in ("class_names", "resolution", "scale", "shift")}
    lists["columns"] = tuple(values.get("columns", ()))
    s = StoreSettings(**{**values, **lists})
    words = (s.text_width, s.text_tokens, s.captions)
    whole = (s.images, *s.resolution, s.channels, s.downsample, s.batch_size, s.shard_size)
    sizes_fit = all(type(n) is int and n > 0 for n in whole) and len(s.resolution) == 2
    numbers = all(isinstance(v, float) for v in (*s.scale, *s.shift)) and usable_scale(s.scale, s.shift)
    names = (s.source_sha256, s.vae, s.vae_config_sha256, s.vae_weights_sha256, s.text or "", *s.class_names)
    names += (s.text_sha256, s.captions_sha256, *s.columns)
    texts = all(isinstance(name, str) for name in names) and s.precision in PRECISIONS and isinstance(s.flip, bool)
    words_fit = all(type(n) is int and 0 <= n <= MAX_WORDS for n in words)
    if not sizes_fit or not words_fit or not numbers or not texts or {len(s.scale), len(s.shift)} != {s.channels}:
        raise ValueError
    return s


def first_difference(old: StoreSettings, new: StoreSettings) -> str | None:
    """`name was X and is now Y` for the first setting that differs, or None.

    The same VAE may have another name, such as that of a folder which was moved.
    """
    hashes = ("vae_config_sha256", "vae_weights_sha256")
    same_vae = all(getattr(old, name) == getattr(new, name) for name in hashes)
    for field in dataclasses.fields(StoreSettings):
        was, now = getattr(old, field.name), getattr(new, field.name)
        if was != now and not (same_vae and field.name == "vae"):
            return f"{field.name} was {was!r:.80} and is now {now!r:.80}"
    return None

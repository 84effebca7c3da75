"""The settings of a store of latents, which its manifest keeps. No file of a store is ever changed.

STORE/manifest.json           the settings, written once
STORE/listing.jsonl           one line per image of the source: name, label, bytes
STORE/ignored.jsonl           files of the source that are not images, with the reason
STORE/shard-NNNNN.safetensors mean and deviation of the posterior of images N * shard_size .. of the
source
STORE/shard-NNNNN.json        its record: its hash, images that could not be read, and statistics

The store is complete once all shards and their records exist.
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffussm_cli.data.vae_facts import usable_scale
from diffussm_cli.errors import DataError
from diffussm_cli.machine.files import read_regular

MANIFEST = "manifest.json"
LISTING = "listing.jsonl"
IGNORED = "ignored.jsonl"
FORMAT = 2
EARLIER_FORMAT = 1  # convert.py reads it
MAX_JSON_BYTES = 1 << 28
MAX_TEXT_SIZE = 1 << 16  # width of text vectors, tokens, captions of an image
PRECISIONS = ("fp32", "bf16")  # of the VAE
SAME_COMMAND = "run the same diffussm encode command again"


@dataclass(frozen=True)
class StoreSettings:
    """What determines the bytes of a store, apart from the device and library versions."""

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
    arrays_sha256: str = ""  # of the pixels of .npz files and CIFAR's batches; no size tells them
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

    def command(self, store: Path) -> str:
        """The command that makes the store from its source, which stands there as SOURCE."""
        height, width = self.resolution
        words = ["diffussm", "encode", "SOURCE", str(store), "--vae", self.vae]
        words += ["--resolution", f"{height}x{width}", "--precision", self.precision]
        words += ["--batch-size", str(self.batch_size), "--shard-size", str(self.shard_size)]

        # What not every store has.
        if not self.flip:
            words += ["--no-flip"]
        if self.columns:
            words += ["--columns", ",".join(self.columns)]
        if self.text is not None:
            words += ["--text", self.text, "--text-tokens", str(self.text_tokens)]
        return shlex.join(words)


# -------------------------------------------------------------------------------------------- files
def manifest_text(settings: StoreSettings) -> str:
    """A manifest that `read_settings` accepts, with more facts for people who read the file."""
    import diffusers

    from diffussm_cli import __version__

    versions = {
        "diffussm": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    values = {
        "format": FORMAT,
        "settings": dataclasses.asdict(settings),
        "dtype": "float16",
        "crop": "ADM: halve by boxes, resize bicubically, cut the middle",
        "versions": versions,
    }
    text = json.dumps(values, indent=1) + "\n"
    assert len(text) <= MAX_JSON_BYTES, "its reader must accept it"
    assert parse_settings(json.loads(text)["settings"]) == settings, "its reader must accept it"
    return text


def read_settings(store: Path, option: str) -> StoreSettings:
    """Read the manifest of a store; `option` is the option that gave the folder.

    Raises:
        DataError: if the manifest is missing, is damaged or has another format.
    """
    values = read_manifest(store, option)
    if values["format"] == EARLIER_FORMAT:
        convert = shlex.join(["diffussm", "encode", str(store)])
        raise DataError(
            f"{option}: {str(store)!r} is a store of an earlier version; "
            f"convert it, which encodes nothing again, by: {convert}"
        )

    if values["format"] != FORMAT:
        path = store / MANIFEST
        has = f"{path} has format {values['format']}"
        raise DataError(f"{option}: {has}, but this version reads {FORMAT}")

    return values["settings"]


def read_manifest(store: Path, option: str) -> dict[str, Any]:
    """The values in the manifest of a store of any format.

    If the format is known, its settings are checked.

    Raises:
        DataError: if the manifest is missing or damaged.
    """
    path = store / MANIFEST

    try:
        values = json.loads(read_regular(path, MAX_JSON_BYTES))
        if values["format"] in (FORMAT, EARLIER_FORMAT):
            values["settings"] = parse_settings(values["settings"])
        return values
    except OSError as e:
        raise DataError(f"{option}: cannot read {str(path)!r}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        remedy = "run the command that made the store in an empty folder"
        raise DataError(f"{option}: {path} is damaged; {remedy}") from e


def parse_settings(values: Mapping[str, Any]) -> StoreSettings:
    """Check the settings in a manifest, so that none can demand absurd memory.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: for any that this version cannot use.
    """
    lists = {name: tuple(values[name]) for name in ("class_names", "resolution", "scale", "shift")}
    lists["columns"] = tuple(values.get("columns", ()))
    s = StoreSettings(**{**values, **lists})

    # Sizes
    positive = (s.images, *s.resolution, s.channels, s.downsample, s.batch_size, s.shard_size)
    sizes_fit = all(type(n) is int and n > 0 for n in positive) and len(s.resolution) == 2
    text_sizes = (s.text_width, s.text_tokens, s.captions)
    text_fits = all(type(n) is int and 0 <= n <= MAX_TEXT_SIZE for n in text_sizes)

    # Scale and shift
    scales = len(s.scale) == len(s.shift) == s.channels
    scales = scales and all(isinstance(v, float) for v in (*s.scale, *s.shift))
    scales = scales and usable_scale(s.scale, s.shift)

    # Texts and choices
    hashes = (
        s.source_sha256,
        s.vae_config_sha256,
        s.vae_weights_sha256,
        s.text_sha256,
        s.captions_sha256,
        s.arrays_sha256,
    )
    names = (*hashes, s.vae, s.text or "", *s.class_names, *s.columns)
    texts = all(isinstance(name, str) for name in names)
    choices = s.precision in PRECISIONS and isinstance(s.flip, bool)
    if not (sizes_fit and text_fits and scales and texts and choices):
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

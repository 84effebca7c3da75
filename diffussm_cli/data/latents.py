"""A store of latents: what is in it, how it is read, and how damage is found. `encoding.py` writes it.

STORE/manifest.json           what the latents are and the hash of every other file
STORE/listing.jsonl           one line an image of the source: name, label, bytes
STORE/skipped.jsonl           images that could not be read and files that are none, with the reason
STORE/shard-NNNNN.safetensors images N * shard_size .. of the source: mean and standard deviation of the posterior

B batch   C channels   H x W grid   S images of a shard
"""

import dataclasses
import json
import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.data.images import coins
from diffussm_cli.errors import DataError
from diffussm_cli.files import sha256, tensors_header

MANIFEST, LISTING, SKIPPED = "manifest.json", "listing.jsonl", "skipped.jsonl"
FORMAT = 1
MAX_MANIFEST_BYTES = 1 << 28
PRECISIONS = ("fp32", "bf16")  # of the VAE
SAFETENSORS = {"I64": np.dtype("<i8"), "F16": np.dtype("<f2"), "U8": np.dtype("u1")}


@dataclass(frozen=True)
class StoreSettings:
    """All that decides the bytes of a store, device and library versions aside."""

    source_sha256: str  # of listing.jsonl
    images: int
    class_names: tuple[str, ...]
    resolution: tuple[int, int]  # height, width in pixels
    vae: str
    vae_config_sha256: str
    vae_weights_sha256: str
    channels: int
    downsample: int
    scale: tuple[float, ...]  # one a channel; model space is (z - shift) * scale
    shift: tuple[float, ...]
    flip: bool
    precision: str
    batch_size: int
    shard_size: int

    @property
    def shards(self) -> int:
        """Their number."""
        return -(-self.images // self.shard_size)

    @property
    def latent(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        height, width = self.resolution
        return self.channels, height // self.downsample, width // self.downsample

    def span(self, shard: int) -> range:
        """Places in the source that a shard covers."""
        return range(shard * self.shard_size, min(self.images, (shard + 1) * self.shard_size))


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of a shard."""

    sha256: str
    skipped: int


@dataclass(frozen=True)
class Manifest:
    """manifest.json; `shards` is empty while the store is being written."""

    settings: StoreSettings
    shards: tuple[ShardRecord, ...] = ()
    skipped_sha256: str = ""

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.settings.shards


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


# ---------------------------------------------------------------------------------------------- manifest
def manifest_text(manifest: Manifest) -> str:
    """A manifest as JSON, with what else a reader of the file wants to know."""
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
    return json.dumps(values, indent=1) + "\n"


def read_manifest(store: Path, option: str) -> Manifest:
    """The manifest of a store; `option` is what the folder was given by.

    Raises:
        DataError: if it is missing, damaged or of another format.
    """
    path = store / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise DataError(f"{option}: {path} has format {values['format']}, this version reads {FORMAT}")
        shards = tuple(ShardRecord(str(s["sha256"]), int(s["skipped"])) for s in values["shards"])
        manifest = Manifest(_settings(values["settings"]), shards, str(values["skipped_sha256"]))
        if manifest.complete is not values["complete"]:
            raise ValueError
        return manifest
    except OSError as e:
        raise DataError(f"{option}: cannot read {str(path)!r}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise DataError(f"{option}: {path} is damaged; run the command that made the store in an empty folder") from e


def _settings(values: dict[str, Any]) -> StoreSettings:
    """Checked, so that nothing a manifest says can ask for absurd memory. Raises ValueError, KeyError, TypeError."""
    lists = {k: tuple(values[k]) for k in ("class_names", "resolution", "scale", "shift")}
    s = StoreSettings(**{**values, **lists})
    whole = (s.images, *s.resolution, s.channels, s.downsample, s.batch_size, s.shard_size)
    sizes_fit = all(type(n) is int and n > 0 for n in whole) and len(s.resolution) == 2
    numbers = all(isinstance(v, float) and math.isfinite(v) for v in (*s.scale, *s.shift))
    names = (s.source_sha256, s.vae, s.vae_config_sha256, s.vae_weights_sha256, *s.class_names)
    texts = all(isinstance(name, str) for name in names) and s.precision in PRECISIONS and isinstance(s.flip, bool)
    if not sizes_fit or not numbers or not texts or {len(s.scale), len(s.shift)} != {s.channels}:
        raise ValueError
    return s


def first_difference(old: StoreSettings, new: StoreSettings) -> str | None:
    """`name was X and is now Y` of the first setting that differs."""
    for field in dataclasses.fields(StoreSettings):
        was, now = getattr(old, field.name), getattr(new, field.name)
        if was != now:
            return f"{field.name} was {was!r:.80} and is now {now!r:.80}"
    return None


# ----------------------------------------------------------------------------------------------- layout
def layout(settings: StoreSettings, shard: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of a shard in the order of the file: name to safetensors dtype and shape.

    `index` is the place in the source; where `readable` is 0 the image was skipped and its latents are zeros.
    Means and deviations are in the VAE's units; `_mirrored` are those of the mirrored image.
    """
    S = len(settings.span(shard))
    moments = ["mean", "std", *(["mean_mirrored", "std_mirrored"] if settings.flip else [])]
    latents = dict.fromkeys(moments, ("F16", (S, *settings.latent)))
    return {"index": ("I64", (S,)), "label": ("I64", (S,)), **latents, "readable": ("U8", (S,))}


def header(settings: StoreSettings, shard: int) -> bytes:
    """The bytes before the tensors of a shard: length and JSON, as safetensors has them."""
    tensors = layout(settings, shard).items()
    return tensors_header({n: (t, shape, SAFETENSORS[t].itemsize * math.prod(shape)) for n, (t, shape) in tensors})


def empty_shard(settings: StoreSettings, shard: int) -> dict[str, np.ndarray]:
    """Arrays of a shard, all zeros."""
    return {name: np.zeros(shape, SAFETENSORS[dtype]) for name, (dtype, shape) in layout(settings, shard).items()}


def map_shard(store: Path, settings: StoreSettings, shard: int) -> dict[str, np.ndarray]:
    """Read-only views of a shard's tensors in its memory map.

    Raises:
        DataError: if the file is missing, or has another header or size than the manifest asks for.
    """
    path, expected = store / shard_name(shard), header(settings, shard)
    tensors = layout(settings, shard)
    try:
        with path.open("rb") as file:
            if file.read(len(expected)) != expected:
                raise DataError(f"{path}: header differs from the manifest; find the damage: diffussm encode --verify")
            keep_no_handle = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **keep_no_handle)
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}") from e
    views, start = {}, len(expected)
    if len(data) != start + sum(SAFETENSORS[t].itemsize * math.prod(shape) for t, shape in tensors.values()):
        raise DataError(f"{path}: is {len(data)} bytes long, not as the manifest says; diffussm encode --verify")
    if hasattr(mmap, "MADV_RANDOM"):
        data.madvise(mmap.MADV_RANDOM)  # no reading ahead: the next image lies elsewhere
    for name, (dtype, shape) in tensors.items():
        views[name] = np.frombuffer(data, SAFETENSORS[dtype], math.prod(shape), start).reshape(shape)
        start += views[name].nbytes
    return views


# ---------------------------------------------------------------------------------------------- reading
class LatentStore:
    """A finished store as a training source: image i is the i-th readable one. Only pages that are read use memory."""

    def __init__(self, root: Path, flip: bool):
        self.root, self.flip = root, flip
        manifest = read_manifest(root, "data.path")
        self.settings = manifest.settings
        if not manifest.complete:
            raise DataError(f"data.path: {str(root)!r} is not finished; run the same diffussm encode command again")
        if flip and not self.settings.flip:
            raise DataError(f"data.flip: true, but {str(root)!r} was made with --no-flip; --set data.flip=false")
        self.class_names = self.settings.class_names
        self._shards: dict[int, dict[str, np.ndarray]] = {}
        shards = [self._shard(i) for i in range(self.settings.shards)]
        self.places = np.flatnonzero(np.concatenate([s["readable"] for s in shards]))
        self.labels = torch.from_numpy(np.concatenate([s["label"] for s in shards])[self.places])
        if not len(self.places):
            raise DataError(f"data.path: {str(root)!r} holds no readable image; see {SKIPPED}")
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < max(1, len(self.class_names)):
            raise DataError(f"data.path: {str(root)!r} holds labels without a class; diffussm encode --verify")
        self.scale, self.shift = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.settings.scale, self.settings.shift))

    def __len__(self) -> int:
        return len(self.places)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # another process makes its own maps

    def _shard(self, i: int) -> dict[str, np.ndarray]:
        if i not in self._shards:
            self._shards[i] = map_shard(self.root, self.settings, i)
        return self._shards[i]

    def moments(self, indices: Sequence[int], mirrored: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of images, (B, C, H, W) float16 in the VAE's units; of their mirrored ones where
        `mirrored` (B,) is true."""
        places = self.places[np.asarray(indices)]
        mean, std = (np.empty((len(places), *self.settings.latent), np.float16) for _ in range(2))
        suffixes = ("", "_mirrored") if self.settings.flip else ("",)
        which = np.zeros(len(places), int) if mirrored is None else np.asarray(mirrored, int)
        shards, rows = np.divmod(places, self.settings.shard_size)
        for k, (shard, row, m) in enumerate(zip(shards.tolist(), rows.tolist(), which.tolist())):
            tensors = self._shard(shard)
            mean[k], std[k] = tensors["mean" + suffixes[m]][row], tensors["std" + suffixes[m]][row]
        return torch.from_numpy(mean), torch.from_numpy(std)

    def read(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Samples of the posterior in model space, (B, C, H, W) float32, and labels (B,)."""
        mirrored = coins(self.flip, generators)
        mean, std = self.moments(indices, mirrored.numpy() if self.flip else None)
        z = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators]).mul_(std).add_(mean)
        return z.sub_(self.shift).mul_(self.scale), self.labels[torch.as_tensor(np.asarray(indices))]


# --------------------------------------------------------------------------------------------- verifying
def verify(store: Path) -> Iterator[tuple[str, str | None]]:
    """Check every file of a finished store; yields (file name, what is wrong with it or None).

    Raises:
        DataError: if there is no finished store.
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
        return None if sha256(path) == expected else "its sha256 is not that of the manifest"
    except OSError as e:
        return f"cannot be read: {e.strerror}"


def _wrong_shard(store: Path, settings: StoreSettings, shard: int, record: ShardRecord) -> str | None:
    wrong = _wrong_hash(store / shard_name(shard), record.sha256)
    if wrong is None:
        try:
            map_shard(store, settings, shard)
        except DataError as e:
            return str(e)
    return wrong

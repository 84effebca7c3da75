"""The bytes of one shard: a safetensors file whose layout follows from the settings of the store.

C channels   H x W grid   S images in a shard   K text tokens   E width of text vectors
"""

import math
import mmap
import sys
from pathlib import Path

import numpy as np

from diffussm_cli.data.latents.manifest import StoreSettings, shard_name
from diffussm_cli.errors import DataError
from diffussm_cli.machine.files import open_regular, tensors_header

SAFETENSORS: dict[str, np.dtype] = {"I64": np.dtype("<i8"), "F16": np.dtype("<f2"), "U8": np.dtype("u1")}
BLOCK = 256  # rows that are checked at a time


def layout(settings: StoreSettings, shard: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of a shard in the order of the file: name to safetensors dtype and shape.

    `index` is the place in the source. Where `readable` is 0, the image was skipped and its latents are zeros.
    With text, `captions` is the number of captions of an image, and `text` holds each as (1 + K, E), then zeros.
    Means and deviations are in the VAE's units. `_mirrored` tensors are for the horizontally flipped image.
    """
    S = len(settings.span(shard))
    moments = ["mean", "std", *(["mean_mirrored", "std_mirrored"] if settings.flip else [])]
    latents = dict.fromkeys(moments, ("F16", (S, *settings.latent)))
    numbers = dict.fromkeys(["index", "label", *(["captions"] if settings.text else [])], ("I64", (S,)))
    vectors = (S, settings.captions, 1 + settings.text_tokens, settings.text_width)
    text = {"text": ("F16", vectors)} if settings.text else {}
    return {**numbers, **latents, **text, "readable": ("U8", (S,))}


def header(settings: StoreSettings, shard: int) -> bytes:
    """The safetensors header of a shard: its length and its JSON."""
    tensors = layout(settings, shard).items()
    return tensors_header({n: (t, shape, SAFETENSORS[t].itemsize * math.prod(shape)) for n, (t, shape) in tensors})


def empty_shard(settings: StoreSettings, shard: int) -> dict[str, np.ndarray]:
    """The arrays of a shard, filled with zeros."""
    return {name: np.zeros(shape, SAFETENSORS[dtype]) for name, (dtype, shape) in layout(settings, shard).items()}


def shard_bytes(settings: StoreSettings, shard: int) -> int:
    """The size of the file of a shard."""
    tensors = layout(settings, shard).values()
    return len(header(settings, shard)) + sum(SAFETENSORS[t].itemsize * math.prod(shape) for t, shape in tensors)


def first_not_finite(tensors: dict[str, np.ndarray]) -> int | None:
    """The first row of a shard with a latent or text vector that is not finite, or None."""
    first = [_first_not_finite(values) for values in tensors.values() if values.dtype == SAFETENSORS["F16"]]
    return min((row for row in first if row is not None), default=None)


def _first_not_finite(values: np.ndarray) -> int | None:
    for start in range(0, len(values), BLOCK):
        finite = np.isfinite(values[start : start + BLOCK]).reshape(len(values[start : start + BLOCK]), -1).all(1)
        if not finite.all():
            return start + int(np.argmin(finite))
    return None


def statistics(settings: StoreSettings, arrays: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel of the readable images, drawn from the posterior, in model space.

    Six digits, so that they do not depend on the order of a sum; nothing without a readable image.
    """
    readable = arrays["readable"] == 1
    if not readable.any():
        return {"mean": [], "std": []}
    means, deviations = [], []
    for c, (scale, shift) in enumerate(zip(settings.scale, settings.shift)):
        mean, std = (arrays[name][readable, c].astype(np.float32) for name in ("mean", "std"))
        centre = mean.mean(dtype=np.float64)
        variance = np.square(mean - centre).mean(dtype=np.float64) + np.square(std).mean(dtype=np.float64)
        means.append(float(f"{(centre - shift) * scale:.6g}"))
        deviations.append(float(f"{abs(scale) * variance**0.5:.6g}"))
    return {"mean": means, "std": deviations}


def map_shard(store: Path, settings: StoreSettings, shard: int) -> dict[str, np.ndarray]:
    """Read-only views of a shard's tensors in its memory map.

    Raises:
        DataError: if the file is missing, or its header or size differs from the manifest.
    """
    path, expected = store / shard_name(shard), header(settings, shard)
    tensors = layout(settings, shard)
    try:
        with open_regular(path) as file:
            if file.read(len(expected)) != expected:
                raise DataError(f"{path}: header differs from the manifest; run diffussm encode --verify")
            keep_no_handle = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **keep_no_handle)
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}") from e
    views, start = {}, len(expected)
    if len(data) != shard_bytes(settings, shard):
        raise DataError(f"{path}: {len(data)} bytes is not the size in the manifest; run diffussm encode --verify")
    if hasattr(mmap, "MADV_RANDOM"):
        data.madvise(mmap.MADV_RANDOM)  # no read-ahead: the next image is elsewhere
    for name, (dtype, shape) in tensors.items():
        views[name] = np.frombuffer(data, SAFETENSORS[dtype], math.prod(shape), start).reshape(shape)
        start += views[name].nbytes
    return views

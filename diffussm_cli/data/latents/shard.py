"""One shard of a store: a safetensors file, whose layout follows from the settings, and its record.

C channels   H x W grid   S images in a shard   K text tokens   E width of text vectors
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffussm_cli.data.latents.manifest import MAX_JSON_BYTES, SAME_COMMAND, StoreSettings
from diffussm_cli.errors import DataError
from diffussm_cli.machine import tensors
from diffussm_cli.machine.files import read_regular, sha256, whole_file, write_text

BLOCK = 256  # rows that are checked at a time


class Skipped(NamedTuple):
    """An image that could not be encoded, and why."""

    index: int  # type: ignore[assignment]  # its place in the source; a tuple has a method of this name
    file: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a shard."""

    sha256: str
    skipped: tuple[Skipped, ...]
    mean: tuple[float, ...] = ()  # by channel, in model space; empty in stores of earlier versions
    std: tuple[float, ...] = ()


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def record_name(shard: int) -> str:
    return f"shard-{shard:05d}.json"


# ------------------------------------------------------------------------------------------ tensors
def layout(settings: StoreSettings, shard: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of a shard in the order of the file: name to safetensors dtype and shape.

    `index` is the place in the source. Where `readable` is 0, the image was skipped and its latents
    are zeros. With text, `captions` is the number of captions of an image, and `text` holds each as
    (1 + K, E), then zeros. Means and deviations are in the VAE's units. `_mirrored` tensors are for
    the horizontally flipped image.
    """
    S = len(settings.span(shard))
    moments = ["mean", "std"]
    if settings.flip:
        moments += ["mean_mirrored", "std_mirrored"]

    numbers = ["index", "label"]
    text = {}
    if settings.text:
        numbers += ["captions"]
        vectors = (S, settings.captions, 1 + settings.text_tokens, settings.text_width)
        text = {"text": ("F16", vectors)}

    return {
        **dict.fromkeys(numbers, ("I64", (S,))),
        **dict.fromkeys(moments, ("F16", (S, *settings.latent))),
        **text,
        "readable": ("U8", (S,)),
    }


def empty_shard(settings: StoreSettings, shard: int) -> dict[str, np.ndarray]:
    """The arrays of a shard, filled with zeros."""
    parts = layout(settings, shard).items()
    return {
        name: np.zeros(shape, np.dtype(tensors.ARRAYS[dtype])) for name, (dtype, shape) in parts
    }


def map_shard(store: Path, settings: StoreSettings, shard: int) -> dict[str, np.ndarray]:
    """Read-only views of a shard's tensors in its memory map.

    Raises:
        DataError: if the file is missing, or its header or size differs from the manifest.
    """
    path = store / shard_name(shard)
    try:
        return tensors.map_file(path, layout(settings, shard))
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}; {SAME_COMMAND}") from e
    except ValueError as e:
        raise DataError(f"{path}: {e}; run diffussm encode --verify") from e


def statistics(
    settings: StoreSettings, arrays: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each channel of samples of the posterior, in model space.

    Only readable images count; without one, there are none. Six digits, so that they do not depend
    on the order of a sum.
    """
    readable = arrays["readable"] == 1
    means: list[float] = []
    deviations: list[float] = []

    if readable.any():
        for c, (scale, shift) in enumerate(zip(settings.scale, settings.shift)):
            mean, std = (arrays[name][readable, c].astype(np.float32) for name in ("mean", "std"))
            centre = mean.mean(dtype=np.float64)
            variance = np.square(mean - centre).mean(dtype=np.float64)
            variance += np.square(std).mean(dtype=np.float64)
            means.append(float(f"{(centre - shift) * scale:.6g}"))
            deviations.append(float(f"{abs(scale) * variance**0.5:.6g}"))
    return {"mean": tuple(means), "std": tuple(deviations)}


# -------------------------------------------------------------------------------------------- files
def write_shard(
    store: Path,
    settings: StoreSettings,
    shard: int,
    arrays: Mapping[str, np.ndarray],
    skipped: Sequence[Skipped],
) -> None:
    """Write one shard and its record; the record first, so that no shard lacks one.

    Raises:
        OSError: if one of them cannot be written.
    """
    with whole_file(store / shard_name(shard)) as file:
        buffers = (memoryview(array.data).cast("B") for array in arrays.values())
        digest = tensors.write(file, layout(settings, shard), buffers)
        record = ShardRecord(digest, tuple(skipped), **statistics(settings, arrays))
        write_record(store, shard, record)


def write_record(store: Path, shard: int, record: ShardRecord) -> None:
    """Write the record of a shard. Raises OSError."""
    skipped = [image._asdict() for image in record.skipped]
    values = {**asdict(record), "skipped": skipped}
    write_text(store / record_name(shard), json.dumps(values) + "\n")


def read_record(store: Path, settings: StoreSettings, shard: int) -> ShardRecord:
    """The record of a shard.

    Raises:
        FileNotFoundError: if there is none.
        DataError: if it cannot be read, or cannot be the record of this shard.
    """
    path = store / record_name(shard)

    try:
        return parse_record(json.loads(read_regular(path, MAX_JSON_BYTES)), settings, shard)
    except FileNotFoundError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as e:
        raise DataError(f"{path}: damaged; delete it and {SAME_COMMAND}") from e


def parse_record(values: Mapping[str, Any], settings: StoreSettings, shard: int) -> ShardRecord:
    """The record of a shard from its JSON.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError: if it is none.
    """
    skipped = tuple(Skipped(s["index"], s["file"], s["reason"]) for s in values["skipped"])
    mean, std = (tuple(map(float, values.get(name, ()))) for name in ("mean", "std"))
    record = ShardRecord(values["sha256"], skipped, mean, std)

    texts = [record.sha256, *(text for s in skipped for text in (s.file, s.reason))]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError
    if any(type(s.index) is not int or s.index not in settings.span(shard) for s in skipped):
        raise ValueError
    if any(len(numbers) not in (0, settings.channels) for numbers in (mean, std)):
        raise ValueError
    if not all(map(math.isfinite, mean + std)):
        raise ValueError

    return record


def is_there(store: Path, settings: StoreSettings, shard: int) -> bool:
    """Whether a shard is there with all its bytes, and its record beside it."""
    path = store / shard_name(shard)
    size = tensors.file_size(layout(settings, shard))
    return (store / record_name(shard)).is_file() and path.is_file() and path.stat().st_size == size


# ------------------------------------------------------------------------------------------- damage
def damage(store: Path, settings: StoreSettings, shard: int) -> tuple[str, str] | None:
    """Which of the two files of a shard is damaged, and what is wrong with it; None if both are
    intact.
    """
    try:
        record = read_record(store, settings, shard)
    except FileNotFoundError:
        return record_name(shard), "it is missing"
    except DataError:
        return record_name(shard), "it is no record of this shard"

    name = shard_name(shard)
    try:
        if sha256(store / name) != record.sha256:
            return name, "its sha256 differs from its record"
        arrays = map_shard(store, settings, shard)
    except OSError as e:
        return name, f"cannot be read: {e.strerror}"
    except DataError as e:
        return name, str(e)

    row = first_not_finite(arrays)
    if row is not None:
        return name, f"row {row} holds numbers that are not finite"
    if sorted(s.index for s in record.skipped) != arrays["index"][arrays["readable"] == 0].tolist():
        return record_name(shard), "it names other images as unreadable than its shard"
    return None


def first_not_finite(arrays: Mapping[str, np.ndarray]) -> int | None:
    """The first row of a shard with a latent or text vector that is not finite, or None."""
    rows = [_first_not_finite(values) for values in arrays.values() if values.dtype == np.float16]
    return min((row for row in rows if row is not None), default=None)


def _first_not_finite(values: np.ndarray) -> int | None:
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        finite = np.isfinite(block).reshape(len(block), -1).all(1)
        if not finite.all():
            return start + int(np.argmin(finite))
    return None

"""Sets of images to evaluate: folders, .npz files, built-in data sets, and images that a model
draws.

Files are read one batch at a time.

B batch   C channels that the extractor takes   H x W pixels
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.config import BUILTIN
from diffussm_cli.data import builtin
from diffussm_cli.data.arrays import image_rows, open_npz
from diffussm_cli.data.captions import read_captions
from diffussm_cli.data.images import GRID, is_grey
from diffussm_cli.data.latents.manifest import MANIFEST
from diffussm_cli.data.listing import LeftOut, left_out_line, list_source, read_entry
from diffussm_cli.data.samples import BESIDE
from diffussm_cli.data.text import Text
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.machine.device import Helpers
from diffussm_cli.machine.files import sha256
from diffussm_cli.machine.processes import own_cores
from diffussm_cli.sampling.request import FIXED
from diffussm_cli.sampling.sampler import Sampler

IMAGES, LABELS = "arr_0", "arr_1"  # in a .npz
HELD_OUT = "/held-out"  # suffix of the name of a built-in set: the part that is not trained on
IN_COLOUR = "in colour, but the extractor takes only grey images; use the extractor inception"
BESIDE_SAMPLES = (GRID, *BESIDE)  # beside samples: not of the set
LOSSY = (".jpg", ".jpeg", ".webp")


class ImageSet(Protocol):
    """Images in a fixed order, all of the same size."""

    name: str
    size: tuple[int, int]  # (H, W)
    grey: bool  # judged by the first image; of a built-in set, by all
    labels: Sequence[int] | None
    lossy: bool

    @property
    def left_out(self) -> str:
        """One line that counts what is not used, with the reasons; empty if everything is."""

    @property
    def captions(self) -> Sequence[tuple[str, ...]]:
        """Captions of each image; empty if there are none."""

    def __len__(self) -> int: ...

    def read(self, places: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        """Yield the images at increasing indices as uint8 (B, C, H, W). Raises DataError."""

    def image_name(self, i: int) -> str:
        """The name of an image, for an error."""

    def sha256(self) -> str:
        """Hash of the content, independent of its name."""


def open_images(
    path: str, channels: int, size: tuple[int, int] | None = None, name: str = "samples"
) -> ImageSet:
    """Open a folder of images (or one folder per class), an .npz, `builtin:mnist` or
    `builtin:mnist/held-out`.

    Args:
        path: what errors call `name`.
        channels: 1 or 3, as the extractor takes.
        size: (H, W) to crop to as in ADM; without it, images are used as they are and must have the
            same size.

    Raises:
        DataError, ConfigError: if there are no images, or they differ in size.
    """
    if path.startswith(BUILTIN):
        return _Builtin(path, channels, size)
    if path.endswith(".npz"):
        return _Npz(Path(path), channels, size)
    return _Folder(Path(path), channels, size, name)


class _Folder:
    def __init__(self, path: Path, channels: int, size: tuple[int, int] | None, name: str):
        # unlike Path.is_file, False for a name that is too long
        if os.path.isfile(path / MANIFEST):
            raise DataError(
                f"{name}: {path} holds latents; name the folder of images that they were made from"
            )
        self.name = str(path)
        self.channels = channels
        listing = list_source(path, name)
        entries = [e for e in listing.entries if e.name != GRID]
        if not entries:
            raise DataError(f"{name}: {path} holds no image other than {GRID}")
        self.listing = dataclasses.replace(listing, entries=entries)

        # The first image decides for all of them.
        first = read_entry(listing.root, entries[0], None)
        self.cropped = size is not None
        self.size = size or (first.shape[0], first.shape[1])
        self.grey = is_grey(first)
        self.labels: Sequence[int] | None = (
            [e.label for e in entries] if listing.class_names else None
        )
        self.lossy = any(e.name.lower().endswith(LOSSY) for e in entries)
        self._pool = Helpers(min(8, own_cores()))

    def __len__(self) -> int:
        return len(self.listing.entries)

    @property
    def left_out(self) -> str:
        """One line that counts what is not used of the folder, with the reasons; empty if
        everything is.
        """
        return left_out_line(self.name, self.listing.left_out(with_text=True, known=BESIDE_SAMPLES))

    @functools.cached_property
    def captions(self) -> Sequence[tuple[str, ...]]:
        captions = read_captions(self.listing, needed=False)
        return [captions.get(e.name, ()) for e in self.listing.entries] if captions else ()

    def read(self, places: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        batches = [places[i : i + batch_size] for i in range(0, len(places), batch_size)]
        # The next batch is decoded while the caller uses this one.
        begun = [self._pool.map(self._read_one, batch) for batch in batches[:1]]
        for k in range(len(batches)):
            begun += [self._pool.map(self._read_one, batch) for batch in batches[k + 1 : k + 2]]
            yield torch.stack(list(begun.pop(0)))

    def _read_one(self, i: int) -> Tensor:
        entry = self.listing.entries[i]
        try:
            array = read_entry(self.listing.root, entry, self.size if self.cropped else None)
        except DataError as e:
            raise DataError(f"{self.name}: {e}") from e

        if self.channels == 1:
            _refuse_colour(array, self.image_name(i))

        if array.shape[:2] != self.size:
            has = "{}x{}".format(*array.shape[:2])
            first = "{}x{}".format(*self.size)
            raise DataError(
                f"{self.image_name(i)} is {has}, the first image is {first}; "
                "give images of one size (--resolution crops those of a reference)"
            )

        return torch.from_numpy(array[..., : self.channels].copy()).permute(2, 0, 1)

    def image_name(self, i: int) -> str:
        return f"{self.name}: {self.listing.entries[i].name}"

    def sha256(self) -> str:
        crop = self.size if self.cropped else None
        digest = hashlib.sha256(repr((self.channels, crop)).encode())
        for file in dict.fromkeys(e.archive or e.name for e in self.listing.entries):
            digest.update(sha256(self.listing.root / file).encode())
        return digest.hexdigest()


class _Npz:
    captions: Sequence[tuple[str, ...]] = ()

    def __init__(self, path: Path, channels: int, size: tuple[int, int] | None):
        self.path = path
        self.name = str(path)
        self.channels = channels
        self.lossy = False

        arrays = open_npz(path)
        if IMAGES not in arrays:
            raise DataError(
                f"{path}: holds no {IMAGES}, only {', '.join(sorted(arrays)) or 'nothing'}"
            )
        self.rows = image_rows(arrays[IMAGES])
        height, width = self.rows.shape[1:3]
        self.size = (height, width)
        self.grey = is_grey(next(self.rows.read(0, 1)))
        _refuse_other_size(self, size)

        # Labels, if there is one for each image.
        self.left_out = ""
        labels = arrays.get(LABELS)
        if labels is not None and (
            labels.shape != self.rows.shape[:1] or labels.dtype.kind not in "iu"
        ):
            why = f"{labels.dtype} of shape {labels.shape}, which is not one integer per image"
            self.left_out = left_out_line(self.name, [LeftOut(1, "array", why, LABELS)])
            labels = None
        self.labels: Sequence[int] | None = None if labels is None else labels.read_all().tolist()

    def __len__(self) -> int:
        return self.rows.shape[0]

    def read(self, places: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        requested = set(places)
        first = places[0]  # of the block
        for block in self.rows.read(first, places[-1] + 1, batch_size):
            chosen = [i for i in range(len(block)) if first + i in requested]

            if self.channels == 1:
                for i in chosen:
                    _refuse_colour(block[i], self.image_name(first + i))

            images = torch.from_numpy(block[chosen][..., : self.channels]).permute(0, 3, 1, 2)
            yield images.expand(-1, self.channels, -1, -1)
            first += len(block)

    def image_name(self, i: int) -> str:
        return f"{self.path}: image {i} of {IMAGES}"

    def sha256(self) -> str:
        return f"{self.channels}-{sha256(self.path)}"


def _refuse_other_size(images: ImageSet, size: tuple[int, int] | None) -> None:
    """Raises ConfigError if arrays of images, which are not cropped, have another size than the
    requested one.
    """
    if size is not None and size != images.size:
        height, width = images.size
        raise ConfigError(
            f"resolution: {images.name} holds images of {height}x{width}, which are not cropped"
        )


def _refuse_colour(image: np.ndarray, name: str) -> None:
    """Raises DataError for a colour image."""
    if not is_grey(image):
        raise DataError(f"{name} is {IN_COLOUR}")


class _Builtin:
    left_out = ""

    def __init__(self, path: str, channels: int, size: tuple[int, int] | None = None):
        held_out = path.endswith(HELD_OUT)
        name = path.removeprefix(BUILTIN).removesuffix(HELD_OUT)
        source = builtin.load(name, None, held_out=held_out)
        height, width = source.images.shape[2:]
        self.name = path
        self.size = (height, width)
        self.grey = source.images.shape[1] == 1
        self.lossy = False
        if channels == 1 and not self.grey:
            raise DataError(f"{path} is {IN_COLOUR}")

        # The images are sorted by class, which would make the Inception Score too low.
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
        self.images = source.images[order].expand(-1, channels, -1, -1)
        self.labels: Sequence[int] | None = source.labels[order].tolist()
        self.captions: Sequence[tuple[str, ...]] = (
            [source.captions[i] for i in order] if source.captions else ()
        )
        _refuse_other_size(self, size)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, places: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        yield from self.images[torch.as_tensor(places)].split(batch_size)

    def image_name(self, i: int) -> str:
        return f"{self.name}: image {i}"

    def sha256(self) -> str:
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()


class DrawnImages:
    """An ImageSet that draws one image per seed.

    Args:
        labels: one per seed; None for an unconditional model.
        channels: number of channels that the extractor takes.
        facts: what determines the images, from `sample_facts`; needed to cache features.
        text: one caption per seed; None for a model without text.
    """

    lossy = False
    left_out = ""
    captions: Sequence[tuple[str, ...]] = ()  # `text` is what was asked for

    def __init__(
        self,
        sampler: Sampler,
        seeds: range,
        labels: Sequence[int] | None,
        channels: int,
        name: str,
        facts: Mapping[str, Any] | None = None,
        text: Text | None = None,
    ):
        data = sampler.config.data
        if channels == 1 and not data.is_grey:
            raise ConfigError(
                "extractor: this one takes grey images, but the run draws colour images"
            )

        self.sampler = sampler
        self.seeds = seeds
        self.labels = labels
        self.channels = channels
        self.name = name
        self.size = data.size
        self.grey = data.is_grey
        self.facts = facts
        self.text = text

    def __len__(self) -> int:
        return len(self.seeds)

    def read(self, places: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            labels = self.labels and [self.labels[i] for i in chosen]
            text = self.text and self.text.of(list(chosen))
            for _, images in self.sampler.draw([self.seeds[i] for i in chosen], labels, text):
                yield images.expand(-1, self.channels, -1, -1)

    def image_name(self, i: int) -> str:
        """The name of an image, for an error."""
        return f"{self.name}: the image of seed {self.seeds[i]}"

    def sha256(self) -> str:
        """Hash of what determines the images: weights, sampler, seeds, code and device."""
        assert self.facts is not None, "the hash of drawn images needs their facts"
        names = (*FIXED, "num", "versions", "device")
        facts = {name: self.facts[name] for name in names} | {"channels": self.channels}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

"""Sources of training images, read by index and opened from `data.path`.

B batch   C channels   H x W grid   x_0 (B, C, H, W) float32 in model space   labels (B,) int64
"""

import dataclasses
import functools
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffussm_cli.config import BUILTIN, PYTHON, Config, named_columns
from diffussm_cli.data.captions import read_captions
from diffussm_cli.data.datasets import DatasetSource
from diffussm_cli.data.images import coins, to_model_space
from diffussm_cli.data.listing import (
    UNREADABLE,
    LeftOut,
    Listing,
    empty_classes,
    left_out_line,
    list_source,
    read_entry,
)
from diffussm_cli.data.text import Captioned, open_texts
from diffussm_cli.data.vae import full_name, read_facts
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.events import Event, Progress
from diffussm_cli.machine.device import Helpers
from diffussm_cli.machine.processes import World, gather, own_cores

AT_ONCE = 256  # images that are handed to the threads at a time


class Source(Protocol):
    """Images by index. All randomness comes from the generators, one per image, so that a step can
    be repeated.
    """

    class_names: tuple[str, ...]

    @property
    def labels(self) -> Sequence[int] | Tensor:
        """The label of each image; empty if they are not known before the images are read."""

    @property
    def left_out(self) -> str:
        """One line that counts what is not used of the data, with the reasons; empty if everything
        is.
        """

    def __len__(self) -> int: ...

    def text(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """Return one caption of each image as vectors, (B, 1 + K, E); only if the run has text."""

    def read(
        self, indices: Sequence[int], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Return x_0 (B, C, H, W) and labels (B,) of the images; each image has its own
        generator.
        """


class ImageFolder(Captioned):
    """A training source over a folder of images in any layout of `list_source`; every read decodes
    the files.
    """

    def __init__(
        self,
        root: Path,
        size: tuple[int, int],
        channels: int,
        flip: bool = False,
        columns: Mapping[str, str] = {},
        listing: Listing | None = None,
    ):
        if channels not in (1, 3):
            raise DataError(f"data.channels: {channels} must be 1 or 3 for a folder of images")
        self.size, self.channels, self.flip = size, channels, flip
        self.listing = listing or list_source(root, "data.path", columns)
        self.entries = self.listing.entries
        self.class_names = self.listing.class_names
        self._pool = Helpers(min(8, own_cores()))
        self._unused_captions: list[LeftOut] = []

    @property
    def left_out(self) -> str:
        """One line that counts what is not used of the folder, with the reasons; empty if
        everything is.
        """
        parts = self.listing.left_out(with_text=self.texts is not None)
        return left_out_line(self.listing.root, [*parts, *self._unused_captions])

    @property
    def labels(self) -> list[int]:
        """The label of each image."""
        return [e.label for e in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def read(
        self, indices: Sequence[int], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(np.stack(list(self._pool.map(self._decode, indices)))).permute(
            0, 3, 1, 2
        )
        labels = torch.tensor([self.entries[i].label for i in indices])
        return to_model_space(images, coins(self.flip, generators)), labels

    def _decode(self, i: int) -> np.ndarray:
        return read_entry(self.listing.root, self.entries[i], self.size, self.channels)

    def captions_of(self, i: int) -> tuple[str, ...]:
        return self._captions.get(self.name_of(i), ())

    def name_of(self, i: int) -> str:
        return self.entries[i].name

    @functools.cached_property
    def _captions(self) -> dict[str, tuple[str, ...]]:
        return read_captions(self.listing, left_out=self._unused_captions)

    def check(self, indices: Sequence[int]) -> Iterator[tuple[int, dict[int, str]]]:
        """Decode images once; yields the number of images in each block, and the reason of each
        failure by index.
        """
        for start in range(0, len(indices), AT_ONCE):
            block = indices[start : start + AT_ONCE]
            yield (
                len(block),
                {
                    i: reason
                    for i, reason in zip(block, self._pool.map(self._reason, block))
                    if reason
                },
            )

    def _reason(self, i: int) -> str | None:
        try:
            self._decode(i)
        except DataError as e:
            return str(e).removeprefix(f"{Path(self.entries[i].name)}: ")
        return None

    def leave_out(self, names: Mapping[int, str]) -> None:
        """Remove images from the source, each given by its index and name.

        Raises:
            DataError: if the image at an index has another name, or a class is left without images.
        """
        for i, name in names.items():
            if not 0 <= i < len(self.listing.entries) or self.listing.entries[i].name != name:
                raise DataError(
                    f"data.path: image {i} of {str(self.listing.root)!r} is no longer {name!r}"
                )
        self.entries = [e for i, e in enumerate(self.listing.entries) if i not in names]
        lost = {e.label for e in self.listing.entries} - {e.label for e in self.entries}
        for label in lost:
            folder = self.listing.root / (self.class_names[label] if self.class_names else "")
            raise DataError(f"data.path: {str(folder)!r} holds no readable images")


class Part:
    """A share of the images of a source, held out at random, or the rest. The seed of the run does
    not change it.
    """

    def __init__(self, source: Source, share: float, held_out: bool = False):
        self.source = source
        self.share = share
        self.held_out = held_out
        self.class_names = source.class_names

    @property
    def labels(self) -> Sequence[int] | Tensor:
        """Those of the undivided source."""
        return self.source.labels

    @property
    def left_out(self) -> str:
        """As that of the undivided source."""
        return self.source.left_out

    @property
    def indices(self) -> np.ndarray:
        """Indices in the undivided source, which may lose unreadable images before training."""
        return _split(len(self.source), self.share)[self.held_out]

    def __len__(self) -> int:
        return len(self.indices)

    def read(
        self, indices: Sequence[int], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        return self.source.read(self.indices[indices].tolist(), generators)

    def text(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        return self.source.text(self.indices[indices].tolist(), generators)


def undivided(source: Source) -> Source:
    """The source itself, or the one that it is a Part of."""
    return source.source if isinstance(source, Part) else source


def doubts(source: Source, config: Config) -> list[str]:
    """Lines about data that can be used, but may not be what was meant: their scale, and classes
    without images.
    """
    scale = getattr(undivided(source), "warning", "")
    empty = empty_classes(source.class_names, source.labels) if config.model.num_classes else ""
    return [line for line in (scale, empty) if line]


def unreadable_images(
    source: ImageFolder, world: World
) -> Generator[Event, None, list[tuple[int | None, str, str]]]:
    """Decode every image once, by all processes together.

    Returns:
        index, name and reason of every image that cannot be read; the index is None if it was not
        even listed.
    """
    places = range(world.rank, len(source), world.size)
    reasons: dict[int, str] = {}
    done = 0
    yield Progress(0, len(places), "checking images")
    for checked, failures in source.check(places):
        done += checked
        reasons |= failures
        yield Progress(done, len(places), "checking images")

    for failures in gather(reasons, world):
        reasons |= failures
    decoded: list[tuple[int | None, str, str]] = [
        (i, source.entries[i].name, reasons[i]) for i in sorted(reasons)
    ]
    return decoded + [
        (None, name, why) for name, why in source.listing.ignored if why.startswith(UNREADABLE)
    ]


@functools.lru_cache(maxsize=2)
def _split(n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The indices 0..n-1 to train on, and those to hold out; at least one of each if n > 1."""
    held_out = np.random.default_rng(0).permutation(n) < min(n - 1, max(1, round(n * share)))
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def open_source(
    config: Config, dataset: Dataset | None = None, listing: Listing | None = None
) -> Source:
    """Open the data set of `data.path`, without the images that `data.held_out` excludes, and check
    it.

    Args:
        dataset: the data as an object, in place of those at `data.path`.
        listing: of the images at `data.path`, if somebody has listed them.

    Raises:
        DataError, ConfigError: if the data set is missing, is empty or does not fit the model.
    """
    d = config.data
    if dataset is not None and d.normalize == "measured" and not d.latents_std:
        raise ConfigError(
            "data.normalize: measured needs a store of latents; of a Dataset, name its statistics "
            "as data.latents_mean and data.latents_std"
        )
    source = _open(config, listing=listing) if dataset is None else DatasetSource(dataset, config)
    share = config.data.held_out
    _check_classes(config, source)
    return Part(source, share) if share and isinstance(share, float) else source


def open_held_out(config: Config, source: Source) -> Source | None:
    """The images that a run never trains on, or None; `source` is from `open_source`. Raises
    DataError, ConfigError.
    """
    d = config.data
    if isinstance(source, Part):
        return Part(source.source, source.share, held_out=True)
    if isinstance(d.held_out, float) or not (d.held_out or d.path.startswith(BUILTIN)):
        return None

    try:
        held_out = _open(
            dataclasses.replace(config, data=dataclasses.replace(d, path=d.held_out or d.path)),
            held_out=True,
        )
    except (DataError, ConfigError) as e:
        raise type(e)(f"data.held_out: {str(e).removeprefix('data.path: ')}") from e

    if config.model.num_classes and held_out.class_names != source.class_names:
        raise ConfigError(
            f"data.held_out: {d.held_out!r} must hold the same classes as data.path {d.path!r}"
        )
    return held_out


def _open(config: Config, held_out: bool = False, listing: Listing | None = None) -> Source:
    source = _open_images(config, held_out, listing)
    if config.data.text is not None and isinstance(source, Captioned):
        source.embed(open_texts(config), config.data.path)
    return source


def text_hash(config: Config, source: Source) -> str:
    """The hash of the text encoder of a source from `open_source`; empty without text."""
    images: Any = undivided(source)
    if config.data.text is None:
        return ""
    return (
        images.settings.text_sha256 if hasattr(images, "settings") else images.texts.encoder.sha256
    )


def latent_statistics(source: Source) -> dict[str, Any]:
    """The fields of `data` with the statistics by which a source from `open_source` normalises its
    latents; none if it does not.
    """
    images: Any = undivided(source)
    return getattr(images, "statistics", {})


def vae_hash(source: Source) -> str:
    """The hash of the VAE that made the latents of a source from `open_source`; empty for
    pixels.
    """
    images: Any = undivided(source)
    return images.settings.vae_weights_sha256 if hasattr(images, "settings") else ""


def _open_images(config: Config, held_out: bool, listing: Listing | None) -> Source:
    from diffussm_cli.data import builtin
    from diffussm_cli.data.latents.manifest import MANIFEST
    from diffussm_cli.data.latents.reading import LatentStore

    d = config.data

    # No folder.
    if d.path.startswith(BUILTIN):
        return builtin.load(d.path.removeprefix(BUILTIN), d.size, d.channels, d.flip, held_out)
    if d.path.startswith(PYTHON):
        raise ConfigError(
            f"data.path: {d.path!r} was a dataset of a Python program; give it again, "
            "as diffussm.train(data=...)"
        )
    if not d.path:
        raise ConfigError("data.path: no data set given; pass --data FOLDER")

    # Latents, or images.
    if d.vae is not None:
        if not (Path(d.path) / MANIFEST).is_file():
            raise DataError(_latents_missing(config))
        source = LatentStore(Path(d.path), d.flip, config.model.text_tokens)
        _check_latents(config, source.settings)
        if d.normalize == "measured":
            source.normalize(d)
        return source

    columns = named_columns(d.columns, "data.columns")
    return ImageFolder(Path(d.path), d.size, d.channels, d.flip, columns, listing)


def _check_classes(config: Config, source: Source) -> None:
    names = config.data.class_names
    if names and names != source.class_names:
        raise ConfigError(
            f"data.class_names: {names[0]!r}, ... are not the classes of {config.data.path}; "
            "remove the field, because the classes are read from the data"
        )

    classes = config.model.num_classes
    in_data = len(source.class_names)
    if classes and classes != in_data:
        in_folders = isinstance(source, ImageFolder) and not source.entries[0].archive
        kind = "class folders" if in_folders else "classes"
        has = f"has {in_data or 'no'} {kind}"
        unread = "" if in_data or not source.left_out else f"; {source.left_out}"  # labels, perhaps
        raise ConfigError(
            f"model.num_classes: {classes}, but {config.data.path} {has}; "
            f"--set model.num_classes={in_data}{unread}"
        )


def _check_latents(config: Config, settings: Any) -> None:
    """Raises ConfigError if the latents have another size or VAE than the run."""
    d = config.data
    assert d.vae is not None, "these are latents"
    height, width = settings.resolution
    facts = {
        "resolution": (
            d.size,
            settings.resolution,
            height if height == width else f"{height}x{width}",
        ),
        "channels": (d.channels, settings.channels, settings.channels),
        "downsample": (d.downsample, settings.downsample, settings.downsample),
        "vae": (full_name(d.vae), full_name(settings.vae), settings.vae),
    }
    if (
        os.path.isdir(d.vae)
        and read_facts(d.vae, "data.vae").config_sha256 == settings.vae_config_sha256
    ):
        del facts["vae"]  # the folder may have been moved; decoding compares the weights

    for field, (expected, stored, value) in facts.items():
        if expected != stored:
            raise ConfigError(
                f"data.{field}: {getattr(d, field)!r}, but the latents in {d.path!r} have "
                f"{value!r}; --set data.{field}={value}"
            )

    m, but = config.model, f"but the captions in {d.path!r} are"
    if d.text is None:
        return
    if d.text != settings.text or d.text_sha256 not in ("", settings.text_sha256):
        has = f"of {settings.text}" if settings.text else "missing; encode the images with --text"
        raise ConfigError(f"data.text: {d.text!r}, {but} {has}")
    if m.text_width != settings.text_width or m.text_tokens > settings.text_tokens:
        stored = f"{settings.text_tokens} tokens of width {settings.text_width}"
        raise ConfigError(
            f"model.text_tokens: {m.text_tokens} of width {m.text_width}, {but} {stored}"
        )


def _latents_missing(config: Config) -> str:
    d = config.data
    return (
        f"data.path: no folder of latents at {d.path!r}; create it first: "
        f"diffussm encode IMAGES {d.path} --resolution {d.resolution}"
    )

"""Opens the data set of a configuration, and checks that it fits the run."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from diffussm_cli.config import BUILTIN, PYTHON, Config, named_columns
from diffussm_cli.data.datasets import DatasetSource
from diffussm_cli.data.folder import ImageFolder
from diffussm_cli.data.listing import Listing, empty_classes
from diffussm_cli.data.source import Part, Source, undivided
from diffussm_cli.data.text import Captioned, open_texts
from diffussm_cli.data.vae_facts import full_name, read_facts
from diffussm_cli.errors import ConfigError, DataError


def doubts(source: Source, config: Config) -> list[str]:
    """Lines about data that can be used, but may not be what was meant: their scale, colours that
    are lost, and classes without images that are trained on.
    """
    images = undivided(source)
    scale = getattr(images, "warning", "")
    loses_colour = config.data.is_grey and isinstance(images, ImageFolder) and images.in_colour()
    colour = "colour images become grey: data.channels=1" if loses_colour else ""
    empty = empty_classes(source.class_names, source.labels) if config.model.num_classes else ""
    if empty and isinstance(source, Part):
        empty = f"data.held_out: without a share of {source.share:g}, {empty}"
    return [line for line in (scale, colour, empty) if line]


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


def count_shared(held_out: Source, source: Source) -> int:
    """How many images of one source are images of the other too: the same files, under whatever
    name, or the same store.
    """
    images: Any = held_out
    others: Any = undivided(source)
    if isinstance(images, ImageFolder) and isinstance(others, ImageFolder):
        return len(images.listing.places() & others.listing.places())
    root: Path | None = getattr(images, "root", None)
    other: Path | None = getattr(others, "root", None)
    is_same = root is not None and other is not None and os.path.samefile(root, other)
    return len(images) if is_same else 0


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


def content_hashes(config: Config, source: Source) -> dict[str, str]:
    """Hashes of what the list of images does not show of a source from `open_source`: of `pixels`
    in arrays and of `latents`, and of `captions` for a run with text. Raises DataError.
    """
    images: Any = undivided(source)
    hashes = {"latents": getattr(images, "shards_sha256", "")}
    if isinstance(images, ImageFolder):
        hashes["pixels"] = images.listing.arrays_sha256()
    if config.data.text is not None and isinstance(images, Captioned):
        hashes["captions"] = images.captions_sha256()
    return {name: value for name, value in hashes.items() if value}


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

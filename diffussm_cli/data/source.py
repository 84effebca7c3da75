"""What the training loop reads: a source of images by index, opened from `data.path`.

B batch   C channels   H x W grid   x_0 (B, C, H, W) float32 in model space   labels (B,) int64
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffussm_cli.config import BUILTIN, Config
from diffussm_cli.errors import ConfigError, DataError


class Source(Protocol):
    """Images by index. What chance there is comes from the generator, so that a step can be repeated.

    It is drawn for all indices though only `part` of them be read, so that processes which share a batch agree.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(
        self, indices: Sequence[int], generator: torch.Generator, part: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """x_0 (B, C, H, W) and labels (B,) of indices[part]."""


def open_source(config: Config) -> Source:
    """The data set of `data.path`, checked against the configuration.

    Raises:
        DataError, ConfigError: if it is missing, empty or does not fit the model.
    """
    from diffussm_cli.data import builtin, images
    from diffussm_cli.data.latents.manifest import MANIFEST
    from diffussm_cli.data.latents.reading import LatentStore

    d = config.data
    if d.path.startswith(BUILTIN):
        source: Source = builtin.load(d.path.removeprefix(BUILTIN), d.size, d.channels, d.flip)
    elif not d.path:
        raise ConfigError("data.path: no data set given; pass --data FOLDER")
    elif d.vae is not None:
        if not (Path(d.path) / MANIFEST).is_file():
            raise DataError(_latents_missing(config))
        source = LatentStore(Path(d.path), d.flip)
        _check_latents(config, source.settings)
    else:
        source = images.ImageFolder(Path(d.path), d.size, d.channels, d.flip)
    _check_classes(config, source)
    return source


def _check_classes(config: Config, source: Source) -> None:
    given = config.data.class_names
    if given and given != source.class_names:
        raise ConfigError(
            f"data.class_names: {given[0]!r}, ... are not the classes of {config.data.path}; leave the field out, they "
            "are found in the data"
        )
    wanted, found = config.model.num_classes, len(source.class_names)
    if wanted and wanted != found:
        has = f"has {found} class folders" if found else "has no class folders"
        raise ConfigError(f"model.num_classes: {wanted}, but {config.data.path} {has}; --set model.num_classes={found}")


def _check_latents(config: Config, settings: Any) -> None:
    """Raises ConfigError for latents of another size or VAE than the run's."""
    d = config.data
    height, width = settings.resolution
    found = {
        "resolution": (d.size, settings.resolution, height if height == width else f"{height}x{width}"),
        "channels": (d.channels, settings.channels, settings.channels),
        "downsample": (d.downsample, settings.downsample, settings.downsample),
        "vae": (d.vae, settings.vae, settings.vae),
    }
    for field, (wanted, has, value) in found.items():
        if wanted != has:
            given = getattr(d, field)
            raise ConfigError(
                f"data.{field}: {given!r}, but the latents in {d.path!r} have {value!r}; --set data.{field}={value}"
            )


def _latents_missing(config: Config) -> str:
    d = config.data
    return (
        f"data.path: no folder of latents at {d.path!r}; make one first: "
        f"diffussm encode IMAGES {d.path} --resolution {d.resolution}"
    )

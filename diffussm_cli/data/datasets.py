"""A torch Dataset of a user as a source of training images.

B batch   C channels   H x W pixels or latents
"""

from collections.abc import Iterable, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffussm_cli.config import MAX_CLASSES, Config, whole_number
from diffussm_cli.data.images import coins, to_model_space, to_uint8
from diffussm_cli.data.vae_facts import space_of
from diffussm_cli.errors import DataError

LARGEST = 1.001  # of pixels in model space: 1 and a rounding error
LOOKED_AT = 16  # items, at equal distances, by which values of the wrong scale are noticed


class DatasetSource:
    """Images and labels of a map-style Dataset, whose items are (C, H, W) or pairs of that and a
    label.

    uint8 images are scaled to [-1, 1]. Floats are taken as they are, and must be finite; pixels
    must be in [-1, 1], latents need not. Latents in model space are normalised by the statistics of
    the configuration, if it has any. Labels do not count for a model without classes.

    Raises:
        DataError: if it is empty, its first item does not fit the model or its classes, or the run
            needs captions.
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
        self.has_labels = config.model.num_classes > 0
        self.of_pixels = config.data.vae is None
        self.shape = (config.data.channels, *config.data.grid)
        C = config.data.channels
        space = space_of((1.0,) * C, (0.0,) * C, config.data)
        self.scale, self.shift = (torch.tensor(v).view(1, -1, 1, 1) for v in space)

        check_dataset(dataset)
        self._image(0)
        self.class_names: tuple[str, ...] = ()
        self.labels: list[int] = []
        if self.has_labels:
            self.class_names, self.labels = classes_of(dataset)
        if self.class_names:
            self._item(0)
        self.warning = self._doubt()

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
            x = to_model_space(images, flipped)
        else:
            x = torch.where(flipped[:, None, None, None], images.flip(-1), images).float()
        return (x - self.shift) * self.scale, labels

    def text(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:  # noqa: ARG002
        raise AssertionError("refused above")

    def _doubt(self) -> str:
        """`scale_doubt` of items at equal distances; empty for latents, which have no scale."""
        if not self.of_pixels:
            return ""
        last = len(self) - 1
        places = sorted({i * last // (LOOKED_AT - 1) for i in range(LOOKED_AT)})
        return scale_doubt([self._image(i)[0] for i in places])

    def _item(self, i: int) -> tuple[Tensor, int]:
        """Image and label of an item, checked."""
        image, label = self._image(i)
        if not self.has_labels:
            return image, 0
        return image, check_label(label, place(self.dataset, i), len(self.class_names))

    def _image(self, i: int) -> tuple[Tensor, Any]:
        """The image of an item, checked, and its label."""
        image, label = split(self.dataset[i])
        where = place(self.dataset, i)
        if tuple(image.shape) != self.shape:
            raise DataError(
                f"{where} has the shape {tuple(image.shape)}, but the model takes {self.shape}"
            )
        check_values(image, where, self.of_pixels)
        return image, label


def check_dataset(dataset: Any) -> None:
    """Raises DataError for an object without items that can be counted and read by their number."""
    is_class = isinstance(dataset, type)
    name = dataset.__name__ if is_class else type(dataset).__name__
    if is_class or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        given = f"the class {name}" if is_class else f"a {name}"
        raise DataError(
            f"data: {given} given; give a folder, or a Dataset, which has __len__ and __getitem__"
        )
    if not len(dataset):
        raise DataError("data: the dataset is empty")


def classes_of(dataset: Dataset) -> tuple[tuple[str, ...], list[int]]:
    """The Dataset's `classes`, or else the numbers up to its largest label, for which all items are
    read; and the labels, if they are read. Raises DataError.
    """
    names = getattr(dataset, "classes", None)
    if names is not None:
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise DataError(
                f"data: the classes of the {type(dataset).__name__} are {names!r:.80}; "
                "they must be a list of names"
            )
        return tuple(map(str, names)), []
    labels = [
        check_label(split(dataset[i])[1], place(dataset, i))
        for i in range(len(cast(Sized, dataset)))
    ]
    return tuple(str(label) for label in range(max(labels) + 1)), labels


def place(dataset: Dataset, i: int) -> str:
    """What errors call an item of a Dataset."""
    return f"data: item {i} of the {type(dataset).__name__}"


def check_values(image: Tensor, where: str, of_pixels: bool) -> None:
    """Raises DataError for values that are neither bytes nor finite floats, or for pixels outside
    [-1, 1] or of other than 1 or 3 channels.
    """
    if of_pixels and len(image) not in (1, 3):
        raise DataError(
            f"{where} has the shape {tuple(image.shape)}; it must be (C, H, W), "
            "with 1 or 3 channels first"
        )

    is_float = image.is_floating_point()
    if is_float and not torch.isfinite(image).all():
        raise DataError(f"{where} holds a number that is not finite")
    is_wide = is_float and of_pixels and image.abs().max() > LARGEST
    if is_wide or not (is_float or image.dtype == torch.uint8):
        kind = str(image.dtype).removeprefix("torch.")
        span = f"{image.min().item():g} to {image.max().item():g}"
        raise DataError(f"{where} is {kind} from {span}; give uint8, or floats in [-1, 1]")


def scale_doubt(images: Sequence[Tensor]) -> str:
    """A line if pixels seem to lie in [0, 1], where torchvision's ToTensor puts them; else empty.

    Args:
        images: uint8, or floats in [-1, 1]; at least one.
    """
    floats = [image for image in images if image.is_floating_point()]
    if len(floats) < len(images) or min(image.min() for image in floats) < 0:
        return ""
    if not any(image.max() > 0 for image in floats):
        return ""
    return (
        f"data: the pixels of {len(images)} items lie in [0, 1], as ToTensor makes them, "
        "but floats are taken to lie in [-1, 1]; give 2 * x - 1 or uint8"
    )


def check_label(label: Any, where: str, classes: int = MAX_CLASSES) -> int:
    """A label as an int. Raises DataError for one that is no whole number below the number of
    classes.
    """
    number = whole_number(label)
    if number is None or not 0 <= number < classes:
        of = "" if classes == MAX_CLASSES else f", because the data have {classes} classes"
        raise DataError(
            f"{where} has the label {label!r:.80}; "
            f"labels must be whole numbers from 0 to {classes - 1}{of}"
        )
    return number


def split(item: Any) -> tuple[Tensor, Any]:
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
    return image, label


def images_of(dataset: Dataset) -> tuple[Tensor, str]:
    """All images of a Dataset, uint8 (n, C, H, W), and their `scale_doubt`. Raises DataError."""
    check_dataset(dataset)
    items = [split(dataset[i])[0] for i in range(len(cast(Sized, dataset)))]
    for i, image in enumerate(items):
        check_values(image, place(dataset, i), of_pixels=True)
    images = torch.stack(items)
    if images.dtype == torch.uint8:
        return images, ""
    return to_uint8(images), scale_doubt(items)

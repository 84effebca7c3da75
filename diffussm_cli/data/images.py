"""Images on disk: listed, opened with care, cropped as ADM does, written as PNG and as grids.

Arrays are uint8; a folder of class folders gives labels in the sorted order of their names. Every picture becomes
upright RGB or grey of 8 bits: 16-bit values are scaled, alpha is laid on white, CMYK, palettes and others are converted
by Pillow without colour profiles, of an animation the first frame counts.
"""

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffussm_cli.device import helpers
from diffussm_cli.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 1 << 26
GRID = "grid.png"  # a picture of many images beside them; not one of them
EVERYTHING = slice(None)
# What Pillow's decoders raise when a file is damaged.
DECODING = (OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, TypeError, MemoryError)
DECODING += (struct.error, Image.DecompressionBombError)


class ImageFolder:
    """A folder of images, or of one folder a class, as a training source; files are decoded as they are read."""

    def __init__(self, root: Path, size: tuple[int, int], channels: int, flip: bool = False):
        if channels not in (1, 3):
            raise DataError(f"data.channels: {channels} must be 1 or 3 for a folder of images")
        self.size, self.channels, self.flip = size, channels, flip
        self.files, self.labels, self.class_names = list_images(root)
        self._pool = helpers(min(8, os.cpu_count() or 1))

    def __len__(self) -> int:
        return len(self.files)

    def read(
        self, indices: Sequence[int], generator: torch.Generator, part: slice = EVERYTHING
    ) -> tuple[Tensor, Tensor]:
        mirrored, chosen = coins(len(indices), self.flip, generator)[part], indices[part]
        arrays = list(self._pool.map(lambda i: read_image(self.files[i], self.size, self.channels), chosen))
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        return to_model_space(images, mirrored), torch.tensor([self.labels[i] for i in chosen])


def list_images(root: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Files, labels and class names below a folder, sorted by name; a flat folder has no class names and labels 0.

    Raises:
        DataError: if the folder is missing, unreadable or holds no image.
    """
    try:
        entries = sorted(root.iterdir())
    except OSError as e:
        raise DataError(f"data.path: cannot read the folder {str(root)!r}: {e.strerror}") from e
    classes = [p for p in entries if p.is_dir() and not p.name.startswith(".")]
    files, labels = [], []
    for label, folder in enumerate(classes):
        found = [p for p in sorted(folder.rglob("*")) if _is_image(p)]
        if not found:
            raise DataError(f"data.path: the class folder {str(folder)!r} holds no image")
        files += found
        labels += [label] * len(found)
    if not classes:
        files = [p for p in entries if _is_image(p)]
        labels = [0] * len(files)
    if not files:
        raise DataError(f"data.path: no image in {str(root)!r} (looked for {', '.join(SUFFIXES)})")
    return files, labels, tuple(p.name for p in classes)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


@contextlib.contextmanager
def open_image(path: Path, content: BinaryIO | None = None) -> Iterator[Image.Image]:
    """An image of an allowed format and bearable size, read from `content` if given and else from `path`.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    try:
        with Image.open(content or path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width}x{image.height} pixels, more than the limit of {MAX_PIXELS}")
            yield image
    except UnidentifiedImageError as e:
        raise DataError(f"{path}: not a {', '.join(FORMATS)} image") from e
    except DECODING as e:
        reason = getattr(e, "strerror", None) or (str(e).splitlines() or [type(e).__name__])[0]
        raise DataError(f"{path}: cannot be decoded: {reason}") from e


def read_image(path: Path, size: tuple[int, int] | None, channels: int, content: BinaryIO | None = None) -> np.ndarray:
    """One image upright, cropped to (height, width) if that is given: uint8 (height, width, channels).

    Raises:
        DataError: if it cannot be decoded.
    """
    with open_image(path, content) as image:
        upright = flatten(image, channels)
        cropped = upright if size is None else centre_crop(upright, size)
        return np.asarray(cropped).reshape(cropped.height, cropped.width, channels)


def flatten(image: Image.Image, channels: int) -> Image.Image:
    """The first frame, upright, as 8 bits of grey (1 channel) or RGB (3); transparent parts become white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if channels == 1 else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey to 8, v / 257 to the nearest; Pillow itself would cut everything above 255."""
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise ValueError("pixels of more than 16 bits have no agreed range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """ADM's centre crop: halve by boxes while twice too large, resize the tighter side bicubically, cut the middle."""
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


# ----------------------------------------------------------------------------------------------- model space
def coins(n: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Which of n images are to be mirrored, bool (n,): each with probability 1/2 if `flip`, else none."""
    return torch.rand(n, generator=generator) < 0.5 if flip else torch.zeros(n, dtype=torch.bool)


def to_model_space(pixels: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """uint8 (B, C, H, W) to float32 in [-1, 1]; those of `mirrored`, bool (B,), left to right."""
    if mirrored is not None and mirrored.any():
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Model space [-1, 1] to pixels: floor(clamp(127.5 x + 128, 0, 255)), the rule of the ADM evaluation."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------- writing
def save_png(pixels: Tensor, path: Path | BinaryIO) -> None:
    """uint8 (C, H, W), C = 1 or 3, or (H, W), as PNG."""
    pixels = pixels[0] if pixels.ndim == 3 and len(pixels) == 1 else pixels
    array = pixels.cpu().numpy() if pixels.ndim == 2 else pixels.permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array).save(path, "PNG")


def save_grid(pixels: Tensor, path: Path, columns: int, gap: int = 2, smallest: int = 56) -> None:
    """uint8 (n, C, H, W) as one picture, row by row; images under `smallest` pixels are enlarged whole times."""
    n, C, H, W = pixels.shape
    rows, times = -(-n // columns), max(1, smallest // max(H, W))
    pixels = pixels.repeat_interleave(times, 2).repeat_interleave(times, 3)
    H, W = H * times, W * times
    canvas = torch.full((C, rows * (H + gap) + gap, columns * (W + gap) + gap), 128, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + (i // columns) * (H + gap), gap + (i % columns) * (W + gap)
        canvas[:, top : top + H, left : left + W] = image
    save_png(canvas, path)

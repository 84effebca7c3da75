"""Images on disk: opened with care, cropped as ADM does, written as PNG and as grids.

Arrays are uint8. Every picture becomes upright RGB or grey of 8 bits: 16-bit values are scaled, alpha is laid on white,
CMYK, palettes and others are converted by Pillow without colour profiles, of an animation the first frame counts.
"""

import contextlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffussm_cli.errors import DataError, reason

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 1 << 26
GRID = "grid.png"  # a picture of many images beside them; not one of them
# What Pillow's decoders raise when a file is damaged.
DECODING = (OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, TypeError, MemoryError)
DECODING += (struct.error, Image.DecompressionBombError)


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
        raise DataError(f"{path}: cannot be decoded: {reason(e)}") from e


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
def coins(flip: bool, generators: Sequence[torch.Generator]) -> Tensor:
    """Which images are to be mirrored, one per generator, bool (B,): each with probability 1/2 if `flip`, else none."""
    if not flip:
        return torch.zeros(len(generators), dtype=torch.bool)
    return torch.cat([torch.rand(1, generator=g) for g in generators]) < 0.5


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


def save_grid(pixels: Tensor, path: Path | BinaryIO, columns: int, gap: int = 2, smallest: int = 56) -> None:
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

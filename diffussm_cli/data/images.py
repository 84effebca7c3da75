"""Read untrusted image files, crop them as ADM does, and write PNG files and grids.

Arrays are uint8. Every image becomes upright 8-bit RGB or grey: 12-bit and 16-bit values are
scaled, transparent parts become white, Pillow converts CMYK, palettes and others without colour
profiles, and animations keep only their first frame.
"""

import contextlib
import io
import struct
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    TiffImageFile,
)
from torch import Tensor

from diffussm_cli.errors import DataError, NotFiniteError, reason
from diffussm_cli.machine.files import open_regular

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 1 << 26  # of a file, and of an image that is enlarged before it is cropped
GRID_MARK = ("Software", "diffussm")  # of a grid that a program of Python has written
GRID = "grid.png"  # the overview beside a set of images; not one of the set
ORIENTATION = 0x0112  # of EXIF
WHITE_IS_ZERO, UNSIGNED = 0, 1  # values of two TIFF tags
# Errors that Pillow's decoders raise for damaged files.
DECODING: tuple[type[Exception], ...] = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
)
DECODING += (TypeError, MemoryError, struct.error, Image.DecompressionBombError)


@contextlib.contextmanager
def open_image(path: Path, content: BinaryIO | None = None) -> Iterator[Image.Image]:
    """Open an image of an allowed format and size, from `content` if given, else from `path`.

    Raises:
        DataError: naming the file and the problem.
    """
    try:
        with (
            contextlib.nullcontext(content) if content else open_regular(path) as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: {image.width}x{image.height} pixels, "
                    f"more than the limit of {MAX_PIXELS}"
                )

            yield image
    except UnidentifiedImageError as e:
        raise DataError(f"{path}: not a {', '.join(FORMATS)} image") from e
    except DECODING as e:
        raise DataError(f"{path}: cannot be decoded: {reason(e)}") from e


def read_image(
    path: Path, size: tuple[int, int] | None, channels: int, content: BinaryIO | None = None
) -> np.ndarray:
    """Read an image, upright and cropped to `size` (height, width) if given: uint8 (height, width,
    channels).

    Raises:
        DataError: if it cannot be decoded.
    """
    with open_image(path, content) as image:
        return _cropped(image, size, channels)


def fit_array(pixels: np.ndarray, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    """Pixels, uint8 (height, width, 1 or 3), as `read_image` gives those of a file."""
    image = Image.fromarray(
        np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    )
    return _cropped(image, size, channels)


def _cropped(image: Image.Image, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    upright = flatten(image, channels)
    cropped = upright if size is None else centre_crop(upright, size)
    return np.asarray(cropped).reshape(cropped.height, cropped.width, channels)


def flatten(image: Image.Image, channels: int) -> Image.Image:
    """The first frame, upright, as 8-bit grey (1 channel) or RGB (3 channels); transparent parts
    become white.

    Raises:
        ValueError: for pixels without a standard range: floating point, signed, or of more than 16
            bits.
    """
    # Eight bits and transparency, for which Pillow needs help.
    if image.mode == "F":
        raise ValueError("floating-point pixels have no standard range")
    if isinstance(image, TiffImageFile):
        formats = image.tag_v2.get(SAMPLEFORMAT, (UNSIGNED,))
        if set(formats) != {UNSIGNED}:
            raise ValueError("signed pixels have no standard range")
    opaque = _opaque(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if opaque is not None:
        image.info.pop("transparency", None)
        image.putalpha(Image.fromarray(opaque))

    # Upright, over white.
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if channels == 1 else "RGB")


def is_grey(image: np.ndarray) -> bool:
    """Whether all channels (..., C) of an image are equal, as in a grey image stored in colour."""
    return bool((image == image[..., :1]).all())


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits, rounded to the nearest. Pillow itself would clip all values
    above 255.
    """
    # What the values mean.
    bits = 16
    inverted = False
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        bits = tags.get(BITSPERSAMPLE, (1,))[0]
        inverted = tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
        if bits > 16:
            raise ValueError("pixels of more than 16 bits have no standard range")

    top = (1 << bits) - 1
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > top):
        raise ValueError(f"pixels of more than {bits} bits have no standard range")

    # A table of all values takes less memory than arithmetic on a large image.
    grey = ((np.arange(top + 1) * 255 * 2 + top) // (2 * top)).astype(np.uint8)
    scaled = Image.fromarray((grey[::-1] if inverted else grey)[values])

    # The orientation stands in Exif, which a new image lacks.
    exif = Image.Exif()
    exif[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    scaled.info["exif"] = exif.tobytes()
    return scaled


def _opaque(image: Image.Image) -> np.ndarray | None:
    """The opacity of a PNG that names a transparent colour with 2, 4 or 16 bits: uint8 (height,
    width), 0 or 255.

    None for other images, also of 1 and 8 bits, whose transparent colour Pillow finds. It compares
    the colour as it stands in the file with pixels that it has scaled to 8 bits.
    """
    colour = image.info.get("transparency")
    if colour is None or not isinstance(image, PngImageFile) or not image.tile:
        return None

    layout = image.tile[0].args
    if layout == "RGB;16B":
        low = _low_bytes(image)
        high = np.asarray(image)
        transparent = (high == np.array(colour) >> 8).all(2) & (low == np.array(colour) & 0xFF).all(
            2
        )
    elif layout in ("L;2", "L;4", "I;16B"):
        unit = {"L;2": 85, "L;4": 17, "I;16B": 1}[layout]
        transparent = np.asarray(image) == colour * unit
    else:
        return None

    return np.where(transparent, 0, 255).astype(np.uint8)


def _low_bytes(image: PngImageFile) -> np.ndarray:
    """The low bytes of the pixels of an RGB image of 16 bits, of which Pillow reads the high bytes;
    not loaded yet.
    """
    file: Any = image.fp
    place = file.tell()
    file.seek(0)
    again = PngImageFile(io.BytesIO(file.read()))
    file.seek(place)
    again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
    return np.asarray(again)


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """ADM's centre crop: halve with a box filter while twice too large, resize bicubically, and
    crop the centre.

    Raises:
        ValueError: for an image so narrow that it would be enlarged to more than MAX_PIXELS.
    """
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)

    scale = max(width / image.width, height / image.height)
    enlarged = (round(image.width * scale), round(image.height * scale))
    limit = max(MAX_PIXELS, 4 * height * width)
    if enlarged[0] * enlarged[1] > limit:
        what = (
            f"{image.width}x{image.height} pixels become {enlarged[0]}x{enlarged[1]} "
            "before the crop"
        )
        raise ValueError(f"{what}, more than the limit of {limit}")

    if scale != 1:
        image = image.resize(enlarged, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


# -------------------------------------------------------------------------------------- model space
def coins(flip: bool, generators: Sequence[torch.Generator]) -> Tensor:
    """Which images to flip, one per generator, as bool (B,): each with probability 1/2 if `flip`,
    otherwise none.
    """
    if not flip:
        return torch.zeros(len(generators), dtype=torch.bool)
    return torch.cat([torch.rand(1, generator=g) for g in generators]) < 0.5


def to_model_space(pixels: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Convert uint8 (B, C, H, W) to float32 in [-1, 1], with a horizontal flip where `mirrored`,
    bool (B,), is true.
    """
    if mirrored is not None and mirrored.any():
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor, names: Sequence[str] = ()) -> Tensor:
    """Convert model space [-1, 1] to pixels: floor(clamp(127.5 x + 128, 0, 255)), the rule of the
    ADM evaluation.

    Raises:
        NotFiniteError: as `check_finite`. A NaN would become a black pixel.
    """
    check_finite(x, names)
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def check_finite(x: Tensor, names: Sequence[str] = ()) -> None:
    """Raises NotFiniteError for the first image of x (B, ...) that holds NaN or an infinite value.

    Args:
        names: what the error calls each image, by default its place.
    """
    if bool(torch.isfinite(x).all()):
        return
    broken = [i for i, image in enumerate(x) if not bool(torch.isfinite(image).all())]
    raise NotFiniteError(names[broken[0]] if names else f"image {broken[0]}", broken[0])


# ------------------------------------------------------------------------------------------ writing
def save_png(pixels: Tensor, path: Path | BinaryIO, prompt: str | None = None) -> None:
    """Write uint8 (C, H, W) with C = 1 or 3, or (H, W), as a PNG file; a prompt goes into its text
    chunk `prompt`.
    """
    pixels = pixels[0] if pixels.ndim == 3 and len(pixels) == 1 else pixels
    array = pixels.cpu().numpy() if pixels.ndim == 2 else pixels.permute(1, 2, 0).cpu().numpy()
    chunks = PngInfo()
    if prompt is not None:
        chunks.add_itxt("prompt", prompt)
    Image.fromarray(array).save(path, "PNG", pnginfo=chunks)


def save_grid(
    pixels: Tensor, path: Path | BinaryIO, columns: int, titles: Sequence[str] = ()
) -> None:
    """Write uint8 (n, C, H, W) as one PNG, row by row, each image below its title if there are
    `titles`.
    """
    save_png(image_grid(pixels, columns, titles), path)


def image_grid(pixels: Tensor, columns: int, titles: Sequence[str] = ()) -> Tensor:
    """uint8 (n, C, H, W) -> one image (C, H', W'), row by row, each below its title if there are
    `titles`.

    Images under 56 pixels, or 112 pixels with a title, are enlarged by an integer.
    """
    n = len(pixels)
    gap = 2
    rows = -(-n // columns)
    times = max(1, (112 if titles else 56) // max(pixels.shape[2:]))
    pixels = pixels.repeat_interleave(times, 2).repeat_interleave(times, 3)

    if titles:
        strips = torch.stack([_title(text, pixels.shape[3]) for text in titles])[:, None]
        pixels = torch.cat([strips.expand(-1, pixels.shape[1], -1, -1), pixels], 2)

    _, C, H, W = pixels.shape
    canvas = torch.full(
        (C, rows * (H + gap) + gap, columns * (W + gap) + gap), 128, dtype=torch.uint8
    )
    for i, image in enumerate(pixels):
        top, left = gap + (i // columns) * (H + gap), gap + (i % columns) * (W + gap)
        canvas[:, top : top + H, left : left + W] = image
    return canvas


def grid_mark() -> PngInfo:
    """The mark in a PNG file by which `is_grid` knows it."""
    chunks = PngInfo()
    chunks.add_text(*GRID_MARK)
    return chunks


def is_grid(path: Path) -> bool:
    """Whether a file is a PNG with the mark of a grid."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get(GRID_MARK[0]) == GRID_MARK[1]
    except (OSError, ValueError, SyntaxError):
        return False


def _title(text: str, width: int) -> Tensor:
    """Text on two lines of 12 pixels, cut at the width: uint8 (26, width)."""
    font = ImageFont.load_default(11)
    image = Image.new("L", (width, 26), 255)
    lines = textwrap.wrap(text, max(1, int(width / font.getlength("d")))) or [""]
    kept = [*lines[:1], lines[1] + ("..." if len(lines) > 2 else "")] if len(lines) > 1 else lines
    ImageDraw.Draw(image).multiline_text((2, 0), "\n".join(kept), fill=0, font=font, spacing=1)
    return torch.from_numpy(np.array(image))

"""Reading, cropping and writing images, and what bad ones get."""

import io
import math
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli.data import images
from diffussm_cli.data.images import (
    centre_crop,
    coins,
    read_image,
    save_grid,
    to_model_space,
    to_uint8,
)
from diffussm_cli.errors import DataError, NotFiniteError


def write(path, width=8, height=8, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def generators(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def test_flips_follow_the_generators():
    x = torch.arange(2, dtype=torch.uint8).repeat(64, 1, 1, 1)
    once, again = (to_model_space(x, coins(True, generators(64))) for _ in range(2))
    assert torch.equal(once, again)
    mirrored = once[:, 0, 0, 0] > once[:, 0, 0, 1]
    assert 16 < mirrored.sum() < 48
    assert not coins(False, generators(64)).any()
    assert torch.equal(to_model_space(x), x / 127.5 - 1)


def test_centre_crop_equals_adm():
    """ADM's arithmetic, written out for a square: box-halve while twice too large, then bicubic,
    then the middle.
    """
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 135, 3), dtype=np.uint8))
    expected = image
    while min(*expected.size) >= 2 * 32:
        expected = expected.resize(
            (expected.width // 2, expected.height // 2), Image.Resampling.BOX
        )
    scale = 32 / min(*expected.size)
    size = (round(expected.width * scale), round(expected.height * scale))
    array = np.asarray(expected.resize(size, Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
    assert np.array_equal(
        np.asarray(centre_crop(image, (32, 32))), array[top : top + 32, left : left + 32]
    )


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (1, 1), (33, 64), (640, 480)])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_centre_crop_always_has_requested_size(shape, size):
    assert centre_crop(Image.new("RGB", shape), size).size == size[::-1]


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_modes_become_rgb_and_grey(tmp_path, mode):
    path = write(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"), mode=mode)
    assert read_image(path, (8, 8), 3).shape == (8, 8, 3)
    assert read_image(path, (8, 8), 1).shape == (8, 8, 1)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    path = write(tmp_path / "x.png", exif=exif)
    plain = read_image(write(tmp_path / "y.png"), (8, 8), 3)
    assert np.array_equal(read_image(path, (8, 8), 3), plain[::-1, ::-1])


def test_bad_images_are_named(tmp_path, monkeypatch):
    good = write(tmp_path / "good.jpg", 64, 64)
    bad = {
        "text.png": b"this is no image",
        "empty.png": b"",
        "cut.jpg": good.read_bytes()[:500],
        "pixmap.png": b"P6 1 1 255\n\0\0\0",  # Pillow could, the allow-list does not
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name, (8, 8), 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(DataError, match="64x64 pixels, more than the limit of 4095"):
        read_image(good, (8, 8), 3)
    with pytest.raises(DataError, match="none.png"):
        read_image(tmp_path / "none.png", (8, 8), 3)


def png(pixels, bits, transparent=None):
    """A PNG of grey (height, width) or RGB (height, width, 3) values, of a transparent colour,
    written by hand.
    """

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = pixels.shape[:2]
    rows = np.asarray(pixels, ">u2").reshape(height, -1)
    if bits == 16:
        packed = [row.tobytes() for row in rows]
    else:
        parts = (rows[:, :, None] >> np.arange(bits)[::-1]) & 1
        packed = [np.packbits(row).tobytes() for row in parts.reshape(height, -1).astype(np.uint8)]
    head = struct.pack(">IIBBBBB", width, height, bits, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    colour = (
        b"" if transparent is None else chunk(b"tRNS", np.asarray(transparent, ">u2").tobytes())
    )
    image = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + colour + image + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparent_colour_of_grey_becomes_white_at_every_depth(tmp_path, bits):
    top = 2**bits - 1
    values = np.arange(8).reshape(2, 4) * max(1, top // 8) % (top + 1)
    colour = int(values[0, 1])
    expected = np.where(values == colour, 255, np.round(values * 255 / top))
    (tmp_path / "x.png").write_bytes(png(values, bits, colour))
    assert np.array_equal(read_image(tmp_path / "x.png", None, 1)[:, :, 0], expected)


@pytest.mark.parametrize("bits", [8, 16])
def test_transparent_colour_of_rgb_becomes_white_and_its_neighbours_do_not(tmp_path, bits):
    unit = 2 ** (bits - 8)
    colour, neighbour = (3 * unit, 7 * unit, 200 * unit), (3 * unit + 1, 7 * unit, 200 * unit)
    (tmp_path / "x.png").write_bytes(png(np.array([[colour, neighbour]] * 2), bits, colour))
    assert read_image(tmp_path / "x.png", None, 3)[0].tolist() == [
        [255] * 3,
        [neighbour[0] // unit, 7, 200],
    ]


def tiff(values, bits, photometric=1, sample_format=1):
    """A TIFF of grey values (height, width) without compression, written by hand."""
    height, width = values.shape
    if bits == 12:
        ones = (values[:, :, None] >> np.arange(12)[::-1]) & 1
        data = b"".join(
            np.packbits(row).tobytes() for row in ones.reshape(height, -1).astype(np.uint8)
        )
    else:
        data = values.astype({8: "u1", 16: "<u2", 32: "<u4"}[bits]).tobytes()
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(data),
    }
    tags |= {339: sample_format}
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())
    )
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_grey_of_tiff_is_scaled_by_its_bits(tmp_path, bits, photometric):
    top = 2**bits - 1
    values = np.linspace(0, top, 32).round().astype(int).reshape(2, 16)
    (tmp_path / "x.tif").write_bytes(tiff(values, bits, photometric))
    grey = np.round(values * 255 / top)
    expected = grey if photometric else 255 - grey
    assert np.array_equal(read_image(tmp_path / "x.tif", None, 1)[:, :, 0], expected)


@pytest.mark.parametrize(
    ("bits", "sample_format", "kind"),
    [
        (8, 2, "signed pixels"),
        (16, 2, "signed pixels"),
        (32, 2, "signed pixels"),
        (32, 1, "pixels of more than 16 bits"),
    ],
)
def test_grey_without_standard_range_is_rejected(tmp_path, bits, sample_format, kind):
    (tmp_path / "x.tif").write_bytes(tiff(np.full((2, 2), 200), bits, sample_format=sample_format))
    with pytest.raises(DataError, match=f"{kind} have no standard range"):
        read_image(tmp_path / "x.tif", None, 1)


def test_sixteen_bit_image_is_turned_upright(tmp_path):
    values = (np.arange(6).reshape(2, 3) * 9000).astype(np.uint16)
    for name in ("x.png", "x.tif"):
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn to the right
        Image.fromarray(values).save(tmp_path / name, exif=exif)
        expected = np.rot90(np.round(values / 257), -1)
        assert np.array_equal(read_image(tmp_path / name, None, 1)[:, :, 0], expected)


@pytest.mark.parametrize(("width", "height"), [(1, 200_000), (200_000, 1), (2, 4_000_000)])
def test_narrow_image_that_would_unfold_is_rejected(tmp_path, width, height):
    content = io.BytesIO()
    Image.new("1", (width, height)).save(content, "PNG")
    with pytest.raises(
        DataError,
        match=rf"x.png: .*{width}x{height} pixels become .* more than the limit of 67108864",
    ):
        read_image(tmp_path / "x.png", (64, 64), 3, content)


def test_pipe_is_rejected_without_opening(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match="x.png: cannot be decoded: not a regular file"):
        read_image(tmp_path / "x.png", None, 3)


def test_model_space_is_rounded_to_uint8():
    x = torch.tensor([-2.0, -1.0, -1 / 255, 0.0, 0.999, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 127, 128, 255, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_model_space(every)), every)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_image_that_is_not_finite_is_rejected_by_name(value):
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 1, 1] = value
    with pytest.raises(NotFiniteError, match="^image 1 has values that are not finite") as error:
        to_uint8(x)
    assert error.value.index == 1
    with pytest.raises(NotFiniteError, match="^the image of seed 8 has values"):
        to_uint8(x, ["the image of seed 7", "the image of seed 8", "the image of seed 9"])


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_every_image(tmp_path, channels):
    pixels = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, channels, 60, 60) * 40
    save_grid(pixels, tmp_path / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[:2] == (2 * 62 + 2, 3 * 62 + 2)
    centres = [grid[32 + 62 * (i // 3), 32 + 62 * (i % 3)] for i in range(5)]
    assert [int(np.max(c)) for c in centres] == [0, 40, 80, 120, 160]


def test_titles_stand_above_their_images(tmp_path):
    """Small images are enlarged to hold two lines; the second title is dark on white, the first is
    empty.
    """
    pixels = torch.full((2, 3, 50, 50), 77, dtype=torch.uint8)
    save_grid(pixels, tmp_path / "grid.png", 2, ["", "a very long title " * 20])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (100 + 26 + 4, 2 * 102 + 2, 3)
    titles, images = grid[2:28], grid[28:-2]
    assert (titles[:, 2:102] == 255).all()
    assert titles[:13, 104:-2].min() == titles[13:, 104:-2].min() < 50  # both lines
    assert (images[:, 2:102] == 77).all()

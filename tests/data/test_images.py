"""Reading, cropping and writing images, and what bad ones get."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli.data import images
from diffussm_cli.data.images import centre_crop, coins, read_image, save_grid, to_model_space, to_uint8
from diffussm_cli.errors import DataError


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
    """ADM's arithmetic, written out for a square: box-halve while twice too large, then bicubic, then the middle."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 135, 3), dtype=np.uint8))
    expected = image
    while min(*expected.size) >= 2 * 32:
        expected = expected.resize((expected.width // 2, expected.height // 2), Image.Resampling.BOX)
    scale = 32 / min(*expected.size)
    size = (round(expected.width * scale), round(expected.height * scale))
    array = np.asarray(expected.resize(size, Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
    assert np.array_equal(np.asarray(centre_crop(image, (32, 32))), array[top : top + 32, left : left + 32])


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (1, 1), (33, 64), (640, 480)])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_centre_crop_always_gives_the_size(shape, size):
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


def test_pixel_rule():
    x = torch.tensor([-2.0, -1.0, -1 / 255, 0.0, 0.999, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 127, 128, 255, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_model_space(every)), every)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_every_image(tmp_path, channels):
    pixels = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, channels, 60, 60) * 40
    save_grid(pixels, tmp_path / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[:2] == (2 * 62 + 2, 3 * 62 + 2)
    centres = [grid[32 + 62 * (i // 3), 32 + 62 * (i % 3)] for i in range(5)]
    assert [int(np.max(c)) for c in centres] == [0, 40, 80, 120, 160]


def test_titles_stand_above_their_images(tmp_path):
    """Small images are enlarged to hold two lines; the second title is dark on white, the first is empty."""
    pixels = torch.full((2, 3, 50, 50), 77, dtype=torch.uint8)
    save_grid(pixels, tmp_path / "grid.png", 2, ["", "a very long title " * 20])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (100 + 26 + 4, 2 * 102 + 2, 3)
    titles, images = grid[2:28], grid[28:-2]
    assert (titles[:, 2:102] == 255).all()
    assert titles[:13, 104:-2].min() == titles[13:, 104:-2].min() < 50  # both lines
    assert (images[:, 2:102] == 77).all()

"""A film begins at the noise of its seeds and ends with the images that the same request draws."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import diffussm
from diffussm_cli.cli import app
from diffussm_cli.data.decoding import Decoding
from diffussm_cli.errors import ConfigError, NotFiniteError
from diffussm_cli.model import build_model
from diffussm_cli.sampling import film
from diffussm_cli.sampling.beginning import Beginning
from diffussm_cli.sampling.film import write_film
from diffussm_cli.sampling.sampler import Sampler


@pytest.fixture
def sampler(tiny):
    config = tiny("sample.steps=6")
    torch.manual_seed(0)
    model = build_model(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))
    return Sampler(model, config, config.sample, Decoding(lambda x: x, {}))


def facts(labels):
    return {"labels": labels, "prompts": None, "negative": None}


def read(path):
    with Image.open(path) as animation:
        frames, times = [], []
        for i in range(animation.n_frames):
            animation.seek(i)
            frames.append(np.asarray(animation.convert("L")).astype(int))
            times.append(animation.info["duration"])
        return np.stack(frames), times


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_film_goes_from_noise_to_the_image_of_its_seed(sampler, tmp_path, suffix):
    path, labels = tmp_path / f"film{suffix}", [3, 5]
    write_film(sampler, range(7, 9), facts(labels), path)
    frames, times = read(path)
    assert sum(times) == 6 * 80 + 2000  # six steps, and the image; equal frames may be one
    ((_, images),) = sampler.draw(range(7, 9), labels)
    for k in range(2):
        left = 2 + k * 58
        shown = frames[:, 2:58, left : left + 56][:, 3::7, 3::7]  # the middle of each pixel
        np.testing.assert_allclose(shown[-1], images[k, 0], atol=8 if suffix == ".webp" else 1)
        generator = torch.Generator().manual_seed(7 + k)
        torch.randint(10, (), generator=generator)
        noise = (127.5 * torch.randn(1, 8, 8, generator=generator)[0] + 128).clamp(0, 255).int()
        np.testing.assert_allclose(shown[0], noise, atol=8 if suffix == ".webp" else 1)


def test_film_ends_with_the_known_pixels_of_an_image(sampler, tmp_path):
    """Whatever the VAE makes of them, as in the images of the same request."""
    image = 3 * torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    mask = torch.arange(8).expand(8, 8) >= 4
    sampler.decoding = Decoding(lambda x: x / 2, {})
    sampler.beginning = Beginning(image, mask).encoded(sampler.decoding, 1)
    write_film(sampler, range(7, 8), facts([3]), tmp_path / "film.gif")
    ((_, images),) = sampler.draw([7], [3])
    assert torch.equal(images[0, :, :, :4], image[:, :, :4])
    shown = read(tmp_path / "film.gif")[0][-1, 2:58, 2:58][3::7, 3::7]
    np.testing.assert_allclose(shown, images[0, 0], atol=1)


def test_film_has_limited_frames_and_images(sampler, tmp_path, monkeypatch):
    monkeypatch.setattr(film, "FRAMES", 4)
    monkeypatch.setattr(film, "IMAGES", 2)
    write_film(sampler, range(100), facts(sampler.labels(range(100))), tmp_path / "film.gif")
    frames, times = read(tmp_path / "film.gif")
    assert frames.shape[1:] == (60, 118)
    assert sum(times) == 3 * 80 + 2000


def test_frame_that_is_not_finite_is_named_and_writes_no_film(sampler, tmp_path):
    def decode(x):
        x = x.clone()
        x[1] = torch.where(x[1].abs() > 2, math.nan, x[1])  # in the noise of the first frame
        return x

    sampler.decoding = Decoding(decode, {})
    with pytest.raises(
        NotFiniteError, match="^the image of seed 8 in frame 0 of the film has values"
    ):
        write_film(sampler, range(7, 9), facts([3, 5]), tmp_path / "film.gif")
    assert list(tmp_path.iterdir()) == []


def test_film_may_lie_in_the_folder_that_the_request_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = {"num": 1, "show": False, "steps": 1}
    diffussm.sample("mnist", "images", film=Path("images/film.gif"), **request)
    assert (tmp_path / "images" / "film.gif").is_file()
    with pytest.raises(ConfigError, match="film: there is no folder 'more/films'"):
        diffussm.sample("mnist", "more", film=Path("more/films/film.gif"), **request)
    assert not (tmp_path / "more").exists()


def test_film_is_written_by_the_command(tiny, tmp_path):
    from diffussm_cli.training import train

    list(train(tiny("train.steps=1"), tmp_path / "run"))
    command = [
        "sample",
        str(tmp_path / "run"),
        "-n",
        "3",
        "--steps",
        "2",
        "--film",
        str(tmp_path / "f.webp"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert f"film: {tmp_path / 'f.webp'}" in result.stderr
    assert sum(read(tmp_path / "f.webp")[1]) == 2 * 80 + 2000

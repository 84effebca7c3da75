"""The nearest training image of each sample."""

import json

import numpy as np
import pytest
import torch

from diffussm_cli.data.images import read_image, to_model_space
from diffussm_cli.errors import DataError
from diffussm_cli.training import nearest, preview, train
from diffussm_cli.training.nearest import nearest_images, write_nearest


class Images:
    """A source over uint8 images (N, C, H, W)."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def read(self, indices, generators):
        assert len(indices) == len(generators)
        return to_model_space(self.pixels[list(indices)]), torch.zeros(len(indices))


def drawn(n, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 3, 4, 5), np.uint8)
    return torch.from_numpy(pixels)


@pytest.mark.parametrize("flip", [False, True])
def test_nearest_images_are_those_of_a_comparison_of_all_pairs(flip, monkeypatch):
    monkeypatch.setattr(nearest, "AT_ONCE", 16)
    samples, training = drawn(7, 0), drawn(50, 1)
    samples[3] = training[41]
    samples[4] = training[12].flip(-1)
    found = nearest_images(samples, Images(training), flip)

    candidates = torch.cat([training, training.flip(-1)]) if flip else training
    differences = samples[:, None].double() - candidates[None].double()
    distances = differences.square().flatten(2).mean(2).sqrt()
    least, places = distances.min(1)
    torch.testing.assert_close(found.distances, least)
    assert torch.equal(found.images, candidates[places])
    assert found.distances[3] == 0
    assert (found.distances[4] == 0) == flip


def test_each_sample_stands_beside_its_nearest_image(tmp_path):
    """Five pairs a row, enlarged to 56 pixels, with gaps of two."""
    samples = drawn(6, 0)
    write_nearest(tmp_path, 9, samples, Images(samples.flip(0)), flip=False)
    facts = json.loads((tmp_path / "nearest.json").read_text())
    assert facts == {"step": 9, "images": 6, "distances": [0.0] * 6}
    picture = read_image(tmp_path / "nearest.png", None, 3)
    height, width = 11 * 4, 11 * 5
    for i, sample in enumerate(samples):
        top, left = 2 + (i // 5) * (height + 2), 2 + (i % 5) * 2 * (width + 2)
        for x in (left, left + width + 2):
            shown = picture[top : top + height : 11, x : x + width : 11]
            np.testing.assert_array_equal(shown, sample.permute(1, 2, 0))


def test_last_preview_is_compared_only_with_a_small_set(tiny, tmp_path, monkeypatch):
    settings = ("train.sample_every=2", "train.sample_images=4", "train.sample_steps=2")
    list(train(tiny(*settings), tmp_path / "small"))
    assert json.loads((tmp_path / "small" / "nearest.json").read_text())["step"] == 4
    monkeypatch.setattr(nearest, "MOST_VALUES", 1000)
    list(train(tiny(*settings), tmp_path / "large"))
    assert not (tmp_path / "large" / "nearest.json").exists()


def test_unreadable_image_does_not_end_training_at_its_last_preview(tiny, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise DataError("cat.png: cannot be read")

    monkeypatch.setattr(preview, "write_nearest", fail)
    config = tiny("train.sample_every=2", "train.sample_images=4", "train.sample_steps=2")
    events = list(train(config, tmp_path / "run"))
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    told = [event.text for event in events if "nearest" in getattr(event, "text", "")]
    assert told == ["the nearest training images are not shown: cat.png: cannot be read"]

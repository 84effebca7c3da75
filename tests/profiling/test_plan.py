"""What a training will take, from one measured step."""

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.errors import RunError
from diffussm_cli.profiling import plan as planning
from diffussm_cli.profiling.flops import cost


def test_estimate_extrapolates_from_steps_of_one_and_two_parts(monkeypatch):
    """One part of 8 takes 3 s, two take 5 s: a batch of 32 takes 9 s."""
    monkeypatch.setattr(planning, "step_seconds", lambda config, images, parts: 1 + 2 * parts)
    recipe = ["train.batch_size=32", "train.accumulate=4", "train.steps=1000"]
    estimate = planning.plan(load_config("digits", recipe), None)
    assert estimate.measured_images == 8
    assert estimate.step_seconds == pytest.approx(9)
    assert estimate.seconds == pytest.approx(9000)


def test_number_of_measured_images_is_halved_until_they_fit():
    def config(images):
        return load_config("digits", [f"train.batch_size={images}"])

    def needed(images):
        return cost(config(images)).training_bytes

    for images in (1, 4):
        assert planning.plan(config(8), needed(images)).measured_images == images
        assert planning.plan(config(8), needed(2 * images) - 1).measured_images == images
    assert planning.plan(config(8), None).measured_images == 8
    with pytest.raises(RunError, match="--estimate: .*digits"):
        planning.plan(config(8), needed(1) - 1)


def test_noise_has_the_shape_and_classes_of_the_run():
    source = planning.Noise(load_config("s-256"))
    x, labels = source.read([0, 999, 1000], [torch.Generator().manual_seed(i) for i in (1, 2, 1)])
    assert x.shape == (3, 4, 32, 32)
    assert labels.tolist() == [0, 999, 0]
    assert torch.equal(x[0], x[2])
    assert not torch.equal(x[0], x[1])
    assert len(source.class_names) == 1000

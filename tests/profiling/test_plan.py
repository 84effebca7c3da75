"""What a training will take, from one measured step."""

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.errors import RunError
from diffussm_cli.profiling import plan as planning
from diffussm_cli.profiling.flops import cost


def test_estimate_reckons_steps_from_a_measured_one(monkeypatch):
    """One part of 8 takes 3 s, two take 5 s: a batch of 32 takes 9 s."""
    monkeypatch.setattr(planning, "_step_seconds", lambda config, images, parts: 1 + 2 * parts)
    config = load_config("digits", ["train.batch_size=32", "train.accumulate=4", "train.steps=1000"])
    found = planning.plan(config, None)
    assert found.measured_images == 8
    assert found.step_seconds == pytest.approx(9)
    assert found.seconds == pytest.approx(9000)


def test_estimate_takes_fewer_images_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(planning, "_step_seconds", lambda config, images, parts: 1.0)
    config = load_config("s-256", ["train.precision=fp32"])
    assert 1 <= planning.plan(config, 8 << 30).measured_images < 64


def test_the_most_images_that_fit_are_measured_by_halving():
    config = load_config("s-256", ["train.precision=fp32", "train.batch_size=8"])

    def taken(images):
        return cost(planning._with_batch(config, images, 1)).training_bytes

    for images in (1, 4):
        assert planning._images_that_fit(config, taken(images)) == images
        assert planning._images_that_fit(config, taken(2 * images) - 1) == images
    assert planning._images_that_fit(config, None) == planning._images_that_fit(config, taken(8)) == 8
    with pytest.raises(RunError, match="--estimate: .*s-256"):
        planning._images_that_fit(config, taken(1) - 1)


def test_a_source_of_noise_has_the_shape_and_classes_of_the_run():
    source = planning.Noise(load_config("s-256"))
    x, labels = source.read([0, 999, 1000], [torch.Generator().manual_seed(i) for i in (1, 2, 1)])
    assert x.shape == (3, 4, 32, 32)
    assert labels.tolist() == [0, 999, 0]
    assert torch.equal(x[0], x[2])
    assert not torch.equal(x[0], x[1])
    assert len(source.class_names) == 1000

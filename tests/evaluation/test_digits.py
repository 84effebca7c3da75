"""The classifier of digits: which of its numbers are features, and in which order."""

import hashlib
from pathlib import Path

import pytest
import torch

from diffussm_cli.evaluation import digits
from tests.conftest import device


@pytest.fixture(scope="module")
def network():
    return digits.load_digits()[0].to(device())


def test_features_are_those_of_the_layers_by_hand(network):
    """Spatial features in NHWC order, of the first 8 channels; pool features before the ReLU, scaled to 1."""
    seen = {}
    for name in ("conv3", "features"):
        getattr(network, name).register_forward_hook(lambda m, x, y, name=name: seen.update({name: y}))
    images = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pool, spatial, logits = network(images.to(device()))
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 64), (2, 392), (2, 10))
    for row, column, channel in ((0, 0, 0), (0, 1, 3), (3, 4, 7), (6, 6, 7)):
        expected = seen["conv3"][:, channel, row, column].relu()
        assert torch.equal(spatial[:, (row * 7 + column) * 8 + channel], expected)
    torch.testing.assert_close(pool * 11.2, seen["features"])
    torch.testing.assert_close(logits, network.classify(seen["features"].relu()))


def test_the_network_is_frozen_and_known_by_its_file(network):
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    file = Path(digits.__file__).with_name("digits.safetensors")
    assert digits.load_digits()[1] == f"digits-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"

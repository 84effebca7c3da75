"""Images and features for the tests of sets, gathering, comparison and references."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli.evaluation.features import load_extractor
from diffussm_cli.evaluation.gathering import Gathering


@pytest.fixture(scope="session")
def digits():
    return load_extractor("digits", None, torch.device("cpu"))


@pytest.fixture
def pictures(tmp_path):
    """28 x 28 noise in folders of two classes."""
    return folder(tmp_path / "pictures", 12)


def folder(path, n, side=28, mode="L", classes=2):
    generator = np.random.default_rng(0)
    for i in range(n):
        place = path / f"class{i % classes}" if classes else path
        place.mkdir(parents=True, exist_ok=True)
        shape = (side, side) if mode == "L" else (side, side, 3)
        Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(place / f"{i:03d}.png")
    return path


def gathered(images, extractor, cache=None):
    work = Gathering(images, extractor, 5, cache)
    done = sum(work.run())
    return work, done

"""Images and features for the tests of sets, gathering, comparison and references."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli.evaluation.extractors import load_extractor
from diffussm_cli.evaluation.features import gather_features
from diffussm_cli.events import Progress, Warned
from diffussm_cli.machine.processes import ALONE


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


def gathered(images, extractor, cache=None, world=ALONE, batch_size=5):
    """The features of a set, how many images they were computed from, and the lines of warnings."""
    session, done, lines = gather_features(images, extractor, batch_size, cache, world), 0, []
    while True:
        try:
            event = next(session)
        except StopIteration as e:
            return e.value, done, lines
        done = event.done if isinstance(event, Progress) else done
        lines += [event.text] if isinstance(event, Warned) else []

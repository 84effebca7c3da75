"""Images of a model as a set: drawn by seed when they are read, and known by what decides them."""

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.errors import ConfigError
from diffussm_cli.evaluation.drawn import DrawnImages
from diffussm_cli.sampling.folder import FIXED
from diffussm_cli.sampling.generate import Text

FACTS = dict.fromkeys(FIXED, 1) | {"num": 5, "run": "a", "device": "cpu"}


class Painter:
    """A sampler whose images are filled with their seed; notes what it was asked for."""

    def __init__(self, *overrides):
        self.config, self.asked = load_config("digits", overrides), []

    def draw(self, seeds, labels, text):
        self.asked.append((list(seeds), labels) if text is None else (list(seeds), labels, text.captions.tolist()))
        yield seeds, torch.tensor(seeds, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_places_are_drawn_by_their_seeds_and_labels_in_the_channels_of_the_extractor():
    painter = Painter()
    images = DrawnImages(painter, range(10, 15), [0, 1, 2, 3, 4], 3, "run")
    assert (len(images), images.size, images.lossy) == (5, (8, 8), False)
    batches = list(images.read([0, 2, 4], 2))
    assert painter.asked == [([10, 12], [0, 2]), ([14], [4])]
    assert [b.shape for b in batches] == [(2, 3, 8, 8), (1, 3, 8, 8)]
    assert [b[:, c, 7, 7].tolist() for b in batches for c in range(3)] == [[10, 12]] * 3 + [[14]] * 3


def test_places_are_drawn_by_their_captions():
    painter = Painter()
    captions = Text(torch.arange(3.0).view(3, 1, 1))
    list(DrawnImages(painter, range(10, 13), None, 1, "run", text=captions).read([0, 2], 2))
    assert painter.asked == [([10, 12], None, [[[0.0]], [[2.0]]])]


def test_an_unconditional_model_is_asked_for_no_labels():
    painter = Painter("model.num_classes=0", "sample.guidance=1")
    list(DrawnImages(painter, range(2), None, 1, "run").read([0, 1], 2))
    assert painter.asked == [([0, 1], None)]


def test_what_decides_the_images_decides_the_hash_and_nothing_else():
    def known(channels=1, **changes):
        return DrawnImages(Painter(), range(5), None, channels, "x", FACTS | changes).sha256()

    others = [known(**{fact: 2}) for fact in (*FIXED, "num")] + [known(channels=3)]
    assert len({known(), *others}) == len(others) + 1
    assert known(run="b", device="cuda") == known()


def test_colours_are_refused_by_an_extractor_of_grey():
    painter = Painter("data.path=x", "data.channels=3")
    with pytest.raises(ConfigError, match="--extractor"):
        DrawnImages(painter, range(2), None, 1, "run")

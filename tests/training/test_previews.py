"""Previews: how their grids are laid out."""

import numpy as np
import pytest
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.data.opening import open_source
from diffussm_cli.training.loop import Trainer
from diffussm_cli.training.preview import columns_of


@pytest.mark.parametrize(
    ("images", "classes", "columns"),
    [
        *((40, 1, 7), (40, 2, 8), (40, 3, 9), (40, 4, 8), (40, 5, 10), (40, 6, 6), (40, 9, 9)),
        # as they always were
        *((40, 10, 10), (40, 1000, 10), (40, 0, 10), (4, 0, 4), (20, 10, 10)),
        *((4, 2, 2), (5, 2, 4), (1, 3, 3), (400, 3, 9)),
    ],
)
def test_grid_of_previews_is_as_wide_as_high_with_whole_turns_of_its_classes(
    images, classes, columns
):
    assert columns_of(images, classes) == columns


def test_preview_of_three_classes_is_wider_than_high(tiny, tmp_path):
    for i, name in enumerate("abc"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 80 * i, np.uint8)).save(tmp_path / "data" / name / "0.png")
    config = tiny(
        f"data.path={tmp_path / 'data'}",
        "model.num_classes=3",
        "train.sample_every=1",
        "train.sample_images=12",
        "train.sample_steps=1",
    )
    Trainer(config, open_source(config), tmp_path).preview(last=False)
    (picture,) = (tmp_path / runs.SAMPLES).iterdir()
    with Image.open(picture) as image:
        assert image.size == (6 * 58 + 2, 2 * 58 + 2)  # 8 pixels, enlarged to 56, and 2 between

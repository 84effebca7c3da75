"""Models by name, and published figures beside ours."""

import pytest

from diffussm_cli.errors import ConfigError
from diffussm_cli.profiling import paper
from diffussm_cli.profiling.paper import display_name, named_model


@pytest.mark.parametrize(
    ("name", "resolution", "shown", "sizes"),
    [
        ("xl", 256, "DiffuSSM-XL", (1152, 29, 1, 2)),
        ("xl", 2048, "DiffuSSM-XL", (1152, 29, 1, 2)),
        ("s/2", 512, "DiffuSSM-S/2", (384, 13, 2, 2)),
        ("l-m1", 256, "DiffuSSM-L M=1", (768, 25, 1, 1)),
        ("dit-xl/2", 512, "DiT-XL/2", (1152, 28, 2, 1)),
        ("dit-b/8", 256, "DiT-B/8", (768, 12, 8, 1)),
        ("dit-xl/1-m2", "256x512", "DiT-XL/1 M=2", (1152, 28, 1, 2)),
    ],
)
def test_size_names_round_trip(name, resolution, shown, sizes):
    config = named_model(name, resolution)
    m = config.model
    assert display_name(config) == shown
    assert (m.hidden_size, m.depth, m.patch_size, m.compression) == sizes
    assert config.data.resolution == resolution


@pytest.mark.parametrize("name", ["xxl", "dit", "xl/", "xl-m", "mnist", "", "b"])
def test_unknown_names_are_rejected(name):
    with pytest.raises(ConfigError, match="--models: .* must be one of .*dit-xl"):
        named_model(name, 256)


@pytest.mark.parametrize(
    ("name", "resolution", "images"),
    [
        ("xl", 256, 660e6),
        ("xl/1-m1", "512", 302e6),
        ("xl", 2048, 660e6),
        ("dit-xl/1", 512, 768e6),
        ("s", 256, 400_000 * 256),
        ("dit-b", 512, 400_000 * 256),
    ],
)
def test_length_of_training_is_the_published_one(name, resolution, images):
    train = named_model(name, resolution).train
    assert train.steps * train.batch_size == pytest.approx(images, abs=128)


def test_published_rows_of_dit_are_reproduced():
    """Within 0.3%, or within the rounding of the table's two decimals."""
    rows = list(paper.dit_rows())
    assert len(rows) == 13
    for row in rows:
        assert abs(row.difference) < 3e-3 or abs(row.ours - row.published) <= 5e-3, row
    assert rows[-1].name == "DiT-XL/2 at 512"


def test_training_compute_equals_that_of_paper():
    rows = {row.name: row for row in paper.training_rows()}
    implied = {name: round(row.implied, 1) for name, row in rows.items()}
    assert implied == {
        "xl-256": 280.3,
        "dit-xl-256": 118.9,
        "xl-512": 1066.2,
        "dit-xl-512": 524.7,
    }
    assert rows["xl-256"].difference == pytest.approx(295.66 / 280.3 - 1, abs=1e-3)
    assert rows["xl-512"].difference == pytest.approx(1182.43 / 1066.2 - 1, abs=1e-3)
    assert abs(rows["dit-xl-256"].difference) < 3e-3
    assert abs(rows["dit-xl-512"].difference) < 3e-3
    assert "2.5 times" in paper.sentence()

"""Models by name, and grids of them."""

import pytest

from diffussm_cli.errors import ConfigError
from diffussm_cli.profiling.models import display_name, named_model, swept


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
def test_names(name, resolution, shown, sizes):
    config = named_model(name, resolution)
    m = config.model
    assert display_name(config) == shown
    assert (m.hidden_size, m.depth, m.patch_size, m.compression) == sizes
    assert config.data.resolution == resolution


@pytest.mark.parametrize("name", ["xxl", "dit", "xl/", "xl-m", "mnist", ""])
def test_unknown_names(name):
    with pytest.raises(ConfigError, match="--models: .* must be one of .*dit-xl"):
        named_model(name, 256)


def test_own_steps_where_a_preset_has_them():
    assert named_model("xl", 512).train.steps == 1_180_000
    assert named_model("xl", 2048).train.steps == named_model("xl", 256).train.steps


def test_sweep_is_every_combination_on_top_of_the_name():
    found = swept("S", named_model("s/2", 512), ["M=1,2,4", "P=1,4"])
    assert list(found) == ["S M=1 P=1", "S M=1 P=4", "S M=2 P=1", "S M=2 P=4", "S M=4 P=1", "S M=4 P=4"]
    m = found["S M=4 P=1"].model
    assert (m.compression, m.patch_size, m.hidden_size) == (4, 1, 384)
    assert swept("S", named_model("s/2", 512), []) == {"S": named_model("s/2", 512)}


@pytest.mark.parametrize("text", ["M", "M=", "Q=1", "=2"])
def test_bad_sweeps(text):
    with pytest.raises(ConfigError, match="LETTER=VALUES"):
        swept("S", named_model("s", 256), [text])


def test_sweep_values_are_checked():
    with pytest.raises(ConfigError, match=r"model\.patch_size: 3 must divide"):
        swept("S", named_model("s", 256), ["P=3"])
    with pytest.raises(ConfigError, match="model.compression: '1=2' must be a whole number"):
        swept("S", named_model("s", 256), ["M=1=2"])

"""Presets, overrides and the lines that wrong ones get."""

import pytest

from diffussm_cli.config import (
    config_from_dict,
    field_names,
    load_config,
    parse_yaml,
    preset_names,
    preset_text,
    to_dict,
    to_yaml,
)
from diffussm_cli.errors import ConfigError


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_is_a_document(name):
    config = load_config(name)
    header = [line for line in preset_text(name).split("\n\n")[0].splitlines() if line]
    assert config.preset == name
    assert all(line.startswith("#") for line in header)
    assert f"diffussm train --preset {name}" in preset_text(name)
    if config.data.vae:
        assert f"diffussm encode IMAGES {config.data.path}".split()[:2] == ["diffussm", "encode"]
        assert f" {config.data.path} --resolution {config.data.resolution}" in preset_text(name)


def test_the_presets_of_the_paper():
    assert {"digits", "mnist", "s-256", "l-256", "xl-256", "xl-512", "church-256", "bedroom-256", "xl-1024"} <= set(
        preset_names()
    )
    sizes = {n: load_config(n).model for n in ("s-256", "l-256", "xl-256")}
    assert {n: (m.hidden_size, m.depth) for n, m in sizes.items()} == {
        "s-256": (384, 13),
        "l-256": (768, 25),
        "xl-256": (1152, 29),
    }


def test_overrides_and_round_trip():
    config = load_config(
        "digits", ["train.lr=1e-4", "data.resolution=8x12", "data.path=x", "sample.guidance_interval=1,9"]
    )
    assert config.train.lr == 1e-4  # YAML alone would read text
    assert config.data.size == (8, 12)
    assert config.sample.guidance_interval == (1, 9)
    assert config_from_dict(parse_yaml(to_yaml(config), "x"), "x") == config


def test_every_field_has_help():
    assert "train.batch_size" in field_names()
    sections = {"preset", "model", "data", "diffusion", "train", "sample", "eval"}
    assert set(to_dict(load_config("digits"))) == sections


WRONG = {
    "train.learning_rate=1": "unknown field train.learning_rate",
    "model.lr=1": "unknown field model.lr; did you mean 'train.lr'?",
    "model.hiden_size=8": "did you mean 'model.hidden_size'?",
    "lr=1": "unknown field 'lr'; did you mean 'train.lr'?",
    "modle.depth=1": "did you mean 'model.depth'?",
    "train.lr": "must read section.field=value",
    "train.lr=fast": "train.lr: 'fast' must be a finite number",
    "train.lr=.nan": "train.lr: nan must be a finite number",
    "train.lr=0": "train.lr: 0.0 must be greater than 0",
    "train.steps=1.5": "train.steps: 1.5 must be a whole number",
    "train.steps=0": "train.steps: 0 must be at least 1",
    "train.compile=1": "train.compile: 1 must be true or false",
    "train.ema=1.5": "train.ema: 1.5 must be at most 1",
    "train.lr_decay=cosin": "did you mean 'cosine'?",
    "train.accumulate=3": "train.accumulate: 3 must divide train.batch_size 32",
    "train.lr=[": "--set train.lr: not valid YAML",
    "train.lr=&a [*a]": "--set train.lr: not valid YAML",
    "data.resolution=8x": "must be a number of pixels or HxW",
    "data.downsample=2": "data.downsample: 2 needs data.vae",
    "model.patch_size=3": "model.patch_size: 3 must divide the 8x8 grid",
    "model.compression=3": "model.compression: 3 must divide the 8 tokens of a row",
    "model.hidden_size=30": "model.hidden_size: 30 must be a multiple of 4",
    "model.d_state=7": "model.d_state: 7 must be even",
    "sample.steps=2000": "sample.steps: 2000 must be at most diffusion.timesteps 1000",
    "sample.guidance_interval=5": "must be LO,HI",
    "diffusion.beta_end=2": "diffusion.beta_end: 2.0 must lie between beta_start and 1",
}


@pytest.mark.parametrize(("override", "message"), WRONG.items(), ids=WRONG)
def test_wrong_overrides_get_one_line(override, message):
    with pytest.raises(ConfigError) as error:
        load_config("digits", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_guidance_without_classes_is_refused():
    with pytest.raises(ConfigError, match="sample.guidance: 2 needs a class-conditional model"):
        load_config("digits", ["model.num_classes=0", "sample.guidance=2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2]", "must be a mapping"),
        ("- 1", "must be a mapping"),
        ("trian: {lr: 1}", "unknown section 'trian'; did you mean 'train'?"),
        ("train: {lr: 1", "not valid YAML"),
        ("a: &x [1]\ntrain: *x", "aliases"),
        ("train: !!python/object/apply:os.system [echo]", "not valid YAML"),
    ],
)
def test_wrong_preset_files(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_missing_huge_and_binary_preset_files(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'mnist'"):
        load_config("mnst")
    with pytest.raises(ConfigError, match="No such file"):
        load_config(str(tmp_path / "none.yaml"))
    (tmp_path / "huge.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="larger than"):
        load_config(str(tmp_path / "huge.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text"):
        load_config(str(tmp_path / "binary.yaml"))

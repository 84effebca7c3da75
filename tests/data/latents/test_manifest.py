"""What follows from the settings of a store, and what tells two stores apart."""

import dataclasses
import json

from diffussm_cli.data.latents.manifest import (
    StoreSettings,
    first_difference,
    manifest_text,
    read_settings,
)

SETTINGS = StoreSettings(
    *(
        "s",
        11,
        ("cat", "dog"),
        (16, 24),
        "vae",
        "c",
        "w",
        4,
        8,
        (0.5,) * 4,
        (0.0,) * 4,
        True,
        "fp32",
        3,
        4,
    )
)


def test_shards_cover_every_image_once():
    assert SETTINGS.shards == 3
    assert [SETTINGS.span(i) for i in range(3)] == [range(4), range(4, 8), range(8, 11)]
    assert dataclasses.replace(SETTINGS, images=12).shards == 3
    assert dataclasses.replace(SETTINGS, images=13).shards == 4
    assert SETTINGS.latent == (4, 2, 3)


def test_manifest_is_read_as_it_was_written(tmp_path):
    (tmp_path / "manifest.json").write_text(manifest_text(SETTINGS))
    assert read_settings(tmp_path, "x") == SETTINGS
    assert json.loads(manifest_text(SETTINGS))["format"] == 2


def test_first_setting_that_differs_is_named():
    assert first_difference(SETTINGS, SETTINGS) is None
    other = dataclasses.replace(SETTINGS, batch_size=5, flip=False)
    assert first_difference(SETTINGS, other) == "flip was True and is now False"


def test_command_names_every_choice(tmp_path):
    text = {"text": "wordllama", "text_tokens": 7, "columns": ("image=a b", "label=c")}
    settings = dataclasses.replace(SETTINGS, flip=False, **text)
    assert settings.command("my store") == (
        "diffussm encode SOURCE 'my store' --vae vae --resolution 16x24 --precision fp32 "
        "--batch-size 3 --shard-size 4 --no-flip --columns 'image=a b,label=c' --text wordllama "
        "--text-tokens 7"
    )

"""What follows from the settings of a store, and what tells two stores apart."""

import dataclasses

import pytest

from diffussm_cli.data.latents.manifest import (
    Manifest,
    ShardRecord,
    StoreSettings,
    first_difference,
    manifest_text,
    read_manifest,
)

SETTINGS = StoreSettings(
    *("s", 11, ("cat", "dog"), (16, 24), "vae", "c", "w", 4, 8, (0.5,) * 4, (0.0,) * 4, True, "fp32", 3, 4)
)


def test_shards_cover_every_image_once():
    assert SETTINGS.shards == 3
    assert [SETTINGS.span(i) for i in range(3)] == [range(4), range(4, 8), range(8, 11)]
    assert dataclasses.replace(SETTINGS, images=12).shards == 3
    assert dataclasses.replace(SETTINGS, images=13).shards == 4
    assert SETTINGS.latent == (4, 2, 3)


@pytest.mark.parametrize("shards", [0, 2, 3])
def test_a_manifest_is_read_as_it_was_written_and_complete_with_its_last_shard(tmp_path, shards):
    manifest = Manifest(SETTINGS, tuple(ShardRecord(f"{i}", i) for i in range(shards)), "h")
    assert manifest.complete == (shards == 3)
    (tmp_path / "manifest.json").write_text(manifest_text(manifest))
    assert read_manifest(tmp_path, "x") == manifest


def test_the_first_setting_that_differs_is_named():
    assert first_difference(SETTINGS, SETTINGS) is None
    other = dataclasses.replace(SETTINGS, batch_size=5, flip=False)
    assert first_difference(SETTINGS, other) == "flip was True and is now False"

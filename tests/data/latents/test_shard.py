"""The bytes of a shard follow from the settings, and are safetensors to everyone."""

import dataclasses
import hashlib

import numpy as np
import pytest
from safetensors.numpy import load, save

from diffussm_cli.data.latents.shard import (
    Skipped,
    empty_shard,
    is_there,
    map_shard,
    read_record,
    write_shard,
)
from tests.data.latents.test_manifest import SETTINGS


@pytest.mark.parametrize("flip", [True, False])
def test_shard_is_what_safetensors_reads_with_its_tensors_in_place(tmp_path, flip):
    """The last shard, of three images; every tensor is filled with its own number."""
    settings = dataclasses.replace(SETTINGS, flip=flip)
    arrays = empty_shard(settings, 2)
    for i, array in enumerate(arrays.values()):
        array[...] = i + 1
    write_shard(tmp_path, settings, 2, arrays, [])
    content = (tmp_path / "shard-00002.safetensors").read_bytes()
    moments = ["mean", "std", *(["mean_mirrored", "std_mirrored"] if flip else [])]
    shapes = dict.fromkeys(moments, ((3, 4, 2, 3), "float16"))
    shapes |= {"index": ((3,), "int64"), "label": ((3,), "int64"), "readable": ((3,), "uint8")}
    for found in (load(content), map_shard(tmp_path, settings, 2)):
        assert {name: (a.shape, a.dtype.name) for name, a in found.items()} == shapes
        assert all(np.array_equal(found[name], a) for name, a in arrays.items())
    assert len(content) == len(save(arrays))


def test_record_is_read_as_it_was_written(tmp_path):
    skipped = [Skipped(8, "a/8.png", "broken"), Skipped(10, "\udce9.png", "line\nbreak")]
    write_shard(tmp_path, SETTINGS, 2, empty_shard(SETTINGS, 2), skipped)
    record = read_record(tmp_path, SETTINGS, 2)
    assert record.skipped == tuple(skipped)
    assert (
        record.sha256
        == hashlib.sha256((tmp_path / "shard-00002.safetensors").read_bytes()).hexdigest()
    )


def test_shard_is_complete_only_with_all_bytes_and_record(tmp_path):
    assert not is_there(tmp_path, SETTINGS, 2)
    write_shard(tmp_path, SETTINGS, 2, empty_shard(SETTINGS, 2), [])
    assert is_there(tmp_path, SETTINGS, 2)
    shard, record = tmp_path / "shard-00002.safetensors", tmp_path / "shard-00002.json"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert not is_there(tmp_path, SETTINGS, 2)
    shard.write_bytes(content)
    record.unlink()
    assert not is_there(tmp_path, SETTINGS, 2)

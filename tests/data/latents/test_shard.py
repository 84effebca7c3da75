"""The bytes of a shard follow from the settings, and are safetensors to everyone."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load, save

from diffussm_cli.data.latents.shard import empty_shard, header, map_shard
from tests.data.latents.test_manifest import SETTINGS


@pytest.mark.parametrize("flip", [True, False])
def test_a_shard_is_what_safetensors_reads_with_its_tensors_in_place(tmp_path, flip):
    """The last shard, of three images; every tensor is filled with its own number."""
    settings = dataclasses.replace(SETTINGS, flip=flip)
    arrays = empty_shard(settings, 2)
    for i, array in enumerate(arrays.values()):
        array[...] = i + 1
    content = header(settings, 2) + b"".join(a.tobytes() for a in arrays.values())
    (tmp_path / "shard-00002.safetensors").write_bytes(content)
    moments = ["mean", "std", *(["mean_mirrored", "std_mirrored"] if flip else [])]
    shapes = dict.fromkeys(moments, ((3, 4, 2, 3), "float16"))
    shapes |= {"index": ((3,), "int64"), "label": ((3,), "int64"), "readable": ((3,), "uint8")}
    for found in (load(content), map_shard(tmp_path, settings, 2)):
        assert {name: (a.shape, a.dtype.name) for name, a in found.items()} == shapes
        assert all(np.array_equal(found[name], a) for name, a in arrays.items())
    assert len(content) == len(save(arrays))
    assert len(header(settings, 2)) % 8 == 0  # so that all tensors are aligned

"""safetensors files: what is written is what the package safetensors reads, and what is mapped is
what was written.
"""

import hashlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save

from diffussm_cli.machine import tensors

ARRAYS = {
    "index": np.arange(3),
    "mean": np.linspace(-1, 1, 24, dtype=np.float16).reshape(3, 2, 4),
    "readable": np.array([1, 0, 1], np.uint8),
}
LAYOUT = {"index": ("I64", (3,)), "mean": ("F16", (3, 2, 4)), "readable": ("U8", (3,))}


def written(path, metadata=None):
    with path.open("wb") as file:
        sha256 = tensors.write(file, LAYOUT, ARRAYS.values(), metadata)
    return path, sha256


def test_written_tensors_are_read_by_safetensors(tmp_path):
    path, sha256 = written(tmp_path / "a.safetensors")
    loaded = load_file(path)
    assert list(loaded) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_size == tensors.file_size(LAYOUT) == len(save(ARRAYS))
    with safe_open(written(tmp_path / "b.safetensors", {"format": "pt"})[0], "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_map_file_gives_the_tensors_and_forbids_writing(tmp_path):
    views = tensors.map_file(written(tmp_path / "a.safetensors")[0], LAYOUT)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(views[name], array, strict=True)
    with pytest.raises(ValueError, match="read-only"):
        views["mean"][0] = 0


def test_map_file_rejects_another_layout_or_size(tmp_path):
    path, _ = written(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="its header differs"):
        tensors.map_file(path, LAYOUT | {"mean": ("F16", (3, 4, 2))})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes are not the size"):
        tensors.map_file(path, LAYOUT)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="its header differs"):
        tensors.map_file(path, LAYOUT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_first_tensor_that_is_not_finite_is_named(dtype, value):
    """Wherever the number stands, at every length that vectorised code treats differently."""
    sound = {"whole": torch.tensor([2**40]), "empty": torch.zeros(0), "mask": torch.ones(2) > 0}
    for length in (1, 7, 64, 1025):
        rising = torch.linspace(-9, 9, length).to(dtype)
        assert tensors.first_not_finite({**sound, "rising": rising}) is None
        for place in {0, length // 2, length - 1}:
            broken = rising.clone()
            broken[place] = value
            assert tensors.first_not_finite({**sound, "broken": broken, "b": broken}) == "broken"
    assert (
        tensors.first_not_finite({"largest": torch.full((1,), torch.finfo(dtype).max, dtype=dtype)})
        is None
    )
    assert tensors.first_not_finite({"columns": broken.repeat(2, 2).T, "x": rising}) == "columns"

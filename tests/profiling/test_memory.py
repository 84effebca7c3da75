"""Memory: what is free, and the peak of one kind of work."""

import pytest
import torch
import torch.profiler

from diffussm_cli.config import load_config
from diffussm_cli.profiling import memory, work
from diffussm_cli.profiling.work import Setting

CPU = torch.device("cpu")


def test_memory_of_a_gpu_is_what_is_free_there(monkeypatch):
    free = {torch.device("cuda:1"): 5 << 30}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80 << 30))
    assert memory.available_bytes(torch.device("cuda:1")) == 5 << 30
    assert memory.available_bytes(CPU) != 5 << 30


@pytest.mark.slow
def test_peak_memory_is_that_of_weights_and_activations():
    """35 M floats of weights; their gradients come on top in training."""
    config, setting = load_config("s-256", ["data.resolution=64"]), Setting(CPU)
    weights = 4 * 35_520_784
    forward = memory.peak_bytes(config, work.FORWARD, setting)
    training = memory.peak_bytes(config, work.TRAINING, setting)
    if forward is None:
        pytest.skip("this system does not tell")
    assert 0.9 * weights < forward < 3 * weights
    assert training - forward > 0.7 * weights
    scaled = memory.peak_bytes(config, work.FORWARD, Setting(CPU, depth=4))
    assert scaled == pytest.approx(forward, rel=0.25)


@pytest.mark.parametrize(("depth", "children"), [(None, [8]), (8, [8]), (99, [8]), (4, [4, 2]), (1, [1, 2])])
def test_peak_of_some_blocks_is_scaled_to_all(monkeypatch, depth, children):
    """A model takes 100 bytes, and 10 a block."""
    asked = []
    monkeypatch.setattr(memory, "_peak_in_child", lambda *a: asked.append(a[3]) or 100 + 10 * a[3])
    config = load_config("digits", ["model.depth=8"])
    assert memory.peak_bytes(config, work.FORWARD, Setting(CPU, depth=depth)) == 180
    assert asked == children


def test_a_system_that_does_not_tell_gives_no_peak(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_peak_in_child", lambda *_: None)
    config = load_config("digits", ["model.depth=8"])
    assert memory.peak_bytes(config, work.FORWARD, Setting(CPU, depth=2)) is None
    assert memory._kilobytes(tmp_path / "none", "VmHWM") is None


def test_kilobytes_are_read_by_the_name_of_their_field(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  8 kB\nno field\nMemAvailable:    3 kB\nx: y: 2\n")
    assert memory._kilobytes(tmp_path / "meminfo", "MemAvailable") == 3072

"""Multiply-adds from a trace: one block for all, and no operator forgotten."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffussm_cli.config import load_config
from diffussm_cli.errors import ConfigError
from diffussm_cli.model import build_model
from diffussm_cli.profiling import count as counting
from diffussm_cli.profiling.count import count


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("mnist-dit", []),
        ("mnist-dit", ["model.depth=3", "model.compression=2"]),
        ("digits", ["model.depth=3", "model.mixer=attention", "model.heads=4"]),
    ],
    ids=str,
)
def test_trace_of_one_block_counts_what_torch_counts_in_all_blocks(preset, overrides):
    """The products and the attention of the model with every block, by torch's own counter."""
    config = load_config(preset, overrides)
    with torch.device("meta"):
        model = build_model(config).eval()
        x = torch.empty(1, config.data.channels, *config.data.grid)
        t = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t, t)
    counted = count(config)
    assert sum(counted.values()) == pytest.approx(counter.get_total_flops() / 2e9, rel=1e-12)


def test_kernels_are_counted_once_per_block():
    one, three = (count(load_config("digits", [f"model.depth={depth}"])) for depth in (1, 3))
    assert one["kernels"] > 0
    assert three["kernels"] == pytest.approx(3 * one["kernels"], rel=1e-12)
    assert three["FFT"] == pytest.approx(3 * one["FFT"], rel=1e-12)


def test_uncounted_operator_is_an_error(monkeypatch):
    monkeypatch.setattr(counting, "NOT_COUNTED", counting.NOT_COUNTED - {"silu"})
    with pytest.raises(ConfigError, match="no counter for silu"):
        count(load_config("digits"))

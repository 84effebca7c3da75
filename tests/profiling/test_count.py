"""Multiply-adds from a trace: one block for all, and no operator forgotten."""

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.errors import ConfigError
from diffussm_cli.model import build_model
from diffussm_cli.profiling import count as counting
from diffussm_cli.profiling.count import count


@pytest.mark.parametrize("preset", ["digits", "mnist-dit", "xl-256"])
def test_one_block_is_traced_and_counts_as_all_of_a_whole_trace(preset, monkeypatch):
    config = load_config(preset, ["model.depth=3"])
    with torch.device("meta"):
        whole = build_model(config).eval()
        x = torch.empty(1, config.data.channels, *config.data.grid)
        t = torch.zeros(1, dtype=torch.long)
        tokens = torch.empty(1, x[0, 0].numel() // config.model.patch_size**2)
    expected, _ = counting._trace(whole, (x, t, t))
    kernels, _ = counting._trace(counting._Kernels(whole.eval()), (tokens,))
    expected.subtract(kernels)
    traced, trace = [], counting._trace
    monkeypatch.setattr(counting, "_trace", lambda model, *more: traced.append(model) or trace(model, *more))
    counted = count(config)
    assert len(traced[0].blocks) == 1
    assert counted.pop("kernels", 0) == pytest.approx(kernels.total() / 1e9, rel=1e-12)
    assert counted == pytest.approx({kind: macs / 1e9 for kind, macs in expected.items() if macs}, rel=1e-12)


def test_an_operator_that_nobody_counts_is_an_error(monkeypatch):
    monkeypatch.setattr(counting, "NOT_COUNTED", counting.NOT_COUNTED - {"silu"})
    with pytest.raises(ConfigError, match="no counter for silu"):
        count(load_config("digits"))

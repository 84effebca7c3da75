"""The report of costs: which models, in which order, and what is made of measured times."""

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.errors import ConfigError
from diffussm_cli.profiling import report


def test_models_come_resolution_by_resolution_with_every_value_of_a_sweep():
    chosen = report.choose_models("xl, dit-xl/2", "256,512", [], [], ["M=1,2"])
    assert [(name, config.data.resolution) for name, config in chosen] == [
        (f"{name} M={m}", size) for size in (256, 512) for name in ("DiffuSSM-XL", "DiT-XL/2") for m in (1, 2)
    ]


def test_presets_take_overrides_and_models_do_not():
    ((name, config),) = report.choose_models("", "", ["digits"], ["model.depth=3"], [])
    assert (name, config.model.depth) == ("digits", 3)
    with pytest.raises(ConfigError, match="--set: 'model.depth=3'"):
        report.choose_models("xl", "256", [], ["model.depth=3"], [])


def entry(name, tokens, **milliseconds):
    measured = {kind: {"median_ms": ms, "peak_bytes": 1 << 30} for kind, ms in milliseconds.items()}
    return {"name": name, "tokens": tokens, "measured": measured}


def test_the_exponent_is_of_the_lengths_of_one_model_and_kind():
    models = [entry("a", 100, forward=2.0, other=7.0), entry("a", 400, forward=16.0), entry("b", 100, forward=9.0)]
    assert report._exponents(models) == {"a": {"forward": pytest.approx(1.5)}}  # 8 times at 4 times the length
    assert report._exponents([{"name": "a", "tokens": 1}]) == {}


def test_panels_show_what_was_measured_at_two_resolutions(monkeypatch):
    monkeypatch.setattr(report, "figure_3", lambda: {"x": ([1, 2], [3.0, 4.0])})
    sizes = [load_config("digits", ["data.path=x", f"data.resolution={r}"]) for r in ("8", "16x64")]
    found = report.panels({"models": [entry("a", 64, forward=500.0), entry("a", 1024, forward=2000.0)]}, sizes)
    assert found["forward (seconds)"] == {"a": ([8, 32], [0.5, 2.0])}
    assert found["peak memory of forward (GiB)"] == {"a": ([8, 32], [1.0, 1.0])}
    assert list(report.panels({"models": [entry("a", 64, forward=500.0)]}, sizes)) == ["Gflops of a forward pass"]


@pytest.mark.parametrize(("fast", "warned"), [(True, 0), (False, 1)])
def test_bf16_without_hardware_is_measured_with_a_warning(monkeypatch, fast, warned):
    monkeypatch.setattr(report, "has_bf16", lambda device: fast)
    monkeypatch.setattr("diffussm_cli.machine.device.has_bf16", lambda device: fast)
    setting, warnings = report.make_setting("bf16", "cpu", 2, 3, None)
    assert (setting.dtype, setting.batch_size, setting.repeats) == (torch.bfloat16, 2, 3)
    assert len(warnings) == warned

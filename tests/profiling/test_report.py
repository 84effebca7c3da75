"""The report of costs: which models, in which order, and what is made of measured times."""

import pytest
import torch

from diffussm_cli.config import load_config, preset_names
from diffussm_cli.errors import ConfigError
from diffussm_cli.events import Message, finish
from diffussm_cli.profiling import report, timing
from diffussm_cli.profiling.paper import named_model
from diffussm_cli.profiling.report import swept

CPU = torch.device("cpu")


def test_models_come_resolution_by_resolution_with_every_value_of_sweep():
    chosen = report.choose_models("xl, dit-xl/2", "256,512", [], [], ["M=1,2"])
    assert [(name, config.data.resolution) for name, config in chosen] == [
        (f"{name} M={m}", size)
        for size in (256, 512)
        for name in ("DiffuSSM-XL", "DiT-XL/2")
        for m in (1, 2)
    ]


def test_presets_take_overrides_and_models_do_not():
    ((name, config),) = report.choose_models("", "", ["digits"], ["model.depth=3"], [])
    assert (name, config.model.depth) == ("digits", 3)
    with pytest.raises(ConfigError, match="--set: 'model.depth=3'"):
        report.choose_models("xl", "256", [], ["model.depth=3"], [])


def test_sweep_is_every_combination_on_top_of_the_name():
    configs = swept("S", named_model("s/2", 512), ["M=1,2,4", "P=1,4"])
    assert list(configs) == [f"S M={m} P={p}" for m in (1, 2, 4) for p in (1, 4)]
    m = configs["S M=4 P=1"].model
    assert (m.compression, m.patch_size, m.hidden_size) == (4, 1, 384)
    assert swept("S", named_model("s/2", 512), []) == {"S": named_model("s/2", 512)}


@pytest.mark.parametrize("text", ["M", "M=", "Q=1", "=2"])
def test_bad_sweeps_are_rejected(text):
    with pytest.raises(ConfigError, match="LETTER=VALUES"):
        swept("S", named_model("s", 256), [text])


def test_sweep_values_are_checked():
    with pytest.raises(ConfigError, match=r"model\.patch_size: 3 must divide"):
        swept("S", named_model("s", 256), ["P=3"])
    with pytest.raises(ConfigError, match="model.compression: '1=2' must be a whole number"):
        swept("S", named_model("s", 256), ["M=1=2"])


def test_exponent_is_fitted_per_model_and_kind(monkeypatch):
    """a takes 8 times as long at 4 times the length; b has one length; c does not fit."""
    times = {("a", 64): 2.0, ("a", 256): 16.0, ("b", 64): 9.0}

    def measure(configs, kind, setting):
        results = []
        for config in configs:
            ms = times.get((config.preset, config.data.resolution**2))
            results.append(None if ms is None else {"median_ms": ms})
        return results

    monkeypatch.setattr(timing, "measure", measure)
    sizes = [("a", 8), ("b", 8), ("a", 16), ("c", 16)]
    models = []
    for name, size in sizes:
        config = load_config("digits", ["data.path=x", f"data.resolution={size}"])
        object.__setattr__(config, "preset", name)
        models.append((name, config))

    setting = timing.Setting(CPU)

    def run():
        return report.profile(models, counting=False, work=["forward"], setting=setting)

    assert finish(run())["exponents"] == {"a": {"forward": pytest.approx(1.5)}}
    assert [event.text for event in run() if isinstance(event, Message)] == [
        "c at 16x16: forward does not fit into memory, skipped"
    ]


@pytest.mark.parametrize(("fast", "warned"), [(True, 0), (False, 1)])
def test_bf16_without_hardware_is_measured_with_warning(monkeypatch, fast, warned):
    monkeypatch.setattr(report, "has_bf16", lambda device: fast)
    monkeypatch.setattr("diffussm_cli.machine.device.has_bf16", lambda device: fast)
    setting, warnings = report.make_setting("bf16", "cpu", 2, 3)
    assert (setting.dtype, setting.batch_size, setting.repeats) == (torch.bfloat16, 2, 3)
    assert len(warnings) == warned


def test_preset_rows_hold_the_first_line_and_come_by_cost():
    rows = report.preset_rows()
    assert sorted(row.name for row in rows) == preset_names()
    assert rows[0].name == "digits"
    by_name = {row.name: row for row in rows}
    assert by_name["xl-256"].parameters == 673_088_272
    title = "DiffuSSM-XL on ImageNet 256x256: the paper's main model, 673,088,272 parameters."
    assert by_name["xl-256"].title == title

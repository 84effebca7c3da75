"""The cost of a forward pass: formula against a trace, and both against what was published."""

import pytest
import torch

from diffussm_cli.config import load_config, preset_names
from diffussm_cli.model import build_model
from diffussm_cli.model.mixers import MIXERS, axial
from diffussm_cli.profiling.count import count
from diffussm_cli.profiling.flops import cost


@pytest.mark.parametrize(("preset", "gflops"), [("xl-256", 295.6), ("xl-512", 1182.4)])
def test_cost_of_xl_equals_formula_of_paper(preset, gflops):
    c = cost(load_config(preset))
    assert c.parts["dense layers"] == pytest.approx(gflops, rel=2e-4)
    assert c.parts["dense layers"] == pytest.approx(29 * 7.5e-9 * c.tokens * 1152**2)
    assert c.parameters == 673_088_272
    assert c.gflops < 1.03 * gflops  # the rest is small


@pytest.mark.parametrize("preset", preset_names())
def test_formula_equals_trace(preset):
    config = load_config(preset)
    c, counted = cost(config), count(config)
    assert counted.pop("kernels", 0) == pytest.approx(c.kernel_gflops, rel=5e-3)
    assert sum(counted.values()) == pytest.approx(c.gflops, rel=5e-3)
    for part in ("attention", "FFT", "spectra"):
        assert counted.get(part, 0) == pytest.approx(c.parts.get(part, 0), rel=1e-9)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.backbone=dit", "model.patch_size=1"],
        ["model.num_classes=0"],
        ["model.compression=1"],
    ],
    ids=str,
)
def test_formula_equals_the_trace_of_variants(overrides):
    config = load_config("digits", overrides)
    assert sum(v for k, v in count(config).items() if k != "kernels") == pytest.approx(
        cost(config).gflops, rel=1e-9
    )


@pytest.mark.parametrize("backbone", ["dit", "diffussm"])
@pytest.mark.parametrize("words", [0, 5])
def test_formula_equals_the_trace_with_text(words, backbone):
    chosen = [
        "data.text=x",
        "model.text_width=12",
        f"model.text_tokens={words}",
        f"model.backbone={backbone}",
    ]
    config = load_config(
        "digits", [*chosen, "model.num_classes=0", "model.heads=4", "model.depth=3"]
    )
    counted, c = count(config), cost(config)
    assert sum(v for k, v in counted.items() if k != "kernels") == pytest.approx(c.gflops, rel=1e-9)
    assert c.parts["text"] * 1e9 == 12 * 32 * (1 + words) + 32 * 32
    plain = cost(
        load_config("digits", [f"model.backbone={backbone}", "model.heads=4", "model.depth=3"])
    )
    share = (32 + 2 * words) / 32  # positions with text and without
    assert c.parts["dense layers"] == pytest.approx(share * plain.parts["dense layers"])
    assert (c.training_bytes > plain.training_bytes * 1.1) == bool(words)


@pytest.mark.parametrize("local", [0, 3])
@pytest.mark.parametrize("scan", ["raster", "alternate", "four"])
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_formula_equals_the_trace_of_every_mixer(mixer, scan, local):
    chosen = [f"model.mixer={mixer}", f"model.scan={scan}", f"model.local={local}", "model.heads=4"]
    config = load_config(
        "digits", [*chosen, "data.resolution=8x12", "data.path=folder", "model.depth=3"]
    )
    counted, c = count(config), cost(config)
    assert sum(v for k, v in counted.items() if k != "kernels") == pytest.approx(c.gflops, rel=1e-9)
    assert counted.get("kernels", 0) == pytest.approx(c.kernel_gflops, rel=5e-3)
    with torch.device("meta"):
        assert c.parameters == sum(p.numel() for p in build_model(config).parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.mixer=conv,axial", "model.depth=5", "model.kernel=7"],
        ["model.mixer=conv,axial,s4d", "model.depth=4", "model.skips=true"],
        ["model.mixer=conv,axial", "model.depth=1", "model.skips=true"],
        ["model.backbone=dit", "model.heads=4", "model.depth=5", "model.skips=true"],
        ["model.backbone=dit", "model.heads=4", "model.qk_norm=true", "model.rope=true"],
        ["model.backbone=dit", "model.heads=4", "model.local=3"],
        ["model.mixer=attention,s4d", "model.heads=4", "model.qk_norm=true", "model.rope=true"],
        ["model.stem=6", "model.patch_size=2", "model.compression=2"],
        ["model.mixer=conv", "model.kernel=7", "model.conv_gate=grn"],
    ],
    ids=str,
)
def test_formula_equals_trace_of_lists_skips_and_options(overrides):
    config = load_config("digits", overrides)
    counted, c = count(config), cost(config)
    assert counted.pop("kernels", 0) == pytest.approx(c.kernel_gflops, rel=1e-9)
    assert sum(counted.values()) == pytest.approx(c.gflops, rel=1e-9)
    with torch.device("meta"):
        assert c.parameters == sum(p.numel() for p in build_model(config).parameters())


def test_formula_equals_trace_of_axial_by_ffts(monkeypatch):
    """A grid of 8 x 12 tokens, as if that were many."""
    chosen = ["model.mixer=axial", "data.resolution=8x12", "data.path=folder", "model.depth=3"]
    config = load_config("digits", chosen)
    products, by_products = cost(config), count(config)
    monkeypatch.setattr(axial, "LONGEST", 8)
    counted, c = count(config), cost(config)
    assert counted["FFT"] == pytest.approx(c.parts["FFT"], rel=1e-9)
    assert counted["spectra"] == pytest.approx(c.parts["spectra"], rel=1e-9)
    assert counted["kernels"] == pytest.approx(c.kernel_gflops, rel=1e-9)
    del counted["kernels"], by_products["kernels"]
    assert sum(counted.values()) == pytest.approx(c.gflops, rel=1e-9)
    assert sum(by_products.values()) == pytest.approx(products.gflops, rel=1e-9)
    assert set(c.parts) - set(products.parts) == {"FFT", "spectra"}


def test_memory_of_list_of_mixers_lies_between_those_of_its_mixers():
    conv, both, linear = (
        cost(
            load_config("s-256", [f"model.mixer={mixer}", "model.heads=6", "model.depth=12"])
        ).training_bytes
        for mixer in ("conv", "conv,linear", "linear")
    )
    assert conv < both < linear
    assert both == pytest.approx((conv + linear) / 2, rel=0.07)


def test_parameter_counts_of_mixers_at_xl_are_known():
    """Per block, by closed forms; at N = 64, S4D has 194 numbers per channel and direction."""
    D, h = 1152, 16
    expected = {
        "s4d": 2 * 194 * D,
        "axial": 2 * (2 * 193 + 1) * D,
        "linear": 2 * (D + 1) * (D + h),
        "conv": D * (D + 11),
        "attention": 2 * D * (D + 1),
    }
    for local in (0, 3):
        found = {
            m: cost(load_config("xl-256", [f"model.mixer={m}", f"model.local={local}"]))
            for m in expected
        }
        rest = {
            mixer: c.parameters - 29 * (expected[mixer] + 10 * D * (local > 0))
            for mixer, c in found.items()
        }
        assert set(rest.values()) == {673_088_272 - 12_962_304}


def test_linear_attention_costs_as_much_per_token_at_every_length():
    grids = ("256", "512", "1024")
    found = [
        cost(load_config("s-256", ["model.mixer=linear", "model.heads=6", f"data.resolution={g}"]))
        for g in grids
    ]
    assert [c.parts["mixer"] / c.tokens for c in found] == pytest.approx(
        [found[0].parts["mixer"] / 1024] * 3
    )


def test_products_equal_those_torch_counts():
    """Every matrix product of a forward pass, counted by torch's own counter,
    against the formula.
    """
    from torch.utils.flop_counter import FlopCounterMode

    config = load_config("s-256")
    with torch.device("meta"):
        model = build_model(config)
        x, t, y = (
            torch.empty(1, 4, 32, 32),
            torch.zeros(1, dtype=torch.long),
            torch.zeros(1, dtype=torch.long),
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(x, t, y)
    c = cost(config)
    products = sum(c.parts[part] for part in ("dense layers", "conditioning", "in and out"))
    kernels = 13 * 2 * 384 * 64 * 1024 / 1e9
    assert counter.get_total_flops() / 2e9 == pytest.approx(products + kernels, rel=1e-9)


@pytest.mark.parametrize(
    ("overrides", "processes", "share_of_parameters", "share_of_rest"),
    [
        ([], 1, 1, 1),
        ([], 8, 1, 1 / 8),
        (["train.parallel=fsdp"], 8, 1 / 8, 1 / 8),
        (["train.parallel=fsdp"], 1, 1, 1),
    ],
    ids=str,
)
def test_memory_of_training_is_that_of_one_process(
    overrides, processes, share_of_parameters, share_of_rest
):
    """Weights, gradients, moments and EMA are whole in copies and divided by FSDP; the batch is
    always divided.
    """
    config = load_config("s-256", ["train.precision=fp32", *overrides])
    whole = cost(load_config("s-256", ["train.precision=fp32"]))
    state = 5 * 4 * whole.parameters
    expected = state * share_of_parameters + (whole.training_bytes - state) * share_of_rest
    assert cost(config, processes=processes).training_bytes == pytest.approx(expected, rel=0.03)


def test_muon_keeps_one_moment_of_a_matrix_of_the_blocks():
    """Of each of 29 blocks at D = 1152 and M = 2: 5 matrices D x D, 4 of D x 2D and one 2D x 2D."""
    muon, adamw = (
        cost(load_config("xl-256", [f"train.optimizer={name}", "model.compression=2"]))
        for name in ("muon", "adamw")
    )
    assert adamw.training_bytes - muon.training_bytes == 4 * 29 * (5 + 4 * 2 + 4) * 1152**2


@pytest.mark.parametrize(("has_bf16", "same_as"), [(True, "bf16"), (False, "fp32")])
def test_memory_in_automatic_precision_is_that_of_the_device(has_bf16, same_as, monkeypatch):
    monkeypatch.setattr("diffussm_cli.machine.device.has_bf16", lambda device: has_bf16)

    def needed(precision, device="cpu"):
        chosen = [f"train.precision={precision}", f"train.device={device}"]
        return cost(load_config("s-256", chosen)).training_bytes

    assert needed("bf16") < 0.7 * needed("fp32")
    assert needed("auto") == needed(same_as)
    assert needed("auto", "cuda:99") == needed("fp32")  # not here

"""The cost of a forward pass: formula against a trace, and both against what was published."""

import pytest
import torch

from diffussm_cli.config import load_config, preset_names
from diffussm_cli.errors import ConfigError
from diffussm_cli.model import build_model
from diffussm_cli.profiling import count as counting
from diffussm_cli.profiling import paper
from diffussm_cli.profiling.count import count
from diffussm_cli.profiling.flops import cost


@pytest.mark.parametrize(("preset", "gflops"), [("xl-256", 295.6), ("xl-512", 1182.4)])
def test_xl_costs_what_the_papers_formula_says(preset, gflops):
    c = cost(load_config(preset))
    assert c.parts["dense layers"] == pytest.approx(gflops, rel=2e-4)
    assert c.parts["dense layers"] == pytest.approx(29 * 7.5e-9 * c.tokens * 1152**2)
    assert c.parameters == 673_088_272
    assert c.gflops < 1.03 * gflops  # the rest is small


@pytest.mark.parametrize("preset", preset_names())
def test_formula_equals_the_trace(preset):
    config = load_config(preset)
    c, counted = cost(config), count(config)
    assert counted.pop("kernels", 0) == pytest.approx(c.kernel_gflops, rel=5e-3)
    assert sum(counted.values()) == pytest.approx(c.gflops, rel=5e-3)
    for part in ("attention", "FFT", "spectra"):
        assert counted.get(part, 0) == pytest.approx(c.parts.get(part, 0), rel=1e-9)


@pytest.mark.parametrize(
    "overrides",
    [["model.backbone=dit", "model.patch_size=1"], ["model.num_classes=0"], ["model.compression=1"]],
    ids=str,
)
def test_formula_equals_the_trace_of_variants(overrides):
    config = load_config("digits", overrides)
    assert sum(v for k, v in count(config).items() if k != "kernels") == pytest.approx(cost(config).gflops, rel=1e-9)


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


def test_products_are_what_torch_counts():
    """Every matrix product of a forward pass, counted by torch's own counter, against the formula."""
    from torch.utils.flop_counter import FlopCounterMode

    config = load_config("s-256")
    with torch.device("meta"):
        model = build_model(config)
        x, t, y = torch.empty(1, 4, 32, 32), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(x, t, y)
    c = cost(config)
    products = sum(c.parts[part] for part in ("dense layers", "conditioning", "in and out"))
    kernels = 13 * 2 * 384 * 64 * 1024 / 1e9
    assert counter.get_total_flops() / 2e9 == pytest.approx(products + kernels, rel=1e-9)


def test_an_operator_that_nobody_counts_is_an_error(monkeypatch):
    monkeypatch.setattr(counting, "NOT_COUNTED", counting.NOT_COUNTED - {"silu"})
    with pytest.raises(ConfigError, match="nobody counts silu"):
        count(load_config("digits"))


def test_every_published_row_of_dit():
    """Within 0.3%, or within the rounding of the table's two decimals."""
    rows = list(paper.dit_rows())
    assert len(rows) == 13
    for row in rows:
        assert abs(row.difference) < 3e-3 or abs(row.ours - row.published) <= 5e-3, row


def test_training_compute_of_the_paper():
    rows = {row.name: row for row in paper.training_rows()}
    assert [round(rows[n].implied, 1) for n in ("xl-256", "dit-xl-256", "xl-512", "dit-xl-512")] == [
        280.3,
        118.9,
        1066.2,
        524.7,
    ]
    assert rows["xl-256"].difference == pytest.approx(295.66 / 280.3 - 1, abs=1e-3)
    assert rows["xl-512"].difference == pytest.approx(1182.43 / 1066.2 - 1, abs=1e-3)
    assert abs(rows["dit-xl-256"].difference) < 3e-3
    assert abs(rows["dit-xl-512"].difference) < 3e-3
    assert "2.5 times" in paper.sentence()


@pytest.mark.parametrize(
    ("overrides", "processes", "share_of_parameters", "share_of_rest"),
    [([], 1, 1, 1), ([], 8, 1, 1 / 8), (["train.parallel=fsdp"], 8, 1 / 8, 1 / 8), (["train.parallel=fsdp"], 1, 1, 1)],
    ids=str,
)
def test_memory_of_training_is_that_of_one_process(overrides, processes, share_of_parameters, share_of_rest):
    """Weights, gradients, moments and EMA are whole in copies and divided by FSDP; the batch is always divided."""
    config = load_config("s-256", ["train.precision=fp32", *overrides])
    whole = cost(load_config("s-256", ["train.precision=fp32"]))
    state = 5 * 4 * whole.parameters
    expected = state * share_of_parameters + (whole.training_bytes - state) * share_of_rest
    assert cost(config, processes=processes).training_bytes == pytest.approx(expected, rel=0.03)

"""The analytic cost against the paper."""

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.profiling.flops import cost


@pytest.mark.parametrize(("preset", "gflops"), [("xl-256", 295.6), ("xl-512", 1182.4)])
def test_xl_costs_what_the_papers_formula_says(preset, gflops):
    c = cost(load_config(preset))
    assert c.parts["hourglass and gate"] == pytest.approx(gflops, rel=2e-4)
    assert c.parameters == 673_088_272
    assert c.gflops < 1.03 * gflops  # the rest is small


def test_products_are_counted_as_the_model_makes_them():
    """Every matrix product of a forward pass, counted by torch, against the formula."""
    from torch.utils.flop_counter import FlopCounterMode

    from diffussm_cli.model import build_model

    config = load_config("s-256")
    with torch.device("meta"):
        model = build_model(config)
        x, t, y = torch.empty(1, 4, 32, 32), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t, y)
    c = cost(config)
    products = c.gflops - c.parts["fft"] + c.kernel_gflops
    assert counter.get_total_flops() / 2e9 == pytest.approx(products, rel=1e-3)

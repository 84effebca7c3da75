"""What is measured: models with random weights, and the calls."""

import pytest
import torch
import torch.profiler

from diffussm_cli.config import load_config
from diffussm_cli.profiling import work
from diffussm_cli.profiling.work import Setting

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", work.KINDS)
@pytest.mark.parametrize("preset", ["digits", "mnist-dit"])
def test_workloads_do_what_they_say(kind, preset):
    config, setting = load_config(preset), Setting(CPU, batch_size=2)
    model = work.build(config, setting, 1)
    seen = []
    model.register_forward_hook(lambda m, args, out: seen.append((len(args[0]), m.training, out.requires_grad)))
    work.workload(model, config, kind, setting)()
    assert seen == [{"forward": (2, False, False), "forward+backward": (2, True, True)}.get(kind, (4, False, False))]


def test_built_models_have_no_zero_weights_and_finite_output():
    config = load_config("digits")
    model = work.build(config, Setting(CPU), 2)
    assert len(model.blocks) == 2
    assert all(p.abs().sum() > 0 for p in model.parameters())
    assert torch.isfinite(model(torch.randn(1, 1, 8, 8), torch.tensor([5]), torch.tensor([1]))).all()


def test_the_product_that_rates_are_compared_with_has_the_multiply_adds_it_says():
    call, macs = work.product(Setting(CPU), rows=3, width=5)
    assert call().shape == (3, 10)
    assert macs == 3 * 5 * 10

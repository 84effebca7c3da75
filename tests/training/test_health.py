"""How a training fares: bad steps, sizes of updates and time scales, each with a known answer."""

import math

import pytest
import torch
from torch import nn

from diffussm_cli.model.s4d.layer import S4D
from diffussm_cli.training.health import BadSteps, time_scales, update_ratios
from tests.conftest import device, randn


def test_bad_steps_are_numbered_and_their_row_continues_beyond_a_record():
    bad = BadSteps(device())

    def add(*flags):
        for flag in flags:
            bad.add(torch.tensor(flag, device=device()))

    add(0.0, 1.0, 1.0, 0.0, 1.0)
    assert bad.flush(5) == ([2, 3, 5], 2)
    add(1.0, 1.0, 0.0, 1.0)
    assert bad.flush(9) == ([6, 7, 9], 3)  # 5, 6 and 7
    add(0.0)
    assert bad.flush(10) == ([], 1)  # 9, as it was when this time began


def stepped(weights, gradients, **options):
    """A parameter after AdamW's steps with these gradients, before the last one too, and the
    optimiser.
    """
    p = nn.Parameter(weights.clone().to(device()))
    optimizer = torch.optim.AdamW(
        [{"params": [p], "name": "w", "weight_decay": 0.0} | options], fused=True
    )
    for gradient in gradients:
        before, p.grad = p.detach().clone(), gradient.to(device())
        optimizer.step()
    return before, p.detach(), optimizer


def test_first_update_of_adam_is_the_learning_rate_in_every_weight():
    _, _, optimizer = stepped(
        torch.ones(5), [torch.tensor([1e-3, 2.0, -3.0, 40.0, -500.0])], lr=0.125
    )
    moved, size = update_ratios(optimizer)["w"].tolist()
    assert moved == pytest.approx(5 * 0.125**2, rel=1e-4)
    assert size == pytest.approx(2 * 0.875**2 + 2 * 1.125**2 + 0.875**2, rel=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_update_ratios_equal_those_of_weights_before_and_after(decay):
    gradients = [randn(7, 3, seed=i) for i in range(4)]
    before, after, optimizer = stepped(
        randn(7, 3, seed=9), gradients, lr=0.01, betas=(0.8, 0.95), weight_decay=decay
    )
    moved, size = update_ratios(optimizer)["w"].tolist()
    assert math.sqrt(moved) == pytest.approx((after - before).norm().item(), rel=1e-3)
    assert math.sqrt(size) == pytest.approx(after.norm().item(), rel=1e-5)


def test_update_ratios_are_per_group_and_zero_without_a_step():
    groups = [
        {"params": [nn.Parameter(torch.ones(2, device=device()))], "name": name}
        for name in ("a", "b")
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.5, weight_decay=0.0, fused=True)
    groups[1]["params"][0].grad = torch.ones(2, device=device())
    optimizer.step()
    assert {k: v.tolist() for k, v in update_ratios(optimizer).items()} == {
        "a": [0.0, 0.0],
        "b": pytest.approx([2 * 0.5**2, 2 * 0.5**2], rel=1e-4),
    }


def test_time_scales_are_the_extremes_of_all_layers():
    model = nn.Sequential(S4D(4, 8), nn.Linear(2, 2), S4D(4, 8)).to(device())
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.log_dt.fill_(math.log(0.01))
            layer.log_A_real.fill_(math.log(0.5))
        model[0].log_dt[1, 2], model[2].log_dt[0, 3] = math.log(0.002), math.log(0.3)
        model[2].log_A_real[1, 0, 1], model[0].log_A_real[0, 1, 2] = math.log(0.25), math.log(7.0)
    found = time_scales(model)
    assert {k: (math.exp(v[0]), math.exp(-v[1])) for k, v in found.items()} == {
        "dt": pytest.approx((0.002, 0.3), rel=1e-5),
        "decay": pytest.approx((0.25, 7.0), rel=1e-5),
    }


def test_model_without_ssm_has_no_time_scales():
    assert time_scales(nn.Linear(2, 2)) == {}

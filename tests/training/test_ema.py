"""Averaged weights."""

import pytest
import torch

from diffussm_cli.training.ema import EMA


def test_ema_decay_warms_up_and_averages():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(1.0)
    expected = 0.0
    for step in (1, 2, 3):
        d = (1 + step) / (10 + step)
        expected = d * expected + (1 - d)
        ema.update(model, step)
        assert float(ema.model.weight) == pytest.approx(expected)
    assert ema.decay_at(10**6) == 0.9
    assert not ema.model.weight.requires_grad

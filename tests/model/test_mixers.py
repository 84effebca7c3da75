"""Every mixer in every order: gradients everywhere, checkpointing, names;
and how a mixer is added.
"""

import contextlib
import itertools
import typing

import pytest
import torch
from torch import nn

from diffussm_cli import config
from diffussm_cli.config import ModelConfig, unused_arguments
from diffussm_cli.errors import ConfigError
from diffussm_cli.model import DiffuSSM
from diffussm_cli.model.block import DiffuSSMBlock
from diffussm_cli.model.mixer import Mixer
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.model.scan import SCANS
from tests.conftest import SIZES, device, fill, randn

COMBINATIONS = list(itertools.product(sorted(MIXERS), sorted(SCANS), (0, 3)))


def tiny(**changes):
    return fill(DiffuSSM(**SIZES | {"heads": 2} | changes))


def inputs(H=4, W=8):
    return (
        randn(2, 2, H, W),
        torch.tensor([3, 900], device=device()),
        torch.tensor([0, 1], device=device()),
    )


def dead(model):
    """Names of parameters without a gradient."""
    model(*inputs()).square().sum().backward()
    return [
        n
        for n, p in model.named_parameters()
        if n != "y_embed.weight" and (p.grad is None or not p.grad.any())
    ]


@pytest.mark.parametrize(("mixer", "scan", "local"), COMBINATIONS)
def test_every_parameter_gets_a_gradient(mixer, scan, local):
    assert dead(tiny(mixer=mixer, scan=scan, local=local)) == []


@pytest.mark.parametrize(("mixer", "scan", "local"), COMBINATIONS)
def test_mixer_accepts_other_grids_and_checkpointing(mixer, scan, local):
    chosen = {"mixer": mixer, "scan": scan, "local": local}
    model, other = tiny(**chosen), tiny(input_size=(6, 4), gradient_checkpointing=True, **chosen)
    other.load_state_dict(model.state_dict())
    x, t, y = inputs(6, 4)
    torch.testing.assert_close(model(x, t, y), other(x, t, y))
    results = []
    for each in (model, other):
        each(*inputs()).square().sum().backward()
        results.append([p.grad for p in each.parameters()])
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(plain, recomputed)


def test_scans_change_the_function_and_not_the_parameters():
    models = {scan: tiny(scan=scan) for scan in SCANS}
    for model in models.values():
        model.load_state_dict(models["raster"].state_dict())
    outputs = [model(*inputs()) for model in models.values()]
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(outputs, 2))


def test_published_weights_keep_their_names():
    names = [n for n, _ in DiffuSSMBlock(8, 2, 4).named_parameters()]
    linears = [
        f"{layer}.{part}" for layer in ("norm.adaLN", "W0", "W_up") for part in ("weight", "bias")
    ]
    ssm = [f"s4d.{name}" for name in ("log_dt", "log_A_real", "A_imag", "B", "C", "D_skip")]
    after = [
        f"{layer}.{part}" for layer in ("W_down", "W1", "W2", "W3") for part in ("weight", "bias")
    ]
    assert names == linears + ssm + after
    assert {n.split(".")[0] for n in DiffuSSMBlock(8, 2, 4, "conv", local=3).state_dict()} >= {
        "conv",
        "local",
    }


def test_conv_with_response_normalisation_learns_and_starts_at_zero():
    model = DiffuSSM(**SIZES, mixer="conv", kernel=7, conv_gate="grn")
    assert not any(p.any() for block in model.blocks for p in block.conv.gate.parameters())
    assert dead(fill(model)) == []


def test_list_of_mixers_repeats_along_the_blocks():
    model = tiny(mixer="conv, axial", depth=5)
    assert [block.mixer_name for block in model.blocks] == [
        "conv",
        "axial",
        "conv",
        "axial",
        "conv",
    ]
    assert dead(model) == []


def test_configuration_knows_every_mixer_and_scan():
    hints = typing.get_type_hints(ModelConfig)
    assert tuple(MIXERS) == config.MIXERS
    for name, mixer in MIXERS.items():
        text = [
            "data.text=x",
            "model.text_width=4",
            "model.text_tokens=4",
            f"model.mixer=s4d,{name}",
            "model.heads=4",
        ]
        with pytest.raises(ConfigError) if mixer.needs_image else contextlib.nullcontext():
            config.load_config("digits", text)
    assert set(typing.get_args(hints["scan"])) == set(SCANS)


def test_mixer_is_added(monkeypatch):
    class Mean(Mixer):
        """Every token, and the mean of all: u (B, D, J, M) -> (B, 2D, J, M)."""

        def __init__(self, D):
            super().__init__()
            self.project = nn.Linear(D, D)

        @classmethod
        def of(cls, sizes):
            return cls(sizes.D)

        def macs(self, _L, _grid):
            return {"mixer": self.project.weight.numel()}

        def forward(self, u, _grid):
            mean = self.project(u.mean((2, 3)))  # (B, D)
            return torch.cat([u, mean[..., None, None].expand(u.shape)], dim=1)

    monkeypatch.setitem(MIXERS, "mean", Mean)
    model = tiny(mixer="mean", scan="four", local=3)
    assert not unused_arguments("diffussm", {"mixer": "mean", "d_state": 4, "heads": 2})
    assert model.blocks[3].mean.project.weight.shape == (16, 16)
    assert dead(model) == []

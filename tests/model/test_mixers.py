"""Every mixer in every order: gradients everywhere, checkpointing, names, what autograd saves; and
how a mixer is added.
"""

import contextlib
import dataclasses
import itertools
import typing

import pytest
import torch
from torch import nn

from diffussm_cli import config
from diffussm_cli.config import MIXER_FACTS, ModelConfig, unused_arguments
from diffussm_cli.config.mixers import MixerFacts
from diffussm_cli.errors import ConfigError
from diffussm_cli.model import DiffuSSM
from diffussm_cli.model.block import DiffuSSMBlock
from diffussm_cli.model.mixer import Mixer, Sizes
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.model.scan import SCANS
from diffussm_cli.training.optimizer import make_optimizer
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
    assert list(MIXERS) == list(MIXER_FACTS)
    for name, row in MIXER_FACTS.items():
        text = [
            "data.text=x",
            "model.text_width=4",
            "model.text_tokens=4",
            f"model.mixer=s4d,{name}",
            "model.heads=4",
        ]
        with pytest.raises(ConfigError) if row.needs_image else contextlib.nullcontext():
            config.load_config("digits", text)
    for backbone in ("diffussm", "dit"):
        local = [*text[:3], f"model.backbone={backbone}", "model.local=3", "model.heads=4"]
        with pytest.raises(ConfigError, match="text_tokens: 4 given, but model.local=3 reads"):
            config.load_config("digits", local)
    assert set(typing.get_args(hints["scan"])) == set(SCANS)


class Watched(Sizes):
    """Sizes that remember which of them were asked for."""

    def __getattribute__(self, name):
        if not name.startswith("_"):
            super().__getattribute__("asked").add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_is_made_from_the_fields_of_its_row_alone(name):
    fields = {field: getattr(ModelConfig(), field) for field in MIXER_FACTS[name].fields}
    sizes = Watched(asked=set(), D=16, scan=SCANS["raster"][0], grid=(4, 4), **fields)
    MIXERS[name].of(sizes)
    assert sizes.asked & set(config.MIXER_FIELDS) == set(fields)


def saved_numbers(mixer, B, side, monkeypatch):
    """How many numbers autograd saves in a call of a mixer, without its parameters and result."""
    monkeypatch.setattr("diffussm_cli.model.s4d.convolution.worth_keeping", lambda _: False)
    u = torch.randn(B, 16, side * side // 2, 2, requires_grad=True)
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        y = mixer(u, (side, side // 2))
    for tensor in (y, *mixer.parameters()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(t.untyped_storage().nbytes() / 4 for t in storages.values())


@pytest.mark.parametrize("name", MIXERS)
def test_saved_is_what_autograd_saves_of_a_token(name, monkeypatch):
    """Of a mixer that saves its input, that may count or not."""
    mixer, side = fill(DiffuSSMBlock(16, 2, 4, name, 4, grid=(16, 16))).mixer.cpu(), 16
    one, three = (saved_numbers(mixer, B, side, monkeypatch) for B in (1, 3))
    saved = (three - one) / 2 / side**2  # the kernels do not depend on B
    assert min(abs(saved - mixer.saved()), abs(saved - 16 - mixer.saved())) < 0.1 * saved


class Decay(Mixer):
    """Every token, and a mean of all that has a decay by head: u (B, D, J, M) -> (B, 2D, J, M)."""

    def __init__(self, D, heads):
        super().__init__()
        self.project = nn.Linear(D, D)
        self.decay = nn.Parameter(torch.zeros(heads, D // heads))

    @classmethod
    def of(cls, sizes):
        return cls(sizes.D, sizes.heads)

    def macs(self, _L, _grid):
        return {"mixer": self.project.weight.numel()}

    def saved(self):
        return 0

    def forward(self, u, _grid):
        mean = self.project(u.mean((2, 3))) * self.decay.exp().flatten()  # (B, D)
        return torch.cat([u, mean[..., None, None].expand(u.shape)], dim=1)


ROW = MixerFacts(("heads",), reads_in_order=False, needs_image=True, is_state_space=False)


def add(monkeypatch, mixer=Decay, row=ROW):
    monkeypatch.setitem(MIXERS, "mine", mixer)
    monkeypatch.setitem(MIXER_FACTS, "mine", row)


def test_mixer_is_added(monkeypatch):
    add(monkeypatch)
    model = tiny(mixer="mine", scan="four", local=3)
    assert not unused_arguments("diffussm", {"mixer": "mine", "heads": 2})
    assert model.blocks[3].mine.decay.shape == (2, 8)
    assert dead(model) == []

    # as a configuration knows it
    with pytest.raises(ConfigError, match="model.heads: 5 must divide"):
        config.load_config("digits", ["model.mixer=mine", "model.heads=5"])
    words = ["data.text=x", "model.text_width=4", "model.text_tokens=4"]
    with pytest.raises(ConfigError, match="model.mixer=mine reads an image"):
        config.load_config("digits", [*words, "model.mixer=mine", "model.heads=4"])
    fitting = config.load_config("digits", ["model.mixer=mine", "model.d_state=16"])
    assert "model.d_state=16 (no mixer is s4d or axial)" in config.unused_fields(fitting)


def test_what_a_new_mixer_lacks_is_an_error_when_the_network_is_built(monkeypatch):
    add(monkeypatch, row=dataclasses.replace(ROW, fields=()))
    with pytest.raises(AttributeError, match="config/mixers.py does not name the field 'heads'"):
        tiny(mixer="mine")

    class Costless(Decay):
        saved = Mixer.saved

    add(monkeypatch, Costless)
    with pytest.raises(TypeError, match="abstract.*saved"):
        tiny(mixer="mine")

    class WithBuffer(Decay):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("mean", torch.zeros(1))

    add(monkeypatch, WithBuffer)
    with pytest.raises(AssertionError, match="blocks.0.mine.mean.*: averages .* do not follow"):
        tiny(mixer="mine")


def test_muon_leaves_convolutions_of_a_mixer_to_adamw(monkeypatch):
    """A depthwise one, D x 1 x k, is no stack of D matrices 1 x k."""

    class WithConvolution(Decay):
        def __init__(self, D, heads):
            super().__init__(D, heads)
            self.along = nn.Conv1d(D, D, 3, padding=1, groups=D)

    add(monkeypatch, WithConvolution)
    recipe = config.load_config("digits", ["train.optimizer=muon"]).train
    model = tiny(mixer="mine")
    groups = {
        id(p): group["name"]
        for group in make_optimizer(model, recipe).param_groups
        for p in group["params"]
    }
    mixer = model.blocks[0].mine
    assert groups[id(mixer.along.weight)] == "matrices"
    assert groups[id(mixer.project.weight)] == "muon"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parameters_beside_the_layers_of_a_mixer_are_no_matrices(optimizer, monkeypatch):
    """A decay by channel and state has two dimensions, and nothing to shrink or orthogonalise."""
    add(monkeypatch)
    recipe = config.load_config(
        "digits", [f"train.optimizer={optimizer}", "train.weight_decay=0.1"]
    ).train
    model = tiny(mixer="mine")
    groups = make_optimizer(model, recipe).param_groups
    (group,) = (g for g in groups if any(p is model.blocks[0].mine.decay for p in g["params"]))
    assert (group["name"], group["weight_decay"]) == ("vectors", 0)

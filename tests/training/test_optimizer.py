"""The groups of parameters and the course of the learning rate."""

import math

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.errors import ConfigError
from diffussm_cli.model import build_model
from diffussm_cli.training.muon import Muon, orthogonalised
from diffussm_cli.training.optimizer import lr_factor, make_optimizer, parameter_groups, set_lr
from tests.conftest import device, randn

SSM = {"log_dt", "log_A_real", "A_imag", "B", "C", "D_skip"}


def test_learning_rate_follows_its_schedule():
    def course(**changes):
        t = load_config(
            "digits", [f"train.{k}={v}" for k, v in {"steps": 100, **changes}.items()]
        ).train
        return [lr_factor(t, s) for s in (0, 4, 9, 10, 55, 99)]

    assert course() == [1] * 6
    assert course(warmup_steps=10) == [0.1, 0.5, 1, 1, 1, 1]
    assert course(lr_decay="linear", warmup_steps=10) == pytest.approx(
        [0.1, 0.5, 1, 1, 0.5, 1 / 90]
    )
    assert course(lr_decay="cosine", warmup_steps=10)[3:5] == pytest.approx([1, 0.5])


def test_optimiser_groups_hold_every_parameter_once(tiny):
    config = load_config("xl-256", ["train.weight_decay=0.1", "train.lr=5e-3"])
    model = build_model(tiny())
    groups = {g["name"]: g for g in parameter_groups(model, config.train)}
    ids = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[-1] for p in groups["matrices"]["params"]} == {"weight"}
    assert {names[id(p)].rpartition(".")[-1] for p in groups["vectors"]["params"]} == {"bias"}
    assert all(".s4d." in names[id(p)] for p in groups["ssm"]["params"])
    assert (groups["matrices"]["weight_decay"], groups["vectors"]["weight_decay"]) == (0.1, 0.0)
    assert groups["ssm"]["weight_decay"] == 0.0
    assert (groups["matrices"]["lr"], groups["ssm"]["lr"]) == (5e-3, 1e-3)


def test_state_spaces_of_every_mixer_are_the_ssm_group(tiny):
    for mixer, expected in (("s4d", SSM), ("axial", SSM), ("conv", set()), ("attention", set())):
        config = tiny(
            f"model.mixer={mixer}", "model.heads=4", "train.lr=5e-3", "train.weight_decay=0.1"
        )
        model = build_model(config)
        groups = {g["name"]: g for g in parameter_groups(model, config.train)}
        ssm = {id(p) for p in groups.get("ssm", {"params": []})["params"]}
        assert {n for n, p in model.named_parameters() if id(p) in ssm} == {
            f"blocks.{i}.{mixer}.{name}" for i in range(2) for name in expected
        }
        if expected:
            assert (groups["ssm"]["lr"], groups["ssm"]["weight_decay"]) == (
                config.train.ssm_lr,
                0.0,
            )


# --------------------------------------------------------------------------------------------- Muon
def exactly_orthogonal(matrices):
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 16), (2, 16, 4)])
def test_orthogonalised_matrices_keep_directions_and_have_singular_values_near_one(shape):
    matrices = randn(*shape)
    result = orthogonalised(matrices)
    values = torch.linalg.svdvals(result)
    assert 0.65 < values.min() < values.max() < 1.25
    cosine = torch.nn.functional.cosine_similarity(
        result.flatten(1), exactly_orthogonal(matrices).flatten(1)
    )
    assert cosine.min() > 0.97
    torch.testing.assert_close(orthogonalised(100 * matrices), result, rtol=1e-4, atol=1e-5)
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


def test_muon_moves_each_part_of_stacked_matrix_as_if_alone():
    """Against the rule written out, for three matrices in one parameter, over two steps."""
    weight = torch.nn.Parameter(randn(12, 6))
    alone = weight.detach().clone().view(3, 4, 6)
    group = {"name": "muon", "params": [weight], "lr": 0.1, "weight_decay": 0.5, "muon": True}
    optimizer = Muon([group, others()], {id(weight): 3}, (0.9, 0.999))
    optimizer.found_inf = torch.zeros((), device=device())
    momentum = torch.zeros(3, 4, 6, device=device())
    for seed in (1, 2):
        gradient = randn(12, 6, seed=seed)
        weight.grad = gradient
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient.view(3, 4, 6)
        direction = orthogonalised(0.05 * gradient.view(3, 4, 6) + 0.95 * momentum)
        alone = alone - 0.1 * (0.2 * math.sqrt(6) * direction + 0.5 * alone)
        torch.testing.assert_close(weight.detach().view(3, 4, 6), alone, rtol=1e-5, atol=1e-5)


def others():
    parameter = torch.nn.Parameter(torch.ones(1, device=device()))
    return {"name": "vectors", "params": [parameter], "lr": 0.1, "weight_decay": 0.0, "muon": False}


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_muon_skips_a_step_that_is_not_finite_and_keeps_its_momentum(wrong):
    weight = torch.nn.Parameter(randn(4, 4))
    vector = others()
    group = {"name": "muon", "params": [weight], "lr": 0.1, "weight_decay": 0.5, "muon": True}
    optimizer = Muon([group, vector], {}, (0.9, 0.999))
    for bad, value in ((0.0, 1.0), (1.0, wrong)):
        before = (
            weight.detach().clone(),
            optimizer.state[weight].get("momentum", torch.zeros(4, 4)).clone(),
        )
        weight.grad = torch.full((4, 4), value, device=device())
        vector["params"][0].grad = torch.full((1,), value, device=device())
        optimizer.found_inf = torch.full((), bad, device=device())
        optimizer.step()
    assert torch.equal(weight, before[0])
    assert torch.equal(optimizer.state[weight]["momentum"], before[1])
    assert torch.isfinite(vector["params"][0]).all()


def test_muon_steps_in_a_loop_of_your_own_as_in_training():
    def weights_after_steps(found_inf):
        weight = torch.nn.Parameter(torch.eye(4, device=device()))
        vector = others()
        group = {"name": "muon", "params": [weight], "lr": 0.1, "weight_decay": 0.5, "muon": True}
        optimizer = Muon([group, vector], {}, (0.9, 0.999))
        if found_inf is not None:
            optimizer.found_inf = found_inf
        for _ in range(2):
            weight.grad = torch.arange(16.0, device=device()).view(4, 4)
            vector["params"][0].grad = torch.ones(1, device=device())
            optimizer.step()
        return torch.cat([weight.detach().flatten(), vector["params"][0].detach()])

    in_training = weights_after_steps(torch.zeros((), device=device()))
    assert torch.equal(weights_after_steps(None), in_training)


def test_muon_with_loaded_state_steps_as_if_never_saved():
    """The moments of both kinds continue, and both follow a rate that is set later."""

    def weights_after_steps(saved_at):
        weight = torch.nn.Parameter(torch.eye(4, device=device()))
        vector = others()
        group = {"name": "muon", "params": [weight], "lr": 0.1, "weight_decay": 0.5, "muon": True}
        groups = [group, vector]
        optimizer = Muon([dict(g) for g in groups], {}, (0.9, 0.999))
        for number in range(4):
            if number == saved_at:
                saved = optimizer.state_dict()
                optimizer = Muon([dict(g) for g in groups], {}, (0.9, 0.999))
                optimizer.load_state_dict(saved)
            if number == 3:
                for g in optimizer.param_groups:
                    g["lr"] = 1.0
            weight.grad = randn(4, 4, seed=number)
            vector["params"][0].grad = randn(1, seed=number)
            optimizer.step()
        return torch.cat([weight.detach().flatten(), vector["params"][0].detach()])

    assert torch.equal(weights_after_steps(saved_at=2), weights_after_steps(saved_at=None))


def test_muon_steps_group_that_is_added_later():
    optimizer = Muon([others()], {}, (0.9, 0.999))
    later = torch.nn.Parameter(torch.ones(1, device=device()))
    optimizer.add_param_group({"params": [later], "lr": 0.1, "weight_decay": 0.0})
    later.grad = torch.ones(1, device=device())
    optimizer.step()
    torch.testing.assert_close(later.detach(), torch.full_like(later, 0.9))


@pytest.mark.parametrize("backbone", ["diffussm", "dit"])
def test_muon_takes_block_matrices_and_adamw_the_rest(tiny, backbone):
    config = tiny("train.optimizer=muon", f"model.backbone={backbone}", "model.heads=2")
    model = build_model(config)
    optimizer = make_optimizer(model, config.train)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    expected = {
        name
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and name.endswith("weight") and p.ndim in (2, 3)
    }
    assert matrices == expected
    parts = {
        names[id(p)].split(".", 2)[2]: optimizer.parts.get(id(p), 1)
        for p in model.parameters()
        if id(p) in names and names[id(p)] in matrices
    }
    shown = {"diffussm": ("norm.adaLN.weight", 2), "dit": ("attention.qkv.weight", 6)}[backbone]
    assert parts[shown[0]] == shown[1]
    everything = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(everything) == sorted(names)


def test_muon_with_split_matrices_is_rejected(tiny):
    with pytest.raises(
        ConfigError, match="^train.optimizer: muon needs whole matrices, which train.parallel=fsdp"
    ):
        tiny("train.optimizer=muon", "train.parallel=fsdp")


def optimizer_of(tiny, *overrides):
    config = tiny(*overrides)
    return make_optimizer(build_model(config).to(device()), config.train)


def test_learning_rates_are_scaled_from_their_peaks(tiny):
    optimizer = optimizer_of(tiny, "train.lr=4e-3", "train.ssm_lr=1e-3")
    for factor in (0.5, 0.25):  # the second does not multiply the first
        set_lr(optimizer, factor)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
        "matrices": 1e-3,
        "vectors": 1e-3,
        "ssm": 2.5e-4,
    }


def test_adamw_lr_is_the_rate_of_what_muon_leaves_to_adamw(tiny):
    fields = ["train.optimizer=muon", "train.lr=1e-2", "train.ssm_lr=1e-3"]
    rates = [
        {g["name"]: (g["lr"], g["peak_lr"]) for g in optimizer_of(tiny, *fields, *of).param_groups}
        for of in ([], ["train.adamw_lr=2e-3"], ["train.adamw_lr=1e-4"])
    ]
    muon = {"muon": (1e-2, 1e-2)}
    assert [rate.pop("muon") for rate in rates] == [*muon.values()] * 3
    expected = [(1e-2, 1e-3), (2e-3, 1e-3), (1e-4, 1e-4)]
    for rate, (others, ssm) in zip(rates, expected):
        assert rate == {
            "matrices": (others, others),
            "vectors": (others, others),
            "ssm": (ssm, ssm),
        }


def test_optimizer_skips_step_where_found_inf_is_one(tiny):
    optimizer = optimizer_of(tiny)
    p = optimizer.param_groups[0]["params"][0]
    for bad, moves in ((1.0, False), (0.0, True)):
        before = p.detach().clone()
        for group in optimizer.param_groups:
            for q in group["params"]:
                q.grad = torch.ones_like(q)
        optimizer.found_inf = torch.tensor(bad, device=device())
        optimizer.step()
        assert torch.equal(p, before) != moves
        assert optimizer.state[p]["step"].item() == moves

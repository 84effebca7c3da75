"""The groups of parameters and the course of the learning rate."""

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.model import build_model
from diffussm_cli.training.optimizer import lr_factor, make_optimizer, parameter_groups, set_lr
from tests.conftest import device

SSM = {"log_dt", "log_A_real", "A_imag", "B", "C", "D_skip"}


def test_learning_rate_courses():
    def course(**changes):
        t = load_config("digits", [f"train.{k}={v}" for k, v in {"steps": 100, **changes}.items()]).train
        return [lr_factor(t, s) for s in (0, 4, 9, 10, 55, 99)]

    assert course() == [1] * 6
    assert course(warmup_steps=10) == [0.1, 0.5, 1, 1, 1, 1]
    assert course(lr_decay="linear", warmup_steps=10) == pytest.approx([0.1, 0.5, 1, 1, 0.5, 1 / 90])
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
        config = tiny(f"model.mixer={mixer}", "model.heads=4", "train.lr=5e-3", "train.weight_decay=0.1")
        model = build_model(config)
        groups = {g["name"]: g for g in parameter_groups(model, config.train)}
        ssm = {id(p) for p in groups.get("ssm", {"params": []})["params"]}
        assert {n for n, p in model.named_parameters() if id(p) in ssm} == {
            f"blocks.{i}.{mixer}.{name}" for i in range(2) for name in expected
        }
        if expected:
            assert (groups["ssm"]["lr"], groups["ssm"]["weight_decay"]) == (config.train.ssm_lr, 0.0)


def optimizer_of(tiny, *overrides):
    config = tiny(*overrides)
    return make_optimizer(build_model(config).to(device()), config.train)


def test_rates_are_scaled_from_their_peaks(tiny):
    optimizer = optimizer_of(tiny, "train.lr=4e-3", "train.ssm_lr=1e-3")
    for factor in (0.5, 0.25):  # the second does not multiply the first
        set_lr(optimizer, factor)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {"matrices": 1e-3, "vectors": 1e-3, "ssm": 2.5e-4}


def test_a_step_is_left_out_where_found_inf_is_one(tiny):
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

"""AdamW or Muon with the parameter groups that an SSM needs, and the learning rate schedule."""

import dataclasses
import math

import torch
from torch import nn

from diffussm_cli.config import TrainConfig
from diffussm_cli.errors import ConfigError
from diffussm_cli.model import Backbone
from diffussm_cli.model.block import HourglassLinear
from diffussm_cli.model.mixer import Mixer, StateSpace
from diffussm_cli.model.stacked import StackedLinear
from diffussm_cli.training.muon import Muon


def make_optimizer(model: Backbone, config: TrainConfig) -> torch.optim.AdamW | Muon:
    """The optimiser of a configuration: fused AdamW over `parameter_groups`, or Muon for the
    linear layers of the blocks and AdamW for all others.

    Either skips a step on the device when its `found_inf` is 1. Rates are those after warm-up;
    each group also has its own as `peak_lr`, which a schedule may multiply.

    Args:
        model: a network of this package.
        config: the section `train` of a configuration, as `load_config("mnist").train`.

    Raises:
        ConfigError: if `config` is none, or if Muon is to update a model without blocks.
    """
    groups = parameter_groups(model, config)
    betas = 0.9, config.beta2
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    if config.adamw_lr:
        groups = parameter_groups(model, dataclasses.replace(config, lr=config.adamw_lr))

    # of the matrices, the linear layers of the blocks; convolutions, embeddings and the last layer
    # stay with AdamW
    if not hasattr(model, "blocks"):
        raise ConfigError(
            f"model: {type(model).__name__} has no blocks, whose matrices Muon would update; "
            "give a network of this package, or train.optimizer=adamw"
        )
    layers = {
        id(module.weight)
        for module in model.blocks.modules()
        if isinstance(module, nn.Linear | HourglassLinear)
    }
    muon = []
    for group in groups:
        group["muon"] = False
        if group["name"] == "matrices":
            chosen = [p for p in group["params"] if id(p) in layers]
            group["params"] = [p for p in group["params"] if id(p) not in layers]
            rate = {"lr": config.lr, "peak_lr": config.lr}
            muon.append({**group, **rate, "name": "muon", "params": chosen, "muon": True})
    parts = {
        id(module.weight): module.parts
        for module in model.modules()
        if isinstance(module, StackedLinear)
    }
    return Muon([*groups, *muon], parts, betas)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Every parameter once: matrices with weight decay, vectors and what a mixer holds beside its
    layers without, the SSM without and at a capped rate. For an optimiser of torch, whatever
    `config.optimizer` says.

    Raises:
        ConfigError: if `config` is not the section `train` of a configuration.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"config: {type(config).__name__} is no section of training; give "
            "load_config('mnist').train"
        )
    ssm = {
        id(p)
        for module in model.modules()
        if isinstance(module, StateSpace)
        for p in module.parameters()
    }
    # what a mixer holds beside its layers, such as a decay by channel and state, is no matrix
    of_mixers = {
        id(p)
        for module in model.modules()
        if isinstance(module, Mixer)
        for p in module.parameters(recurse=False)
    }

    groups: dict[str, list] = {"matrices": [], "vectors": [], "ssm": []}
    for name, p in model.named_parameters():
        # the hourglass keeps M biases in one tensor
        is_vector = p.ndim < 2 or name.endswith("bias") or id(p) in of_mixers
        groups["ssm" if id(p) in ssm else "vectors" if is_vector else "matrices"].append(p)
    rates = {"matrices": config.lr, "vectors": config.lr, "ssm": min(config.lr, config.ssm_lr)}
    decays = {"matrices": config.weight_decay, "vectors": 0.0, "ssm": 0.0}
    return [
        {"name": n, "params": ps, "lr": rates[n], "peak_lr": rates[n], "weight_decay": decays[n]}
        for n, ps in groups.items()
        if ps
    ]


def lr_factor(config: TrainConfig, step: int) -> float:
    """Multiplier of the peak learning rate at optimiser step `step` (0, 1, ...): warm-up, then the
    chosen decay.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.lr_decay == "linear":
        return 1 - progress
    if config.lr_decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor

"""The objective of a configuration, and its timesteps of training."""

import torch
from torch import Tensor

from diffussm_cli.config import SAMPLERS, DiffusionConfig
from diffussm_cli.diffusion.flow import ImageFlow, LinearFlow, MeanFlow
from diffussm_cli.diffusion.process import GaussianDiffusion, Objective, VelocityDiffusion

OBJECTIVES: dict[str, type[Objective]] = {
    "noise": GaussianDiffusion,
    "velocity": VelocityDiffusion,
    "flow": LinearFlow,
}
# What the model of a flow predicts.
FLOWS: dict[str, type[Objective]] = {
    "velocity": LinearFlow,
    "image": ImageFlow,
    "mean_velocity": MeanFlow,
}

_only_once = ", ".join(sorted(OBJECTIVES.keys() ^ SAMPLERS.keys()))
assert not _only_once, (
    f"objective {_only_once}: needs a class here, and a row in SAMPLERS of config/fields.py"
)


def class_of(config: DiffusionConfig) -> type[Objective]:
    """The class of a configuration's objective."""
    return FLOWS[config.predicts] if config.objective == "flow" else OBJECTIVES[config.objective]


def make_objective(config: DiffusionConfig, device: torch.device | str = "cpu") -> Objective:
    """The objective of a configuration's `diffusion` section, with its tables on `device`."""
    return class_of(config).from_config(config, device)


def draw_timestep(d: DiffusionConfig, generator: torch.Generator) -> Tensor:
    """A timestep of training, (1,). Logit-normal and shifted times: SD3, arXiv 2403.03206,
    equations (19) and (23).
    """
    continuous = class_of(d).continuous
    if d.timesteps_drawn == "uniform" and not continuous:
        return torch.randint(d.timesteps, (1,), generator=generator)

    # The share of T.
    if d.timesteps_drawn == "logit_normal":
        share = torch.sigmoid(d.logit_mean + d.logit_std * torch.randn(1, generator=generator))
    else:
        alpha = d.shift if d.timesteps_drawn == "shifted" else 1.0
        share = torch.rand(1, generator=generator)
        share = alpha * share / (1 + (alpha - 1) * share)

    t = share.clamp(1e-5, 1 - 1e-5) * d.timesteps  # float32 rounds shares to 0 and 1
    return t if continuous else t.long()

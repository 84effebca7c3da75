"""The networks. Start with `backbone.py` (tokens in, blocks, tokens out), then `block.py`,
`s4d/layer.py`, `mixers`.
"""

import dataclasses
import warnings

from torch import nn

from diffussm_cli.config import NOT_OF_DIT, Config
from diffussm_cli.model.backbone import Backbone, UnusedArgument
from diffussm_cli.model.diffussm import DiffuSSM
from diffussm_cli.model.dit import DiT

__all__ = ["Backbone", "DiT", "DiffuSSM", "build_model", "count_parameters"]


def count_parameters(module: nn.Module) -> int:
    """The number of parameters of a network or a part of it."""
    return sum(p.numel() for p in module.parameters())


def build_model(config: Config, gradient_checkpointing: bool = False) -> Backbone:
    """Build the network that a configuration describes, freshly initialised, on the current default
    device.
    """
    options = dataclasses.asdict(config.model) | {"gradient_checkpointing": gradient_checkpointing}
    options |= {"input_size": config.data.grid, "in_channels": config.data.channels}
    is_dit = options.pop("backbone") == "dit"
    if is_dit:
        options = {name: value for name, value in options.items() if name not in NOT_OF_DIT}

    with warnings.catch_warnings():
        # whoever has a configuration is told of its unused fields by `unused_fields`
        warnings.simplefilter("ignore", UnusedArgument)
        return DiT(**options) if is_dit else DiffuSSM(**options)

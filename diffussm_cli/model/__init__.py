"""The networks. Start with `backbone.py` (tokens in, blocks, tokens out), then `block.py`, `s4d/layer.py`, `mixers`."""

from typing import Any

from torch import nn

from diffussm_cli.config import Config
from diffussm_cli.model.backbone import Backbone
from diffussm_cli.model.diffussm import DiffuSSM
from diffussm_cli.model.dit import DiT

__all__ = ["Backbone", "DiT", "DiffuSSM", "build_model", "count_parameters"]


def count_parameters(module: nn.Module) -> int:
    """The number of parameters of a network or a part of it."""
    return sum(p.numel() for p in module.parameters())


def build_model(config: Config, gradient_checkpointing: bool = False) -> Backbone:
    """Build the network that a configuration describes, freshly initialised, on the current default device."""
    m = config.model
    common: dict[str, Any] = {
        "input_size": config.data.grid,
        "in_channels": config.data.channels,
        "patch_size": m.patch_size,
        "hidden_size": m.hidden_size,
        "depth": m.depth,
        "compression": m.compression,
        "num_classes": m.num_classes,
        "learn_sigma": m.learn_sigma,
        "label_std": m.label_std,
        "text_width": m.text_width,
        "text_tokens": m.text_tokens,
        "gradient_checkpointing": gradient_checkpointing,
    }
    if m.backbone == "dit":
        return DiT(heads=m.heads, **common)
    return DiffuSSM(d_state=m.d_state, mixer=m.mixer, heads=m.heads, scan=m.scan, local=m.local, **common)

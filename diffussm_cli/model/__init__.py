"""The networks. Start with `diffussm.py`, then `block.py` and `s4d.py`."""

from diffussm_cli.config import Config
from diffussm_cli.model.diffussm import DiffuSSM

__all__ = ["DiffuSSM", "build_model"]


def build_model(config: Config, gradient_checkpointing: bool = False) -> DiffuSSM:
    """The network that a configuration describes, on the current default device, freshly initialised."""
    m = config.model
    return DiffuSSM(
        input_size=config.data.grid,
        in_channels=config.data.channels,
        patch_size=m.patch_size,
        hidden_size=m.hidden_size,
        depth=m.depth,
        compression=m.compression,
        d_state=m.d_state,
        num_classes=m.num_classes,
        learn_sigma=m.learn_sigma,
        label_std=m.label_std,
        gradient_checkpointing=gradient_checkpointing,
    )

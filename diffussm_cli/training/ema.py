"""The exponential moving average of a model's parameters, on which images are drawn."""

import copy

import torch

from diffussm_cli.model import Backbone
from diffussm_cli.runs import power
from diffussm_cli.training.parallel import local_shards


class EMA:
    """Exponential moving average of a model's parameters, kept as a separate model (`ema.model`, in
    eval mode).

    The decay at step s is min(decay, (1 + s) / (10 + s)), so that the initial weights do not
    dominate a short run.

    Raises:
        ValueError: for a decay that does not lie in 0..1.
    """

    def __init__(self, model: Backbone, decay: float):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: {decay!r} must be a number from 0 to 1")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """The decay used by the update after optimiser step `step` (1, 2, ...)."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: Backbone, step: int) -> None:
        """Move the average towards the parameters after optimiser step `step` (1, 2, ...)."""
        averaged, current = local_shards(self.model.parameters()), local_shards(model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - self.decay_at(step))


class PowerEMA(EMA):
    """An average with a power-function profile, see `runs/power.py`.

    Args:
        width: the standard deviation of the profile, as a share of the steps so far.
    """

    def __init__(self, model: Backbone, width: float):
        self.width = width
        self.exponent = power.exponent_of(width)
        super().__init__(model, decay=1)

    def decay_at(self, step: int) -> float:
        """The decay used by the update after optimiser step `step` (1, 2, ...)."""
        return power.decay_at(step, self.exponent)

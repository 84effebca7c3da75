"""Samplers that follow the velocity from noise to an image: Euler, Heun and the stochastic one.

B batch   C channels   x (B, C, H, W)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffussm_cli.diffusion.denoiser import Denoiser
from diffussm_cli.diffusion.process import Objective, timestep_batch
from diffussm_cli.errors import NotFiniteError

INTEGRATORS = ("euler", "heun", "sde")
# (number of the step from 0, its timestep, the new x) -> the x to go on with, or None to end here
AfterStep = Callable[[int, Any, Tensor], Tensor | None]


@torch.no_grad()
def integrate(
    denoise: Denoiser,
    objective: Objective,
    x: Tensor,
    steps: int,
    heun: bool = False,
    noise: Callable[[Tensor], Tensor] | None = None,
    after_step: AfterStep | None = None,
    start: int = 0,
) -> Tensor:
    """Follow the probability flow, dx = velocity dtime, from x_T to x_0, both (B, C, H, W).

    Args:
        heun: take the mean of the velocities at both ends of each step but the last (arXiv
            2206.00364, algorithm 1).
        noise: (x) -> normal noise like x, which adds the noise and the drift of SiT, section 2,
            with w_t = t, to a flow; the last step adds no noise.
        after_step, start: as in `sample`.

    Raises:
        NotFiniteError: as `sample_by_name`.
    """
    C = x.shape[1]
    grid = objective.timesteps(steps)
    times = [*map(objective.time, grid), 0.0]
    checks = FiniteSteps(x)

    def slope(x: Tensor, t: float) -> Tensor:
        output = denoise(x, t)[:, :C]
        batch = timestep_batch(t, x)
        velocity = objective.predict_velocity(x, batch, output)
        if noise is None:
            return velocity
        return velocity + objective.predict_noise(x, batch, output) / 2  # the score is -noise / t

    # One straight step would return its noise, along the arc of the discrete process and with the
    # drift.
    if steps == 1 and (noise is not None or not objective.continuous):
        x = objective.predict_x_0(x, timestep_batch(grid[0], x), denoise(x, grid[0])[:, :C])
        checks.count(x)
        checks.check(grid)
        changed = x if after_step is None else after_step(0, grid[0], x)
        return x if changed is None else changed

    for i, t in enumerate(grid[start:]):
        now, end = times[start + i], times[start + i + 1]
        velocity = slope(x, t)
        if heun and end > 0:
            guess = x + (end - now) * velocity
            velocity = (velocity + slope(guess, grid[start + i + 1])) / 2
        x = x + (end - now) * velocity
        if noise is not None and end > 0:
            x = x + math.sqrt(now * (now - end)) * noise(x)

        checks.count(x)
        changed = x if after_step is None else after_step(i, t, x)
        if changed is None:
            break
        x = changed

    checks.check(grid[start : start + i + 1])
    return x


class FiniteSteps:
    """Counts on the device how many steps left each image finite, so that only the end waits for
    it.
    """

    def __init__(self, x: Tensor):
        self.steps = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def count(self, x: Tensor) -> None:
        """Count a step, after which the images are x, (B, ...). What is not finite once never
        becomes finite again.
        """
        self.steps += torch.isfinite(x).flatten(1).all(1)

    def check(self, timesteps: Sequence[float]) -> None:
        """Raises NotFiniteError for the first image that was finite after fewer steps than there
        are timesteps.
        """
        n = len(timesteps)
        for i, done in enumerate(self.steps.tolist()):
            if done < n:
                where = f"after step {done + 1} of {n} (timestep {timesteps[done]:g})"
                raise NotFiniteError(f"image {i}", i, where)

"""Samplers that follow the velocity from noise to an image: Euler, Heun and the stochastic one.

B batch   C channels   x (B, C, H, W)
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffussm_cli.diffusion.denoiser import Denoiser
from diffussm_cli.diffusion.process import Objective, timestep_batch
from diffussm_cli.errors import NotFiniteError

# (number of the step from 0, its timestep, the new x) -> the x to go on with, or None to end here
AfterStep = Callable[[int, Any, Tensor], Tensor | None]


@dataclass(frozen=True)
class Path:
    """The places at which an integrator may ask the model on its way from noise to an image.

    Place i has the timestep `grid[i]` and the time `times[i]`; one more time, 0, is the image's.
    """

    denoise: Denoiser
    objective: Objective
    grid: Sequence[float]
    noise: Callable[[Tensor], Tensor]  # normal noise like x

    @functools.cached_property
    def times(self) -> list[float]:
        return [*map(self.objective.time, self.grid), 0.0]

    def length(self, i: int) -> float:
        """The time from place i to the next."""
        return self.times[i + 1] - self.times[i]

    def velocity(self, x: Tensor, i: int) -> Tensor:
        """The velocity of x at place i, (B, C, H, W)."""
        return self.objective.predict_velocity(x, *self._predict(x, i))

    def velocity_and_noise(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """The velocity of x at place i and the noise in it, from one call of the model."""
        t, output = self._predict(x, i)
        velocity = self.objective.predict_velocity(x, t, output)
        return velocity, self.objective.predict_noise(x, t, output)

    def image(self, x: Tensor, i: int) -> Tensor:
        """The image that the model predicts at place i."""
        return self.objective.predict_x_0(x, *self._predict(x, i))

    def _predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """The timesteps (B,) of place i, and the model's output without v."""
        t = self.grid[i]
        return timestep_batch(t, x), self.denoise(x, t)[:, : x.shape[1]]


# ----------------------------------------------------------------- steps: x at place i -> at i + 1
def euler(path: Path, x: Tensor, i: int) -> Tensor:
    """A straight step."""
    return x + path.length(i) * path.velocity(x, i)


def heun(path: Path, x: Tensor, i: int) -> Tensor:
    """A step at the mean of the velocities at both ends, but for the last (arXiv 2206.00364,
    algorithm 1).
    """
    velocity = path.velocity(x, i)
    if path.times[i + 1] > 0:
        guess = x + path.length(i) * velocity
        velocity = (velocity + path.velocity(guess, i + 1)) / 2
    return x + path.length(i) * velocity


def euler_maruyama(path: Path, x: Tensor, i: int) -> Tensor:
    """A step with the noise and the drift of SiT, section 2, with w_t = t, of a flow; the last one
    adds no noise.
    """
    now, end = path.times[i], path.times[i + 1]
    velocity, noise = path.velocity_and_noise(x, i)
    x = x + path.length(i) * (velocity + noise / 2)  # the score is -noise / t
    return x + math.sqrt(now * (now - end)) * path.noise(x) if end > 0 else x


@dataclass(frozen=True)
class Integrator:
    """A row of `INTEGRATORS`: how it steps, and whether it adds noise at every step."""

    step: Callable[[Path, Tensor, int], Tensor]
    adds_noise: bool


INTEGRATORS = {
    "euler": Integrator(euler, adds_noise=False),
    "heun": Integrator(heun, adds_noise=False),
    "sde": Integrator(euler_maruyama, adds_noise=True),
}


@torch.no_grad()
def integrate(
    denoise: Denoiser,
    objective: Objective,
    x: Tensor,
    steps: int,
    name: str = "euler",
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    after_step: AfterStep | None = None,
    start: int = 0,
) -> Tensor:
    """Follow the probability flow, dx = velocity dtime, from x_T to x_0, both (B, C, H, W).

    Args:
        name: how, one of `INTEGRATORS`.
        noise: (x) -> normal noise like x, for an integrator that adds some.
        after_step, start: as in `sample`.

    Raises:
        NotFiniteError: as `sample_by_name`.
    """
    method = INTEGRATORS[name]
    path = Path(denoise, objective, objective.timesteps(steps), noise)
    checks = FiniteSteps(x)

    # One straight step would return its noise, along the arc of the discrete process and with the
    # drift.
    if steps == 1 and (method.adds_noise or not objective.continuous):
        x = path.image(x, 0)
        checks.count(x)
        checks.check(path.grid)
        changed = x if after_step is None else after_step(0, path.grid[0], x)
        return x if changed is None else changed

    left = path.grid[start:]
    for i, t in enumerate(left):
        x = method.step(path, x, start + i)
        checks.count(x)
        changed = x if after_step is None else after_step(i, t, x)
        if changed is None:
            break
        x = changed

    checks.check(left[: i + 1])
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

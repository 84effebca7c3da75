"""From noise to images: schedulers by name, diffusers' or our own, and guidance and clipping as wrappers of a denoiser.

    B batch   C channels   T timesteps of the process   x (B, C, H, W)   y (B,) labels

A denoiser is any `denoise(x, t) -> (B, 2C or C, H, W)`: it returns what the objective predicts, and v if the covariance
is learned. `t` is one number for the whole batch: whole for a discrete process, fractional for a flow.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffussm_cli.diffusion.process import GaussianDiffusion, Objective, timestep_batch

Denoiser = Callable[[Tensor, float], Tensor]
LabelledModel = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, t (B,), y (B,)) -> (B, 2C or C, H, W)


def make_scheduler(name: str, objective: Objective, steps: int, learned_covariance: bool):
    """A scheduler, ready to step: one of diffusers, or an `OdeScheduler`.

    `ddpm`   ancestral sampling over ADM's respaced timesteps, with the learned covariance if there is one
    `ddim`   DDIM with eta 0, timesteps from 0 at an integer stride (ADM's ddimN)
    `dpmpp`  DPM-Solver++(2M)
    `unipc`  UniPC, second order
    `euler`  the probability flow in Euler's steps
    `heun`   the same with Heun's steps, second order; the model is computed 2 steps - 1 times
    `sde`    a flow's stochastic equation in Euler-Maruyama steps

    All but `ddpm` ignore the covariance. `config.SAMPLERS` lists those that fit an objective.
    """
    import diffusers

    if name in ("euler", "heun", "sde"):
        return OdeScheduler(objective, steps, heun=name == "heun", stochastic=name == "sde")
    kind, options = scheduler_settings(name, objective, learned_covariance)
    return set_steps(getattr(diffusers, kind)(**options), objective, steps)


def scheduler_settings(name: str, objective: Objective, learned_covariance: bool) -> tuple[str, dict[str, Any]]:
    """The class and the options of the scheduler of diffusers that a sampler is. Raises ValueError if it is none."""
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        "ddpm": ("DDPMScheduler", {"variance_type": "learned_range" if learned_covariance else "fixed_small"}),
        "ddim": ("DDIMScheduler", {"timestep_spacing": "leading"}),
        "dpmpp": ("DPMSolverMultistepScheduler", {"variance_type": None}),
        "unipc": ("UniPCMultistepScheduler", {}),
    }
    if name not in settings:
        raise ValueError(f"sampler {name!r} is not one of {', '.join(settings)}, euler, heun, sde")
    kind, options = settings[name]
    clip = {"clip_sample": False} if name in ("ddpm", "ddim") else {}
    return kind, options | clip | objective.schedule


def set_steps(scheduler, objective: Objective, steps: int):
    """Choose the timesteps of a scheduler of diffusers; returns it, ready to step."""
    if _is_ddpm(scheduler):
        assert isinstance(objective, GaussianDiffusion), "checked by the configuration"
        scheduler.set_timesteps(timesteps=objective.timesteps(steps))
        scheduler.alphas_cumprod = objective.alpha_bar64  # its own float32 table adds 7e-6 of error in 250 steps
        return scheduler
    scheduler.set_timesteps(steps)
    if objective.continuous:  # diffusers rounds them, so that the model would see another noise level
        scheduler.timesteps = scheduler.sigmas[:-1] * objective.T
    return scheduler


class OdeScheduler:
    """Steps along the probability flow, dx = velocity dtime, with the interface of diffusers' schedulers.

    `heun` takes the mean of the velocities at both ends of each step but the last. `stochastic` adds the noise and the
    drift of SiT, section 2, to a flow, with w_t = t; the last step adds no noise.
    """

    def __init__(self, objective: Objective, steps: int, heun: bool = False, stochastic: bool = False):
        grid = objective.timesteps(steps)
        self.objective, self.heun, self.stochastic = objective, heun, stochastic
        visited = [grid[0], *(t for t in grid[1:] for _ in range(2 if heun else 1))]
        self.timesteps = torch.tensor(visited, dtype=torch.float64 if objective.continuous else torch.long)
        self._times, self._done = [*map(objective.time, grid), 0.0], 0
        self._first: tuple[Tensor, Tensor] | None = None  # x and velocity where a step of Heun began

    def step(self, output: Tensor, t: Tensor, x: Tensor, generator: Any = None, **_: Any) -> tuple[Tensor]:
        """x at the next timestep, or Heun's first guess of it."""
        from diffusers.utils.torch_utils import randn_tensor

        batch, (start, end) = timestep_batch(t.item(), x), self._times[self._done : self._done + 2]
        velocity = self.objective.predict_velocity(x, batch, output)
        if self.stochastic:  # the score is -noise / t
            velocity = velocity + self.objective.predict_noise(x, batch, output) / 2
        if self._first is not None:
            x, first = self._first
            velocity, self._first = (first + velocity) / 2, None
        elif self.heun and end > 0:
            self._first = x, velocity
            return (x + (end - start) * velocity,)
        self._done += 1
        x = x + (end - start) * velocity
        if self.stochastic and end > 0:
            z = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + math.sqrt(start * (start - end)) * z
        return (x,)


@torch.no_grad()
def sample(denoise: Denoiser, scheduler, x: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """Denoise x_T down to x_0 with a scheduler from `make_scheduler`.

    Args:
        x: starting noise x_T, (B, C, H, W).
        generators: one per image, so that an image does not depend on its batch; CPU generators give the same
            noise on every device.

    Returns:
        x_0, (B, C, H, W).
    """
    C = x.shape[1]
    takes_covariance = _is_ddpm(scheduler) and scheduler.config.variance_type == "learned_range"
    takes_generators = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": list(generators)} if generators and takes_generators else {}
    for t in scheduler.timesteps:
        output = denoise(x, t.item())
        output = output if takes_covariance else output[:, :C]
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x


def _is_ddpm(scheduler) -> bool:
    return type(scheduler).__name__ == "DDPMScheduler"


# --------------------------------------------------------------------------------------- wrappers of a denoiser
def labelled(model: LabelledModel, y: Tensor | None) -> Denoiser:
    """A model with its labels fixed."""
    return lambda x, t: model(x, timestep_batch(t, x), y)


def guided(
    model: LabelledModel,
    y: Tensor,
    null: int | Tensor,
    scale: float,
    channels: int | None = None,
    interval: Sequence[int] | None = None,
) -> Denoiser:
    """Classifier-free guidance (arXiv 2207.12598): eps_null + scale (eps_y - eps_null), both in one batched forward.

    A predicted velocity is guided in the same way, which guides the noise that it implies. The covariance and the
    unguided channels are those of the label y. At scale 1, and at timesteps outside the interval, there is one forward
    pass without guidance.

    Args:
        null: the label of the null class, or a label of the same kind for each image.
        channels: number of predicted channels that are guided; None for all, 3 for DiT's published numbers.
        interval: (lowest, highest) guided timestep, both included (arXiv 2404.07724).
    """
    plain = labelled(model, y)
    if scale == 1:
        return plain
    both = torch.cat([y, torch.zeros_like(y) + null])

    def denoise(x: Tensor, t: float) -> Tensor:
        if interval is not None and not interval[0] <= t <= interval[1]:
            return plain(x, t)
        output, null = labelled(model, both)(torch.cat([x, x]), t).chunk(2)
        n = x.shape[1] if channels is None else min(channels, x.shape[1])
        eps = null[:, :n] + scale * (output[:, :n] - null[:, :n])
        return torch.cat([eps, output[:, n:]], dim=1)

    return denoise


def clipped(denoise: Denoiser, objective: Objective) -> Denoiser:
    """Clamp the x_0 that a denoiser predicts to [-1, 1] (ADM's clip_denoised; for pixels)."""

    def clamp(x: Tensor, t: float) -> Tensor:
        output, C, batch = denoise(x, t), x.shape[1], timestep_batch(t, x)
        x_0 = objective.predict_x_0(x, batch, output[:, :C]).clamp(-1, 1)
        return torch.cat([objective.output_for(x, batch, x_0), output[:, C:]], dim=1)

    return clamp

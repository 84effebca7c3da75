"""From noise to images: samplers by name, and guidance and clipping as wrappers of a denoiser.

    B batch   C channels   T timesteps of the process   x (B, C, H, W)   y (B,) labels

`sample_by_name` takes every sampler. Four of them are schedulers of diffusers, made by
`make_scheduler` and stepped by `sample`; Euler, Heun and the stochastic one are `integrate`.

A denoiser is any `denoise(x, t) -> (B, 2C or C, H, W)`: it returns what the objective predicts, and
v if the covariance is learned. `t` is one number for the whole batch: whole for a discrete process,
fractional for a flow.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffussm_cli.config import SAMPLERS
from diffussm_cli.diffusion.process import GaussianDiffusion, Objective, timestep_batch
from diffussm_cli.errors import NotFiniteError

Denoiser = Callable[[Tensor, float], Tensor]
# (x, t (B,), y (B,)) -> (B, 2C or C, H, W)
LabelledModel = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# The samplers that are schedulers of diffusers, and those of `integrate`.
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
INTEGRATORS = ("euler", "heun", "sde")


# --------------------------------------------------------------------------------- samplers by name
@torch.no_grad()
def sample_by_name(
    name: str,
    denoise: Denoiser,
    objective: Objective,
    x: Tensor,
    steps: int,
    generators: Sequence[torch.Generator] | None = None,
    learned_covariance: bool = False,
) -> Tensor:
    """Denoise x_T down to x_0, both (B, C, H, W).

    `ddpm`   ancestral sampling over ADM's respaced timesteps, with the learned covariance if there
             is one
    `ddim`   DDIM with eta 0; timesteps from 0 at an integer stride (ADM's ddimN) where these reach
             the last tenth of T, otherwise as for `ddpm`
    `dpmpp`  DPM-Solver++(2M)
    `unipc`  UniPC, second order
    `euler`  the probability flow in Euler's steps
    `heun`   the same with Heun's steps, second order; the model is computed 2 steps - 1 times
    `sde`    a flow's stochastic equation in Euler-Maruyama steps

    All but `ddpm` ignore the covariance. One step of any of them returns the image that the model
    predicts at the noisiest timestep. `config.SAMPLERS` lists those that fit an objective.

    Args:
        generators: one per image, so that an image does not depend on its batch; CPU generators
            give the same noise on every device.
        learned_covariance: whether the denoiser returns v too, (B, 2C, H, W).

    Raises:
        ValueError: if the sampler is unknown or does not fit the objective, or `steps` is not a
            whole number in 1..T.
        NotFiniteError: if an image becomes NaN or infinite; it names its place in the batch and the
            step.
    """
    check_sampler(name, objective)
    if name in SCHEDULERS:
        return sample(
            denoise, make_scheduler(name, objective, steps, learned_covariance), x, generators
        )
    noise = functools.partial(_noise_like, generators) if name == "sde" else None
    return integrate(denoise, objective, x, steps, heun=name == "heun", noise=noise)


def check_sampler(name: str, objective: Objective) -> None:
    """Raises ValueError if a sampler is unknown or does not fit the objective."""
    names = (*SCHEDULERS, *INTEGRATORS)
    if name not in names:
        raise ValueError(f"sampler {name!r} is not one of {', '.join(names)}")
    if name not in SAMPLERS[objective.name]:
        fitting = ", ".join(SAMPLERS[objective.name])
        raise ValueError(
            f"sampler {name!r} does not fit the objective {objective.name}; choose {fitting}"
        )


def _noise_like(generators: Sequence[torch.Generator] | None, x: Tensor) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(
        x.shape, generator=list(generators) if generators else None, device=x.device, dtype=x.dtype
    )


# ------------------------------------------------------------------------------ Euler, Heun and SDE
@torch.no_grad()
def integrate(
    denoise: Denoiser,
    objective: Objective,
    x: Tensor,
    steps: int,
    heun: bool = False,
    noise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Follow the probability flow, dx = velocity dtime, from x_T to x_0, both (B, C, H, W).

    Args:
        heun: take the mean of the velocities at both ends of each step but the last (arXiv
            2206.00364, algorithm 1).
        noise: (x) -> normal noise like x, which adds the noise and the drift of SiT, section 2,
            with w_t = t, to a flow; the last step adds no noise.

    Raises:
        NotFiniteError: as `sample_by_name`.
    """
    C, grid = x.shape[1], objective.timesteps(steps)
    times = [*map(objective.time, grid), 0.0]
    checks = FiniteSteps(x)

    def slope(x: Tensor, t: float) -> Tensor:
        output, batch = denoise(x, t)[:, :C], timestep_batch(t, x)
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
        return x

    for i, t in enumerate(grid):
        start, end = times[i], times[i + 1]
        velocity = slope(x, t)
        if heun and end > 0:
            guess = x + (end - start) * velocity
            velocity = (velocity + slope(guess, grid[i + 1])) / 2
        x = x + (end - start) * velocity
        if noise is not None and end > 0:
            x = x + math.sqrt(start * (start - end)) * noise(x)
        checks.count(x)
    checks.check(grid)
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


# -------------------------------------------------------------------------- schedulers of diffusers
def make_scheduler(name: str, objective: Objective, steps: int, learned_covariance: bool = False):
    """The scheduler of diffusers that a sampler is, one of `SCHEDULERS`, ready to step.

    Raises:
        ValueError: as `sample_by_name`, or if the sampler is one of `integrate`.
    """
    import diffusers

    check_sampler(name, objective)
    kind, options = scheduler_settings(name, objective, learned_covariance)
    return set_steps(getattr(diffusers, kind)(**options), objective, steps)


def scheduler_settings(
    name: str, objective: Objective, learned_covariance: bool
) -> tuple[str, dict[str, Any]]:
    """Class name and constructor options of the diffusers scheduler behind a sampler, one of
    `SCHEDULERS`.

    Raises:
        ValueError: for another sampler.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"sampler {name!r} is no scheduler of diffusers; use `integrate`")

    options: dict[str, dict[str, Any]] = {
        "ddpm": {
            "variance_type": "learned_range" if learned_covariance else "fixed_small",
            "clip_sample": False,
        },
        "ddim": {"timestep_spacing": "leading", "clip_sample": False},
        "dpmpp": {"variance_type": None},
        "unipc": {},
    }
    return SCHEDULERS[name], options[name] | objective.schedule


def set_steps(scheduler, objective: Objective, steps: int):
    """Choose the timesteps of a scheduler of diffusers; returns it, or what steps in its place,
    ready to step.

    Raises:
        ValueError: if the scheduler does not fit the objective, cannot take this number of steps,
            or would begin before the image is noise.
    """
    objective.check_steps(steps)
    check_fit(scheduler, objective)

    # DDPM and DDIM
    name = type(scheduler).__name__
    if name == "DDPMScheduler" and steps > 1:
        assert isinstance(objective, GaussianDiffusion), "it fits"
        scheduler.set_timesteps(timesteps=objective.timesteps(steps))
        # its own float32 table adds 7e-6 of error in 250 steps
        scheduler.alphas_cumprod = objective.alpha_bar64
        return scheduler
    if name == "DDPMScheduler":
        return Respaced(scheduler, objective.timesteps(steps))
    scheduler.set_timesteps(steps)
    if name == "DDIMScheduler":
        return (
            scheduler
            if _covers(scheduler, objective.T)
            else Respaced(scheduler, objective.timesteps(steps))
        )

    # others of diffusers
    # they divide by the difference
    if "solver_order" in scheduler.config and _repeats(scheduler.sigmas):
        scheduler.register_to_config(timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
    # diffusers rounds them, so that the model would see another noise level
    if objective.continuous:
        scheduler.timesteps = scheduler.sigmas[:-1] * objective.T
    _check_timesteps(scheduler, objective, steps)
    return scheduler


def check_fit(scheduler, objective: Objective) -> None:
    """Raises ValueError if a scheduler of diffusers was made for another process or prediction than
    the objective.
    """
    name, settings = type(scheduler).__name__, scheduler.config
    expected = dict(objective.schedule)

    # The kinds of process.
    if name.startswith("FlowMatch"):
        if objective.schedule["prediction_type"] != "flow_prediction":
            others = "DPMSolverMultistepScheduler or UniPCMultistepScheduler"
            raise ValueError(
                f"scheduler: {name} is for models that predict the velocity of a flow; use {others}"
            )
        expected = {"num_train_timesteps": objective.T}
    elif (
        objective.continuous
        and "use_flow_sigmas" not in inspect.signature(type(scheduler)).parameters
    ):
        others = (
            "DPMSolverMultistepScheduler, UniPCMultistepScheduler or "
            "FlowMatchEulerDiscreteScheduler"
        )
        raise ValueError(
            f"scheduler: {name} cannot step along a flow, as this model needs; use {others}"
        )

    # Their settings.
    for key, value in expected.items():
        if settings.get(key, False) != value:
            raise ValueError(
                f"scheduler: {key} of {name} is {settings.get(key)!r}, but this model needs "
                f"{value!r}; make the scheduler by from_config of the one that came with the model"
            )


def _check_timesteps(scheduler, objective: Objective, steps: int) -> None:
    """Raises ValueError for timesteps that repeat, that leave the path or that begin before the
    image is noise.
    """
    name, first = type(scheduler).__name__, float(scheduler.timesteps.max())

    if "solver_order" in scheduler.config and _repeats(scheduler.sigmas):
        raise ValueError(
            f"scheduler: {name} visits a timestep twice in {steps} steps; choose fewer"
        )

    if objective.continuous and float(scheduler.sigmas.max()) > 1:
        spacings = [
            key
            for key in scheduler.config
            if key.startswith("use_") and scheduler.config[key] is True
        ]
        chosen = ", ".join(key for key in spacings if key != "use_flow_sigmas") or "its settings"
        raise ValueError(
            f"scheduler: {chosen} of {name} do not fit a flow, whose noise levels are at most 1"
        )

    if first < objective.T - _tenth(objective.T):
        raise ValueError(
            f"scheduler: {name} begins at timestep {first:g} of {objective.T} in {steps} steps, "
            "where the image is not yet noise; "
            f"choose at least 10 steps that divide {objective.T}, or timestep_spacing='trailing'"
        )


def _covers(scheduler, T: int) -> bool:
    """Whether DDIM's timesteps begin in the last tenth of T and lie at the stride at which its step
    takes them.
    """
    n, t = scheduler.num_inference_steps, scheduler.timesteps
    stride = T // n
    is_even = T % n == 0 and bool((t[:-1] - t[1:] == stride).all()) and int(t[-1]) < stride
    return is_even and int(t[0]) >= T - _tenth(T)


def _tenth(T: int) -> int:
    return max(1, T // 10)


def _repeats(sigmas: Tensor) -> bool:
    return bool((sigmas[1:] == sigmas[:-1]).any())


class Respaced:
    """DDIM or DDPM of diffusers on chosen timesteps: their tables keep these timesteps alone, as
    ADM respaces them.

    Their own step would look for the next timestep at the distance T // steps.
    """

    def __init__(self, scheduler, timesteps: Sequence[float]):
        n = len(timesteps)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod[list(reversed(timesteps))]
        scheduler.register_to_config(
            num_train_timesteps=n, timestep_spacing="leading", steps_offset=0
        )
        scheduler.set_timesteps(n)
        self.scheduler, self.timesteps, self._done = scheduler, torch.tensor(timesteps), 0

    def step(self, output: Tensor, t: Tensor, x: Tensor, **options: Any) -> tuple[Tensor]:  # noqa: ARG002
        """x at the next of the timesteps."""
        place = self.scheduler.timesteps[self._done]
        self._done += 1
        return self.scheduler.step(output, place, x, **options)


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler,
    x: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    after_step: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Denoise x_T down to x_0 with a scheduler of diffusers from `set_steps`, which may be used
    again: a copy steps.

    Args:
        x: starting noise x_T, (B, C, H, W).
        generators: one per image, so that an image does not depend on its batch; CPU generators
            give the same noise on every device.
        after_step: is called with the number of the step, from 0, its timestep and the new x; it
            returns the x to go on with, or None to end here.

    Returns:
        x_0, (B, C, H, W).

    Raises:
        NotFiniteError: if an image becomes NaN or infinite; it names its place in the batch and the
            step.
    """
    C, scheduler = x.shape[1], copy.deepcopy(scheduler)
    is_ddpm = type(scheduler).__name__ == "DDPMScheduler"
    takes_covariance = is_ddpm and scheduler.config.variance_type == "learned_range"
    takes_generators = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": list(generators)} if generators and takes_generators else {}

    checks = FiniteSteps(x)
    for i, t in enumerate(scheduler.timesteps):
        output = denoise(x, t.item())
        output = output if takes_covariance else output[:, :C]
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
        checks.count(x)
        changed = x if after_step is None else after_step(i, t, x)
        if changed is None:
            break
        x = changed

    checks.check(scheduler.timesteps[: i + 1].tolist())
    return x


# --------------------------------------------------------------------------- wrappers of a denoiser
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
    """Classifier-free guidance (arXiv 2207.12598): eps_null + scale (eps_y - eps_null), both in one
    batched forward.

    A predicted velocity is guided in the same way, which guides the noise that it implies. The
    covariance and the unguided channels are those of the label y. At scale 1, and at timesteps
    outside the interval, there is one forward pass without guidance.

    Args:
        null: the label of the null class, or a label of the same kind for each image.
        channels: number of predicted channels that are guided; None for all, 3 for DiT's published
            numbers.
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

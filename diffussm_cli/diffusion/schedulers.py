"""Schedulers of diffusers: which of them fits an objective, its timesteps, and its steps to an
image.

    B batch   C channels   T timesteps of the process   x (B, C, H, W)
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffussm_cli.diffusion.denoiser import Denoiser
from diffussm_cli.diffusion.integrators import AfterStep, FiniteSteps
from diffussm_cli.diffusion.process import GaussianDiffusion, Objective


@dataclass(frozen=True)
class Scheduler:
    """A row of `SCHEDULERS`: its class in diffusers, options of that beside the objective's, and
    whether it adds noise at every step.
    """

    kind: str
    options: Mapping[str, Any]
    adds_noise: bool


# The samplers that are schedulers of diffusers.
SCHEDULERS = {
    "ddpm": Scheduler(
        "DDPMScheduler", {"variance_type": "fixed_small", "clip_sample": False}, adds_noise=True
    ),
    "ddim": Scheduler(
        "DDIMScheduler",
        {"timestep_spacing": "leading", "clip_sample": False},
        adds_noise=False,
    ),
    "dpmpp": Scheduler("DPMSolverMultistepScheduler", {"variance_type": None}, adds_noise=False),
    "unipc": Scheduler("UniPCMultistepScheduler", {}, adds_noise=False),
}


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler,
    x: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    after_step: AfterStep | None = None,
    start: int = 0,
) -> Tensor:
    """Denoise x_T down to x_0 with a scheduler of diffusers from `set_steps`, which may be used
    again: a copy steps.

    Args:
        x: starting noise x_T, (B, C, H, W).
        generators: one per image, so that an image does not depend on its batch; CPU generators
            give the same noise on every device.
        after_step: is called with the number of the step, from 0, its timestep and the new x; it
            returns the x to go on with, or None to end here.
        start: the number of timesteps to leave out; x is then noised to the next one.

    Returns:
        x_0, (B, C, H, W).

    Raises:
        NotFiniteError: if an image becomes NaN or infinite; it names its place in the batch and the
            step.
    """
    C = x.shape[1]
    scheduler = copy.deepcopy(scheduler)
    is_ddpm = type(scheduler).__name__ == "DDPMScheduler"
    takes_covariance = is_ddpm and scheduler.config.variance_type == "learned_range"
    takes_generators = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": list(generators)} if generators and takes_generators else {}

    timesteps = scheduler.timesteps[start:]
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    checks = FiniteSteps(x)

    for i, t in enumerate(timesteps):
        output = denoise(x, t.item())
        output = output if takes_covariance else output[:, :C]
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]

        checks.count(x)
        changed = x if after_step is None else after_step(i, t, x)
        if changed is None:
            break
        x = changed

    checks.check(timesteps[: i + 1].tolist())
    return x


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

    row = SCHEDULERS[name]
    options = {**row.options, **objective.schedule}
    if name == "ddpm" and learned_covariance:
        options["variance_type"] = "learned_range"
    return row.kind, options


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
    name = type(scheduler).__name__
    settings = scheduler.config
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

    # Their settings, and the noise levels that follow from all of them.
    remedy = "make the scheduler by from_config of the one that came with the model"
    for key, value in expected.items():
        if settings.get(key, False) != value:
            raise ValueError(
                f"scheduler: {key} of {name} is {settings.get(key)!r}, but this model needs "
                f"{value!r}; {remedy}"
            )
    levels = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(objective, GaussianDiffusion) and levels is not None:
        ours = objective.alpha_bar64
        if not torch.allclose(levels.to(ours), ours, rtol=1e-3, atol=1e-6):
            raise ValueError(
                f"scheduler: the noise levels of {name} are not those of this model; {remedy}"
            )


def _check_timesteps(scheduler, objective: Objective, steps: int) -> None:
    """Raises ValueError for timesteps that repeat, that leave the path or that begin before the
    image is noise.
    """
    name = type(scheduler).__name__
    first = float(scheduler.timesteps.max())

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
    n = scheduler.num_inference_steps
    t = scheduler.timesteps
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
        self.scheduler = scheduler
        self.timesteps = torch.tensor(timesteps)
        self._done = 0

    def set_begin_index(self, start: int) -> None:
        """Leave out the timesteps before this place."""
        self._done = start

    def step(self, output: Tensor, t: Tensor, x: Tensor, **options: Any) -> tuple[Tensor]:  # noqa: ARG002
        """x at the next of the timesteps."""
        place = self.scheduler.timesteps[self._done]
        self._done += 1
        return self.scheduler.step(output, place, x, **options)

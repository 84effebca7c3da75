"""From noise to images: samplers by name.

    B batch   C channels   T timesteps of the process   x (B, C, H, W)

`sample_by_name` takes every sampler. Four of them are schedulers of diffusers (schedulers.py);
Euler, Heun and the stochastic one are `integrate` (integrators.py). Guidance, known pixels and
clipping are wrappers of the denoiser that a sampler gets (denoiser.py).
"""

import functools
import typing
from collections.abc import Sequence

import torch
from torch import Tensor

from diffussm_cli.config import SAMPLERS, SamplerName
from diffussm_cli.diffusion.denoiser import Denoiser
from diffussm_cli.diffusion.integrators import INTEGRATORS, AfterStep, integrate
from diffussm_cli.diffusion.process import Objective, timestep_batch
from diffussm_cli.diffusion.schedulers import SCHEDULERS, sample, scheduler_settings, set_steps

NAMES = (*SCHEDULERS, *INTEGRATORS)
STOCHASTIC = [
    name for name in NAMES if (SCHEDULERS.get(name) or INTEGRATORS[name]).adds_noise
]  # these add noise at every step

_fitting: set[str] = {name for names in SAMPLERS.values() for name in names}
_lists: tuple[set[str], ...] = ({*NAMES}, {*typing.get_args(SamplerName)}, _fitting)
_incomplete = {name for names in _lists for name in names if not all(name in s for s in _lists)}
_missing = ", ".join(sorted(_incomplete))
assert not _missing, (
    f"sampler {_missing}: needs a row in SCHEDULERS or INTEGRATORS, and its name in SamplerName "
    "and SAMPLERS of config/fields.py"
)


@torch.no_grad()
def sample_by_name(
    name: str,
    denoise: Denoiser,
    objective: Objective,
    x: Tensor,
    steps: int,
    generators: Sequence[torch.Generator] | None = None,
    learned_covariance: bool = False,
    image: Tensor | None = None,
    strength: float = 1.0,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Denoise x_T down to x_0, both (B, C, H, W).

    - `ddpm`: ancestral sampling over ADM's respaced timesteps, with the learned covariance if there
      is one
    - `ddim`: DDIM with eta 0; timesteps from 0 at an integer stride (ADM's ddimN) in 10 or more
      steps that divide T, otherwise as for `ddpm`
    - `dpmpp`: DPM-Solver++(2M)
    - `unipc`: UniPC, second order
    - `euler`: the probability flow in Euler's steps
    - `heun`: the same with Heun's steps, second order; the model is computed 2 steps - 1 times
    - `sde`: a flow's stochastic equation in Euler-Maruyama steps

    All but `ddpm` ignore the covariance. One step of any of them returns the image that the model
    predicts at the noisiest timestep. `config.SAMPLERS` lists those that fit an objective.

    Args:
        generators: one per image, so that an image does not depend on its batch; CPU generators
            give the same noise on every device.
        learned_covariance: whether the denoiser returns v too, (B, 2C, H, W).
        image: what to begin with at a strength below 1, (B, C, H, W): it is noised by x, and only
            the last of the steps are taken, a share of about `strength`.
        strength: from 0, which returns the image, to 1, which begins at x and needs no image.
        after_step: as in `sample`.

    Raises:
        ValueError: if the sampler is unknown or does not fit the objective, `steps` is not a whole
            number in 1..T, or `strength` does not lie in 0..1 or needs an image.
        NotFiniteError: if an image becomes NaN or infinite; it names its place in the batch and the
            step.
    """
    check_sampler(name, objective)
    scheduler = None
    grid = objective.timesteps(steps)
    if name in SCHEDULERS:
        scheduler = make_scheduler(name, objective, steps, learned_covariance)
        grid = scheduler.timesteps.tolist()

    x, start = begin_at(image, strength, objective, x, grid)
    if start == len(grid):
        return x

    if scheduler is not None:
        return sample(denoise, scheduler, x, generators, after_step, start)
    noise = functools.partial(_noise_like, generators)
    return integrate(denoise, objective, x, steps, name, noise, after_step, start)


def begin_at(
    image: Tensor | None, strength: float, objective: Objective, x: Tensor, grid: Sequence[float]
) -> tuple[Tensor, int]:
    """Where the steps of a strength begin.

    Args:
        image, strength: as in `sample_by_name`.
        x: noise, (B, C, H, W).
        grid: the timesteps of all steps, the noisiest first.

    Returns:
        The image, noised by x to the level of the first step that is taken, or x itself at strength
        1; and the number of the steps that are left out.

    Raises:
        ValueError: if the strength does not lie in 0..1 or needs an image.
    """
    start = len(grid) - steps_of(strength, len(grid))
    if not start:
        return x, 0
    if image is None:
        raise ValueError(f"strength: {strength:g} needs an image to begin with")
    if start == len(grid):
        return image.to(x), start
    return objective.q_sample(image.to(x), timestep_batch(grid[start], x), x), start


def steps_of(strength: float, steps: int) -> int:
    """How many of the steps a strength takes: none at 0, else at least one.

    Raises:
        ValueError: for a strength that does not lie in 0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: {strength!r} must be a number from 0 to 1")
    return max(1, round(strength * steps)) if strength else 0


def check_sampler(name: str, objective: Objective) -> None:
    """Raises ValueError if a sampler is unknown or does not fit the objective."""
    if name not in NAMES:
        raise ValueError(f"sampler {name!r} is not one of {', '.join(NAMES)}")
    if name not in SAMPLERS[objective.name]:
        fitting = ", ".join(SAMPLERS[objective.name])
        raise ValueError(
            f"sampler {name!r} does not fit the objective {objective.name}; choose {fitting}"
        )


def make_scheduler(name: str, objective: Objective, steps: int, learned_covariance: bool = False):
    """The scheduler of diffusers that a sampler is, one of `SCHEDULERS`, ready to step.

    Raises:
        ValueError: as `sample_by_name`, or if the sampler is one of `integrate`.
    """
    import diffusers

    check_sampler(name, objective)
    kind, options = scheduler_settings(name, objective, learned_covariance)
    return set_steps(getattr(diffusers, kind)(**options), objective, steps)


def _noise_like(generators: Sequence[torch.Generator] | None, x: Tensor) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(
        x.shape, generator=list(generators) if generators else None, device=x.device, dtype=x.dtype
    )

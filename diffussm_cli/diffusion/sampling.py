"""From noise to images: diffusers' schedulers by name, and guidance and clipping as wrappers of a denoiser.

    B batch   C channels   T timesteps of the process   x (B, C, H, W)   y (B,) labels

A denoiser is any `denoise(x, t) -> (B, 2C or C, H, W)`: it returns the noise, and v if the covariance is learned.
`t` is one integer for the whole batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffussm_cli.diffusion.process import GaussianDiffusion

Denoiser = Callable[[Tensor, int], Tensor]
LabelledModel = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, t (B,), y (B,)) -> (B, 2C or C, H, W)


def respaced_timesteps(T: int, steps: int) -> list[int]:
    """`steps` timesteps of 0..T-1, evenly spaced, both ends included, descending: ADM's respacing with one section."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps must lie in 1..{T}, got {steps}")
    stride = (T - 1) / (steps - 1) if steps > 1 else 0.0
    position, kept = 0.0, []
    for _ in range(steps):  # like ADM, which adds up the stride: the rounding of the sum decides some steps
        kept.append(round(position))
        position += stride
    return kept[::-1]


def make_scheduler(name: str, process: GaussianDiffusion, steps: int, learned_covariance: bool):
    """A diffusers scheduler, ready to step.

    `ddpm`   ancestral sampling over ADM's respaced timesteps, with the learned covariance if there is one
    `ddim`   DDIM with eta 0, timesteps from 0 at an integer stride (ADM's ddimN)
    `dpmpp`  DPM-Solver++(2M)
    `unipc`  UniPC, second order

    All but `ddpm` ignore the covariance.
    """
    import diffusers

    schedule = {
        "num_train_timesteps": process.T,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "beta_schedule": "linear",
    }
    scheduler: Any
    if name == "ddpm":
        variance = "learned_range" if learned_covariance else "fixed_small"
        scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=False, **schedule)
        scheduler.set_timesteps(timesteps=respaced_timesteps(process.T, steps))
        scheduler.alphas_cumprod = process.alpha_bar64  # its own float32 table adds 7e-6 of error in 250 steps
    elif name == "ddim":
        scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading", **schedule)
        scheduler.set_timesteps(steps)
    else:
        solvers: dict[str, tuple[Any, dict]] = {
            "dpmpp": (diffusers.DPMSolverMultistepScheduler, {"variance_type": None}),
            "unipc": (diffusers.UniPCMultistepScheduler, {}),
        }
        if name not in solvers:
            raise ValueError(f"sampler {name!r} is not one of ddpm, ddim, {', '.join(solvers)}")
        solver, options = solvers[name]
        scheduler = solver(**options, **schedule)
        scheduler.set_timesteps(steps)
    return scheduler


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
    takes_covariance = getattr(scheduler.config, "variance_type", None) == "learned_range"
    options = {"generator": list(generators)} if generators and _is_stochastic(scheduler) else {}
    for t in scheduler.timesteps:
        output = denoise(x, int(t))
        output = output if takes_covariance else output[:, :C]
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x


def _is_stochastic(scheduler) -> bool:
    return type(scheduler).__name__ == "DDPMScheduler"


# --------------------------------------------------------------------------------------- wrappers of a denoiser
def labelled(model: LabelledModel, y: Tensor | None) -> Denoiser:
    """A model with its labels fixed."""
    return lambda x, t: model(x, torch.full((len(x),), t, device=x.device), y)


def guided(
    model: LabelledModel,
    y: Tensor,
    null_class: int,
    scale: float,
    channels: int | None = None,
    interval: Sequence[int] | None = None,
) -> Denoiser:
    """Classifier-free guidance (arXiv 2207.12598): eps_null + scale (eps_y - eps_null), both in one batched forward.

    The covariance and the unguided channels are those of the label y. At scale 1, and at timesteps outside the
    interval, there is one forward pass without guidance.

    Args:
        channels: number of noise channels that are guided; None for all, 3 for DiT's published numbers.
        interval: (lowest, highest) guided timestep, both included (arXiv 2404.07724).
    """
    plain = labelled(model, y)
    if scale == 1:
        return plain
    both = torch.cat([y, torch.full_like(y, null_class)])

    def denoise(x: Tensor, t: int) -> Tensor:
        if interval is not None and not interval[0] <= t <= interval[1]:
            return plain(x, t)
        output, null = labelled(model, both)(torch.cat([x, x]), t).chunk(2)
        n = x.shape[1] if channels is None else min(channels, x.shape[1])
        eps = null[:, :n] + scale * (output[:, :n] - null[:, :n])
        return torch.cat([eps, output[:, n:]], dim=1)

    return denoise


def clipped(denoise: Denoiser, process: GaussianDiffusion) -> Denoiser:
    """Clamp the x_0 that a denoiser predicts to [-1, 1] (ADM's clip_denoised; for pixels)."""

    def clamp(x: Tensor, t: int) -> Tensor:
        output, C, steps = denoise(x, t), x.shape[1], torch.full((len(x),), t, device=x.device)
        x_0 = process.predict_x_0(x, steps, output[:, :C]).clamp(-1, 1)
        return torch.cat([process.predict_noise(x, steps, x_0), output[:, C:]], dim=1)

    return clamp

"""Wrappers of a denoiser: labels, guidance, known pixels and clipping. No sampler knows of them.

    B batch   C channels   x (B, C, H, W)   y (B,) labels

A denoiser is any `denoise(x, t) -> (B, 2C or C, H, W)`: it returns what the objective predicts, and
v if the covariance is learned. `t` is one number for the whole batch: whole for a discrete process,
fractional for a flow.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffussm_cli.diffusion.process import Objective, timestep_batch

Denoiser = Callable[[Tensor, float], Tensor]
# (x, t (B,), y (B,)) -> (B, 2C or C, H, W)
LabelledModel = Callable[[Tensor, Tensor, Tensor | None], Tensor]


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
    both = labelled(model, torch.cat([y, torch.zeros_like(y) + null]))

    def pair(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        output, away = both(torch.cat([x, x]), t).chunk(2)
        return output, away

    return _led_away(plain, pair, scale, channels, interval)


def autoguided(
    denoise: Denoiser,
    guide: Denoiser,
    scale: float,
    channels: int | None = None,
    interval: Sequence[int] | None = None,
) -> Denoiser:
    """Autoguidance (arXiv 2406.02507): D_guide + scale (D - D_guide), where the guide is a weaker
    model of the same data.

    What two models of one objective predict at x_t is a linear function of D, so it is guided in
    place of D. The other arguments are those of `guided`.
    """

    def pair(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return denoise(x, t), guide(x, t)

    return _led_away(denoise, pair, scale, channels, interval)


def _led_away(
    plain: Denoiser,
    pair: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    scale: float,
    channels: int | None,
    interval: Sequence[int] | None,
) -> Denoiser:
    """away + scale (output - away) for what `pair` returns, or `plain` where nothing is guided."""
    if scale == 1:
        return plain

    def denoise(x: Tensor, t: float) -> Tensor:
        if interval is not None and not interval[0] <= t <= interval[1]:
            return plain(x, t)
        output, away = pair(x, t)
        n = x.shape[1] if channels is None else min(channels, x.shape[1])
        eps = away[:, :n] + scale * (output[:, :n] - away[:, :n])
        return torch.cat([eps, output[:, n:]], dim=1)

    return denoise


def keeping(
    denoise: Denoiser, objective: Objective, x_0: Tensor, noise: Tensor, redrawn: Tensor
) -> Denoiser:
    """Keep the known pixels of images: the denoiser sees them noised to its timestep, always by the
    same noise, and what it predicts there is what implies x_0.

    A sampler of any kind so moves the other pixels alone, in steps of any kind.

    Args:
        x_0, noise: the images and their x_T, (B, C, H, W).
        redrawn: bool, broadcast to (B, C, H, W): true for the pixels that are not known.
    """

    def denoise_redrawn(x: Tensor, t: float) -> Tensor:
        C = x.shape[1]
        batch = timestep_batch(t, x)
        output = denoise(torch.where(redrawn, x, objective.q_sample(x_0, batch, noise)), t)
        known = objective.output_for(x, batch, x_0)
        return torch.cat([torch.where(redrawn, output[:, :C], known), output[:, C:]], dim=1)

    return denoise_redrawn


def clipped(denoise: Denoiser, objective: Objective) -> Denoiser:
    """Clamp the x_0 that a denoiser predicts to [-1, 1] (ADM's clip_denoised; for pixels)."""

    def clamp(x: Tensor, t: float) -> Tensor:
        output = denoise(x, t)
        C = x.shape[1]
        batch = timestep_batch(t, x)
        x_0 = objective.predict_x_0(x, batch, output[:, :C]).clamp(-1, 1)
        return torch.cat([objective.output_for(x, batch, x_0), output[:, C:]], dim=1)

    return clamp

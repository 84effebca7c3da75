"""Gaussian diffusion of ADM: schedule, q(x_t | x_0), its posterior, and p(x_{t-1} | x_t) from a model's output.

    B batch   C channels   T timesteps   x_0 image   x_t noised image   eps noise   v range interpolation

Equations: DDPM = Ho et al. 2020 (arXiv 2006.11239), IDDPM = Nichol and Dhariwal 2021 (arXiv 2102.09672).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffussm_cli.config import DiffusionConfig


class Prediction(NamedTuple):
    """A model's p(x_{t-1} | x_t); each field is (B, C, ...)."""

    mean: Tensor
    log_variance: Tensor
    x_0: Tensor


class GaussianDiffusion:
    """Linear schedule of T variances from `beta_start` to `beta_end`; all tables are (T,), on `device`.

    Tables are computed in float64 and kept in float32, as ADM uses them; `alpha_bar64` stays in float64, on the CPU.
    """

    def __init__(
        self, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, device: torch.device | str = "cpu"
    ):
        beta = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - beta, dim=0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        posterior_variance = beta * (1 - previous) / (1 - alpha_bar)  # DDPM (7)
        clipped = torch.cat([posterior_variance[1:2], posterior_variance[1:]])  # the variance is 0 at t = 0

        self.T, self.beta_start, self.beta_end = T, beta_start, beta_end

        def table(x: Tensor) -> Tensor:
            return x.float().to(device)

        self.alpha_bar64 = alpha_bar
        self.signal, self.noise = table(alpha_bar.sqrt()), table((1 - alpha_bar).sqrt())
        self.inv_signal, self.noise_to_signal = table(alpha_bar.rsqrt()), table((1 / alpha_bar - 1).sqrt())
        self.posterior_x_0 = table(beta * previous.sqrt() / (1 - alpha_bar))  # DDPM (7), factor of x_0
        self.posterior_x_t = table((1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar))  # factor of x_t
        self.posterior_log_variance = table(clipped.log())
        self.log_beta = table(beta.log())

    @classmethod
    def from_config(cls, config: DiffusionConfig, device: torch.device | str = "cpu") -> "GaussianDiffusion":
        """The process of a configuration's `diffusion` section."""
        return cls(config.timesteps, config.beta_start, config.beta_end, device)

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0), DDPM (4): x_0, noise (B, C, ...), t (B,) -> (B, C, ...)."""
        return _at(self.signal, t, x_0) * x_0 + _at(self.noise, t, x_0) * noise

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, ...) and log variance (B, 1, ...) of q(x_{t-1} | x_t, x_0), DDPM (6)."""
        mean = _at(self.posterior_x_0, t, x_t) * x_0 + _at(self.posterior_x_t, t, x_t) * x_t
        return mean, _at(self.posterior_log_variance, t, x_t)

    def predict_x_0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_0 implied by x_t and the noise in it, DDPM (15)."""
        return _at(self.inv_signal, t, x_t) * x_t - _at(self.noise_to_signal, t, x_t) * eps

    def predict_noise(self, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """The inverse of `predict_x_0`."""
        return (_at(self.inv_signal, t, x_t) * x_t - x_0) / _at(self.noise_to_signal, t, x_t)

    def inverse_signal_share(self, t: Tensor) -> Tensor:
        """1 / alpha_bar = 1 + 1/SNR at t (B,) -> (B,)."""
        return self.inv_signal[t] ** 2

    def p_mean_variance(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """p(x_{t-1} | x_t) from a model's output (B, 2C, ...); log variance by range interpolation, IDDPM (15)."""
        eps, v = model_output.chunk(2, dim=1)
        x_0 = self.predict_x_0(x_t, t, eps)
        mean, lowest = self.q_posterior(x_0, x_t, t)
        share = (v + 1) / 2
        return Prediction(mean, share * _at(self.log_beta, t, x_t) + (1 - share) * lowest, x_0)


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t], shaped (B, 1, ...) to multiply `like` (B, C, ...)."""
    return table[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1))

"""Training losses: the MSE of the model's output, and with a learned covariance ADM's variational
bound.

IDDPM = Nichol and Dhariwal 2021 (arXiv 2102.09672), equation (16).

    B batch   C channels   t (B,) timesteps

All losses are (B,): a mean over an image's C H W values.
"""

import math

import torch
from torch import Tensor

from diffussm_cli.diffusion.process import GaussianDiffusion, Objective
from diffussm_cli.errors import ConfigError


def training_losses(
    objective: Objective,
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    weight_cap: float = 1.0,
    min_snr_gamma: float | None = None,
) -> dict[str, Tensor]:
    """Losses per sample, from one forward pass of a model.

    Args:
        model_output: (B, 2C, ...) prediction and v, or (B, C, ...) prediction alone if the
            covariance is not learned.
        x_0, x_t, noise: (B, C, ...), t: (B,).
        weight_cap: cap on the weight 1 + 1/SNR(t) of the noise MSE in `loss`. 1 is the loss of ADM
            and of the paper. A larger cap gives noisy timesteps, where classes and shapes are
            decided, the weight that they have when the model predicts the velocity (arXiv
            2202.00512).
        min_snr_gamma: instead, weight the MSE by `Objective.min_snr_weight`.

    Without either, the weight is `Objective.loss_weight`: 1, except for a flow whose model predicts
    the image.

    Returns:
        `mse` of the prediction; with a learned covariance `vb`, the term of the bound at t in bits
        per dimension, whose gradient reaches v but not the mean; and `loss`, their weighted sum.
        Each is (B,).
    """
    C = x_0.shape[1]
    mse = _mean((model_output[:, :C] - objective.target(x_0, t, noise)) ** 2)

    weight = objective.loss_weight(t).to(mse.dtype)
    if min_snr_gamma is not None:
        weight = objective.min_snr_weight(t, min_snr_gamma).to(mse.dtype)
    elif weight_cap > 1:
        assert isinstance(objective, GaussianDiffusion), (
            "the configuration refuses a cap for a flow"
        )
        weight = objective.inverse_signal_share(t).clamp(max=weight_cap).to(mse.dtype)

    if model_output.shape[1] == C:
        return {"mse": mse, "loss": weight * mse}
    if not isinstance(objective, GaussianDiffusion):
        raise ConfigError(
            f"model.learn_sigma: {objective.name} has no covariance; build the model with "
            "learn_sigma=False"
        )

    # The bound, whose gradient reaches only the covariance.
    frozen_mean = torch.cat([model_output[:, :C].detach(), model_output[:, C:]], dim=1)
    vb = variational_bound(objective, frozen_mean, x_0, x_t, t)
    return {"mse": mse, "vb": vb, "loss": weight * mse + vb}


def variational_bound(
    process: GaussianDiffusion, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """The bound's L_t in bits per dimension, (B,): KL(q || p) for t > 0, the discretised likelihood
    of x_0 at t = 0.
    """
    true_mean, true_log_variance = process.q_posterior(x_0, x_t, t)
    p = process.p_mean_variance(model_output, x_t, t)
    kl = _mean(gaussian_kl(true_mean, true_log_variance, p.mean, p.log_variance))
    nll = -_mean(discretised_log_likelihood(x_0, p.mean, p.log_variance / 2))
    return torch.where(t == 0, nll, kl) / math.log(2)


def gaussian_kl(
    mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor
) -> Tensor:
    """KL(N1 || N2) elementwise, in nats."""
    shift = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (
        log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2) + shift - 1
    )


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability, in nats, of 8-bit values rescaled to [-1, 1] under a Gaussian; the outer
    bins are open.

    The normal CDF is ADM's tanh approximation, so that the losses agree with ADM's.
    """
    centred = x - mean
    inverse = torch.exp(-log_scale)
    above = _normal_cdf(inverse * (centred + 1 / 255))
    below = _normal_cdf(inverse * (centred - 1 / 255))
    p = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return p.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)

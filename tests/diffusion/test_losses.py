"""Losses against ADM's values, the bound's terms by hand."""

import math

import pytest
import torch

from diffussm_cli.diffusion.losses import discretised_log_likelihood, gaussian_kl, training_losses
from diffussm_cli.diffusion.process import GaussianDiffusion
from tests.conftest import device, golden


@pytest.fixture(scope="module")
def g():
    return golden("adm_diffusion")


@pytest.mark.parametrize("name", ["mse", "vb", "loss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_equal_adm(g, name, dtype):
    x_0, x_t, noise, output = (g[k].to(dtype) for k in ("x0", "x_t", "noise", "model_output"))
    ours = training_losses(GaussianDiffusion(device=device()), output, x_0, x_t, g["t"], noise)[
        name
    ]
    # float32 cancels in the bound's small terms
    tolerance = 1e-5 if dtype == torch.float64 or name == "mse" else 1e-3
    torch.testing.assert_close(
        ours.double(), g[name], rtol=tolerance, atol=1e-9 if dtype == torch.float64 else 1e-6
    )


def test_variational_bound_has_no_gradient_in_the_mean(g):
    output = g["model_output"].clone().requires_grad_()
    process = GaussianDiffusion(device=device())
    losses = training_losses(process, output, g["x0"], g["x_t"], g["t"], g["noise"])
    (vb,) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    (mse,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert not vb[:, :4].any()
    assert vb[:, 4:].flatten(1).any(dim=1).all()
    assert mse[:, :4].any()
    assert not mse[:, 4:].any()


def test_loss_without_learned_covariance_is_noise_mse(g):
    losses = training_losses(
        GaussianDiffusion(device=device()),
        g["model_output"][:, :4],
        g["x0"],
        g["x_t"],
        g["t"],
        g["noise"],
    )
    assert losses.keys() == {"mse", "loss"}
    torch.testing.assert_close(losses["loss"], g["mse"], rtol=1e-6, atol=0)


def test_weights_of_noisy_timesteps_equal_velocity_up_to_cap(g):
    process = GaussianDiffusion(device=device())
    arguments = (g["model_output"], g["x0"], g["x_t"], g["t"], g["noise"])
    plain, weighted = (
        training_losses(process, *arguments),
        training_losses(process, *arguments, weight_cap=20.0),
    )
    alpha_bar = process.alpha_bar64.to(device())[g["t"]]
    expected = (1 / alpha_bar).clamp(max=20) * plain["mse"] + plain["vb"]
    torch.testing.assert_close(weighted["loss"], expected, rtol=1e-5, atol=0)
    assert torch.equal(weighted["mse"], plain["mse"])

    abar = alpha_bar.view(-1, 1, 1, 1)  # the weight is that of v = signal eps - noise x_0
    eps = g["model_output"][:, :4]
    x_0 = (g["x_t"] - (1 - abar).sqrt() * eps) / abar.sqrt()
    v, true_v = (
        abar.sqrt() * e - (1 - abar).sqrt() * x for e, x in ((eps, x_0), (g["noise"], g["x0"]))
    )
    mse_v = ((v - true_v) ** 2).flatten(1).mean(1)
    uncapped = training_losses(process, *arguments, weight_cap=1e9)
    torch.testing.assert_close(uncapped["loss"] - uncapped["vb"], mse_v, rtol=1e-4, atol=1e-6)


def test_kl_of_gaussians_equals_closed_form():
    kl = gaussian_kl(*map(torch.tensor, (0.0, 0.0, 1.0, math.log(4.0))))
    assert float(kl) == pytest.approx(0.5 * (math.log(4) + 1 / 4 + 1 / 4 - 1))


def test_likelihood_of_all_256_values_is_one():
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = discretised_log_likelihood(
        x, torch.full_like(x, 0.3), torch.full_like(x, math.log(0.4))
    )
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)

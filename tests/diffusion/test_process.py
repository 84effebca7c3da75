"""Process and losses against ADM's values, the prior against itself."""

import pytest
import torch

from diffussm_cli.diffusion.process import GaussianDiffusion
from tests.conftest import device, golden, relative


@pytest.fixture(scope="module")
def g():
    return golden("adm_diffusion")


def test_process_equals_adm(g):
    process = GaussianDiffusion(device=device())
    p = process.p_mean_variance(g["model_output"], g["x_t"], g["t"])
    mean, log_variance = process.q_posterior(g["x0"], g["x_t"], g["t"])
    assert relative(process.q_sample(g["x0"], g["t"], g["noise"]), g["x_t"]) < 1e-5
    assert relative(p.mean, g["p_mean"]) < 1e-5
    assert relative(p.log_variance, g["p_log_variance"]) < 1e-5
    assert relative(p.x_0, g["pred_x0"]) < 1e-5
    assert relative(mean, g["q_posterior_mean"]) < 1e-5
    assert relative(log_variance.expand_as(mean), g["q_posterior_log_variance"]) < 1e-5


def test_predictions_of_noise_and_image_are_inverse(g):
    process = GaussianDiffusion(device=device())
    x_0 = process.predict_x_0(g["x_t"], g["t"], g["noise"])
    torch.testing.assert_close(
        process.output_for(g["x_t"], g["t"], x_0), g["noise"], rtol=1e-4, atol=1e-4
    )
    assert relative(x_0, g["x0"]) < 1e-4

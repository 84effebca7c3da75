"""Process and losses against ADM's values, the prior against itself."""

import pytest
import torch

from diffussm_cli.diffusion.flow import ImageFlow, LinearFlow
from diffussm_cli.diffusion.process import GaussianDiffusion, VelocityDiffusion
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


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: GaussianDiffusion(beta_start=2, beta_end=3),
            "beta_start: 2 must be at most 0.999",
        ),
        (lambda: VelocityDiffusion(beta_end=0.0), "beta_end: 0.0 must be greater than 0"),
        (lambda: GaussianDiffusion(beta_end="x"), "beta_end: 'x' must be a finite number"),
        (lambda: GaussianDiffusion(beta_end=1e-5), "beta_end: 1e-05 must be at least beta_start"),
        (lambda: GaussianDiffusion(1), "T: 1 must be a whole number from 2 to 10000"),
        (lambda: GaussianDiffusion(beta_end=0.9), "T: 1000 with variances up to 0.9 leave nothing"),
        (lambda: LinearFlow(0), "T: 0 must be at least 1"),
        (lambda: ImageFlow(-5), "T: -5 must be at least 1"),
    ],
)
def test_process_that_leaves_no_image_or_no_time_is_rejected_by_name(make, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        make()

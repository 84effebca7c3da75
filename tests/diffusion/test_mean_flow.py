"""One step: the mean velocity of the whole path, on Gaussian data, whose paths are known."""

import pytest
import torch

from diffussm_cli.config import DiffusionConfig
from diffussm_cli.diffusion.flow import LEAST_SHARE, LinearFlow, MeanFlow
from diffussm_cli.diffusion.objectives import make_objective
from diffussm_cli.diffusion.samplers import sample_by_name
from tests.conftest import device, randn, relative
from tests.diffusion.test_objectives import flow_end, optimal

FLOW = MeanFlow(device=device())
TIMES = torch.tensor([30.0, 400.0, 700.0, 999.0])


def ends(x, t):
    """Where the exact flow takes x_t, for a timestep of each image."""
    return torch.cat([flow_end(FLOW, x[i : i + 1], t[i].item()) for i in range(len(t))])


def mean_velocity(x, t):
    return (x - ends(x, t)) / (t.double() / FLOW.T).clamp(min=1e-6).view(-1, 1, 1, 1)


def velocity(x, t):
    """The exact flow, of which `optimal` knows the target eps - x_0."""
    return optimal(LinearFlow(device=device()))(x, t)


def at_times():
    x = randn(4, 1, 8, 8, dtype=torch.float64)
    return x, TIMES.to(x.device, torch.float64)


def test_one_step_of_the_exact_mean_velocity_ends_at_the_image():
    x = randn(4, 1, 8, 8, dtype=torch.float64)

    def denoise(x, t):
        return mean_velocity(x, torch.full((len(x),), t))

    image = sample_by_name("euler", denoise, FLOW, x, 1)
    assert relative(image, flow_end(FLOW, x, 1000.0)) < 1e-12


def test_more_steps_than_one_are_refused():
    with pytest.raises(ValueError, match="steps must be 1 for a model that draws in one step"):
        sample_by_name("euler", lambda x, _: x, FLOW, randn(1, 1, 8, 8), 2)


def test_at_first_the_target_is_the_velocity_of_the_teacher():
    x, t = at_times()
    losses = FLOW.losses(velocity, velocity, x, t, progress=0.0)
    assert losses["mse"].max() < 1e-24
    assert FLOW.losses(mean_velocity, velocity, x, t, progress=0.0)["mse"][1:].min() > 1e-3


def test_exact_mean_velocity_is_the_target_of_small_steps_up_to_eulers_error():
    x, t = at_times()
    at_end = FLOW.losses(mean_velocity, velocity, x, t, progress=0.5)["mse"]
    halfway = FLOW.losses(mean_velocity, velocity, x, t, progress=0.25)["mse"]
    assert at_end.max() < 1e-4
    # One step of a share has an error of the share's square, and its square is measured; the two
    # shares differ by the root of ten.
    assert (at_end < 0.0125 * halfway).all()
    assert torch.equal(at_end, FLOW.losses(mean_velocity, velocity, x, t, progress=1.0)["mse"])


def test_target_is_the_first_share_of_the_teacher_and_the_rest_of_the_model():
    x, t = at_times()
    b = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def model(x, t):
        return b * x + t.view(-1, 1, 1, 1) / 1000

    def teacher(x, _):
        return 3 * x

    losses = FLOW.losses(model, teacher, x, t, progress=0.75)
    s = t.view(-1, 1, 1, 1) / 1000
    a = LEAST_SHARE
    rest = 2 * (x - a * s * 3 * x) + (1 - a) * s
    error = (2 * x + s) - (a * 3 * x + (1 - a) * rest)
    mse = error.square().mean((1, 2, 3))
    torch.testing.assert_close(losses["mse"], mse)

    # The target has no gradient.
    losses["loss"].sum().backward()
    gradient = 2 * (error * x).mean((1, 2, 3)) / (mse + 0.01).sqrt()
    torch.testing.assert_close(b.grad, gradient.sum())


def test_no_target_without_a_teacher():
    x, t = at_times()
    with pytest.raises(TypeError, match="learned from a teacher"):
        FLOW.target(x, t, x)


def test_configuration_makes_it():
    made = make_objective(DiffusionConfig(objective="flow", predicts="mean_velocity"))
    assert type(made) is MeanFlow

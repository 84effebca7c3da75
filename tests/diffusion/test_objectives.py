"""Noise, velocity and flow against closed forms: on Gaussian data, everything that a model could
learn is known.
"""

import math

import pytest
import torch

from diffussm_cli.config import SAMPLERS, DiffusionConfig
from diffussm_cli.diffusion.denoiser import clipped
from diffussm_cli.diffusion.flow import ImageFlow, LinearFlow
from diffussm_cli.diffusion.losses import training_losses
from diffussm_cli.diffusion.objectives import draw_timestep, make_objective
from diffussm_cli.diffusion.process import GaussianDiffusion, VelocityDiffusion, timestep_batch
from diffussm_cli.diffusion.samplers import sample_by_name
from tests.conftest import device, randn, relative

MEAN, VARIANCE = 0.3, 0.25  # of the data
OBJECTIVES = {
    "noise": GaussianDiffusion(device=device()),
    "velocity": VelocityDiffusion(device=device()),
    "zero_snr": VelocityDiffusion(device=device(), zero_snr=True),
    "flow": LinearFlow(device=device()),
    "image": ImageFlow(device=device()),
}
ALL = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
TIMES = torch.tensor([1, 50, 400, 700, 998])


def seeded(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def batch_of(t):
    return t.to(device())


def path(objective, t, x):
    """Signal and noise in float64, from their definitions."""
    if isinstance(objective, LinearFlow):
        share = t.double().view(-1, 1, 1, 1) / objective.T
        return 1 - share, share
    abar = objective.alpha_bar64.to(t.device)[t].view(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def optimal(objective):
    """The exact denoiser of N(MEAN, VARIANCE) data: E[target | x_t]."""

    def denoise(x, t):
        t = timestep_batch(t, x) if isinstance(t, int | float) else t
        a, s = path(objective, t, x)
        centred = (x - a * MEAN) / (VARIANCE * a**2 + s**2)
        return objective.target(MEAN + VARIANCE * a * centred, t, s * centred)

    return denoise


def flow_end(objective, x, t):
    """Where the exact probability flow takes x_t: it rescales Gaussian data."""
    a, s = path(objective, timestep_batch(t, x), x)
    return MEAN + (x - a * MEAN) * (VARIANCE / (VARIANCE * a**2 + s**2)).sqrt()


def ode_error(name, objective, steps):
    x, seen = randn(4, 1, 8, 8, dtype=torch.float64), []

    def denoise(x, t):
        seen.append(t)
        return optimal(objective)(x, t)

    end = sample_by_name(name, denoise, objective, x, steps)
    return relative(end, flow_end(objective, x, seen[0]))


def slope(name, objective, steps):
    """Of log(error) by log(steps), least squares: minus the order of convergence."""
    x, y = [math.log(n) for n in steps], [math.log(ode_error(name, objective, n)) for n in steps]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


# ------------------------------------------------------------------------------------------- losses
@pytest.mark.skipif(device().type != "cpu", reason="recorded on a CPU")
def test_losses_of_noise_keep_golden_values():
    """Recorded in float32 with the code of that time. Exponentials of the bound may differ by CPU,
    products do not.
    """
    process = GaussianDiffusion()
    x_0, noise, output = randn(4, 1, 2, 2) / 2, randn(4, 1, 2, 2, seed=1), randn(4, 2, 2, 2, seed=2)
    t = torch.tensor([0, 10, 500, 999])
    known = (x_0, process.q_sample(x_0, t, noise), t, noise)
    plain = training_losses(process, output[:, :1], *known)["loss"]
    capped = training_losses(process, output[:, :1], *known, weight_cap=20.0)["loss"]
    bound = training_losses(process, output, *known)["loss"]
    assert plain.tolist() == [
        0.9214867353439331,
        0.9044747352600098,
        0.45586803555488586,
        2.6318485736846924,
    ]
    assert capped.tolist() == [
        0.9215787649154663,
        0.9064629673957825,
        5.859737873077393,
        52.63697052001953,
    ]
    recorded = torch.tensor(
        [3.084646701812744, 1.0043985843658447, 0.459492951631546, 2.6705946922302246]
    )
    torch.testing.assert_close(bound, recorded, rtol=1e-6, atol=0)


@ALL
def test_optimal_predictor_has_no_excess_loss(objective):
    """Its loss is the variance that x_t leaves to the target p x_0 + q eps: V (a q - s p)^2 / (V
    a^2 + s^2).
    """
    n = 20_000
    t = batch_of(TIMES)
    x_0 = MEAN + math.sqrt(VARIANCE) * randn(len(t), 1, n, 1, seed=1, dtype=torch.float64)
    noise = randn(len(t), 1, n, 1, seed=2, dtype=torch.float64)
    x_t = objective.q_sample(x_0, t, noise)
    a, s = (v.flatten() for v in path(objective, t, x_t))
    targets = {
        "epsilon": (0, 1),
        "v_prediction": (-s, a),
        "flow_prediction": (-1, 1),
        "sample": (1, 0),
    }
    p, q = targets[objective.schedule["prediction_type"]]
    left = VARIANCE * (a * q - s * p) ** 2 / (VARIANCE * a**2 + s**2)
    losses = training_losses(objective, optimal(objective)(x_t, t), x_0, x_t, t, noise)
    torch.testing.assert_close(losses["mse"], left, rtol=5 * math.sqrt(2 / n), atol=0)
    torch.testing.assert_close(
        losses["loss"], losses["mse"] * objective.loss_weight(t), rtol=1e-6, atol=0
    )


def test_loss_of_predicted_image_equals_that_of_velocity_except_at_least_noise():
    """The same prediction as an image and as a velocity; below s = 0.05 the weight stays 400."""
    image, flow = OBJECTIVES["image"], OBJECTIVES["flow"]
    t = batch_of(torch.tensor([10.0, 50.0, 400.0, 999.0], dtype=torch.float64))
    x_0, noise, guess = (randn(4, 1, 4, 4, seed=i, dtype=torch.float64) for i in range(3))
    x_t = flow.q_sample(x_0, t, noise)
    of_image = training_losses(image, guess, x_0, x_t, t, noise)["loss"]
    of_velocity = training_losses(flow, flow.output_for(x_t, t, guess), x_0, x_t, t, noise)["loss"]
    ratio = torch.tensor([(0.01 / 0.05) ** 2, 1, 1, 1], dtype=torch.float64).to(device())
    torch.testing.assert_close(of_image / of_velocity, ratio, rtol=1e-5, atol=0)
    assert torch.equal(flow.loss_weight(t), torch.ones(4).to(device()))


@ALL
def test_loss_is_zero_if_the_image_is_known(objective):
    t, x_0 = batch_of(TIMES), randn(5, 3, 4, 4, seed=1, dtype=torch.float64)
    noise = randn(5, 3, 4, 4, seed=2, dtype=torch.float64)
    x_t = objective.q_sample(x_0, t, noise)
    target = objective.target(x_0, t, noise)
    torch.testing.assert_close(objective.output_for(x_t, t, x_0), target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(objective.predict_x_0(x_t, t, target), x_0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(objective.predict_noise(x_t, t, target), noise, rtol=1e-4, atol=1e-4)
    velocity = objective.velocity(x_0, t, noise)
    torch.testing.assert_close(
        objective.predict_velocity(x_t, t, target), velocity, rtol=1e-4, atol=1e-4
    )


@ALL
def test_velocity_is_the_derivative_of_the_path(objective):
    """Along the angle of image and noise in the discrete process, along t/T in the flow: a central
    difference.
    """
    x_0, noise = (randn(1, 1, 4, 4, seed=i, dtype=torch.float64) for i in (1, 2))
    earlier, t, later = (
        timestep_batch(type(objective.timesteps(2)[0])(v), x_0) for v in (499, 500, 501)
    )
    ends = [objective.q_sample(x_0, v, noise) for v in (earlier, later)]
    step = objective.time(later.item()) - objective.time(earlier.item())
    torch.testing.assert_close(
        (ends[1] - ends[0]) / step, objective.velocity(x_0, t, noise), rtol=1e-3, atol=1e-3
    )


def test_min_snr_weights_of_noise_and_velocity():
    """min(SNR, 5)/SNR and min(SNR, 5)/(SNR + 1), arXiv 2303.09556; the velocity's falls to zero
    with the signal.
    """
    t = batch_of(TIMES)
    abar = OBJECTIVES["noise"].alpha_bar64.to(device())[t]
    snr = (abar / (1 - abar)).float()
    least = snr.clamp(max=5)
    torch.testing.assert_close(
        OBJECTIVES["noise"].min_snr_weight(t, 5), least / snr, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        OBJECTIVES["velocity"].min_snr_weight(t, 5), least / (snr + 1), rtol=1e-5, atol=0
    )
    assert snr[0] > 5 > snr[-1]  # capped and not
    known = [randn(5, 1, 4, 4, seed=i) for i in range(3)]
    losses = training_losses(
        OBJECTIVES["velocity"], known[0], known[1], known[2], t, known[1], min_snr_gamma=5
    )
    torch.testing.assert_close(losses["loss"], losses["mse"] * least / (snr + 1), rtol=1e-5, atol=0)


def test_velocity_keeps_the_bound_of_the_noise():
    """The same p(x_{t-1} | x_t), from an output that implies the same x_0: the same bound."""
    noise, velocity = OBJECTIVES["noise"], OBJECTIVES["velocity"]
    x_0, eps, predicted, v = (randn(5, 1, 4, 4, seed=i, dtype=torch.float64) / 2 for i in range(4))
    t = batch_of(TIMES)
    x_t = noise.q_sample(x_0, t, eps)
    as_velocity = velocity.output_for(x_t, t, noise.predict_x_0(x_t, t, predicted))
    outputs = [torch.cat([output, v], dim=1) for output in (predicted, as_velocity)]
    one, two = (
        training_losses(o, out, x_0, x_t, t, eps) for o, out in zip((noise, velocity), outputs)
    )
    torch.testing.assert_close(two["vb"], one["vb"], rtol=1e-4, atol=1e-6)


def test_zero_terminal_snr_ends_in_noise_and_begins_as_before():
    """arXiv 2305.08891, algorithm 1."""
    usual, rescaled = OBJECTIVES["velocity"], OBJECTIVES["zero_snr"]
    assert rescaled.alpha_bar64[-1] == 0
    assert rescaled.alpha_bar64[0].item() == pytest.approx(usual.alpha_bar64[0].item(), rel=1e-12)
    ratios = rescaled.alpha_bar64.sqrt().diff() / usual.alpha_bar64.sqrt().diff()
    # a linear map of sqrt(abar)
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-9, atol=0)
    # without noise, the mean of x_{t-1} given x_t = a_t x_0 is a_{t-1} x_0, in the last step too
    mean = rescaled.posterior_x_0 + rescaled.posterior_x_t * rescaled.signal
    torch.testing.assert_close(mean[1:], rescaled.signal[:-1], rtol=1e-4, atol=1e-6)
    assert torch.isfinite(rescaled.log_beta).all()
    assert torch.isfinite(rescaled.posterior_log_variance).all()


# ----------------------------------------------------------------------------------------- samplers
@ALL
@pytest.mark.parametrize(
    ("name", "order", "steps"), [("euler", 1, (10, 20, 40, 80, 160)), ("heun", 2, (8, 16, 32, 64))]
)
def test_solvers_of_the_flow_converge_with_their_order(objective, name, order, steps):
    assert slope(name, objective, steps) == pytest.approx(-order, abs=0.15)


@pytest.mark.parametrize("of", ["flow", "image"])
@pytest.mark.parametrize("name", ["dpmpp", "unipc"])
def test_diffusers_second_order_solvers_converge_on_flow(name, of):
    """Their own timesteps are rounded down to whole numbers; the model must see the noise level of
    the step.
    """
    objective = OBJECTIVES[of]
    assert ode_error(name, objective, 160) < 1e-3
    assert ode_error(name, objective, 320) < 0.4 * ode_error(name, objective, 160)


@ALL
def test_one_step_of_any_sampler_gives_image_predicted_at_noisiest_timestep(objective):
    x = randn(2, 1, 4, 4, dtype=torch.float64)
    for name in SAMPLERS[objective.name]:
        seen = []

        def denoise(x, t):
            seen.append(t)  # noqa: B023
            return optimal(objective)(x, t)

        end = sample_by_name(name, denoise, objective, x, 1, seeded(2))
        assert len(seen) == 1
        assert seen[0] >= objective.T - 1
        assert (end - MEAN).abs().max() < 0.03, name  # all that can be said of the image from noise


@ALL
@pytest.mark.parametrize("T", [2, 10, 50, 1000])
def test_as_many_steps_as_timesteps_are_as_good_as_one_less(objective, T):
    """DPM-Solver++ and UniPC of diffusers would visit the last timestep twice,
    and divide by zero.
    """
    betas = {} if objective.continuous else {"beta_start": 0.1 / T, "beta_end": min(0.9, 20 / T)}
    process = type(objective)(T, **betas, device=device())
    for name in SAMPLERS[process.name]:
        if name in ("ddpm", "sde"):
            continue
        # so many steps are nearly exact
        one_less = 0.0 if T == 1000 else ode_error(name, process, T - 1)
        assert ode_error(name, process, T) < one_less + 0.03, name


@pytest.mark.parametrize("name", ["ddim", "dpmpp", "unipc", "euler", "heun"])
def test_samplers_take_the_same_steps_with_noise_and_velocity(name):
    x = randn(4, 1, 8, 8, dtype=torch.float64)
    noise, velocity = (
        sample_by_name(name, optimal(o), o, x, 12)
        for o in (OBJECTIVES["noise"], OBJECTIVES["velocity"])
    )
    assert relative(velocity, noise) < 1e-4


def test_all_objectives_describe_the_same_flow():
    x = randn(4, 1, 8, 8, dtype=torch.float64)
    ends = [sample_by_name("heun", optimal(o), o, x, 100) for o in OBJECTIVES.values()]
    exact = MEAN + math.sqrt(VARIANCE) * x
    # noise and velocity begin at a signal of 0.006
    assert all(relative(end, exact) < 2e-3 for end in ends)


def test_stochastic_sampler_reproduces_mean_and_variance():
    objective, x = OBJECTIVES["flow"], randn(4, 1, 64, 64, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    end = sample_by_name("sde", optimal(objective), objective, x, 200, generators)
    assert end.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert end.var().item() == pytest.approx(VARIANCE, rel=0.04)
    deterministic = flow_end(objective, x, 1000.0)
    assert relative(end, deterministic) > 0.5  # and it is not the deterministic one


@pytest.mark.parametrize(
    ("objective", "predicts"),
    [("noise", "velocity"), ("velocity", "velocity"), ("flow", "velocity"), ("flow", "image")],
)
def test_every_fitting_sampler_draws_each_image_from_its_own_generator(objective, predicts):
    process = make_objective(DiffusionConfig(objective=objective, predicts=predicts), device())
    x = randn(3, 2, 4, 4, dtype=torch.float64)
    for name in SAMPLERS[objective]:
        together, alone = (
            sample_by_name(
                name, clipped(optimal(process), process), process, x[chosen], 6, seeded(3)[chosen]
            )
            for chosen in (slice(0, 3), slice(2, 3))
        )
        torch.testing.assert_close(together[2:], alone, rtol=0, atol=1e-12)


def test_heun_calls_model_twice_per_step_and_once_in_the_last():
    seen = []

    def denoise(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    sample_by_name("heun", denoise, OBJECTIVES["flow"], randn(1, 1, 2, 2), 4)
    assert seen == [1000.0, 750.0, 750.0, 500.0, 500.0, 250.0, 250.0]


# ---------------------------------------------------------------------------------------- timesteps
def drawn(n=4000, **fields):
    d = DiffusionConfig(**fields)
    return torch.cat([draw_timestep(d, torch.Generator().manual_seed(i)) for i in range(n)])


def test_uniform_timesteps_keep_golden_values():
    expected = [
        torch.randint(1000, (1,), generator=torch.Generator().manual_seed(i)).item()
        for i in range(50)
    ]
    assert drawn(50).tolist() == expected


def test_flow_draws_between_the_whole_timesteps():
    t = drawn(objective="flow")
    assert t.dtype == torch.float32
    assert (t != t.round()).any()
    assert t.mean().item() == pytest.approx(500, abs=5 * 1000 / math.sqrt(12 * len(t)))
    assert t.var().item() == pytest.approx(1000**2 / 12, rel=0.1)


@pytest.mark.parametrize("objective", ["noise", "flow"])
def test_logits_of_logit_normal_timesteps_are_normal(objective):
    t = drawn(
        objective=objective, timesteps_drawn="logit_normal", logit_mean=-0.5, logit_std=0.8
    ).double()
    logit = torch.logit((t + (0.5 if objective == "noise" else 0)) / 1000)
    assert logit.mean().item() == pytest.approx(-0.5, abs=0.06)
    assert logit.std().item() == pytest.approx(0.8, rel=0.06)


@pytest.mark.parametrize("objective", ["noise", "flow"])
def test_shifted_timesteps_have_the_shifted_distribution(objective):
    """P(t' <= t) = t / (alpha - (alpha - 1) t), the inverse of SD3's map."""
    t = drawn(objective=objective, timesteps_drawn="shifted", shift=3.0).double() / 1000
    for share in (0.25, 0.5, 0.75, 0.9):
        expected = share / (3 - 2 * share)
        assert (t < share).double().mean().item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("objective", ["noise", "flow"])
@pytest.mark.parametrize("mean", [-80.0, 80.0])
def test_extreme_draws_stay_inside(objective, mean):
    t = drawn(20, objective=objective, timesteps_drawn="logit_normal", logit_mean=mean)
    assert (t >= 0).all()
    assert (t < 1000).all()

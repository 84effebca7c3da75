"""Samplers against ADM's runs and against the exact solution on Gaussian data; guidance and
clipping by hand.
"""

import math
import re
import typing
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

from diffussm_cli.config import SAMPLERS, SamplerName
from diffussm_cli.diffusion.denoiser import autoguided, clipped, guided, keeping
from diffussm_cli.diffusion.flow import LinearFlow
from diffussm_cli.diffusion.integrators import INTEGRATORS, integrate
from diffussm_cli.diffusion.process import GaussianDiffusion, timestep_batch
from diffussm_cli.diffusion.samplers import check_sampler, make_scheduler, sample_by_name, steps_of
from diffussm_cli.diffusion.schedulers import SCHEDULERS, sample, scheduler_settings, set_steps
from diffussm_cli.errors import NotFiniteError
from tests.conftest import device, golden, randn, relative

PROCESS = GaussianDiffusion(device=device())
VARIANCE = 0.25  # of the data


def seeded(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def gaussian_denoiser(x, t):
    """The exact denoiser of N(0, 1/4) data, with the golden file's v beside it."""
    abar = PROCESS.alpha_bar64[t]
    s = (1 - abar).sqrt()
    return torch.cat([x * s / (VARIANCE * abar + s**2), 0.5 * torch.tanh(x)], dim=1)


def test_every_list_of_samplers_has_the_same_names():
    names = set(typing.get_args(SamplerName))
    page = (Path(__file__).parents[2] / "docs" / "get-started.md").read_text("utf-8")
    table = page.partition("| Sampler | Method |")[2].partition("\n\n")[0]
    assert names == {*SCHEDULERS, *INTEGRATORS}
    assert names == {name for fitting in SAMPLERS.values() for name in fitting}
    assert names == set(re.findall(r"^\| `(\w+)` \|", table, re.M))


@pytest.mark.parametrize("steps", [250, 50])
def test_ddpm_equals_adm(steps, monkeypatch):
    g = golden("adm_diffusion")
    scheduler = make_scheduler("ddpm", PROCESS, steps, learned_covariance=True)
    assert scheduler.timesteps.tolist() == g[f"s{steps}_timesteps"].tolist()
    noise = iter(g[f"s{steps}_z"])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(noise).double())
    final = sample(gaussian_denoiser, scheduler, g[f"s{steps}_xT"])
    assert relative(final, g[f"s{steps}_final"]) < 1e-6


def test_ddim_equals_adm():
    g = golden("adm_diffusion")
    scheduler = make_scheduler("ddim", PROCESS, 25, learned_covariance=True)
    assert scheduler.timesteps.tolist() == g["sddim25_timesteps"].tolist()
    assert (
        relative(sample(gaussian_denoiser, scheduler, g["sddim25_xT"]), g["sddim25_final"]) < 1e-6
    )


def test_respacing_keeps_ends_and_rejects_bad_counts():
    assert PROCESS.timesteps(1) == [999]  # ADM's would be 0, where nothing is left to denoise
    assert PROCESS.timesteps(2) == [999, 0]
    assert PROCESS.timesteps(1000) == list(range(999, -1, -1))
    for steps in (0, -1, 1001, 10.0, True):
        for objective in (PROCESS, LinearFlow()):
            with pytest.raises(ValueError, match=f"must be a whole number in 1..1000, got {steps}"):
                objective.timesteps(steps)


def ode_error(name, steps):
    """Distance of a solver's end from the exact probability flow, which only rescales Gaussian
    data.
    """
    scheduler = make_scheduler(name, PROCESS, steps, learned_covariance=True)
    x_T = randn(4, 1, 8, 8, dtype=torch.float64)
    abar = PROCESS.alpha_bar64[int(scheduler.timesteps[0])]
    exact = x_T * (VARIANCE / (VARIANCE * abar + 1 - abar)).sqrt()
    return relative(sample(gaussian_denoiser, scheduler, x_T), exact)


def test_ddim_converges_with_order_one():
    steps = [10, 20, 50, 100, 250, 500]
    errors = [math.log(ode_error("ddim", n)) for n in steps]
    x = [math.log(n) for n in steps]
    mx, my = sum(x) / len(x), sum(errors) / len(x)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, errors)) / sum((a - mx) ** 2 for a in x)
    assert -1.05 < slope < -0.9


@pytest.mark.parametrize("name", ["dpmpp", "unipc"])
def test_second_order_solvers_beat_ddim_and_converge(name):
    assert ode_error(name, 40) < 0.2 * ode_error("ddim", 40)
    assert ode_error(name, 80) < 0.01


def test_unknown_sampler_is_named():
    with pytest.raises(
        ValueError, match="'eulr' is not one of ddpm, ddim, dpmpp, unipc, euler, heun, sde"
    ):
        sample_by_name("eulr", gaussian_denoiser, PROCESS, randn(1, 1, 4, 4), 10)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "sde"])
def test_sampler_of_another_process_is_rejected(name):
    objective = PROCESS if name == "sde" else LinearFlow()
    with pytest.raises(
        ValueError, match=f"'{name}' does not fit the objective {objective.name}; choose .*euler"
    ):
        check_sampler(name, objective)


def test_scheduler_of_other_noise_levels_is_rejected():
    """By their settings they would fit: betas in place of those of the settings, and a process
    that does not say in `schedule` that its noise levels are others.
    """
    options = scheduler_settings("dpmpp", PROCESS, False)[1]
    betas = torch.linspace(1e-4, 0.03, PROCESS.T).tolist()
    scheduler = diffusers.DPMSolverMultistepScheduler(**options, trained_betas=betas)
    with pytest.raises(ValueError, match="noise levels of DPMSolverMultistepScheduler are not"):
        set_steps(scheduler, PROCESS, 10)

    class Cosine(GaussianDiffusion):
        def __init__(self):
            super().__init__()
            t = torch.arange(self.T, dtype=torch.float64) / self.T
            self.alpha_bar64 = (t * math.pi / 2).cos() ** 2

    for name in ("ddpm", "ddim", "unipc"):
        with pytest.raises(ValueError, match="noise levels of .* are not those of this model"):
            make_scheduler(name, Cosine(), 10)


def test_own_sampler_is_rejected_as_diffusers_scheduler():
    with pytest.raises(ValueError, match="'heun' is no scheduler of diffusers; use `integrate`"):
        make_scheduler("heun", PROCESS, 10)


def test_ddim_begins_at_the_noisiest_timestep_whatever_the_steps():
    """ADM's ddimN where N divides T and reaches the last tenth, bit for bit; otherwise evenly
    spaced from T-1 to 0.
    """
    for steps in (10, 25, 50, 250, 500, 1000):
        stride = 1000 // steps
        assert make_scheduler("ddim", PROCESS, steps).timesteps.tolist() == list(
            range(1000 - stride, -1, -stride)
        )
    for steps in (1, 2, 3, 8, 334, 501, 600, 999):
        assert make_scheduler("ddim", PROCESS, steps).timesteps.tolist() == PROCESS.timesteps(steps)
    for steps in (334, 501, 600):
        assert ode_error("ddim", steps) < 1.1 * ode_error("ddim", 250)


def test_ddim_on_uneven_timesteps_equals_formula():
    """x_0 and the noise are kept, and mixed again at the next timestep."""
    scheduler, x = make_scheduler("ddim", PROCESS, 3), randn(2, 1, 4, 4, dtype=torch.float64)
    expected = x
    for t, following in ((999, 500), (500, 0), (0, None)):
        eps = gaussian_denoiser(expected, t)[:, :1]
        abar = PROCESS.alpha_bar64[t]
        x_0 = (expected - (1 - abar).sqrt() * eps) / abar.sqrt()
        later = torch.tensor(1.0) if following is None else PROCESS.alpha_bar64[following]
        expected = later.sqrt() * x_0 + (1 - later).sqrt() * eps
    assert scheduler.timesteps.tolist() == [999, 500, 0]
    assert relative(sample(gaussian_denoiser, scheduler, x), expected) < 1e-4


def test_scheduler_can_be_reused():
    x = randn(2, 1, 4, 4, dtype=torch.float64)
    for name in ("ddpm", "ddim", "dpmpp", "unipc"):
        for steps in (7, 10):
            scheduler = make_scheduler(name, PROCESS, steps)
            first, second = (sample(gaussian_denoiser, scheduler, x, seeded(2)) for _ in range(2))
            assert torch.equal(first, second), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_image_that_is_not_finite_is_error_naming_image_and_step(value):
    def denoise(x, t):
        output = gaussian_denoiser(x, t)
        output[1, 0, 2, 2] = value if t < 500 else output[1, 0, 2, 2]
        return output

    for name, where in (
        ("ddim", r"step 6 of 10 \(timestep 400\)"),
        ("euler", r"step 6 of 10 \(timestep 444\)"),
    ):
        with pytest.raises(
            NotFiniteError, match=f"^image 1 has values that are not finite after {where}, so"
        ) as e:
            sample_by_name(name, denoise, PROCESS, randn(2, 1, 4, 4, dtype=torch.float64), 10)
        assert e.value.index == 1


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp", "unipc"])
@pytest.mark.parametrize("learned", [True, False])
def test_every_sampler_takes_four_channels_with_and_without_covariance(name, learned):
    def denoise(x, t):
        return gaussian_denoiser(x, t) if learned else gaussian_denoiser(x, t)[:, :4]

    x = sample(denoise, make_scheduler(name, PROCESS, 6, learned), randn(2, 4, 3, 5), seeded(2))
    assert x.shape == (2, 4, 3, 5)
    assert torch.isfinite(x).all()


def test_euler_heun_and_stochastic_step_equal_formulas():
    """Two steps of a flow: x + h v(x); x + h (v(x) + v(x + h v(x))) / 2; and SiT's drift with
    noise, w_t = t.
    """
    flow, x = LinearFlow(), randn(2, 1, 4, 4, dtype=torch.float64)
    z = randn(2, 1, 4, 4, seed=1, dtype=torch.float64)

    def velocity(x, t):
        return x * (t / 1000 + 0.5)

    middle = x - 0.5 * velocity(x, 1000)
    euler = middle - 0.5 * velocity(middle, 500)
    middle = x - 0.5 * (velocity(x, 1000) + velocity(middle, 500)) / 2
    heun = middle - 0.5 * velocity(middle, 500)

    def drift(x, t):  # with the noise that the velocity implies, x + (1 - t) v
        return velocity(x, t) + (x + (1 - t / 1000) * velocity(x, t)) / 2

    middle = x - 0.5 * drift(x, 1000) + math.sqrt(0.5) * z
    stochastic = middle - 0.5 * drift(middle, 500)
    for expected, how in (
        (euler, {}),
        (heun, {"name": "heun"}),
        (stochastic, {"name": "sde", "noise": lambda _: z}),
    ):
        assert relative(integrate(velocity, flow, x, 2, **how), expected) < 1e-14


class CountingModel:
    """Noise equals the label, v equals ten times the label; counts forwards and rows."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append(len(x))
        eps = torch.ones_like(x) * y.view(-1, 1, 1, 1)
        return torch.cat([eps, 10 * eps], dim=1)


def test_guidance_equals_formula_on_all_channels_and_on_three():
    x, y = torch.zeros(2, 4, 1, 1, device=device()), torch.tensor([3.0, 5.0], device=device())
    everything = guided(CountingModel(), y, null=1, scale=1.5)(x, 7)
    assert everything[:, :4, 0, 0].tolist() == [[1 + 1.5 * 2] * 4, [1 + 1.5 * 4] * 4]
    # the covariance of the label itself
    assert everything[:, 4:, 0, 0].tolist() == [[30] * 4, [50] * 4]
    three = guided(CountingModel(), y, null=1, scale=1.5, channels=3)(x, 7)
    assert three[:, :4, 0, 0].tolist() == [[4, 4, 4, 3], [7, 7, 7, 5]]


def test_guidance_without_effect_costs_one_forward():
    x, y = torch.zeros(2, 4, 1, 1, device=device()), torch.tensor([3, 5], device=device())
    model = CountingModel()
    guided(model, y, 1, scale=1)(x, 500)
    assert model.calls == [2]
    model = CountingModel()
    denoise = guided(model, y, 1, scale=2, interval=(200, 600))
    for t in (199, 200, 600, 601):
        denoise(x, t)
    assert model.calls == [2, 4, 4, 2]


def test_autoguidance_leads_away_from_the_guide_by_hand():
    x = randn(2, 4, 4, 4)

    def model(x, t):
        return torch.cat([torch.sin(x) + t, x], 1)

    def guide(x, t):
        return torch.cos(x)

    led = autoguided(model, guide, 2.5)(x, 0.5)
    expected = torch.cos(x) + 2.5 * (torch.sin(x) + 0.5 - torch.cos(x))
    torch.testing.assert_close(led[:, :4], expected)
    assert torch.equal(led[:, 4:], x), "the covariance is the model's"
    three = autoguided(model, guide, 2.5, channels=3)(x, 0.5)
    assert torch.equal(three[:, :3], led[:, :3])
    assert torch.equal(three[:, 3:], model(x, 0.5)[:, 3:])


def test_autoguidance_at_scale_one_and_outside_the_interval_is_the_plain_model():
    x = randn(2, 4, 4, 4)

    def nobody(x, t):
        raise AssertionError("the guide is not computed")

    assert torch.equal(autoguided(lambda x, t: torch.sin(x), nobody, 1.0)(x, 5), torch.sin(x))
    led = autoguided(lambda x, t: torch.sin(x), nobody, 3.0, interval=(100, 200))
    assert torch.equal(led(x, 300), torch.sin(x))


@pytest.mark.parametrize("scale", [0.0, 2.0, 7.5])
def test_a_model_that_guides_itself_draws_the_same_at_every_scale(scale):
    x = randn(2, 4, 4, 4)
    led = autoguided(gaussian_denoiser, gaussian_denoiser, scale)(x, 300)
    assert torch.equal(led, gaussian_denoiser(x, 300))


def test_clipping_bounds_the_predicted_image():
    x, t = 3 * randn(2, 1, 4, 4, seed=1, dtype=torch.float64), 400
    steps = torch.tensor([t, t], device=device())
    raw = PROCESS.predict_x_0(x, steps, gaussian_denoiser(x, t)[:, :1])
    output = clipped(gaussian_denoiser, PROCESS)(x, t)
    x_0 = PROCESS.predict_x_0(x, steps, output[:, :1])
    assert raw.abs().max() > 1
    torch.testing.assert_close(x_0, raw.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(output[:, 1:], gaussian_denoiser(x, t)[:, 1:])


# ----------------------------------------------------------------- images to begin with and to keep
EVERY = [(name, process) for process in (PROCESS, LinearFlow(device=device()))
         for name in SAMPLERS[process.name]]  # fmt: skip


def rounding(name, process):
    """How far a sampler of ten steps ends from an image that its model knows: straight steps along
    an arc, and the drift in the last step of the stochastic one, miss it.
    """
    if name == "sde":
        return 0.4
    return 0.1 if name in ("euler", "heun") and not process.continuous else 1e-4


def draw_from(name, process, model, noise, image=None, strength=1.0, steps=10, after_step=None):
    return sample_by_name(
        name, model, process, noise, steps, seeded(2), False, image, strength, after_step
    )


@pytest.mark.parametrize(("name", "process"), EVERY)
def test_strength_one_is_plain_sampling_and_strength_zero_is_the_image(name, process):
    noise, image = randn(2, 1, 4, 4, dtype=torch.float64), randn(2, 1, 4, 4, seed=1)

    def model(x, t):
        return torch.sin(3 * x) + t / 1000

    plain = draw_from(name, process, model, noise)
    assert torch.equal(draw_from(name, process, model, noise, image, 1.0), plain)
    assert torch.equal(draw_from(name, process, model, noise, image, 0.0), image)
    assert not torch.equal(draw_from(name, process, model, noise, image, 0.5), plain)


@pytest.mark.parametrize(("name", "process"), EVERY)
def test_a_strength_begins_at_the_noised_image_and_takes_its_share_of_the_steps(name, process):
    """A model that knows the image leads back to it from there, whatever the sampler."""
    noise, image = randn(2, 1, 4, 4, dtype=torch.float64), randn(2, 1, 4, 4, seed=1).double()
    calls = []

    def exact(x, t):
        calls.append((t, x.clone()))
        return process.output_for(x, timestep_batch(t, x), image)

    drawn = draw_from(name, process, exact, noise, image, 0.3)
    torch.testing.assert_close(drawn, image, rtol=0, atol=rounding(name, process))

    whole = draw_from(name, process, lambda x, t: x, noise)
    assert whole.shape == drawn.shape
    seen = list(dict.fromkeys(t for t, _ in calls))
    assert len(seen) == 3, "three of ten steps"
    t, x = calls[0]
    noised = process.q_sample(image, timestep_batch(t, x), noise)
    torch.testing.assert_close(x, noised, rtol=0, atol=1e-9)
    assert t < 0.45 * process.T


@pytest.mark.parametrize(
    ("strength", "steps", "taken"),
    [(0.0, 10, 0), (0.001, 10, 1), (0.29, 100, 29), (0.5, 25, 12), (0.999, 10, 10), (1, 7, 7)],
)
def test_a_strength_takes_its_share_of_the_steps_and_at_least_one(strength, steps, taken):
    assert steps_of(strength, steps) == taken


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(ValueError, match="strength: .* must be a number from 0 to 1"):
        steps_of(strength, 10)


@pytest.mark.parametrize(("name", "process"), EVERY)
def test_known_pixels_are_seen_noised_to_every_timestep_and_imply_the_image(name, process):
    noise, image = randn(2, 1, 4, 4, dtype=torch.float64), randn(2, 1, 4, 4, seed=1).double()
    redrawn = torch.zeros(1, 1, 4, 4, dtype=torch.bool, device=device())
    redrawn[..., 2:] = True

    def model(x, t):
        known = process.q_sample(image, timestep_batch(t, x), noise)
        torch.testing.assert_close(x[..., :2], known[..., :2], rtol=0, atol=0)
        return torch.sin(3 * x)

    keeper = keeping(model, process, image, noise, redrawn)
    drawn = draw_from(name, process, keeper, noise)
    torch.testing.assert_close(drawn[..., :2], image[..., :2], rtol=0, atol=rounding(name, process))

    everything = torch.ones_like(redrawn)
    plain = draw_from(name, process, lambda x, t: torch.sin(3 * x), noise)
    keeper = keeping(lambda x, t: torch.sin(3 * x), process, image, noise, everything)
    assert torch.equal(draw_from(name, process, keeper, noise), plain)


@pytest.mark.parametrize(("name", "process"), EVERY)
def test_a_callback_sees_each_step_and_may_change_or_end_it(name, process):
    noise, seen = randn(2, 1, 4, 4, dtype=torch.float64), []

    def record(i, t, x):
        seen.append((i, float(t), x))
        return x

    plain = draw_from(name, process, lambda x, t: 0.1 * x, noise)
    drawn = draw_from(name, process, lambda x, t: 0.1 * x, noise, after_step=record)
    assert torch.equal(drawn, plain)
    assert torch.equal(seen[-1][2], plain)
    assert [i for i, _, _ in seen] == list(range(10))
    assert [t for _, t, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)

    ended = draw_from(
        name, process, lambda x, t: 0.1 * x, noise, after_step=lambda i, t, x: x if i < 4 else None
    )
    assert torch.equal(ended, seen[4][2])

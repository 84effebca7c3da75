"""Averages with a power-function profile, and widths that are put together from their snapshots."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffussm_cli.errors import RunError
from diffussm_cli.runs.power import coefficients, decay_at, exponent_of, mixture_of


def profile(step, width):
    """The weight of each step 1..step in the average, by its updates, one after the other."""
    weights = np.zeros(step)
    for t in range(1, step + 1):
        decay = decay_at(t, exponent_of(width))
        weights *= decay
        weights[t - 1] += 1 - decay
    return weights


def snapshots(every, last):
    steps = [step for step in range(every, last + 1, every) for _ in range(2)]
    return steps, [0.05, 0.1] * (len(steps) // 2)


@pytest.mark.parametrize(("width", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_are_those_that_the_paper_prints(width, exponent):
    assert exponent_of(width) == pytest.approx(exponent, abs=5e-3)


@pytest.mark.parametrize("width", [0.03, 0.05, 0.1, 0.2, 0.27])
def test_updates_weight_steps_by_their_power_with_the_width_as_standard_deviation(width):
    weights, steps = profile(4000, width), np.arange(1, 4001)
    gamma = exponent_of(width)
    powers = (steps ** (gamma + 1) - (steps - 1.0) ** (gamma + 1)) / 4000.0 ** (gamma + 1)
    np.testing.assert_allclose(weights, powers, rtol=1e-6, atol=1e-12)
    mean = (weights * steps).sum()
    deviation = math.sqrt((weights * (steps - mean) ** 2).sum()) / 4000
    assert weights.sum() == pytest.approx(1)
    assert deviation == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.2])
def test_snapshots_give_the_profile_of_any_width(width):
    """The error that is reported is that of the profiles, which their updates give."""
    steps, widths = snapshots(100, 2000)
    x, error = coefficients(steps, widths, 2000, width)
    assert sum(x) == pytest.approx(1, abs=1e-9)
    total = sum(c * np.pad(profile(t, w), (0, 2000 - t)) for c, t, w in zip(x, steps, widths))
    wanted = profile(2000, width)
    assert np.linalg.norm(total - wanted) / np.linalg.norm(wanted) == pytest.approx(error, abs=3e-3)
    assert error < 0.03


def test_a_width_that_was_tracked_is_its_own_snapshot():
    steps, widths = snapshots(100, 1000)
    x, error = coefficients(steps, widths, 1000, 0.1)
    np.testing.assert_allclose(x, [*[0] * 19, 1], atol=1e-6)
    assert error < 1e-6


def test_more_snapshots_are_never_worse():
    errors = [
        coefficients(*snapshots(every, 2000), 2000, 0.15)[1] for every in (2000, 1000, 500, 100)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[-1]


@pytest.mark.parametrize(
    ("every", "width", "words"),
    [
        (10, 0.0, "--ema-width: 0.0 must be above 0 and below 0.28"),
        (10, 0.3, "--ema-width: 0.3 must be above 0 and below 0.28"),
        (10, math.nan, "--ema-width: nan must be above 0"),
        (1000, 0.2, "--ema-width: 0.2 cannot be put together from the 1 snapshots of 'run'"),
        (2000, 0.1, "--ema-width: 'run' holds no snapshots of averages up to step 1000"),
    ],
)
def test_a_width_that_cannot_be_is_one_line(every, width, words):
    steps, widths = snapshots(every, 1000)
    files = [(Path("x"), t, w) for t, w in zip(steps, widths)]
    with pytest.raises(RunError) as e:
        mixture_of(files, 1000, width, Path("run"))
    assert words in str(e.value)


def test_a_tensor_that_is_averaged_directly_is_what_snapshots_give():
    """Of a random walk, which is what weights do."""
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(600, 50, generator=generator, dtype=torch.float64).cumsum(0)
    kept, direct = [], None
    averages = {0.05: None, 0.1: None}
    for t, x in enumerate(walk, start=1):
        for width in averages:
            decay = decay_at(t, exponent_of(width))
            averages[width] = x if t == 1 else decay * averages[width] + (1 - decay) * x
        decay = decay_at(t, exponent_of(0.15))
        direct = x if t == 1 else decay * direct + (1 - decay) * x
        if t % 30 == 0:
            kept += [(t, width, value) for width, value in averages.items()]
    steps, widths, values = zip(*kept)
    x, _ = coefficients(steps, widths, 600, 0.15)
    total = sum(c * value for c, value in zip(x, values))
    assert (total - direct).norm() < 0.01 * (walk[-1] - direct).norm()

"""The slow forms themselves, against closed forms of one mode."""

import math

import pytest
import torch

from diffussm_cli.model.s4d.reference import s4d_kernel_naive, s4d_recurrence
from tests.conftest import device


def one_mode(dt, A, B, C):
    """One channel with one complex mode, as the functions take it."""
    values = dt, A.real, A.imag, (B.real, B.imag), (C.real, C.imag)
    dt, re, im, b, c = (torch.tensor(v, dtype=torch.float64, device=device()) for v in values)
    return dt.view(1), re.view(1, 1), im.view(1, 1), b.view(1, 1, 2), c.view(1, 1, 2)


def test_real_mode_decays_geometrically():
    """At dt = log 2 and A = -1 the state halves at each step, and takes in (1/2 - 1)/(-1) = 1/2 of
    the input.
    """
    mode = one_mode(math.log(2), -1 + 0j, 1 + 0j, 1 + 0j)
    expected = torch.tensor([[1.0, 1 / 2, 1 / 4, 1 / 8]], dtype=torch.float64, device=device())
    torch.testing.assert_close(s4d_kernel_naive(*mode, 4), expected)
    impulse = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]], dtype=torch.float64, device=device())
    skip = torch.tensor([10.0], dtype=torch.float64, device=device())
    expected[0, 0] += 10
    torch.testing.assert_close(s4d_recurrence(impulse, *mode, skip)[0], expected)


def test_oscillating_mode_is_a_damped_cosine():
    """A quarter of a turn and a factor 1/2 a step; C cancels what is taken in, so that the kernel
    is 2 Re (i/2)^l.
    """
    A = complex(-math.log(2), math.pi / 2)
    taken_in = (0.5j - 1) / A
    mode = one_mode(1.0, A, 1 + 0j, 1 / taken_in)
    expected = torch.tensor([[2.0, 0.0, -1 / 2, 0.0, 1 / 8]], dtype=torch.float64, device=device())
    torch.testing.assert_close(s4d_kernel_naive(*mode, 5), expected)


@pytest.mark.parametrize("dt", [0.05, 0.1, 1.0])
def test_constant_input_ends_at_gain_of_continuous_system(dt):
    """2 Re C (-1/A) B + D whatever dt is: the input is held from one token to the next."""
    A, B, C = -2 + 3j, 1 - 1j, 0.5 + 2j
    gain = 2 * (C * B * (-1 / A)).real
    mode, L = one_mode(dt, A, B, C), round(20 / dt)
    assert s4d_kernel_naive(*mode, L).sum().item() == pytest.approx(gain, rel=1e-12)
    ones = torch.ones(1, 1, L, dtype=torch.float64, device=device())
    y = s4d_recurrence(ones, *mode, torch.tensor([7.0], dtype=torch.float64, device=device()))
    assert y[0, 0, -1].item() == pytest.approx(gain + 7, rel=1e-12)

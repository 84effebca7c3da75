"""State spaces along the axes: against the recurrences, at the start, on finer grids, and in low
precision.
"""

import itertools
import math

import pytest
import torch

from diffussm_cli.model.mixers import axial
from diffussm_cli.model.mixers.axial import Axial, axial_recurrence, toeplitz
from diffussm_cli.model.s4d.kernel import s4d_kernel
from diffussm_cli.model.s4d.reference import s4d_kernel_naive
from diffussm_cli.model.scan import RASTER, SCANS
from tests.conftest import device, golden, randn, relative

H, W, M, D = 4, 6, 2, 3


def made(scan=RASTER, grid=(H, W), N=4, D=D, dtype=torch.float64):
    torch.manual_seed(0)
    return Axial(D, N, scan, grid).to(device(), dtype)


def apply(layer, image, M=M):
    """The layer on an image, (B, D, H, W) -> (B, 2D, H, W)."""
    grid = (image.shape[2], image.shape[3] // M)
    return layer.scan.to_image(layer(layer.scan.to_sequence(image, grid), grid), grid)


@pytest.mark.parametrize("scan", SCANS["four"], ids=str)
@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("longest", [6, 5], ids=["products", "FFTs"])
def test_layer_equals_the_recurrences_along_every_line_with_gradients(
    scan, M, longest, monkeypatch
):
    monkeypatch.setattr(axial, "LONGEST", longest)
    layer, image = made(scan), randn(2, D, H, W, dtype=torch.float64).requires_grad_()
    weight = randn(2, 2 * D, H, W, seed=1, dtype=torch.float64)
    fast, slow = apply(layer, image, M), axial_recurrence(layer, image)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-11)
    inputs = [image, *layer.parameters()]
    for ours, theirs in zip(
        *(torch.autograd.grad((y * weight).sum(), inputs) for y in (fast, slow))
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_one_line_gives_golden_values_of_both_directions(axis):
    """An image that is one row, or one column, of S4D's reference: the sum of its directions."""
    g = golden("s4d_kernel")
    channels, L = g["kernel"].shape
    layer = made(grid=(1, L) if axis == 0 else (L, 1), N=2 * g["A"].shape[1], D=channels)
    with torch.no_grad():
        layer.log_dt.copy_((L * g["dt"]).log())
        layer.log_A_real.copy_((-g["A"].real).log())
        layer.A_imag.copy_(g["A"].imag)
        layer.B.copy_(torch.view_as_real(g["B"]))
        layer.C.copy_(torch.view_as_real(g["C"]))
        layer.D_skip.zero_()
        image = g["u"][:, :, None] if axis == 0 else g["u"][..., None]
        y = apply(layer, image, 1)[:, axis * channels : (axis + 1) * channels]
    expected = g["y_causal"] + g["y_anticausal"]
    assert relative(y.reshape(expected.shape), expected) < 1e-9


def test_long_sides_take_the_kernel_in_two_levels_with_the_same_values(monkeypatch):
    layer, image = made(), randn(2, D, H, W, dtype=torch.float64)
    one = apply(layer, image)
    monkeypatch.setattr(axial, "ONE_LEVEL", 5)
    torch.testing.assert_close(apply(layer, image), one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("L", [1, 2, 7, 16])
def test_kernel_in_one_level_equals_its_definition_with_gradients(L):
    generator = torch.Generator().manual_seed(0)
    dt, re, im = (
        torch.rand(s, generator=generator, dtype=torch.float64)
        for s in ((2, 3), (2, 3, 4), (2, 3, 4))
    )
    B, C = torch.randn(2, 2, 3, 4, 2, generator=generator, dtype=torch.float64)
    skip = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    *arguments, skip = (
        t.detach().to(device()).requires_grad_() for t in (dt, -re - 0.1, 5 * im, B, C, skip)
    )
    naive = s4d_kernel_naive(*arguments, L) + skip[..., None] * (
        torch.arange(L, device=device()) == 0
    )
    ours = s4d_kernel(*arguments, L, skip, one_level=True)
    torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-12)
    weight = randn(2, 3, L, dtype=torch.float64)
    gradients = (torch.autograd.grad((K * weight).sum(), [*arguments, skip]) for K in (ours, naive))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_rows_and_columns_equal_hand_computation():
    """One real mode with dt A = log(1/2) and input 1 at one token: powers of 1/2 to both sides, and
    the skip.
    """
    layer = made(grid=(3, 3), N=2, D=1)
    with torch.no_grad():
        layer.log_dt.fill_(math.log(3 * math.log(2)))  # steps of log 2 on three tokens
        layer.log_A_real.zero_()
        layer.A_imag.zero_()
        layer.B.copy_(torch.tensor([1.0, 0.0]))
        layer.C.copy_(torch.tensor([1.0, 0.0]))  # each tap is 2 (1 - 1/2) / 2^l = 2^-l
        layer.D_skip.copy_(torch.tensor([[10.0], [20.0]]))
    image = torch.zeros(1, 1, 3, 3, dtype=torch.float64, device=device())
    image[0, 0, 0, 1] = 1
    rows, columns = apply(layer, image, 1)[0]
    expected = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    expected[0][0] = torch.tensor([0.5, 12.0, 0.5])  # lag 0 belongs to both directions
    expected[1][:, 1] = torch.tensor([22.0, 0.5, 0.25])
    torch.testing.assert_close(rows.cpu(), expected[0])
    torch.testing.assert_close(columns.cpu(), expected[1])


def test_toeplitz_matrix_holds_taps_by_lag():
    taps = torch.tensor([[-2.0, -1, 0, 1, 2]])
    assert toeplitz(taps).tolist() == [[[0, -1, -2], [1, 0, -1], [2, 1, 0]]]


@pytest.mark.parametrize("grid", [(8, 12), (14, 14), (16, 4)], ids=str)
def test_output_of_white_input_has_variance_one_at_the_start(grid):
    """In every channel: the mean of the squares of all weights of a token, over tokens."""
    layer = made(grid=grid, N=16, D=8)
    for matrix in layer.matrices(*grid, torch.float64):
        variance = matrix.square().sum(-1).mean(-1)  # (D,)
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-5, atol=0)
    y = apply(layer, randn(200, 8, *grid, dtype=torch.float64), 1)
    assert y.square().mean().item() == pytest.approx(1, abs=0.03)


def test_steps_at_the_start_lie_between_their_bounds_in_tokens_of_each_side():
    layer = made(grid=(8, 32), D=512)
    for log_dt, side in zip(layer.log_dt, (32, 8)):
        dt = log_dt.exp() / side
        assert 0.01 <= dt.min() < 0.011
        assert 0.9 < dt.max() <= 1.0


@pytest.mark.parametrize("grid", [(4, 4), (4, 8)], ids=str)
def test_finer_grids_approach_one_operator_with_order_one(grid):
    """On samples of a smooth function at the middles of the tokens, the error halves with the size
    of a token.
    """
    layer = made(grid=grid, N=4, D=4)

    def output(n):
        """The outputs at n x n times the tokens, averaged over the area of each token of `grid`."""
        rows, columns = ((torch.arange(n * S, dtype=torch.float64) + 0.5) / (n * S) for S in grid)
        image = torch.sin(3 * rows)[:, None] + torch.cos(2 * columns + rows[:, None] * columns)
        y = apply(layer, image.expand(1, 4, -1, -1).to(device()), 1)
        return torch.nn.functional.avg_pool2d(y, n)

    with torch.no_grad():
        exact = output(64)
        errors = [(output(n) - exact).norm().item() for n in (1, 2, 4, 8)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(orders) > 0.9, errors
    assert errors[-1] < 0.1 * exact.norm().item()


CASTS = {"bfloat16": lambda m: m.bfloat16(), "half": lambda m: m.half()}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_parameters_stay_float32_under_casts(cast):
    layer = made(dtype=torch.float32)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    cast(layer)
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
    assert {p.dtype for p in layer.parameters()} == {torch.float32}


def test_taps_are_float32_and_products_have_the_dtype_of_the_input_under_autocast():
    layer, image = made(dtype=torch.float32, D=16), randn(2, 16, H, W)
    exact = apply(layer, image)
    expected = torch.autograd.grad(exact.square().sum(), list(layer.parameters()))
    with torch.autocast(device().type, torch.bfloat16):
        # float32 in, float32 out: nothing may be rounded
        assert torch.equal(apply(layer, image), exact)
        assert layer.taps(H, W).dtype == torch.float32
        low = apply(layer, image.bfloat16())
    assert low.dtype == torch.bfloat16
    assert relative(low, exact) < 0.01
    gradients = torch.autograd.grad(low.float().square().sum(), list(layer.parameters()))
    assert all(relative(ours, theirs) < 0.05 for ours, theirs in zip(gradients, expected))


def test_ffts_are_float32_in_low_precision(monkeypatch):
    layer, image = made(dtype=torch.float32), randn(2, D, H, W)
    exact = apply(layer, image)
    monkeypatch.setattr(axial, "LONGEST", 5)
    with torch.autocast(device().type, torch.bfloat16):
        low = apply(layer, image.bfloat16())
    assert low.dtype == torch.bfloat16
    assert relative(low, exact) < 0.005


def test_odd_state_size_is_rejected():
    with pytest.raises(ValueError, match="d_state must be even"):
        Axial(4, 5)

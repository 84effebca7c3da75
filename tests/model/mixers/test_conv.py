"""The convolutional mixer: by formula, and what a token sees."""

import pytest
import torch
import torch.nn.functional as F

from diffussm_cli.model.mixers.conv import Conv
from diffussm_cli.model.scan import SCANS
from tests.conftest import device, fill, randn

H, W, M, D = 4, 6, 2, 3


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_conv_mixer_equals_formula(kernel):
    layer, image = fill(Conv(D, kernel=kernel), 0.5).double(), randn(2, D, H, W, dtype=torch.double)
    v = F.gelu(layer.depthwise.convolve_naive(image))
    weights = torch.sigmoid(v.mean((2, 3)) @ layer.gate.weight.T + layer.gate.bias)
    y, rest = layer(image.view(2, D, H * W // M, M), (H, W // M)).chunk(2, dim=1)
    torch.testing.assert_close(y.reshape(image.shape), v * weights[..., None, None])
    assert torch.equal(rest.reshape(image.shape), image)


def test_response_normalisation_equals_formula():
    layer = fill(Conv(D, kernel=7, conv_gate="grn"), 0.5).double()
    image = randn(2, D, H, W, dtype=torch.double)
    v = F.gelu(layer.depthwise.convolve_naive(image))
    norms = v.square().sum((2, 3)).sqrt()  # (B, D)
    n = (norms / norms.mean(1, keepdim=True))[..., None, None]
    scale, shift = layer.gate.scale[:, None, None], layer.gate.shift[:, None, None]
    y, rest = layer(image.view(2, D, H * W // M, M), (H, W // M)).chunk(2, dim=1)
    torch.testing.assert_close(y.reshape(image.shape), v + scale * n * v + shift, rtol=1e-5, atol=0)
    assert torch.equal(rest.reshape(image.shape), image)


def test_response_normalisation_starts_as_identity_and_takes_empty_images():
    gate = Conv(D, conv_gate="grn").gate.to(device())
    v = randn(2, D, H, W).requires_grad_()
    assert torch.equal(gate(v), v)
    black = torch.zeros(2, D, H, W, device=device(), requires_grad=True)
    gate(black).sum().backward()
    assert all(p.grad.isfinite().all() for p in (black, *gate.parameters()))


@pytest.mark.parametrize("kernel", [5, 7])
def test_kernel_is_the_square_of_tokens_that_a_token_sees(kernel):
    layer, image = Conv(1, kernel=kernel).double(), torch.zeros(1, 1, 9, 9, dtype=torch.double)
    assert torch.equal(layer.depthwise.convolve(image + 1), image + 1)  # it starts as the identity
    layer.depthwise.weight.data.fill_(1)
    image[0, 0, 4, 4] = 1
    assert layer.depthwise.convolve(image).sum() == kernel**2
    torch.testing.assert_close(
        layer.depthwise.convolve(image), layer.depthwise.convolve_naive(image)
    )


@pytest.mark.parametrize("scan", SCANS["four"], ids=str)
def test_token_sees_nine_neighbours_and_image_mean(scan):
    layer, grid = fill(Conv(D, scan), 0.5).double(), (H, W // M)
    image = randn(1, D, H, W, dtype=torch.double).requires_grad_()

    def seen(row, column):
        y = scan.to_image(layer(scan.to_sequence(image, grid), grid), grid)
        (gradient,) = torch.autograd.grad(y[0, :D, row, column].sum(), image)
        return {tuple(place) for place in gradient[0].any(0).nonzero().tolist()}

    assert len(seen(2, 3)) == H * W
    layer.gate.weight.data.zero_()
    assert seen(2, 3) == {(r, c) for r in (1, 2, 3) for c in (2, 3, 4)}
    assert seen(0, 5) == {(r, c) for r in (0, 1) for c in (4, 5)}

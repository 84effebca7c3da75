"""The depthwise convolution: by its definition, and as the identity that it starts as."""

import pytest
import torch

from diffussm_cli.model import DiffuSSM
from diffussm_cli.model.local import Local
from diffussm_cli.model.scan import SCANS
from tests.conftest import SIZES, device, fill, randn


@pytest.mark.parametrize("scan", SCANS["four"], ids=str)
def test_local_convolution_equals_sum_over_image_neighbours(scan):
    B, D, H, W, M = 2, 3, 3, 4, 2
    local = fill(Local(D, scan)).double()
    image = randn(B, D, H, W, dtype=torch.double)
    expected = local.bias[:, None, None].expand(B, D, H, W).clone()
    for r, c, i, j in torch.cartesian_prod(*map(torch.arange, (H, W, 3, 3))).tolist():
        if 0 <= r + i - 1 < H and 0 <= c + j - 1 < W:
            expected[..., r, c] += local.weight[:, 0, i, j] * image[..., r + i - 1, c + j - 1]
    u = scan.to_sequence(image, (H, W // M))
    torch.testing.assert_close(scan.to_image(local(u, (H, W // M)), (H, W // M)), expected)


def test_fast_and_naive_convolution_agree_with_gradients():
    local = fill(Local(3)).double()
    results = []
    for convolve in (local.convolve, local.convolve_naive):
        image = randn(2, 3, 5, 4, dtype=torch.double).requires_grad_()
        y = convolve(image)
        results.append((y, *torch.autograd.grad(y.pow(3).sum(), [image, local.weight, local.bias])))
    for fast, naive in zip(*results):
        torch.testing.assert_close(fast, naive)


@pytest.mark.parametrize("mixer", ["s4d", "conv"])
def test_untrained_local_convolution_is_the_identity(mixer):
    """The same seed gives the same other weights, and the convolution does nothing, whatever those
    are.
    """
    models = []
    for local in (0, 3):
        torch.manual_seed(0)
        models.append(DiffuSSM(mixer=mixer, scan="four", local=local, **SIZES).to(device()))
    without, with_local = models
    missing = {n for n in with_local.state_dict() if ".local." in n}
    assert len(missing) == 2 * 4
    for name, value in without.state_dict().items():
        assert torch.equal(with_local.state_dict()[name], value), name
    with_local.load_state_dict(fill(without).state_dict(), strict=False)
    if mixer == "conv":  # `fill` has filled the mixer's own convolution
        assert not torch.equal(
            with_local.blocks[0].conv.depthwise.bias, torch.zeros(16, device=device())
        )
    arguments = (
        randn(2, 2, 4, 8),
        torch.tensor([3, 900], device=device()),
        torch.tensor([0, 1], device=device()),
    )
    assert with_local(*arguments).any()
    torch.testing.assert_close(with_local(*arguments), without(*arguments), rtol=1e-5, atol=1e-6)

"""Derivatives in forward mode, as `torch.func.jvp` takes them: of every mixer and of DiT."""

import pytest
import torch

from diffussm_cli.model import DiffuSSM, DiT
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.model.mixers.axial import Axial
from diffussm_cli.model.s4d import S4D
from tests.conftest import device, fill, randn, relative

# torch's own, when it first takes such a derivative
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")

SIZES = {"input_size": (4, 8), "in_channels": 2, "hidden_size": 16, "depth": 2, "num_classes": 3}
NETWORKS = {
    mixer: lambda mixer=mixer: DiffuSSM(
        mixer=mixer, heads=2, d_state=4, scan="alternate", local=3, **SIZES
    )
    for mixer in MIXERS
}
NETWORKS["dit"] = lambda: DiT(heads=2, qk_norm=True, rope=True, local=3, stem=3, **SIZES)


def network(name):
    """A network in float64 with nothing at zero, as a function of the image and of the time."""
    torch.manual_seed(0)
    model = fill(NETWORKS[name](), 0.3).double()
    y = torch.tensor([0, 1], device=device())
    return model, lambda x, t: model(x, t, y)


def inputs(seed=0):
    x = randn(2, 2, 4, 8, seed=seed, dtype=torch.float64)
    return x, torch.tensor([3.0, 90.0], dtype=torch.float64, device=device())


@pytest.mark.parametrize("name", NETWORKS)
def test_tangent_equals_finite_difference(name):
    _, f = network(name)
    (x, t), v = inputs(), randn(2, 2, 4, 8, seed=1, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda x: f(x, t), (x,), (v,))
    h = 1e-6
    with torch.no_grad():
        difference = (f(x + h * v, t) - f(x - h * v, t)) / (2 * h)
    assert relative(tangent, difference) < 1e-8


@pytest.mark.parametrize("name", NETWORKS)
def test_tangent_is_adjoint_to_gradient_and_primal_keeps_its_own(name):
    """<w, J v> = <J^T w, v> for image and time; the result still gives parameters a gradient.

    Finite differences in time are blurred, because its sinusoids are of float32.
    """
    model, f = network(name)
    primals, (v, s) = inputs(), inputs(seed=1)
    w = randn(2, 4, 4, 8, seed=2, dtype=torch.float64)
    output, tangent = torch.func.jvp(f, primals, (v, s))

    x, t = (p.clone().requires_grad_() for p in primals)
    expected = f(x, t)
    back = torch.autograd.grad((expected * w).sum(), [x, t], retain_graph=True)
    adjoint = (back[0] * v).sum() + (back[1] * s).sum()
    torch.testing.assert_close((w * tangent).sum(), adjoint, rtol=1e-5, atol=0)

    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11)
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad((o * w).sum(), parameters) for o in (output, expected))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [Axial, S4D])
def test_long_kernels_in_two_levels_have_both_derivatives(kind):
    torch.manual_seed(0)
    layer = (Axial(2, 4, grid=(1, 80)) if kind is Axial else S4D(2, 4)).to(device()).double()
    u, v = randn(2, 1, 2, 80, 1, dtype=torch.float64)
    y, tangent = torch.func.jvp(lambda u: layer(u, (1, 80)), (u,), (v,))
    torch.testing.assert_close(tangent, layer(v, (1, 80)), rtol=1e-9, atol=1e-11)  # it is linear

    parameters = list(layer.parameters())
    weight = randn(*y.shape, seed=1, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((o * weight).sum(), parameters) for o in (y, layer(u, (1, 80)))
    ]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)

"""Kernels are kept while a context is open, and outside of it they are those of the weights."""

import copy

import pytest
import torch

from diffussm_cli.model import DiffuSSM
from diffussm_cli.model.mixer import StateSpace, kept_kernels
from tests.conftest import device, fill, randn


def network(seed=0):
    torch.manual_seed(seed)
    return fill(DiffuSSM(4, 2, 1, 16, 2, 2, 4, 3)).eval()


def outputs(model):
    x, t = randn(2, 2, 4, 4), torch.tensor([3, 900], device=device())
    return model(x, t, torch.tensor([0, 1], device=device()))


def add_through_data(model, other):
    for p, q in zip(model.parameters(), other.parameters()):
        p.data.add_(q.data)


def copy_through_data(model, other):
    """As an average of diffusers writes its weights into a model."""
    for p, q in zip(model.parameters(), other.parameters()):
        p.data.copy_(q.data)


def train(model, _other):
    with torch.enable_grad():
        outputs(model.train()).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval()


CHANGES = {
    "added through data": add_through_data,
    "copied through data": copy_through_data,
    "optimiser step": train,
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "foreach update": lambda model, _: torch._foreach_mul_(
        [p.detach() for p in model.parameters()], 1.5
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_kernels_follow_every_change_of_weights(change):
    model, fresh = network(), network(seed=2)
    with torch.no_grad():
        with kept_kernels(model):
            before = outputs(model)
        outputs(model)
        change(model, network(seed=1))
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(outputs(model), outputs(fresh))
        assert not torch.equal(outputs(model), before)


def test_kept_kernels_give_the_same_bits(kernels_built):
    model = network()
    with torch.no_grad():
        expected = outputs(model)
        kernels_built.clear()
        with kept_kernels(model):
            for _ in range(3):
                assert torch.equal(outputs(model), expected)
    assert kernels_built == [16, 16]  # one for each of two blocks


def test_inner_context_leaves_the_kernels_of_the_outer_one(kernels_built):
    model, other = network(), network(seed=1)
    with torch.no_grad(), kept_kernels(model):
        with kept_kernels(model, other):
            outputs(model)
        outputs(model)
        assert kernels_built == [16, 16]
        outputs(other)
        outputs(other)
        assert kernels_built == [16] * 6


def fail_inside(model):
    with kept_kernels(model):
        outputs(model)
        raise RuntimeError("stop")


def test_error_and_copy_leave_nothing_kept(kernels_built):
    model = network()
    with torch.no_grad():
        with kept_kernels(model):
            outputs(model)
            copied = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="stop"):
            fail_inside(model)
        kernels_built.clear()
        outputs(model)
        outputs(copied)
    assert kernels_built == [16] * 4


@pytest.mark.parametrize("keep", [False, True])
def test_model_built_in_inference_mode_works_there(keep):
    expected = outputs(network())
    with torch.inference_mode():
        model = network()
        with kept_kernels(*[model] if keep else []):
            for _ in range(2):
                torch.testing.assert_close(outputs(model), expected)


def test_kernels_kept_in_inference_mode_never_meet_gradients():
    model = network()
    with kept_kernels(model):
        with torch.inference_mode():
            outputs(model)
        with torch.no_grad():
            outputs(model)
        outputs(model).sum().backward()
    layers = [module for module in model.modules() if isinstance(module, StateSpace)]
    assert all(p.grad is not None for layer in layers for p in layer.parameters())

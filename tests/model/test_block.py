"""The block by formula, and the layout of its numbers in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from diffussm_cli.model.block import DiffuSSMBlock, gelu
from diffussm_cli.model.s4d.reference import s4d_recurrence
from tests.conftest import device, fill, randn


@pytest.mark.parametrize("M", [1, 2, 4])
def test_block_equals_the_formula_token_by_token(M):
    torch.manual_seed(0)
    B, J, D = 2, 6, 8
    block = fill(DiffuSSMBlock(D, M, 4), 0.5).double()
    x, c = randn(B, J, D, dtype=torch.float64), randn(B, D, seed=1, dtype=torch.float64)

    shift, scale = block.norm.adaLN(F.silu(c)).chunk(2, dim=-1)
    I = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]  # noqa: E741
    U = torch.empty(B, J * M, D, dtype=torch.float64, device=device())
    for token in range(J * M):
        j, k = divmod(token, M)
        U[:, token] = F.gelu(
            F.gelu(block.W0(I[:, j])) @ block.W_up.weight[k].T + block.W_up.bias[k]
        )
    s4d, directions = block.s4d, []
    for d, u in enumerate((U.mT, U.mT.flip(-1))):
        ssm = (
            s4d.log_dt[d].exp(),
            -s4d.log_A_real[d].exp(),
            s4d.A_imag[d],
            s4d.B[d],
            s4d.C[d],
            s4d.D_skip[d],
        )
        y = s4d_recurrence(u, *ssm)
        directions.append(y if d == 0 else y.flip(-1))
    Y = torch.cat(directions, dim=1).mT  # (B, L, 2D)
    O = torch.empty(B, J, D, dtype=torch.float64, device=device())  # noqa: E741

    def linear(layer, v):
        return v @ layer.weight.T + layer.bias

    for j in range(J):
        down = [
            F.gelu(Y[:, j * M + k] @ block.W_down.weight[k].T + block.W_down.bias[k])
            for k in range(M)
        ]
        O[:, j] = block.W3(
            F.gelu(linear(block.W2, torch.cat(down, -1))) * F.gelu(linear(block.W1, I[:, j]))
        )
    torch.testing.assert_close(block(x, c), x + O, rtol=1e-9, atol=1e-10)


class Activations(TorchFunctionMode):
    """Whether the numbers that each F.gelu of torch got lay in order, in a list."""

    def __init__(self):
        super().__init__()
        self.in_order = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.gelu:
            self.in_order.append(args[0].is_contiguous())
        return function(*args, **(kwargs or {}))


def test_block_transposes_nothing_between_products():
    """From W_up to the gate channels come first in memory, and activations see numbers in order."""
    block = fill(DiffuSSMBlock(8, 2, 4), 0.5)
    x, c = randn(3, 6, 8), randn(3, 8)
    h = block.norm(x, c)
    u = block.W_up.expand(h)
    y = block.s4d(u)
    assert u.permute(3, 1, 0, 2).is_contiguous()  # (M, D, B, J)
    assert y.permute(3, 1, 0, 2).is_contiguous()  # (M, 2D, B, J)
    for v in (block.W_down.contract(y), block.W1(h)):
        assert v.permute(2, 0, 1).is_contiguous()  # (channels, B, J)
    with Activations() as activations:
        block(x, c)
    assert activations.in_order == [True] * 5


def test_gelu_keeps_the_layout():
    x = randn(2, 3, 4, 5).permute(2, 0, 3, 1)
    torch.testing.assert_close(gelu(x), F.gelu(x))
    assert gelu(x).stride() == x.stride()

"""The gated hourglass block of DiffuSSM and its conditioning (paper, section 4).

B batch   J positions   M tokens per position   L = J M tokens   D width   token l = j M + m

Between W_up and W3, channels come first in memory, which is the layout that the convolution needs. The matrix products
write this layout and read it back, so that nothing is transposed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.model.s4d.layer import S4D


class ShiftScaleNorm(nn.Module):
    """Non-affine LayerNorm, shifted and scaled by the conditioning (adaLN): x (B, J, D), c (B, D) -> (B, J, D)."""

    def __init__(self, D: int):
        super().__init__()
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.adaLN = nn.Linear(D, 2 * D)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN(F.silu(c))[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class ChannelsFirstLinear(nn.Linear):
    """A Linear, x (B, J, in) -> (B, J, out), whose result has channels first in memory: (out, B, J)."""

    def forward(self, x: Tensor) -> Tensor:
        columns = x.flatten(0, 1).mT  # (in, B J)
        return torch.addmm(self.bias[:, None], self.weight, columns).mT.unflatten(0, x.shape[:2])


class HourglassLinear(nn.Module):
    """M independent Linears, one per place m of a token within its position: weight (M, out, in), bias (M, out)."""

    def __init__(self, M: int, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(M, d_out, d_in))
        self.bias = nn.Parameter(torch.empty(M, d_out))

    def reset_parameters(self) -> None:
        for matrix in self.weight:
            nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(self.bias)

    def expand(self, x: Tensor) -> Tensor:
        """Split every position into its M tokens: x (B, J, in) -> (B, out, J, M), in memory (M, out, B, J)."""
        columns = x.flatten(0, 1).mT  # (in, B J)
        tokens = torch.addmm(self.bias.flatten()[:, None], self.weight.flatten(0, 1), columns)  # (M out, B J)
        return tokens.view(*self.bias.shape, *x.shape[:2]).permute(2, 1, 3, 0)

    def contract(self, y: Tensor) -> Tensor:
        """Concatenate the tokens of every position: y (B, in, J, M) -> (B, J, M out), channels first in memory."""
        columns = y.permute(3, 1, 0, 2)  # (M, in, B, J), the order in memory
        places = torch.baddbmm(self.bias[..., None], self.weight, columns.flatten(2))  # (M, out, B J)
        return places.flatten(0, 1).mT.unflatten(0, columns.shape[2:])


def gelu(x: Tensor) -> Tensor:
    """F.gelu in the order of memory: on a CPU, this is twice as fast as on a permuted tensor."""
    if torch.compiler.is_compiling():  # the compiler chooses the order of loops itself
        return F.gelu(x)
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    back = [order.index(i) for i in range(x.ndim)]
    return F.gelu(x.permute(order)).permute(back)


class DiffuSSMBlock(nn.Module):
    """x (B, J, D), c (B, D) -> (B, J, D). The names of the Linears are the paper's."""

    def __init__(self, D: int, M: int, N: int):
        super().__init__()
        self.norm = ShiftScaleNorm(D)
        self.W0 = nn.Linear(D, D)
        self.W_up = HourglassLinear(M, D, D)
        self.s4d = S4D(D, N)
        self.W_down = HourglassLinear(M, 2 * D, 2 * D // M)
        self.W1 = ChannelsFirstLinear(D, 2 * D)
        self.W2 = ChannelsFirstLinear(2 * D, 2 * D)
        self.W3 = nn.Linear(2 * D, D)

    def zeroed(self) -> list[nn.Linear]:
        """The layers that start at zero, so that the block starts as the identity."""
        return [self.norm.adaLN, self.W3]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.norm(x, c)  # I (B, J, D)
        u = gelu(self.W_up.expand(gelu(self.W0(h))))  # U (B, D, J, M)
        y = self.s4d(u)  # Y (B, 2D, J, M)
        z = gelu(self.W_down.contract(y))  # I' (B, J, 2D)
        gated = gelu(self.W2(z)) * gelu(self.W1(h))  # (B, J, 2D)
        return x + self.W3(gated.flatten(0, 1)).view_as(x)  # X + O; 2-D, as torch adds the bias of 3-D separately

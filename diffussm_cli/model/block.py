"""The gated hourglass block of DiffuSSM and its conditioning (paper, section 4).

B batch   J positions   M tokens per position   L = J M tokens   D width   token l = j M + m

Between W_up and W3, channels come first in memory, which is the layout that the convolution needs.
The matrix products write this layout and read it back, so that nothing is transposed.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.config import MIXER_FACTS, ModelConfig
from diffussm_cli.model.local import Local
from diffussm_cli.model.mixer import Mixer, Sizes
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.model.scan import RASTER, Scan
from diffussm_cli.model.stacked import StackedLinear


class ShiftScaleNorm(nn.Module):
    """Non-affine LayerNorm, shifted and scaled by the conditioning (adaLN): x (B, J, D), c (B, D)
    -> (B, J, D).
    """

    def __init__(self, D: int):
        super().__init__()
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.adaLN = StackedLinear(D, D, parts=2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN(F.silu(c))[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class ChannelsFirstLinear(nn.Linear):
    """A Linear, x (B, J, in) -> (B, J, out), whose result has channels first in memory: (out, B,
    J).
    """

    def forward(self, x: Tensor) -> Tensor:
        columns = x.flatten(0, 1).mT  # (in, B J)
        return torch.addmm(self.bias[:, None], self.weight, columns).mT.unflatten(0, x.shape[:2])


class HourglassLinear(nn.Module):
    """M independent Linears, one per slot m (0..M-1) of a position: weight (M, out, in), bias (M,
    out).
    """

    def __init__(self, M: int, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(M, d_out, d_in))
        self.bias = nn.Parameter(torch.empty(M, d_out))

    def reset_parameters(self) -> None:
        for matrix in self.weight:
            nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(self.bias)

    def expand(self, x: Tensor) -> Tensor:
        """Split every position into its M tokens: x (B, J, in) -> (B, out, J, M), in memory (M,
        out, B, J).
        """
        columns = x.flatten(0, 1).mT  # (in, B J)
        # (M out, B J)
        tokens = torch.addmm(self.bias.flatten()[:, None], self.weight.flatten(0, 1), columns)
        return tokens.view(*self.bias.shape, *x.shape[:2]).permute(2, 1, 3, 0)

    def contract(self, y: Tensor) -> Tensor:
        """Concatenate the tokens of every position: y (B, in, J, M) -> (B, J, M out), channels
        first in memory.
        """
        columns = y.permute(3, 1, 0, 2)  # (M, in, B, J), the order in memory
        # (M, out, B J)
        places = torch.baddbmm(self.bias[..., None], self.weight, columns.flatten(2))
        return places.flatten(0, 1).mT.unflatten(0, columns.shape[2:])


def gelu(x: Tensor) -> Tensor:
    """F.gelu applied in memory order; on a CPU it takes twice as long on a permuted tensor."""
    if torch.compiler.is_compiling():  # the compiler chooses the order of loops itself
        return F.gelu(x)
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    back = [order.index(i) for i in range(x.ndim)]
    return F.gelu(x.permute(order)).permute(back)


class DiffuSSMBlock(nn.Module):
    """x (B, J, D), c (B, D), grid (H, W/M) -> (B, J, D). The names of the Linears are the paper's.

    The mixer is in the state dict under its name in `MIXERS`. It sees the positions in the order of
    `scan`; x is always in raster order. `local` is 3 for a convolution before the mixer, or 0.
    `grid` is that of the tokens which the mixer is made for. It is made from `d_state`, `heads` and
    `fields`, as far as its row in `config/mixers.py` names them; fields that are not given have the
    default of the configuration. The defaults need no grid.
    """

    def __init__(
        self,
        D: int,
        M: int,
        d_state: int,
        mixer: str = "s4d",
        heads: int = 16,
        scan: Scan = RASTER,
        local: int = 0,
        grid: tuple[int, int] = (16, 16),
        **fields: Any,
    ):
        super().__init__()
        self.mixer_name = mixer
        self.scan = scan

        self.norm = ShiftScaleNorm(D)
        self.W0 = nn.Linear(D, D)
        self.W_up = HourglassLinear(M, D, D)
        self.local = Local(D, scan) if local else None
        usual = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
        values = usual | {"d_state": d_state, "heads": heads} | fields
        chosen = {name: values[name] for name in MIXER_FACTS[mixer].fields}
        self.add_module(mixer, MIXERS[mixer].of(Sizes(D=D, scan=scan, grid=grid, **chosen)))
        self.W_down = HourglassLinear(M, 2 * D, 2 * D // M)
        self.W1 = ChannelsFirstLinear(D, 2 * D)
        self.W2 = ChannelsFirstLinear(2 * D, 2 * D)
        self.W3 = nn.Linear(2 * D, D)

    def zeroed(self) -> list[nn.Linear]:
        """The layers that start at zero, so that the block starts as the identity."""
        return [self.norm.adaLN, self.W3]

    @property
    def mixer(self) -> Mixer:
        return getattr(self, self.mixer_name)

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        h = self.scan.apply(self.norm(x, c), grid)  # I (B, J, D), in the order of the scan up to W3
        u = gelu(self.W_up.expand(gelu(self.W0(h))))  # U (B, D, J, M)
        y = self.mixer(self.local(u, grid) if self.local else u, grid)  # Y (B, 2D, J, M)
        z = gelu(self.W_down.contract(y))  # I' (B, J, 2D)
        gated = self.gate(gelu(self.W2(z)), h)  # (B, J, 2D)
        # O (B, J, D); 2-D, as torch adds the bias of 3-D separately
        o = self.W3(gated.flatten(0, 1)).view_as(x)
        return x + self.scan.undo(o, grid)

    def gate(self, o: Tensor, h: Tensor) -> Tensor:
        """Gate the mixed features: o * gelu(W1 h), o (B, J, 2D) and h (B, J, D) -> (B, J, 2D)."""
        return o * gelu(self.W1(h))

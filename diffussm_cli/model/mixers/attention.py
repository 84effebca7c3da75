"""Softmax attention as a mixer.

B batch   D channels   J positions   M tokens per position   L = J M tokens
h heads of d = D/h channels
"""

import torch
from torch import Tensor

from diffussm_cli.model.heads import AttentionOfHeads
from diffussm_cli.model.mixer import Mixer, Sizes
from diffussm_cli.model.scan import RASTER, Scan
from diffussm_cli.model.stacked import StackedLinear


class Heads(Mixer):
    """A mixer with heads. The values are U itself, because W_up and W_down already project into and
    out of a mixer.

    Raises:
        ValueError: if heads do not divide D.
    """

    def __init__(self, D: int, heads: int):
        super().__init__()
        if D % heads:
            raise ValueError(f"hidden_size {D} must be a multiple of heads {heads}")
        self.heads = heads
        self.qk = StackedLinear(D, D, parts=2)

    @classmethod
    def of(cls, sizes: Sizes) -> "Heads":
        return cls(sizes.D, sizes.heads)

    def split(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u (B, D, J, M) -> queries, keys, values (B, h, L, d), and the tokens (B, L, D)."""
        tokens = u.permute(0, 2, 3, 1).flatten(1, 2).contiguous()  # (B, L, D)
        # (B, h, L, d) each
        q, k = self.qk(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2), tokens


class Attention(Heads):
    """u (B, D, J, M) -> concat(attention, u) (B, 2D, J, M).

    Attention has one result, not one per direction. The second half of the output is u itself, in
    the role of S4D's skip: with M > 1 no residual connection around a mixer keeps the tokens of a
    position apart.
    """

    def __init__(
        self, D: int, heads: int, scan: Scan = RASTER, qk_norm: bool = False, rope: bool = False
    ):
        super().__init__(D, heads)
        self.scan = scan
        self.attend = AttentionOfHeads(D // heads, qk_norm, rope)

    @classmethod
    def of(cls, sizes: Sizes) -> "Attention":
        return cls(sizes.D, sizes.heads, sizes.scan, sizes.qk_norm, sizes.rope)

    def forward(self, u: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        q, k, v, _ = self.split(u)  # (B, h, L, d) each
        y = self.attend(q, k, v, grid, u.shape[3], self.scan)  # (B, h, L, d)
        return torch.cat([y.mT.reshape(u.shape), u], dim=1)  # (B, 2D, J, M)

    def macs(self, L: int, _grid: tuple[int, int]) -> dict[str, float]:
        D = self.qk.in_features
        return {"mixer": 2 * L * D**2, "attention": 2 * L**2 * D}

    def saved(self) -> float:
        return (4 + self.attend.saved()) * self.qk.in_features

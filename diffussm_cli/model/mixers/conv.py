"""Convolution as a mixer, after the conv module of DiCo (Ai et al. 2025, arXiv 2505.11196).

B batch   D channels   J positions   M tokens per position
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.model.local import Local
from diffussm_cli.model.mixer import Mixer, Sizes
from diffussm_cli.model.scan import RASTER, Scan


class Conv(Mixer):
    """u (B, D, J, M) -> concat(gated convolution, u) (B, 2D, J, M); a token sees the 3x3 tokens
    around it, or with `kernel` 5 or 7 more.

    The gate is DiCo's compact channel attention: a sigmoid of a Linear of each channel's mean over
    the image. DiCo's pointwise convolutions before and after are W_up and W_down here. Why u takes
    the second place: see `Attention`.
    """

    needs_image = True

    def __init__(self, D: int, scan: Scan = RASTER, kernel: int = 3):
        super().__init__()
        self.depthwise = Local(D, scan, kernel)
        self.gate = nn.Linear(D, D)

    @classmethod
    def of(cls, sizes: Sizes) -> "Conv":
        return cls(sizes.D, sizes.scan, sizes.kernel)

    def forward(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        v = F.gelu(self.depthwise(u, grid))  # (B, D, J, M)
        gate = torch.sigmoid(self.gate(v.mean((2, 3))))  # (B, D)
        return torch.cat([v * gate[..., None, None], u], dim=1)  # (B, 2D, J, M)

    def macs(self, L: int, _grid: tuple[int, int]) -> dict[str, float]:
        D = self.gate.in_features
        return {"mixer": self.depthwise.kernel**2 * L * D + D**2}

    def saved(self) -> float:
        return 3 * self.gate.in_features

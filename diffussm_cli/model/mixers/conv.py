"""Convolution as a mixer, after the conv module of DiCo (Ai et al. 2025, arXiv 2505.11196).

B batch   D channels   J positions   M tokens per position
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.model.local import Local
from diffussm_cli.model.scan import RASTER, Scan


class Conv(nn.Module):
    """u (B, D, J, M) -> concat(gated convolution, u) (B, 2D, J, M); a token sees the 3x3 tokens around it.

    The gate is DiCo's compact channel attention: a sigmoid of a Linear of each channel's mean over the image. DiCo's
    pointwise convolutions before and after are W_up and W_down here. Why u takes the second place: see `Attention`.
    """

    def __init__(self, D: int, scan: Scan = RASTER):
        super().__init__()
        self.depthwise = Local(D, scan)
        self.gate = nn.Linear(D, D)

    def forward(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        v = F.gelu(self.depthwise(u, grid))  # (B, D, J, M)
        gate = torch.sigmoid(self.gate(v.mean((2, 3))))  # (B, D)
        return torch.cat([v * gate[..., None, None], u], dim=1)  # (B, 2D, J, M)

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

    The gate is one number per channel and image, made of the whole image: with `conv_gate`
    "attention" by DiCo's `ChannelAttention`, with "grn" by `ResponseNormalisation`. DiCo's
    pointwise convolutions before and after are W_up and W_down here. Why u takes the second place:
    see `Attention`.
    """

    def __init__(self, D: int, scan: Scan = RASTER, kernel: int = 3, conv_gate: str = "attention"):
        super().__init__()
        self.depthwise = Local(D, scan, kernel)
        self.gate = GATES[conv_gate](D)

    @classmethod
    def of(cls, sizes: Sizes) -> "Conv":
        return cls(sizes.D, sizes.scan, sizes.kernel, sizes.conv_gate)

    def reset_parameters(self) -> None:
        """What the backbone does not initialise."""
        if isinstance(self.gate, ResponseNormalisation):
            self.gate.reset_parameters()

    def forward(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        v = F.gelu(self.depthwise(u, grid))  # (B, D, J, M)
        return torch.cat([self.gate(v), u], dim=1)  # (B, 2D, J, M)

    def macs(self, L: int, _grid: tuple[int, int]) -> dict[str, float]:
        D, k = self.depthwise.D, self.depthwise.kernel
        return {"mixer": k**2 * L * D + self.gate.macs}

    def saved(self) -> float:
        return 3 * self.depthwise.D


class ChannelAttention(nn.Linear):
    """DiCo's compact channel attention, v (B, D, J, M) -> the same: times a sigmoid of a Linear of
    each channel's mean.
    """

    def __init__(self, D: int):
        super().__init__(D, D)
        self.macs = D**2

    def forward(self, v: Tensor) -> Tensor:
        gate = torch.sigmoid(super().forward(v.mean((2, 3))))  # (B, D)
        return v * gate[..., None, None]


class ResponseNormalisation(nn.Module):
    """Global response normalisation, v (B, D, J, M) -> the same (ConvNeXt V2, arXiv 2301.00808; in
    diffusion FCDM, arXiv 2603.09408).

    With n the norm of each channel over the image, divided by the mean of n over the channels, it
    is v + scale n v + shift: a channel that answers more than others can be amplified. It starts as
    the identity.
    """

    macs = 0

    def __init__(self, D: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(D))
        self.shift = nn.Parameter(torch.empty(D))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.shift)

    def forward(self, v: Tensor) -> Tensor:
        response = torch.linalg.vector_norm(v, dim=(2, 3))  # (B, D)
        n = response / (response.mean(1, keepdim=True) + 1e-6)
        factor = 1 + self.scale * n
        return torch.addcmul(self.shift[:, None, None], v, factor[..., None, None])


GATES: dict[str, type[ChannelAttention] | type[ResponseNormalisation]] = {
    "attention": ChannelAttention,
    "grn": ResponseNormalisation,
}

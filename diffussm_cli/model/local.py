"""A depthwise convolution over the tokens of an image: B batch, D channels, J positions of M tokens, H x W tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.model.scan import RASTER, Scan


class Local(nn.Module):
    """Depthwise 3x3 convolution with zeros around the image: u (B, D, J, M) in the order of a scan -> the same.

    It starts as the identity. In DiG (arXiv 2405.18428) that start improved the FID of a small model, and a random one
    made it worse.
    """

    def __init__(self, D: int, scan: Scan = RASTER):
        super().__init__()
        self.D, self.scan = D, scan
        self.weight = nn.Parameter(torch.empty(D, 1, 3, 3))
        self.bias = nn.Parameter(torch.empty(D))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.zero_()[..., 1, 1] = 1
        self.bias.zero_()

    def forward(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        image = self.scan.to_image(u, grid)  # (B, D, H, W)
        return self.scan.to_sequence(self.convolve(image), grid)  # (B, D, J, M)

    def convolve(self, image: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H, W)."""
        return F.conv2d(image, self.weight, self.bias, padding=1, groups=self.D)

    def convolve_naive(self, image: Tensor) -> Tensor:
        """Reference for `convolve`: the nine products of every token and channel."""
        around = F.pad(image, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # (B, D, H, W, 3, 3)
        products = around.flatten(2, 3).flatten(3) @ self.weight.view(self.D, 9, 1)  # (B, D, HW, 1)
        return products.view_as(image) + self.bias[:, None, None]

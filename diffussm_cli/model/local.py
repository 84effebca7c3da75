"""A depthwise convolution over the tokens of an image: B batch, D channels, J positions of M
tokens, H x W tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.model.scan import RASTER, Scan


class Local(nn.Module):
    """Depthwise convolution with zeros around the image: u (B, D, J, M) in the order of a scan ->
    the same.

    `kernel` is its side in tokens. It starts as the identity. In DiG (arXiv 2405.18428) that start
    improved the FID of a small model, and a random one made it worse.
    """

    def __init__(self, D: int, scan: Scan = RASTER, kernel: int = 3):
        super().__init__()
        self.D, self.scan, self.kernel = D, scan, kernel
        self.weight = nn.Parameter(torch.empty(D, 1, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(D))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        middle = self.kernel // 2
        self.weight.zero_()[..., middle, middle] = 1
        self.bias.zero_()

    def forward(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        image = self.scan.to_image(u, grid)  # (B, D, H, W)
        return self.scan.to_sequence(self.convolve(image), grid)  # (B, D, J, M)

    def convolve(self, image: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H, W)."""
        return F.conv2d(image, self.weight, self.bias, padding=self.kernel // 2, groups=self.D)

    def convolve_naive(self, image: Tensor) -> Tensor:
        """Reference for `convolve`: the k x k products of every token and channel."""
        k, edge = self.kernel, self.kernel // 2
        # (B, D, H, W, k, k)
        around = F.pad(image, (edge, edge, edge, edge)).unfold(2, k, 1).unfold(3, k, 1)
        # (B, D, HW, 1)
        products = around.flatten(2, 3).flatten(3) @ self.weight.view(self.D, k * k, 1)
        return products.view_as(image) + self.bias[:, None, None]

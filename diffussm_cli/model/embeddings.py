"""The inputs and outputs of a backbone: timestep embedding, position embedding, patches.

B batch   C channels   H x W grid   P patch size   M compression
L = HW/P^2 tokens   J = L/M positions   D width
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class TimestepEmbedding(nn.Module):
    """t (B,), whole or fractional -> (B, D): 256 sinusoids, then an MLP (as in ADM and DiT).

    The sinusoids are of start + scale t, which is t except for weights of others.
    """

    frequencies = 256
    start, scale = 0.0, 1.0

    def __init__(self, D: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, t: Tensor) -> Tensor:
        if self.scale != 1:
            t = self.start + self.scale * t
        return self.mlp(sinusoids(t, self.frequencies).to(self.mlp[0].weight.dtype))  # type: ignore[arg-type]


def sinusoids(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """cos and sin of t at width/2 geometric frequencies: t (...,) -> (..., width), float32."""
    i = torch.arange(width // 2, device=t.device, dtype=torch.float32)
    angle = t[..., None].float() * torch.exp(-math.log(max_period) * i / (width // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def position_table(H: int, W: int, M: int, D: int) -> Tensor:
    """Fixed 2-D sin-cos embedding of a grid of H x W tokens, M neighbours in a row per position ->
    (J, D), float32.

    Half of D encodes the row and half the column. Both count tokens (the column is the mean of the
    M tokens), so that the two axes have the same scale for every M.
    """
    row = torch.arange(H, dtype=torch.float32)
    column = torch.arange(0, W, M, dtype=torch.float32) + (M - 1) / 2
    row, column = torch.meshgrid(row, column, indexing="ij")
    return torch.cat(
        [sinusoids(row.flatten(), D // 2), sinusoids(column.flatten(), D // 2)], dim=-1
    )


class TextEmbedding(nn.Module):
    """Embeds captions: a pooled vector (B, D), added to the conditioning, and token vectors (B, K,
    D).

    A caption is one tensor, (B, 1 + K, E): its pooled vector, then K token vectors. Rows of zeros
    stand for what is missing: the padding of a short caption, or all of it. A learned vector, one
    per row, takes their place.
    """

    def __init__(self, E: int, D: int, K: int):
        super().__init__()
        self.null = nn.Parameter(torch.empty(1 + K, E))
        self.mlp = nn.Sequential(nn.Linear(E, D), nn.SiLU(), nn.Linear(D, D))
        self.tokens = nn.Linear(E, D) if K else None
        self.place = nn.Parameter(torch.empty(K, D)) if K else None

    def reset_parameters(self) -> None:
        for p in (self.null, self.place):
            if p is not None:
                nn.init.zeros_(p)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        has_text = (text != 0).any(-1, keepdim=True)  # (B, 1 + K, 1)
        text = torch.where(has_text, text, self.null).to(self.null.dtype)
        pooled = self.mlp(text[:, 0])
        return pooled, None if self.tokens is None else self.tokens(text[:, 1:]) + self.place


class Stem(nn.Module):
    """Two 3x3 convolutions before an image is split, so that patches overlap: (B, C, H, W) -> (B,
    width, H, W).

    Each is followed by GELU. Around the image are zeros.
    """

    def __init__(self, C: int, width: int):
        super().__init__()
        self.first = nn.Conv2d(C, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def reset_parameters(self) -> None:
        self.first.reset_parameters()
        self.second.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.second(F.gelu(self.first(x))))


def patchify(x: Tensor, P: int, M: int) -> Tensor:
    """(B, C, H, W) -> (B, J, M C P^2): patches in raster order, M neighbours in a row
    concatenated.
    """
    return rearrange(x, "b c (h p) (w m q) -> b (h w) (m c p q)", p=P, q=P, m=M)


def unpatchify(x: Tensor, P: int, M: int, H: int, W: int) -> Tensor:
    """(B, J, M P^2 C) -> (B, C, H, W)."""
    return rearrange(
        x, "b (h w) (m p q c) -> b c (h p) (w m q)", p=P, q=P, m=M, h=H // P, w=W // (P * M)
    )

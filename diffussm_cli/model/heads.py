"""Softmax attention of heads, which DiT and the mixer `attention` share, and what a model may do to
its queries and keys.

B batch   h heads of d channels   H x W grid of tokens   M tokens per position   L = H W tokens
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffussm_cli.model.s4d.numerics import in_forward_mode
from diffussm_cli.model.scan import RASTER, Scan

BASE = 100.0  # the slowest pair of channels turns by nearly 1/100 per token (arXiv 2403.13298)
EPSILON = torch.finfo(torch.float32).eps  # added to the mean square of a query or key


class AttentionOfHeads(nn.Module):
    """q, k, v (B, h, L, d), grid (H, W/M) -> (B, h, L, d).

    With `qk_norm`, every query and key is divided by its root mean square and multiplied by a
    learned scale per channel, so that no score grows without bound. With `rope`, queries and keys
    are turned by angles that grow with row and column (`turned`), so that a score depends on the
    distance of two tokens. Text tokens, which stand around the image, are not turned.

    Raises:
        ValueError: if a head has too few channels for `rope`.
    """

    def __init__(self, d: int, qk_norm: bool = False, rope: bool = False):
        super().__init__()
        if rope and d < 4:
            raise ValueError(f"rope needs heads of at least 4 channels, got {d}")
        self.rope = rope
        self.q_norm = nn.RMSNorm(d, EPSILON) if qk_norm else None
        self.k_norm = nn.RMSNorm(d, EPSILON) if qk_norm else None

    def saved(self) -> float:
        """Numbers per token and channel that autograd saves because of the options."""
        return 4.0 * (self.q_norm is not None)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int] | None = None,
        M: int = 1,
        scan: Scan = RASTER,
    ) -> Tensor:
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normalised(q, self.q_norm), _normalised(k, self.k_norm)

        if self.rope:
            assert grid is not None
            wide = torch.promote_types(q.dtype, torch.float32)
            angles = angles_of(grid, M, q.shape[-1] // 4, scan, q.device, wide)
            words = (q.shape[2] - len(angles)) // 2  # on each side
            angles = F.pad(angles, (0, 0, words, words))
            q, k = turned(q, angles), turned(k, angles)

        # The fused forms of attention have no derivative in forward mode.
        plain = in_forward_mode()
        with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)


def _normalised(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """RMSNorm in the dtype of x, (..., d) -> (..., d)."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def angles_of(
    grid: tuple[int, int], M: int, n: int, scan: Scan, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The angles of axial rotary embedding by token, in the order of a scan, (L, 2n).

    The first n are row * BASE^(-i/n), i = 0..n-1; the others are the same of the column.
    """
    H, W = grid[0], grid[1] * M
    rates = BASE ** (-torch.arange(n, device=device, dtype=dtype) / n)
    rows = torch.arange(H, device=device)[:, None] * rates  # (H, n)
    columns = torch.arange(W, device=device)[:, None] * rates  # (W, n)
    table = torch.cat([rows[:, None].expand(H, W, n), columns.expand(H, W, n)], dim=-1)

    positions = table.reshape(H * grid[1], M, 2 * n)  # in raster order
    return scan.apply(positions, grid, dim=0).flatten(0, 1)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs of channels: x (..., L, d), angles (L, p) -> (..., L, d).

    Channel i, i < p, makes a pair with channel p + i; channels from 2p on stay.
    """
    p = angles.shape[-1]
    first, second, rest = x.split([p, p, x.shape[-1] - 2 * p], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)

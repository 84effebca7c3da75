"""Changes to the network and to the data that no configuration offers, because only studies need
them.

A study names one for a run (`change: no-gate`). It changes what this process imports, so it goes
with a process that trains and measures one job. B batch, D channels, J positions, M tokens per
position, N state size, h heads of d channels, P patch size, L tokens of a square image.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffussm_cli.data import builtin
from diffussm_cli.model import Backbone, dit
from diffussm_cli.model.block import DiffuSSMBlock
from diffussm_cli.model.embeddings import patchify
from diffussm_cli.model.mixer import Sizes
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.model.s4d import S4D


class OneDirection(S4D):
    """u (B, D, J, M) -> concat(forward, u) (B, 2D, J, M); the parameters of the backward direction
    are not used.
    """

    def forward(self, u: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return torch.cat([super().forward(u, grid)[:, : u.shape[1]], u], dim=1)


class S4DInv(S4D):
    """S4D with the poles of S4D-Inv: Im A = N/pi (N/(2n + 1) - 1),
    n = 0..N/2-1 (arXiv 2206.11893).
    """

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        n, N = torch.arange(self.A_imag.shape[-1]), 2 * self.A_imag.shape[-1]
        self.A_imag.copy_(N / math.pi * (N / (2 * n + 1) - 1))


def mix_with(kind: type[S4D], **settings: float) -> None:
    """Let the mixer s4d be of this kind, with these settings of `S4D`."""

    class Changed(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def of(cls, sizes: Sizes) -> S4D:
            return kind(sizes.D, sizes.N, **settings)

    MIXERS["s4d"] = Changed


class NoGate(DiffuSSMBlock):
    """A block whose tokens are not multiplied by a gate, and that has no W1."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        del self.W1

    def gate(self, o: Tensor, _h: Tensor) -> Tensor:
        return o


def no_gate() -> None:
    """Let DiffuSSM stack blocks without a gate."""
    import diffussm_cli.model.diffussm as network

    network.DiffuSSMBlock = NoGate  # type: ignore[misc]


def no_positions() -> None:
    """Add no table of positions to the tokens."""
    positions = Backbone.positions
    Backbone.positions = lambda self, H, W: torch.zeros_like(positions(self, H, W))  # type: ignore[method-assign]


# -------------------------------------------------------------- DiT as people train it today, M = 1
def square(x: Tensor) -> int:
    """The side of a square image of tokens, x (B, L, ...)."""
    side = math.isqrt(x.shape[1])
    assert side**2 == x.shape[1], "the changes of DiT are for square images"
    return side


class ChangedAttention(dit.Attention):
    """The attention of DiT at M = 1: x (B, L, D) -> (B, L, D), with some of three additions.

    Attributes:
        qk_norm: divide every query and key by its root mean square, with a learned scale (RMSNorm).
        rope: turn queries and keys by angles that grow with row and column, so that their product
            depends on the distance.
        local: a depthwise 3x3 convolution of the tokens first, which starts as the identity.
    """

    qk_norm = rope = local = False

    def __init__(self, D: int, M: int, heads: int):
        super().__init__(D, M, heads)
        if self.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(D // heads), nn.RMSNorm(D // heads)
        if self.local:
            self.near = nn.Conv2d(D, D, 3, padding=1, groups=D)
            nn.init.dirac_(self.near.weight, groups=D)
            nn.init.zeros_(self.near.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.local:
            image = x.mT.unflatten(-1, (square(x), -1))  # (B, D, H, W)
            x = self.near(image).flatten(2).mT

        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            side = square(x)
            q, k = turn(q, side), turn(k, side)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")
        return F.linear(y, self.proj.weight[0], self.proj.bias[0])


def turn(x: Tensor, side: int, base: float = 100.0) -> Tensor:
    """Axial rotary embedding (arXiv 2403.13298): x (B, h, L, d) with pairs of channels turned.

    With n = d // 4, n pairs turn by row * base^(-i/n), i = 0..n-1, and n by column; up to 3
    channels stay.
    """
    n = x.shape[-1] // 4
    rate = base ** (-torch.arange(n) / n)
    place = torch.arange(side)
    row = place.repeat_interleave(side)[:, None] * rate  # (L, n)
    column = place.repeat(side)[:, None] * rate
    angle = torch.cat([row, column], dim=1)

    first, second, rest = x.split([2 * n, 2 * n, x.shape[-1] - 4 * n], dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def attend_with(**additions: bool) -> None:
    """Let the blocks of DiT have this `ChangedAttention`."""
    dit.Attention = type("Attention", (ChangedAttention,), additions)  # type: ignore[misc]


class Stem(nn.Module):
    """Patches (B, L, C P^2) -> (B, L, D) after two 3x3 convolutions of the pixels, so that patches
    overlap.
    """

    def __init__(self, C: int, P: int, D: int, width: int = 16):
        super().__init__()
        self.P, self.out_features = P, D
        self.near = nn.Sequential(
            nn.Conv2d(C, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
        )
        self.out = nn.Linear(width * P * P, D)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, patches: Tensor) -> Tensor:
        layout = "b (h w) (c p q) -> b c (h p) (w q)"
        x = rearrange(patches, layout, h=square(patches), p=self.P, q=self.P)
        return self.out(patchify(self.near(x), self.P, 1))


def stem() -> None:
    """Let the patches of a backbone overlap."""
    initialise = Backbone.__init__

    def with_stem(self: Backbone, *args: Any, **settings: Any) -> None:
        initialise(self, *args, **settings)
        self.patch_in = Stem(self.in_channels, self.patch_size, self.patch_in.out_features)  # type: ignore

    Backbone.__init__ = with_stem  # type: ignore[method-assign]


def mimetic(a: float = 0.7, b: float = 0.7) -> None:
    """Let W_q^T W_k of every head begin near the identity, as trained ones are (arXiv 2305.09828).

    It is the best approximation, of the rank d of a head, of a Z + b I with Z from N(0, 1/D).
    """
    reset = Backbone.reset_parameters

    @torch.no_grad()
    def reset_all(self: Backbone) -> None:
        reset(self)
        for block in self.blocks:
            layer: Any = block.attention
            D, h = layer.qkv.in_features, layer.heads
            product = a * torch.randn(h, D, D, device="cpu") / D**0.5 + b * torch.eye(
                D, device="cpu"
            )
            U, S, V_h = torch.linalg.svd(product)
            root = S[:, : D // h, None].sqrt()  # (h, d, 1)
            q, k = root * U.mT[:, : D // h], root * V_h[:, : D // h]  # (h, d, D)
            layer.qkv.weight[:D].copy_(q.flatten(0, 1))
            layer.qkv.weight[D : 2 * D].copy_(k.flatten(0, 1))

    Backbone.reset_parameters = reset_all  # type: ignore[method-assign]


def modern() -> None:
    """Let DiT have the three additions of the small DiT that people train on MNIST (minRF)."""
    attend_with(qk_norm=True, rope=True)
    stem()


# ------------------------------------------------------------------------------------------ data
def train_on(n: int) -> None:
    """Let a built-in data set without captions have n training images, the same for every seed; the
    held-out ones stay.

    A measure that compares samples with training images then takes these n.
    """
    load = builtin.load

    def load_some(
        name: str,
        size: tuple[int, int] | None,
        channels: int | None = None,
        flip: bool = False,
        held_out: bool = False,
    ) -> builtin.InMemory:
        source = load(name, size, channels, flip, held_out)
        if held_out:
            return source
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
        chosen = order[:n].sort().values
        return builtin.InMemory(
            source.images[chosen], source.labels[chosen], source.class_names, source.flip
        )

    builtin.load = load_some  # type: ignore[assignment]


CHANGES: dict[str, Callable[[], None]] = {
    "one-direction": lambda: mix_with(OneDirection),
    "s4d-inv": lambda: mix_with(S4DInv),
    "long-steps": lambda: mix_with(S4D, dt_min=1e-2, dt_max=1.0),
    "short-steps": lambda: mix_with(S4D, dt_min=1e-4, dt_max=1e-2),
    "no-gate": no_gate,
    "no-positions": no_positions,
    "qk-norm": lambda: attend_with(qk_norm=True),
    "rope": lambda: attend_with(rope=True),
    "local-attention": lambda: attend_with(local=True),
    "stem": stem,
    "mimetic": mimetic,
    "modern": modern,
    "500-images": lambda: train_on(500),
    "1500-images": lambda: train_on(1500),
}

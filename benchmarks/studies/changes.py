"""Changes to the network and to the data that no configuration offers, because only studies need them.

A study names one for a run (`change: no-gate`). It changes what this process imports, so it goes with a process that
trains and measures one job. B batch, D channels, J positions, M tokens per position, N state size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffussm_cli.data import builtin
from diffussm_cli.model import Backbone
from diffussm_cli.model.block import DiffuSSMBlock
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.model.s4d import S4D


class OneDirection(S4D):
    """u (B, D, J, M) -> concat(forward, u) (B, 2D, J, M); the parameters of the backward direction are not used."""

    def forward(self, u: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return torch.cat([super().forward(u, grid)[:, : u.shape[1]], u], dim=1)


class S4DInv(S4D):
    """S4D with the poles of S4D-Inv: Im A = N/pi (N/(2n + 1) - 1), n = 0..N/2-1 (arXiv 2206.11893)."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        n, N = torch.arange(self.A_imag.shape[-1]), 2 * self.A_imag.shape[-1]
        self.A_imag.copy_(N / math.pi * (N / (2 * n + 1) - 1))


def mix_with(kind: type[S4D], **settings: float) -> None:
    """Let the mixer s4d be of this kind, with these settings of `S4D`."""
    MIXERS["s4d"] = lambda D, N, *_: kind(D, N, **settings)


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


def train_on(n: int) -> None:
    """Let a built-in data set without captions have n training images, the same for every seed; the held-out ones stay.

    A measure that compares samples with training images then takes these n.
    """
    load = builtin.load

    def load_some(
        name: str, size: tuple[int, int] | None, channels: int | None = None, flip: bool = False, held_out: bool = False
    ) -> builtin.InMemory:
        whole = load(name, size, channels, flip, held_out)
        if held_out:
            return whole
        chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:n].sort().values
        return builtin.InMemory(whole.images[chosen], whole.labels[chosen], whole.class_names, whole.flip)

    builtin.load = load_some  # type: ignore[assignment]


CHANGES: dict[str, Callable[[], None]] = {
    "one-direction": lambda: mix_with(OneDirection),
    "s4d-inv": lambda: mix_with(S4DInv),
    "long-steps": lambda: mix_with(S4D, dt_min=1e-2, dt_max=1.0),
    "short-steps": lambda: mix_with(S4D, dt_min=1e-4, dt_max=1e-2),
    "no-gate": no_gate,
    "no-positions": no_positions,
    "500-images": lambda: train_on(500),
    "1500-images": lambda: train_on(1500),
}

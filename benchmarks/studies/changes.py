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
from torch import Tensor, nn

from diffussm_cli.data import builtin
from diffussm_cli.model import Backbone, dit
from diffussm_cli.model.block import DiffuSSMBlock
from diffussm_cli.model.embeddings import Stem
from diffussm_cli.model.mixer import Sizes
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.model.s4d import S4D
from diffussm_cli.training.batches import Batch
from diffussm_cli.training.step import Step


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


# ------------------------------------------------------------------ DiT as people train it, M = 1
class LocalAttention(dit.Attention):
    """The attention of DiT after a depthwise 3x3 convolution of the tokens, which starts as the
    identity.
    """

    def __init__(self, D: int, M: int, heads: int, **options: bool):
        super().__init__(D, M, heads, **options)
        self.near = nn.Conv2d(D, D, 3, padding=1, groups=D)
        nn.init.dirac_(self.near.weight, groups=D)
        nn.init.zeros_(self.near.bias)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        assert grid is not None
        image = x.mT.unflatten(-1, grid)  # (B, D, H, W)
        return super().forward(self.near(image).flatten(2).mT, grid)


def attend_with(kind: type[dit.Attention] = dit.Attention, **options: bool) -> None:
    """Let the blocks of DiT have this attention, with these options of `model`.

    The fields of the configuration do the same. The studies that name a change are older, and a
    change is not part of their configurations.
    """
    dit.Attention = lambda D, M, heads, **_: kind(D, M, heads, **options)  # type: ignore[misc, assignment]


def stem(width: int = 16) -> None:
    """Let a backbone have the option `model.stem`, but made after the rest of it.

    The rest then starts from the same random numbers as without a stem, as in the results of the
    studies.
    """
    initialise = Backbone.__init__

    def with_stem(self: Backbone, *args: Any, **settings: Any) -> None:
        initialise(self, *args, **settings)
        taps = self.compression * width * self.patch_size**2
        self.stem = Stem(self.in_channels, width)
        self.patch_in = nn.Linear(taps, self.patch_in.out_features)
        nn.init.xavier_uniform_(self.patch_in.weight)
        nn.init.zeros_(self.patch_in.bias)

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


# -------------------------------------------------------------------------------------- the loss
def dispersive(weight: float = 0.5, temperature: float = 0.5) -> None:
    """Let the images of a batch repel each other after a quarter of the blocks (arXiv 2506.09027).

    The loss of every image gains weight log mean exp(-d_ij / temperature) over all pairs of images
    i and j, also i = j, where d_ij is the mean square of the differences of their hidden states.
    Measurements of the averaged weights are as before.
    """
    losses = Step.losses

    def with_repulsion(
        self: Step, batch: Batch, model: nn.Module | None = None
    ) -> dict[str, Tensor]:
        if model is not None:
            return losses(self, batch, model)

        states: list[Tensor] = []
        block = self.model.blocks[max(1, len(self.model.blocks) // 4) - 1]
        hook = block.register_forward_hook(lambda _, __, output: states.append(output))
        result = losses(self, batch)
        hook.remove()

        z = states[0].flatten(1)  # (B, J D)
        products = z @ z.mT
        squares = products.diagonal()
        d = (squares[:, None] + squares[None] - 2 * products).clamp(min=0) / z.shape[1]
        repulsion = torch.logsumexp((-d / temperature).flatten(), 0) - math.log(d.numel())
        return result | {"loss": result["loss"] + weight * repulsion}

    Step.losses = with_repulsion  # type: ignore[method-assign]


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
    "local-attention": lambda: attend_with(LocalAttention),
    "local-rope": lambda: attend_with(LocalAttention, qk_norm=True, rope=True),
    "stem": stem,
    "mimetic": mimetic,
    "modern": modern,
    "dispersive": dispersive,
    "500-images": lambda: train_on(500),
    "1500-images": lambda: train_on(1500),
}

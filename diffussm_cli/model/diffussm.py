"""DiffuSSM (Yan, Gu, Rush 2023, arXiv 2311.18257): tokens in, blocks, tokens out.

B batch   C channels   H x W grid   P patch size   M compression   L = HW/P^2 tokens   J = L/M positions
D hidden size   N state size of S4D
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffussm_cli.model.block import DiffuSSMBlock, HourglassLinear, ShiftScaleNorm
from diffussm_cli.model.embeddings import TimestepEmbedding, patchify, position_table, unpatchify


class DiffuSSM(nn.Module):
    """Denoiser on bidirectional S4D and hourglass dense layers: (x_t, t, y) -> noise, and covariance if learned.

    Args:
        input_size: (H, W) of the grid, or one number for a square. Another size may be given to `forward` too.
        in_channels: C.
        patch_size: P; must divide H and W.
        hidden_size: D, a multiple of 4. The paper's XL: 1152.
        depth: number of blocks. The paper's XL: 29.
        compression: hourglass ratio M; must divide W/P and 2D.
        d_state: N, even; N/2 complex modes a channel and direction.
        num_classes: 0 for an unconditional model. Label `num_classes` is the null class of guidance.
        learn_sigma: put out 2C channels, noise and then ADM's range interpolation v of the covariance; else C.
        label_std: standard deviation of the label table at the start (DiT: 0.02).
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: for sizes that do not divide, naming them.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        patch_size: int = 1,
        hidden_size: int = 1152,
        depth: int = 29,
        compression: int = 2,
        d_state: int = 64,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        label_std: float = 0.02,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.in_channels, self.patch_size, self.compression = in_channels, patch_size, compression
        self.num_classes, self.learn_sigma, self.label_std = num_classes, learn_sigma, label_std
        self.gradient_checkpointing = gradient_checkpointing
        C, P, D, M = in_channels, patch_size, hidden_size, compression
        if D % 4 or 2 * D % M:
            raise ValueError(f"hidden_size {D} must be a multiple of 4, and twice it a multiple of compression {M}")
        self._check_grid(*self.input_size)

        self.patch_in = nn.Linear(M * C * P * P, D)
        self.t_embed = TimestepEmbedding(D)
        self.y_embed = nn.Embedding(num_classes + 1, D) if num_classes else None
        self.blocks = nn.ModuleList(DiffuSSMBlock(D, M, d_state) for _ in range(depth))
        self.norm_out = ShiftScaleNorm(D)
        self.patch_out = nn.Linear(D, M * P * P * self.out_channels)
        self.register_buffer("position", self._positions(*self.input_size), persistent=False)
        self.reset_parameters()

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,) in 0..T-1, y (B,) labels or None if unconditional -> (B, 2C or C, H, W)."""
        H, W = x.shape[-2:]
        c = self.condition(t, y)  # (B, D)
        h = self.patch_in(patchify(x, self.patch_size, self.compression)) + self._position(H, W)  # (B, J, D)
        for block in self.blocks:
            h = checkpoint(block, h, c, use_reentrant=False) if self._recomputes() else block(h, c)  # (B, J, D)
        h = self.patch_out(self.norm_out(h, c))  # (B, J, M P^2 2C)
        return unpatchify(h, self.patch_size, self.compression, H, W)  # (B, 2C, H, W)

    def condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        """Timestep plus label: t (B,), y (B,) or None -> c (B, D)."""
        c = self.t_embed(t)
        if self.y_embed is None:
            return c
        assert y is not None, "a class-conditional model needs labels; the null class is model.null_class"
        return c + self.y_embed(y)

    def reset_parameters(self) -> None:
        """DiT's start: xavier Linears, N(0, 0.02) timestep MLP; zero adaLN, W3 and output: blocks are identities."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, HourglassLinear):
                module.reset_parameters()
        for layer in (self.t_embed.mlp[0], self.t_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        if self.y_embed is not None:
            nn.init.normal_(self.y_embed.weight, std=self.label_std)
        zeroed = [self.norm_out.adaLN, self.patch_out]
        for block in self.blocks:
            block.s4d.reset_parameters()
            zeroed += [block.norm.adaLN, block.W3]
        for layer in zeroed:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def fill_position(self) -> None:
        """Compute the one tensor that is in no state dict; needed after `to_empty` of a model built on "meta"."""
        self.position = self._positions(*self.input_size).to(self.position)

    def _recomputes(self) -> bool:
        return self.gradient_checkpointing and torch.is_grad_enabled()

    def _position(self, H: int, W: int) -> Tensor:
        if self.input_size == (H, W):
            return self.position
        return self._positions(H, W).to(self.position)

    def _positions(self, H: int, W: int) -> Tensor:
        self._check_grid(H, W)
        P = self.patch_size
        return position_table(H // P, W // P, self.compression, self.patch_in.out_features)

    def _check_grid(self, H: int, W: int) -> None:
        P, M = self.patch_size, self.compression
        if H % P or W % (P * M):
            raise ValueError(
                f"a grid of {H}x{W} does not divide: patch_size {P} must divide the height, "
                f"patch_size {P} x compression {M} the width"
            )

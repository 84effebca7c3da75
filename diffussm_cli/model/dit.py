"""DiT (Peebles and Xie 2022, arXiv 2212.09748): the baseline, with the embeddings and the interface
of DiffuSSM.

B batch   C channels   H x W grid   P patch size   M compression
L = HW/P^2 tokens   J = L/M positions   D hidden size
h heads of d = D/h channels   token l = j M + k

M = 1 is DiT. With M > 1 the residual stream and the MLP work on J positions, and only attention
works on all L tokens. This is the hourglass around attention whose Gflops the DiffuSSM paper
compares (section 4 and figure 3).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffussm_cli.model.backbone import Backbone, check_sizes, warn_of_unused
from diffussm_cli.model.block import HourglassLinear
from diffussm_cli.model.heads import AttentionOfHeads
from diffussm_cli.model.local import Local
from diffussm_cli.model.stacked import StackedLinear


class Attention(nn.Module):
    """Self-attention over all tokens: x (B, J, D), grid (H, W/M) -> (B, J, D).

    At M = 1 it is the usual layer. The options are those of `AttentionOfHeads`; without `rope` no
    grid is needed.
    """

    def __init__(self, D: int, M: int, heads: int, qk_norm: bool = False, rope: bool = False):
        super().__init__()
        self.M, self.heads = M, heads
        # one set per place of a token within its position
        self.qkv = StackedLinear(D, D, parts=3 * M)
        self.proj = HourglassLinear(M, D, D // M)
        self.attend = AttentionOfHeads(D // heads, qk_norm, rope)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x), "b j (m three h d) -> three b h (j m) d", m=self.M, three=3, h=self.heads
        )
        y = self.attend(q, k, v, grid, self.M)  # (B, h, L, d)
        places = zip(
            rearrange(y, "b h (j m) d -> m b j (h d)", m=self.M), self.proj.weight, self.proj.bias
        )
        # concatenates the tokens of a position
        return torch.cat([F.linear(y_m, W, b) for y_m, W, b in places], dim=-1)


class DiTBlock(nn.Module):
    """x (B, J, D), c (B, D) -> (B, J, D): attention and MLP, each shifted, scaled and gated by c
    (adaLN-Zero).

    `local` is 3 for a depthwise convolution of the positions before attention, or 0.
    """

    def __init__(
        self,
        D: int,
        M: int,
        heads: int,
        mlp_ratio: int = 4,
        qk_norm: bool = False,
        rope: bool = False,
        local: int = 0,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.local = Local(D) if local else None
        self.attention = Attention(D, M, heads, qk_norm=qk_norm, rope=rope)
        self.mlp = nn.Sequential(
            nn.Linear(D, mlp_ratio * D), nn.GELU("tanh"), nn.Linear(mlp_ratio * D, D)
        )
        self.adaLN = StackedLinear(D, D, parts=6)

    def zeroed(self) -> list[nn.Linear]:
        """The layers that start at zero, so that the block starts as the identity."""
        return [self.adaLN]

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        # (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(F.silu(c))[:, None].chunk(
            6, dim=-1
        )
        h = torch.addcmul(shift1, self.norm(x), 1 + scale1)
        if self.local is not None:
            assert grid is not None
            h = self.local(h.mT[..., None], grid)[..., 0].mT  # each position as one token
        x = torch.addcmul(x, gate1, self.attention(h, grid))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm(x), 1 + scale2)))


class DiT(Backbone):
    """Transformer denoiser: (x_t, t, y) -> noise, and covariance if learned. XL/2 has DiT's 675 M
    parameters.

    Arguments that are not listed are those of `Backbone`.

    Args:
        hidden_size: D, a multiple of 4 and of heads.
        depth: number of blocks.
        heads: number of attention heads.
        compression: M; must divide W/P and D. 1 is DiT.
        qk_norm, rope: of `AttentionOfHeads`; DiT has neither.
        local: 3 for a depthwise 3x3 convolution before each attention, which starts as the
            identity; 0 for none, as in DiT.

    Raises:
        ValueError: for an argument that its field of the configuration could not be, if sizes do
            not divide, heads are too narrow for `rope`, or text tokens have no place in the image
            that `local` reads; the message names them.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        heads: int = 16,
        compression: int = 1,
        num_classes: int = 1000,
        qk_norm: bool = False,
        rope: bool = False,
        local: int = 0,
        stem: int = 0,
        skips: bool = False,
        learn_sigma: bool = True,
        label_std: float = 0.02,
        text_width: int = 0,
        text_tokens: int = 0,
        gradient_checkpointing: bool = False,
    ):
        check_sizes(locals())
        if hidden_size % heads or hidden_size % compression:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of heads {heads} "
                f"and of M {compression}"
            )
        if text_tokens and local:
            raise ValueError(
                f"text_tokens {text_tokens}: local {local} reads an image, and text tokens have no "
                "place in one"
            )
        warn_of_unused("DiT", "dit", locals())

        blocks = [
            DiTBlock(hidden_size, compression, heads, qk_norm=qk_norm, rope=rope, local=local)
            for _ in range(depth)
        ]
        super().__init__(
            blocks,
            input_size=input_size,
            in_channels=in_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            compression=compression,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            label_std=label_std,
            text_width=text_width,
            text_tokens=text_tokens,
            gradient_checkpointing=gradient_checkpointing,
            skips=skips,
            stem=stem,
        )

    def positions(self, H: int, W: int) -> Tensor:
        """The fixed position embedding, (J, D), in DiT's order: sin and cos of the column, then of
        the row.
        """
        return super().positions(H, W).unflatten(-1, (4, -1)).flip(-2).flatten(-2)

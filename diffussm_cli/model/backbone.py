"""The backbone that DiffuSSM and the DiT baseline share: tokens in, blocks, tokens out.

B batch   C channels   H x W grid   P patch size   M compression
L = HW/P^2 tokens   J = L/M positions   D width
E width of text vectors   K text tokens
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffussm_cli.config import DataConfig, ModelConfig, check_arguments, unused_arguments
from diffussm_cli.errors import reason
from diffussm_cli.machine.tensors import NOT_FINITE, first_not_finite
from diffussm_cli.model.block import HourglassLinear, ShiftScaleNorm
from diffussm_cli.model.embeddings import (
    Stem,
    TextEmbedding,
    TimestepEmbedding,
    patchify,
    position_table,
    unpatchify,
)
from diffussm_cli.model.local import Local

CLASS = "class"  # in config.json of a saved network: the name of its class


class UnusedArgument(UserWarning):
    """An argument of a network that nothing in it uses."""


class Backbone(nn.Module, PyTorchModelHubMixin, library_name="diffussm", license="apache-2.0"):
    """A denoiser made of a stack of blocks: (x_t, t, y, text) -> noise, and the covariance if it is
    learned.

    The pooled vector of a caption joins the conditioning. Its K tokens, if any, stand before the
    image and, mirrored, behind it, so that a layer that reads in order meets the words first in
    both directions, and padding comes before words. Each token takes a whole position, whatever M
    is; scans only reorder the image.

    `save_pretrained`, `from_pretrained` and `push_to_hub` write and read a network alone, its
    class, arguments and weights, as huggingface_hub's mixin does. They raise ValueError for a SiT
    that was read from a .pt file, for a network of another class, and for weights that do not fit
    or are not finite.
    A run folder holds more: how to draw, names of classes, the VAE.

    Args:
        blocks: modules that map x (B, J, D), the conditioning c (B, D) and the grid (H/P, W/PM) of
            the positions to (B, J, D), or with text tokens the same for K + J + K positions.
            `zeroed()` of a block lists the Linears that are initialised to zero, so that the block
            starts as the identity.
        input_size: (H, W) of the grid, or one number for a square. `forward` also accepts other
            sizes.
        in_channels: C.
        patch_size: P; must divide H and W.
        hidden_size: D, a multiple of 4.
        compression: M, the number of tokens that share a position; must divide W/P.
        num_classes: 0 for an unconditional model. Label `num_classes` is the null class of
            guidance.
        learn_sigma: output 2C channels, the noise and then ADM's range interpolation v of the
            covariance; else C.
        label_std: initial standard deviation of the label table (DiT: 0.02).
        text_width: E; 0 for a model without text.
        text_tokens: K; 0 for the pooled vector only.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its
            activations.
        skips: before each block of the last half, add what its mirror image in the first half gave,
            through a Linear that starts at zero.
        stem: channels of two 3x3 convolutions before the image is split into patches; 0: none.

    Raises:
        ValueError: for an argument that its field of the configuration could not be, and if sizes
            do not divide; the message names them.
    """

    position: Tensor
    stem: Stem | None

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        input_size: int | tuple[int, int],
        in_channels: int,
        patch_size: int,
        hidden_size: int,
        compression: int,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        label_std: float = 0.02,
        text_width: int = 0,
        text_tokens: int = 0,
        gradient_checkpointing: bool = False,
        skips: bool = False,
        stem: int = 0,
    ):
        check_sizes(locals())
        super().__init__()
        self.input_size = pair(input_size)
        self.in_channels, self.patch_size, self.compression = in_channels, patch_size, compression
        self.num_classes, self.learn_sigma, self.label_std = num_classes, learn_sigma, label_std
        self.text_width, self.text_tokens = text_width, text_tokens
        self.gradient_checkpointing = gradient_checkpointing
        C, P, D, M = in_channels, patch_size, hidden_size, compression
        if D % 4:
            raise ValueError(f"hidden_size {D} must be a multiple of 4")
        if text_tokens and not text_width:
            raise ValueError(
                f"text_tokens {text_tokens} needs text_width, the width of the vectors"
            )
        self._check_grid(*self.input_size)

        self.register_module("stem", Stem(C, stem) if stem else None)
        self.patch_in = nn.Linear(M * (stem or C) * P * P, D)
        self.t_embed = TimestepEmbedding(D)
        self.y_embed = nn.Embedding(num_classes + 1, D) if num_classes else None
        self.text_embed = TextEmbedding(text_width, D, text_tokens) if text_width else None
        self.blocks = nn.ModuleList(blocks)
        self.skips = (
            nn.ModuleList(nn.Linear(D, D) for _ in range(len(self.blocks) // 2)) if skips else None
        )
        self.norm_out = ShiftScaleNorm(D)
        self.patch_out = nn.Linear(D, M * P * P * self.out_channels)
        self.register_buffer("position", self.positions(*self.input_size), persistent=False)
        self.reset_parameters()

        buffers = self.state_dict().keys() - dict(self.named_parameters()).keys()
        assert not buffers, (
            f"{', '.join(sorted(buffers))}: averages of the weights do not follow a buffer; "
            "make it a parameter, or persistent=False if it can be computed"
        )

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    def check_saveable(self) -> None:
        """Raises ValueError for a SiT: its embedding sees times in [0, 1], which is not saved."""
        if self.t_embed.scale != 1:
            raise ValueError(
                "save_pretrained: this SiT counts time from 0 to 1, which a saved model does not "
                'tell; keep its .pt file, and load that with objective="flow"'
            )

    def _save_pretrained(self, save_directory: Path) -> None:
        self.check_saveable()
        not_finite = first_not_finite(self.state_dict())
        if not_finite is not None:
            raise ValueError(f"save_pretrained: {not_finite} {NOT_FINITE}, so nothing is written")
        super()._save_pretrained(save_directory)
        # huggingface_hub writes this after the weights, as config.json
        arguments: Any = self._hub_mixin_config or {}
        self._hub_mixin_config = {**arguments, CLASS: type(self).__name__}

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: Mapping[str, Any] | None = None,
        strict: bool = True,
        **arguments: Any,
    ) -> "Backbone":
        """What `from_pretrained` calls, with the content of config.json, if there is one."""
        where = f"from_pretrained: {model_id!r}"
        parameters = cls._hub_mixin_init_parameters
        if config is None and not parameters.keys() & arguments.keys():
            raise ValueError(
                f"{where} has no config.json, so it is no saved network; a run is opened by "
                "diffussm.load(...), whose `model` is its network"
            )

        # What was saved: the class, which older files do not name, and its arguments.
        config = config or {}
        saved = config.get(CLASS)
        if saved is not None and saved not in [c.__name__ for c in cls.__mro__]:
            raise ValueError(f"{where} is a saved {saved}, not a {cls.__name__}")
        unknown = [name for name in config if name != CLASS and name not in parameters]
        if unknown:
            raise ValueError(
                f"{where}: config.json: {unknown[0]!r} is no argument of a {cls.__name__}"
            )

        try:
            model = super()._from_pretrained(model_id=model_id, strict=strict, **arguments)
        except RuntimeError as e:
            raise ValueError(
                f"{where}: the weights are not those of this {cls.__name__}: {reason(e)}"
            ) from e

        not_finite = first_not_finite(model.state_dict())
        if not_finite is not None:
            raise ValueError(
                f"{where}: model.safetensors: damaged: {not_finite} {NOT_FINITE}; take another "
                "copy of the file, or save the network again"
            )
        return model

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, text: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W), t (B,) in 0..T-1, y (B,) labels, text (B, 1 + K, E) -> (B, 2C or C, H,
        W).

        y is None for a model without classes, and text for one without text; `TextEmbedding`
        describes text.
        """
        self._check_inputs(x, t, y, text)
        H, W = x.shape[-2:]
        grid = H // self.patch_size, W // (self.patch_size * self.compression)

        # The embeddings.
        c, words = self.condition(t, y, text)  # (B, D), (B, K, D)
        position = (
            self.position if self.input_size == (H, W) else self.positions(H, W).to(self.position)
        )
        pixels = x if self.stem is None else self.stem(x)
        h = self.patch_in(patchify(pixels, self.patch_size, self.compression)) + position

        # The words stand on either side, for both directions.
        if words is not None:
            h = torch.cat([words.flip(1), h, words], dim=1)  # (B, K + J + K, D)

        # The blocks; those of the second half may add what the first half gave.
        recomputes = self.gradient_checkpointing and torch.is_grad_enabled()
        earlier: list[Tensor] = []  # what the blocks of the first half gave
        for i, block in enumerate(self.blocks):
            if self.skips is not None and i >= len(self.blocks) - len(self.skips):
                h = h + self.skips[i - len(self.blocks)](earlier.pop())
            h = (
                checkpoint(block, h, c, grid, use_reentrant=False)
                if recomputes
                else block(h, c, grid)
            )

            if self.skips is not None and i < len(self.skips):
                earlier.append(h)

        # The image.
        if words is not None:
            h = h[:, self.text_tokens : -self.text_tokens]
        h = self.patch_out(self.norm_out(h, c))  # (B, J, M P^2 2C)
        return unpatchify(h, self.patch_size, self.compression, H, W)  # (B, 2C, H, W)

    def condition(
        self, t: Tensor, y: Tensor | None, text: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Timestep, label and caption -> c (B, D), which is their sum, and the text tokens (B, K,
        D), if any.
        """
        c = self.t_embed(t)
        words = None

        if self.y_embed is not None:
            assert y is not None
            c = c + self.y_embed(y)

        if self.text_embed is not None:
            assert text is not None
            pooled, words = self.text_embed(text)
            c = c + pooled
        return c, words

    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier, N(0, 0.02) timestep MLP, zero output and conditioning
        (identity blocks).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, HourglassLinear | Local | Stem | TextEmbedding | nn.RMSNorm):
                module.reset_parameters()

        for layer in self.t_embed.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

        if self.y_embed is not None:
            nn.init.normal_(self.y_embed.weight, std=self.label_std)

        zeroed = [z for block in self.blocks for z in block.zeroed()]  # type: ignore[operator]
        for layer in [self.norm_out.adaLN, self.patch_out, *zeroed, *(self.skips or [])]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def compile_blocks(self, **options: Any) -> None:
        """Let torch.compile, with these options, translate the blocks when they are first called.

        Blocks of one kind share their code, so it takes as long for 29 blocks as for one. The
        layers around the blocks stay as they are: they take little of the time.
        """
        dynamo = torch._dynamo.config
        # kinds of blocks, training or not
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(self.blocks))
        for block in self.blocks:
            block.compile(**options)

    def materialize(self, device: torch.device | str) -> None:
        """Allocate a "meta" model on a device, with its table of positions; the parameters are not
        yet initialised.
        """
        self.to_empty(device=device)
        self.position = self.positions(*self.input_size).to(self.position)

    def positions(self, H: int, W: int) -> Tensor:
        """The fixed position embedding of a grid, (J, D)."""
        self._check_grid(H, W)
        P = self.patch_size
        return position_table(H // P, W // P, self.compression, self.patch_in.out_features)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor | None, text: Tensor | None) -> None:
        """Raises ValueError for sizes and types that do not fit; the content of tensors is only
        seen on a CPU.
        """
        B = x.shape[0]
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: shape {tuple(x.shape)} must be (B, {self.in_channels}, H, W)")
        if not x.is_floating_point():
            raise ValueError(f"x: {x.dtype} must be floats, such as x.float() / 127.5 - 1")
        if t.shape != (B,):
            raise ValueError(f"t: shape {tuple(t.shape)} must be ({B},), one timestep per image")

        if self.y_embed is not None:
            if y is None or y.shape != (B,):
                shape = "None" if y is None else f"shape {tuple(y.shape)}"
                raise ValueError(
                    f"y: {shape} must be ({B},), one label per image; no class is {self.null_class}"
                )
            if y.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"y: {y.dtype} must be torch.int64; give y.long()")
            if _is_at_hand(y) and not ((y >= 0) & (y <= self.null_class)).all():
                low, high = y.min().item(), y.max().item()
                raise ValueError(f"y: labels from {low} to {high} must lie in 0..{self.null_class}")

        if self.text_width:
            sizes = (B, 1 + self.text_tokens, self.text_width)
            if text is None or text.shape != sizes:
                shape = "None" if text is None else f"shape {tuple(text.shape)}"
                raise ValueError(f"text: {shape} must be {sizes}; zeros stand for no caption")

    def _check_grid(self, H: int, W: int) -> None:
        P, M = self.patch_size, self.compression
        if H < 1 or W < 1:
            raise ValueError(f"a grid of {H}x{W} has no tokens")
        if H % P or W % (P * M):
            raise ValueError(
                f"a grid of {H}x{W} cannot be split: patch_size {P} must divide the height, "
                f"and patch_size {P} x compression {M} the width"
            )


def check_sizes(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument of a network, by name, that its field of the configuration
    could not be.
    """
    check_arguments(ModelConfig, arguments)
    check_arguments(DataConfig, arguments, {"in_channels": "channels"})


def warn_of_unused(network: str, backbone: str, arguments: Mapping[str, Any]) -> None:
    """Warn whoever makes a network of arguments that it does not use."""
    line = unused_arguments(backbone, arguments)
    if line:
        warnings.warn(f"{network}: {line}", UnusedArgument, stacklevel=3)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a size, or of one number for a square. Raises TypeError for anything else."""
    sides = (size, size) if isinstance(size, int) else size
    if (
        not isinstance(sides, Sequence)
        or len(sides) != 2
        or not all(isinstance(side, int) for side in sides)
    ):
        raise TypeError(f"input_size {size!r} must be a whole number or (height, width)")
    return (sides[0], sides[1])


def _is_at_hand(tensor: Tensor) -> bool:
    """Whether its numbers can be read without waiting for a device, breaking a graph or leaving a
    trace.
    """
    return (
        tensor.is_cpu
        and tensor.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )

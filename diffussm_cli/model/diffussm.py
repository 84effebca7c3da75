"""DiffuSSM (Yan, Gu, Rush 2023, arXiv 2311.18257): a backbone of gated S4D blocks. Its forward is
in `backbone.py`.

B batch   C channels   H x W grid   P patch size   M compression
L = HW/P^2 tokens   J = L/M positions   D hidden size   N state size of S4D
"""

import itertools

from diffussm_cli.config import mixer_names
from diffussm_cli.model.backbone import Backbone, check_sizes, pair, warn_of_unused
from diffussm_cli.model.block import DiffuSSMBlock
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.model.scan import SCANS


class DiffuSSM(Backbone):
    """Denoiser of bidirectional S4D and hourglass dense layers: (x_t, t, y) -> noise, and
    covariance if learned.

    Arguments that are not listed are those of `Backbone`.

    Args:
        hidden_size: D, a multiple of 4. The paper's XL: 1152.
        depth: number of blocks. The paper's XL: 29.
        compression: hourglass ratio M; must divide W/P and 2D.
        d_state: N of the mixers "s4d" and "axial", even; N/2 complex modes per channel and
            direction.
        mixer: the layer that mixes tokens, a name in `mixers.MIXERS`; the paper's is S4D. A list
            such as "conv,axial" repeats along the blocks.
        heads: number of heads of the mixers "linear" and "attention"; must divide D.
        qk_norm, rope: of the mixer "attention"; see `AttentionOfHeads`.
        scan: the orders in which the blocks read the image in turn: "raster", "alternate" or
            "four".
        kernel: side of the convolution of the mixer "conv": 3, 5 or 7.
        conv_gate: how the mixer "conv" weighs channels, "attention" or "grn".
        local: 3 for a depthwise 3x3 convolution before each mixer, 0 for none.

    Raises:
        ValueError: for an argument that its field of the configuration could not be, if sizes do
            not divide, or for an option that the mixer does not have; the message names them.

    Warns of arguments that the mixers do not use, such as `heads` of S4D, with UnusedArgument.
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
        mixer: str = "s4d",
        heads: int = 16,
        kernel: int = 3,
        conv_gate: str = "attention",
        scan: str = "raster",
        local: int = 0,
        qk_norm: bool = False,
        rope: bool = False,
        stem: int = 0,
        skips: bool = False,
        learn_sigma: bool = True,
        label_std: float = 0.02,
        text_width: int = 0,
        text_tokens: int = 0,
        gradient_checkpointing: bool = False,
    ):
        check_sizes(locals())

        # What Backbone does not see.
        mixers = mixer_names(mixer)
        for name in mixers:
            if name not in MIXERS:
                raise ValueError(f"mixer {name!r} must be one of {', '.join(MIXERS)}")
        for option, is_set in {"qk_norm": qk_norm, "rope": rope}.items():
            if is_set and "attention" not in mixers:
                raise ValueError(
                    f"{option}: True needs the mixer attention, and mixer is {mixer!r}"
                )
        if text_tokens and (local or any(MIXERS[name].needs_image for name in mixers)):
            raise ValueError(
                f"text_tokens {text_tokens}: mixer {mixer!r} with local {local} reads an image "
                "without text"
            )
        if 2 * hidden_size % compression:
            raise ValueError(
                f"compression {compression} must divide twice hidden_size {hidden_size}"
            )
        warn_of_unused("DiffuSSM", "diffussm", locals())

        H, W = pair(input_size)
        tokens = (H // patch_size, W // patch_size)
        orders = itertools.cycle(SCANS[scan])
        names = itertools.cycle(mixers)
        options = {"kernel": kernel, "conv_gate": conv_gate, "qk_norm": qk_norm, "rope": rope}
        blocks = [
            DiffuSSMBlock(
                hidden_size, compression, d_state, name, heads, order, local, tokens, **options
            )
            for name, order, _ in zip(names, orders, range(depth))
        ]

        super().__init__(
            blocks,
            input_size,
            in_channels,
            patch_size,
            hidden_size,
            compression,
            num_classes,
            learn_sigma,
            label_std,
            text_width,
            text_tokens,
            gradient_checkpointing,
            skips,
            stem,
        )

    def reset_parameters(self) -> None:
        """Initialise the layers as `Backbone` does, and the mixers by their own rules (S4D:
        S4D-Lin).
        """
        super().reset_parameters()
        for block in self.blocks:
            if hasattr(block.mixer, "reset_parameters"):
                block.mixer.reset_parameters()  # type: ignore[operator]

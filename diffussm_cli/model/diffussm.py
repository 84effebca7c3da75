"""DiffuSSM (Yan, Gu, Rush 2023, arXiv 2311.18257): a backbone of gated S4D blocks. Its forward is
in `backbone.py`.

B batch   C channels   H x W grid   P patch size   M compression
L = HW/P^2 tokens   J = L/M positions   D hidden size   N state size of S4D
"""

import itertools

from diffussm_cli.config import MIXER_FACTS, MIXER_FIELDS, mixer_names, mixers_with
from diffussm_cli.model.backbone import Backbone, check_sizes, pair, warn_of_unused
from diffussm_cli.model.block import DiffuSSMBlock
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
        mixer: the layer that mixes tokens, a name in `config.MIXER_FACTS`; the paper's is S4D. A
            list such as "conv,axial" repeats along the blocks.
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
        arguments = dict(locals())
        check_sizes(arguments)

        # What Backbone does not see.
        mixers = mixer_names(mixer)
        for name in mixers:
            if name not in MIXER_FACTS:
                raise ValueError(f"mixer {name!r} must be one of {', '.join(MIXER_FACTS)}")
        for option, is_set in {"qk_norm": qk_norm, "rope": rope}.items():
            fitting = mixers_with(option)
            if is_set and not set(fitting) & set(mixers):
                raise ValueError(
                    f"{option}: True needs the mixer {' or '.join(fitting)}, and mixer is {mixer!r}"
                )
        if text_tokens and (local or any(MIXER_FACTS[name].needs_image for name in mixers)):
            raise ValueError(
                f"text_tokens {text_tokens}: mixer {mixer!r} with local {local} reads an image "
                "without text"
            )
        if 2 * hidden_size % compression:
            raise ValueError(
                f"compression {compression} must divide twice hidden_size {hidden_size}"
            )
        warn_of_unused("DiffuSSM", "diffussm", arguments)

        H, W = pair(input_size)
        tokens = (H // patch_size, W // patch_size)
        orders = itertools.cycle(SCANS[scan])
        names = itertools.cycle(mixers)
        fields = {name: arguments[name] for name in MIXER_FIELDS}
        blocks = [
            DiffuSSMBlock(
                hidden_size,
                compression,
                mixer=name,
                scan=order,
                local=local,
                grid=tokens,
                **fields,
            )
            for name, order, _ in zip(names, orders, range(depth))
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

    def reset_parameters(self) -> None:
        """Initialise the layers as `Backbone` does, and the mixers by their own rules (S4D:
        S4D-Lin).
        """
        super().reset_parameters()
        for block in self.blocks:
            block.mixer.reset_parameters()  # type: ignore[union-attr, operator]

"""The layers that can mix tokens inside the gated hourglass block, by name. `s4d` is the paper's.

Each is a `Mixer`: U (B, D, J, M), grid (H, W/M) -> Y (B, 2D, J, M). Token (j, m) is number l = j M
+ m of the sequence; a mixer that needs the image gets it from the `Scan` that it is made with. The
backbone initialises every Linear; a mixer with other parameters initialises them in
`reset_parameters`.
"""

from diffussm_cli.model.mixer import Mixer
from diffussm_cli.model.mixers.attention import Attention
from diffussm_cli.model.mixers.axial import Axial
from diffussm_cli.model.mixers.conv import Conv
from diffussm_cli.model.mixers.linear import LinearAttention
from diffussm_cli.model.s4d.layer import S4D

MIXERS: dict[str, type[Mixer]] = {
    "s4d": S4D,
    "axial": Axial,
    "linear": LinearAttention,
    "conv": Conv,
    "attention": Attention,
}

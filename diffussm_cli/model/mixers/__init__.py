"""The layers that can mix tokens inside the gated hourglass block, by name. `s4d` is the paper's.

B batch   D channels   J positions   M tokens per position   H x W grid of tokens

A mixer is a module: U (B, D, J, M), grid (H, W/M) -> Y (B, 2D, J, M). Token (j, m) is number l = j M + m of the
sequence; a mixer that needs the image gets it from `Scan.to_image`. The backbone initialises every Linear; a mixer with
other parameters initialises them in `reset_parameters`.
"""

from collections.abc import Callable

from torch import nn

from diffussm_cli.model.mixers.attention import Attention
from diffussm_cli.model.mixers.conv import Conv
from diffussm_cli.model.mixers.linear import LinearAttention
from diffussm_cli.model.s4d.layer import S4D
from diffussm_cli.model.scan import Scan

# How to make each from D, the state size of S4D, the number of heads, and the order of the positions.
MIXERS: dict[str, Callable[[int, int, int, Scan], nn.Module]] = {
    "s4d": lambda D, N, *_: S4D(D, N),
    "linear": lambda D, _, heads, __: LinearAttention(D, heads),
    "conv": lambda D, _, __, scan: Conv(D, scan),
    "attention": lambda D, _, heads, __: Attention(D, heads),
}

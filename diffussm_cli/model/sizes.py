"""The published sizes of both networks, for class-conditional ImageNet, by name."""

from diffussm_cli.config import ModelConfig


def _diffussm(hidden_size: int, depth: int) -> ModelConfig:
    return ModelConfig(hidden_size=hidden_size, depth=depth, patch_size=1, compression=2)


def _dit(hidden_size: int, depth: int, heads: int) -> ModelConfig:
    return ModelConfig(
        backbone="dit",
        hidden_size=hidden_size,
        depth=depth,
        heads=heads,
        patch_size=2,
        compression=1,
    )


SIZES = {
    # Yan, Gu and Rush (arXiv 2311.18257). They give no depth for S and L: one block more than DiT.
    # The width of L is printed as 786, which is not a multiple of 4.
    "s": _diffussm(384, 13),
    "l": _diffussm(768, 25),
    "xl": _diffussm(1152, 29),
    # Peebles and Xie (arXiv 2212.09748), table 1.
    "dit-s": _dit(384, 12, 6),
    "dit-b": _dit(768, 12, 12),
    "dit-l": _dit(1024, 24, 16),
    "dit-xl": _dit(1152, 28, 16),
}

"""Published costs beside ours: DiT's table and the training compute of the DiffuSSM paper."""

from collections.abc import Iterator
from typing import NamedTuple

from diffussm_cli.config import load_config
from diffussm_cli.profiling.flops import cost

# Peebles and Xie 2022 (arXiv 2212.09748), table 4: forward Gflops at 32x32 latents, by patch size.
DIT_GFLOPS = {
    "s": {8: 0.36, 4: 1.41, 2: 6.06},
    "b": {8: 1.42, 4: 5.56, 2: 23.01},
    "l": {8: 5.01, 4: 19.70, 2: 80.71},
    "xl": {8: 7.39, 4: 29.05, 2: 118.64},
}
DIT_XL_2_AT_512 = 524.60
# Yan, Gu and Rush 2023 (arXiv 2311.18257), tables 1 and 2: total Gflops; images trained on.
TOTAL_GFLOPS = {
    "xl-256": (1.85e11, 660e6),
    "dit-xl-256": (2.13e11, 1792e6),
    "xl-512": (3.22e11, 302e6),
    "dit-xl-512": (4.03e11, 768e6),
}
SENTENCE = (
    "A forward pass of DiffuSSM-XL costs {per_image:.1f} times as much as one of DiT-XL/2 (256x256). The paper saves "
    "total training compute because it trains on fewer images. Against DiT-XL/2, its own formula gives "
    "{by_formula:+.0%} at 256 and {by_formula_512:+.0%} at 512; it prints {printed:+.0%} and {printed_512:+.0%}."
)


class Row(NamedTuple):
    """A published figure beside ours, in Gflops of a forward pass."""

    name: str
    published: float
    ours: float
    difference: float


class Training(NamedTuple):
    """Total Gflops of a training run as printed, the forward Gflops that they imply, and ours by formula."""

    name: str
    images: float
    printed: float
    implied: float
    forward: float
    ours: float
    difference: float


def dit_rows() -> Iterator[Row]:
    """Every row of DiT's table, and XL/2 at 512."""
    for size, by_patch in DIT_GFLOPS.items():
        for patch, published in by_patch.items():
            ours = cost(load_config(f"dit-{size}-256", [f"model.patch_size={patch}"])).gflops
            yield Row(f"DiT-{size.upper()}/{patch}", published, ours, ours / published - 1)
    ours = cost(load_config("dit-xl-512")).gflops
    yield Row("DiT-XL/2 at 512", DIT_XL_2_AT_512, ours, ours / DIT_XL_2_AT_512 - 1)


def training_rows() -> Iterator[Training]:
    """The paper's total Gflops beside ours, which leave out transforms as the paper's formula does."""
    for preset, (printed, images) in TOTAL_GFLOPS.items():
        c = cost(load_config(preset))
        forward = c.gflops - c.parts.get("FFT", 0) - c.parts.get("spectra", 0)
        ours = forward * images
        yield Training(preset, images, printed, printed / images, forward, ours, ours / printed - 1)


def sentence() -> str:
    """A summary of the figures."""
    rows = {row.name: row for row in training_rows()}

    def saving(resolution: int, field: str) -> float:
        return getattr(rows[f"xl-{resolution}"], field) / getattr(rows[f"dit-xl-{resolution}"], field) - 1

    return SENTENCE.format(
        per_image=rows["xl-256"].forward / rows["dit-xl-256"].forward,
        by_formula=saving(256, "ours"),
        by_formula_512=saving(512, "ours"),
        printed=saving(256, "printed"),
        printed_512=saving(512, "printed"),
    )

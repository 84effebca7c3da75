"""The models of the two papers by name, and their published costs beside ours."""

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

from diffussm_cli.config import Config, load_config
from diffussm_cli.errors import ConfigError
from diffussm_cli.model.sizes import SIZES
from diffussm_cli.profiling.flops import cost

# Peebles and Xie 2022 (arXiv 2212.09748), table 4: forward Gflops at 32x32 latents, by patch size.
DIT_GFLOPS = {
    "dit-s": {8: 0.36, 4: 1.41, 2: 6.06},
    "dit-b": {8: 1.42, 4: 5.56, 2: 23.01},
    "dit-l": {8: 5.01, 4: 19.70, 2: 80.71},
    "dit-xl": {8: 7.39, 4: 29.05, 2: 118.64},
}
DIT_XL_2_AT_512 = 524.60
# Yan, Gu and Rush 2023 (arXiv 2311.18257), tables 1 and 2: total Gflops; images trained on.
TOTAL_GFLOPS = {
    "xl-256": (1.85e11, 660e6),
    "dit-xl-256": (2.13e11, 1792e6),
    "xl-512": (3.22e11, 302e6),
    "dit-xl-512": (4.03e11, 768e6),
}
STUDY_IMAGES = 400_000 * 256  # of the smaller sizes: DiT's scaling study

NAME = re.compile(r"(?P<size>[a-z-]+?)(?:/(?P<P>\d+))?(?:-m(?P<M>\d+))?")
SENTENCE = (
    "A forward pass of DiffuSSM-XL costs {per_image:.1f} times as much as one of DiT-XL/2 "
    "(256x256). The paper saves total training compute because it trains on fewer images. Against "
    "DiT-XL/2, its own formula gives {by_formula:+.0%} at 256 and {by_formula_512:+.0%} at 512; it "
    "prints {printed:+.0%} and {printed_512:+.0%}."
)


# --------------------------------------------------------------------------------- models by name
def named_model(name: str, resolution: int | str) -> Config:
    """A published model such as `xl`, `s/2` or `dit-xl/1-m2` at a resolution in pixels, N or HxW.

    Data and recipe are those of the preset xl-256; the number of steps is the published one.

    Raises:
        ConfigError: for an unknown size, or a resolution that the model cannot have.
    """
    parts = NAME.fullmatch(name)
    if parts is None or parts["size"] not in SIZES:
        sizes = ", ".join(SIZES)
        raise ConfigError(
            f"--models: {name!r} must be one of {sizes}, with /P and -mM as in dit-xl/1-m2"
        )
    size = parts["size"]
    network = dataclasses.asdict(SIZES[size])
    if parts["P"]:
        network["patch_size"] = parts["P"]
    if parts["M"]:
        network["compression"] = parts["M"]

    # The published length of training at this resolution, else at 256, else of DiT's smaller sizes.
    _, images = TOTAL_GFLOPS.get(f"{size}-256", (0, STUDY_IMAGES))
    _, images = TOTAL_GFLOPS.get(f"{size}-{resolution}", (0, images))

    fields = {f"model.{field}": value for field, value in network.items()}
    fields |= {"data.resolution": resolution, "train.steps": round(images / 256)}
    return load_config("xl-256", fields=fields)


def display_name(config: Config) -> str:
    """DiffuSSM-XL, DiffuSSM-XL/2 M=4, DiT-XL/2, DiT-XL/1 M=2: P and M if they are not usual."""
    m = config.model
    network = (m.backbone, m.hidden_size, m.depth)
    size = next(
        name for name, s in SIZES.items() if (s.backbone, s.hidden_size, s.depth) == network
    )
    is_dit = m.backbone == "dit"
    family = "DiT" if is_dit else "DiffuSSM"
    patch = f"/{m.patch_size}" if is_dit or m.patch_size != SIZES[size].patch_size else ""
    compression = f" M={m.compression}" if m.compression != SIZES[size].compression else ""
    return f"{family}-{size.removeprefix('dit-').upper()}{patch}{compression}"


# --------------------------------------------------------------------------- published beside ours
class Row(NamedTuple):
    """A published figure beside ours, in Gflops of a forward pass."""

    name: str
    published: float
    ours: float
    difference: float


class Training(NamedTuple):
    """Total Gflops of a training run as printed, the forward Gflops that they imply, and ours."""

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
            yield _row(f"{size}/{patch}", 256, published)
    yield _row("dit-xl/2", 512, DIT_XL_2_AT_512)


def _row(model: str, resolution: int, published: float) -> Row:
    config = named_model(model, resolution)
    ours = cost(config).gflops
    name = display_name(config) + (f" at {resolution}" if resolution != 256 else "")
    return Row(name, published, ours, ours / published - 1)


def training_rows() -> Iterator[Training]:
    """The paper's total Gflops beside ours, without transforms, as its formula has none."""
    for name, (printed, images) in TOTAL_GFLOPS.items():
        size, _, resolution = name.rpartition("-")
        c = cost(named_model(size, resolution))
        forward = c.gflops - c.parts.get("FFT", 0) - c.parts.get("spectra", 0)
        ours = forward * images
        yield Training(name, images, printed, printed / images, forward, ours, ours / printed - 1)


def sentence() -> str:
    """A summary of the figures."""
    rows = {row.name: row for row in training_rows()}

    def saving(resolution: int, field: str) -> float:
        diffussm = getattr(rows[f"xl-{resolution}"], field)
        dit = getattr(rows[f"dit-xl-{resolution}"], field)
        return diffussm / dit - 1

    return SENTENCE.format(
        per_image=rows["xl-256"].forward / rows["dit-xl-256"].forward,
        by_formula=saving(256, "ours"),
        by_formula_512=saving(512, "ours"),
        printed=saving(256, "printed"),
        printed_512=saving(512, "printed"),
    )

"""What images begin with in place of the noise of their seeds: an image of the user, which may be
kept in part, or noise between that of two seeds.

C channels   H x W grid   f downsampling of the VAE, 1 for pixels
"""

import dataclasses
import hashlib
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffussm_cli.config import MAX_SEED, Config, SampleConfig, check_whole
from diffussm_cli.data.decoding import Decoding
from diffussm_cli.data.images import flatten, open_image, to_model_space
from diffussm_cli.diffusion.samplers import STOCHASTIC, steps_of
from diffussm_cli.errors import ConfigError, DataError

STRENGTH = 0.8  # of an image without a mask, as in diffusers; with a mask, 1
WHITE = 128  # from this value on, a pixel of a mask is white

Picture = Path | str | Image.Image | Tensor  # a file, or uint8 (C, fH, fW) or (fH, fW)


@dataclass(frozen=True)
class Beginning:
    """What the images of a request begin with; by default, the noise of their seeds.

    Attributes:
        image: uint8 (C, fH, fW).
        mask: bool (fH, fW), true where the image is drawn anew; None: everywhere.
        strength: how much of the way from noise to image is drawn again, from 0 to 1.
        x_0: the image in model space, (1, C, H, W); see `encoded`.
        redrawn: the mask on the grid of the model, (1, 1, H, W).
        ends: the two seeds between which the noise of the images lies.
        images: how many images go from one end to the other.
        facts: all this for meta.json.
    """

    image: Tensor | None = None
    mask: Tensor | None = None
    strength: float = 1.0
    x_0: Tensor | None = None
    redrawn: Tensor | None = None
    ends: tuple[int, int] | None = None
    images: int = 0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def encoded(self, decoding: Decoding, downsample: int) -> "Beginning":
        """The same with the image in model space, by the VAE of the run if it has one.

        A place of the grid is drawn anew if any of its pixels is.

        Raises:
            DataError: if the VAE cannot be used.
        """
        if self.image is None:
            return self
        if decoding.vae is None and decoding.warning:
            raise DataError(f"--image: needs the VAE of the run; {decoding.warning}")

        x_0 = to_model_space(self.image[None])
        if decoding.vae is not None:
            mean, _ = decoding.vae.encode(x_0)
            x_0 = (mean.cpu() - decoding.vae.shift) * decoding.vae.scale
        redrawn = None
        if self.mask is not None:
            redrawn = F.max_pool2d(self.mask[None, None].float(), downsample) > 0
        return dataclasses.replace(self, x_0=x_0, redrawn=redrawn)

    def noise(self, ends: Tensor, places: Sequence[int]) -> Tensor:
        """Noise between two, (2, C, H, W), at places 0 .. images - 1 of the way: along the arc, so
        that it stays noise.
        """
        first, last = ends.double()
        angle = torch.arccos(F.cosine_similarity(first.flatten(), last.flatten(), 0))
        shares = [place / (self.images - 1) for place in places]
        return torch.stack(
            [
                (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * last)
                / torch.sin(angle)
                if 0 < share < 1
                else ends[round(share)]
                for share in shares
            ]
        )

    def keep(self, latents: Tensor) -> Tensor:
        """Images in model space, (B, C, H, W), with what is known of them as it was."""
        if self.redrawn is None or self.x_0 is None:
            return latents
        return torch.where(self.redrawn.to(latents.device), latents, self.x_0.to(latents))

    def paste(self, images: Tensor) -> Tensor:
        """Images (B, C, fH, fW), uint8 or in [-1, 1], with the pixels that are known as they
        were.
        """
        if self.mask is None or self.image is None:
            return images
        known = self.image if images.dtype == torch.uint8 else to_model_space(self.image[None])
        return torch.where(self.mask, images, known)


def read_beginning(
    config: Config,
    sampling: SampleConfig,
    num: int,
    image: Picture | None = None,
    mask: Picture | None = None,
    strength: float | None = None,
    interpolate: Sequence[int] | None = None,
) -> Beginning:
    """Check what images shall begin with, and read it.

    Args:
        config, sampling, num: of the run and the request.
        image: the image to begin with, of the size of the run's images.
        mask: white where it is drawn anew, black where it is kept; of the same size.
        strength: by default 0.8 for an image alone, and 1 with a mask.
        interpolate: two seeds; the images go from that of the first to that of the second.

    Raises:
        ConfigError, DataError: one line that names the option.
    """
    parts: dict[str, Any] = {}
    facts: dict[str, Any] = dict.fromkeys(FACTS)

    # The image, its mask and the strength.
    for option, value in (("--mask", mask), ("--strength", strength)):
        if image is None and value is not None:
            raise ConfigError(f"{option}: needs --image, the image to begin with")
    if image is not None:
        parts["image"] = _pixels(image, "--image", config, 1 if config.data.is_grey else 3)
        parts["strength"] = _checked_strength(strength, mask is not None)
        facts |= _source(image, "image", parts["image"]) | {"strength": parts["strength"]}
    if mask is not None:
        parts["mask"] = _pixels(mask, "--mask", config, 1)[0] >= WHITE
        facts |= _source(mask, "mask", parts["mask"])
        if not parts["mask"].any():
            raise ConfigError("--mask: is black everywhere, and only white pixels are drawn anew")

    # Two seeds.
    if interpolate is not None:
        parts["ends"] = _checked_ends(interpolate, sampling, num)
        parts["images"] = num
        facts["interpolate"] = {"seeds": list(interpolate), "images": num}
    return Beginning(**parts, facts=facts)


def unused_of_beginning(beginning: Beginning, sampling: SampleConfig) -> str:
    """One line about the parts of a request that its strength leaves without a use; empty if there
    are none.
    """
    if beginning.image is None:
        return ""

    # Everything is kept, or nothing is.
    steps = steps_of(beginning.strength, sampling.steps)
    is_kept = beginning.mask is not None and not beginning.mask.all()
    if not steps:
        mask = "the mask, " if beginning.mask is not None else ""
        return (
            f"not used: {mask}the seeds and how to draw (strength is 0, so that nothing of the "
            "image is drawn again)"
        )
    if steps == sampling.steps and not is_kept:
        share = f"strength {beginning.strength:g} is all of {sampling.steps} steps"
        return f"not used: the image ({share}, so that nothing of it is kept)"
    return ""


# The facts in meta.json that must not change when more images are drawn into a folder, and others.
FIXED_FACTS = ("image_sha256", "mask_sha256", "strength", "interpolate")
FACTS = ("image", "mask", *FIXED_FACTS)


def _checked_strength(strength: float | None, has_mask: bool) -> float:
    if strength is None:
        return 1.0 if has_mask else STRENGTH
    if not isinstance(strength, numbers.Real) or not 0 <= strength <= 1:
        raise ConfigError(f"--strength: {strength!r} must be a number from 0 to 1")
    return float(strength)


def _checked_ends(seeds: Any, sampling: SampleConfig, num: int) -> tuple[int, int]:
    seeds = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    if len(seeds) != 2 or seeds[0] == seeds[1]:
        raise ConfigError(f"--interpolate: {' '.join(map(str, seeds))} must be two different seeds")
    for seed in seeds:
        check_whole("--interpolate", seed, 0, MAX_SEED)

    if num < 2:
        raise ConfigError(f"--interpolate: needs at least 2 images, not --num {num}")
    if sampling.sampler in STOCHASTIC:
        raise ConfigError(
            f"--interpolate: the sampler {sampling.sampler} adds noise at every step, which lies "
            "between no seeds; choose another with --sampler"
        )
    return seeds[0], seeds[1]


def _source(source: Picture, name: str, pixels: Tensor) -> dict[str, Any]:
    """Which picture this is, for meta.json."""
    content = pixels.to(torch.uint8).contiguous().numpy().tobytes()
    digest = hashlib.sha256(f"{tuple(pixels.shape)}".encode() + content).hexdigest()
    path = str(source) if isinstance(source, Path | str) else None
    return {name: path, f"{name}_sha256": digest}


def _pixels(source: Picture, option: str, config: Config, channels: int) -> Tensor:
    """A picture as uint8 (channels, fH, fW). Raises DiffussmError unless it is a still of the run's
    size.
    """
    try:
        if isinstance(source, Path | str):
            with open_image(Path(source)) as file:
                frames = getattr(file, "n_frames", 1)
                if frames > 1:
                    raise DataError(f"{source}: is a film of {frames} frames, not an image")
                image = flatten(file, channels)
        else:
            image = flatten(_as_image(source, option), channels)
    except (DataError, ValueError) as e:
        raise DataError(f"{option}: {e}") from e

    height, width = config.data.size
    if image.size != (width, height):
        raise ConfigError(
            f"{option}: has {image.height}x{image.width} pixels (height x width), but the run "
            f"draws {height}x{width}; crop or resize it"
        )
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)


def is_picture(value: Any) -> bool:
    """Whether `value` is a `Picture`: of tensors, uint8 or bool, (fH, fW) or (C, fH, fW) with 1 or
    3 channels.
    """
    if not isinstance(value, Tensor):
        return isinstance(value, Path | str | Image.Image)
    shape = (value.ndim, *value.shape[:-2])
    return value.dtype in (torch.uint8, torch.bool) and shape in ((2,), (3, 1), (3, 3))


def description(value: Any) -> str:
    """What a value is, for an error: its type, and the shape of an array or tensor."""
    if isinstance(value, np.ndarray | Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"a value of type {type(value).__name__}"


def _as_image(picture: Image.Image | Tensor, option: str) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.copy()
    if not is_picture(picture):
        raise ConfigError(
            f"{option}: {description(picture)} must be a file, an image of Pillow, or a tensor "
            "uint8 (C, H, W) with 1 or 3 channels"
        )

    scale = 255 if picture.dtype == torch.bool else 1
    pixels = (picture.byte() * scale).cpu().numpy()
    if pixels.ndim == 3:
        pixels = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return Image.fromarray(pixels)

"""The arguments of a pipeline's call, checked. As in diffusers, an error is a ValueError."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.config import Config
from diffussm_cli.data.decoding import Decoding
from diffussm_cli.data.images import check_finite
from diffussm_cli.errors import PARAMETERS, DiffussmError, in_python
from diffussm_cli.sampling.beginning import (
    Beginning,
    description,
    is_picture,
    read_beginning,
)
from diffussm_cli.sampling.pipeline_denoiser import Denoiser

Generators = torch.Generator | Sequence[torch.Generator] | None


class Request(NamedTuple):
    """What a call asks for; the lists have one entry per image."""

    generators: list[torch.Generator]
    labels: list[int] | None
    prompts: list[str]
    negatives: list[str] | None


def read_request(
    denoiser: Denoiser,
    prompt: str | Sequence[str] | None,
    negative: str | Sequence[str] | None,
    class_labels: Any,
    generator: Generators,
    latents: Tensor | None,
    batch_size: int,
    times: int,
) -> Request:
    """The arguments of a call with one entry per image; `times` images of each prompt or label.

    Raises ValueError if they do not agree.
    """
    model = denoiser.model
    _check_prompt(denoiser.run.config, prompt, negative)
    for name, count in (("batch_size", batch_size), ("num_images_per_prompt", times)):
        if not _is_whole(count) or count < 1:
            raise ValueError(f"{name}: {count!r} must be a whole number of at least 1")
    labels = _labels(class_labels, model.num_classes)
    is_alone = isinstance(generator, torch.Generator) or generator is None
    generators: list[torch.Generator] = [] if is_alone else list(generator)  # type: ignore[arg-type]

    # the number of images
    kinds = (
        ("prompts or class_labels", prompt),
        ("prompts or class_labels", labels),
        ("negative prompts", negative),
    )
    counts = [
        (times * len(value), kind) for kind, value in kinds if isinstance(value, list | tuple)
    ]
    counts += [] if is_alone else [(len(generators), "generators")]
    counts += [] if latents is None else [(len(latents), "latents")]
    counts += [(times * batch_size, "of batch_size")] if batch_size > 1 or not counts else []
    n = counts[0][0]
    if any(count != n for count, _ in counts):
        described = " and ".join(f"{count} {kind}" for count, kind in counts)
        raise ValueError(f"{described} do not match; each image needs one")
    if not n or n % times:
        raise ValueError(f"{n} images cannot be {times} for each prompt or label")

    # the starting noise
    shape = (n, model.in_channels, *model.input_size)
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"latents: {tuple(latents.shape)} must be {shape}")
    if latents is not None:
        check_finite(latents)

    def per_image(value: Any) -> list:
        each = value if isinstance(value, list | tuple) else [value] * (n // times)
        return [entry for entry in each for _ in range(times)]

    return Request(
        [generator or torch.default_generator] * n if is_alone else generators,  # type: ignore[list-item]
        None if labels is None else per_image(labels),
        [] if prompt is None else per_image(prompt),
        None if negative is None else per_image(negative),
    )


def read_image(
    config: Config, decoding: Decoding, image: Any, mask: Any, strength: float | None
) -> Beginning:
    """What images begin with, from the arguments of a call; an image also in model space.

    Raises ValueError.
    """
    pictures = {"image": _picture("image", image), "mask": _picture("mask_image", mask)}
    try:
        beginning = read_beginning(config, config.sample, 1, **pictures, strength=strength)
        return beginning.encoded(decoding, config.data.downsample)
    except DiffussmError as e:
        raise ValueError(in_python(str(e), PARAMETERS | {"--mask": "mask_image"})) from e


def _picture(name: str, value: Any) -> Any:
    """A picture as `read_beginning` takes it: floats in [0, 1] and arrays, as the pipelines of
    diffusers take and return them, become uint8 (C, H, W).

    Raises ValueError.
    """
    if isinstance(value, list | tuple):
        raise ValueError(f"{name}: one image for all of a call, not a {type(value).__name__}")
    picture = value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        picture = torch.tensor(value)
        picture = picture.movedim(-1, -3) if picture.ndim > 2 else picture

    # A batch of one image, and floats.
    if isinstance(picture, Tensor) and picture.ndim == 4:
        if len(picture) != 1:
            raise ValueError(f"{name}: one image for all of a call, not {len(picture)}")
        picture = picture[0]
    if isinstance(picture, Tensor) and picture.is_floating_point() and picture.numel():
        if not (picture.min() >= 0 and picture.max() <= 1):  # NaN does not compare
            raise ValueError(f"{name}: floats must lie in [0, 1]")
        picture = (255 * picture).round().to(torch.uint8)

    if picture is not None and not is_picture(picture):
        raise ValueError(
            f"{name}: {description(value)} must be a file, an image of Pillow, an array (H, W, C) "
            "or a tensor (C, H, W), with 1 or 3 channels, of uint8 or of floats in [0, 1]"
        )
    return picture


def checked_guidance(guidance: float | None, config: Config) -> float:
    """The guidance scale, by default that of the run. Raises ValueError."""
    if guidance is None:
        return config.sample.guidance
    if not isinstance(guidance, numbers.Real) or not math.isfinite(guidance) or guidance < 0:
        raise ValueError(f"guidance_scale: {guidance!r} must be a number of at least 0")
    if guidance != 1 and not config.model.is_conditional:
        raise ValueError(
            f"guidance_scale: {guidance!r} needs a model of classes or text; leave it at 1"
        )
    if guidance != 1 and config.diffusion.in_one_step:
        raise ValueError(
            f"guidance_scale: {guidance!r} given, but this model draws in one step and its "
            "guidance is in the weights; leave it at 1"
        )
    return float(guidance)


def checked_steps(steps: int | None, config: Config) -> int:
    """The number of denoising steps, by default that of the run. Raises ValueError."""
    if steps is None:
        return config.sample.steps
    if config.diffusion.in_one_step and steps != 1:
        raise ValueError(
            f"num_inference_steps: {steps!r} must be 1, because this model draws in one step"
        )
    most = config.diffusion.timesteps
    if not _is_whole(steps) or not 1 <= steps <= most:
        raise ValueError(f"num_inference_steps: {steps!r} must be a whole number from 1 to {most}")
    return int(steps)


def _check_prompt(
    config: Config, prompt: str | Sequence[str] | None, negative: str | Sequence[str] | None
) -> None:
    for name, value in (("prompt", prompt), ("negative_prompt", negative)):
        texts = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name}: {value!r:.60} must be a text or a list of texts")

    with_text = config.model.text_width > 0
    if not with_text and (prompt or negative):
        raise ValueError("prompt: this model was trained without text")
    if with_text and prompt is None:
        raise ValueError("prompt: this model draws what a text says; give one")


def _labels(labels: Any, num_classes: int) -> int | list[int] | None:
    """One label for all images or a list of them, from numbers, arrays, tensors and nested lists.
    Raises ValueError.
    """
    if labels is None:
        return None
    if not num_classes:
        raise ValueError(f"class_labels: {labels!r:.60} given, but this model has no classes")

    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"class_labels: {labels!r:.60} must be whole numbers in 0..{num_classes - 1}"
        )

    checked = array.reshape(-1).tolist()
    if not all(0 <= label < num_classes for label in checked):
        raise ValueError(f"class_labels: {checked} must lie in 0..{num_classes - 1}")
    return checked[0] if array.ndim == 0 else checked


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)

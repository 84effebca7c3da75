"""A film of the denoising: x_t from noise to image, as an animated GIF or WebP."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from diffussm_cli.data.images import save_grid, to_uint8
from diffussm_cli.data.text import Text
from diffussm_cli.errors import ConfigError, writing
from diffussm_cli.machine.files import whole_file
from diffussm_cli.sampling.generate import name_of
from diffussm_cli.sampling.request import prompts_of
from diffussm_cli.sampling.sampler import Sampler

SUFFIXES = (".gif", ".webp")
IMAGES = 10  # most images side by side
FRAMES = 40  # most frames
MILLISECONDS = 80  # how long a frame shows
LAST = 2000  # and the last one


def write_film(sampler: Sampler, seeds: range, facts: Mapping[str, Any], path: Path) -> None:
    """Draw the first images of a request again, and write evenly spaced steps of their denoising
    side by side.

    Args:
        facts: of the request, from `sample_facts`.

    Raises:
        ConfigError: if the file cannot be written.
        NotFiniteError: if a frame holds NaN or infinite values.
    """
    seeds, labels = seeds[:IMAGES], facts["labels"] and facts["labels"][:IMAGES]
    text = sampler.text(prompts_of(facts, seeds), facts["negative"])
    states = _states(sampler, seeds, labels, text)

    # evenly spaced steps, decoded
    frames = []
    steps = np.linspace(0, len(states) - 1, min(FRAMES, len(states)))
    for i in np.unique(steps.round().astype(int)):
        names = [f"{name_of(seed)} in frame {i} of the film" for seed in seeds]
        images = to_uint8(sampler.decoding.decode(states[i]), names)
        if i == len(states) - 1:  # as these images are drawn
            images = sampler.beginning.paste(images)
        png = io.BytesIO()
        save_grid(images, png, columns=min(5, len(seeds)))
        frames.append(Image.open(png))

    # the file
    durations = [*[MILLISECONDS] * (len(frames) - 1), LAST]
    kind = path.suffix.removeprefix(".")
    with writing(f"--film: cannot write {str(path)!r}", ConfigError), whole_file(path) as file:
        frames[0].save(
            file,
            kind,
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
            quality=90,
        )


def _states(
    sampler: Sampler, seeds: range, labels: Sequence[int] | None, text: Text | None
) -> list[Tensor]:
    """x_t of the images at each call of the network, and at last the images, each (B, C, H, W) in
    model space.
    """
    states: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        # with guidance, the network sees each image twice
        states.append(inputs[0][: len(seeds)].cpu())

    hook = sampler.model.register_forward_pre_hook(record)
    try:
        batches = list(sampler.generate(seeds, labels, text, batch_size=len(seeds)))  # all in one
    finally:
        hook.remove()
    return [*states, *(images for _, images in batches)]

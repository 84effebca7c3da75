"""A film of the denoising: x_t from noise to image, as an animated GIF or WebP."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffussm_cli.data.images import save_grid, to_uint8
from diffussm_cli.errors import ConfigError, writing
from diffussm_cli.machine.files import whole_file
from diffussm_cli.sampling.folder import prompts_of
from diffussm_cli.sampling.generate import generate, name_of
from diffussm_cli.sampling.sampler import Sampler

SUFFIXES = (".gif", ".webp")
IMAGES, FRAMES, MILLISECONDS, LAST = 10, 40, 80, 2000  # most images and frames; how long a frame and the last one show


def write_film(sampler: Sampler, seeds: range, facts: Mapping[str, Any], path: Path) -> None:
    """Draw the first images of a request again, and write evenly spaced steps of their denoising side by side.

    Args:
        facts: of the request, from `sample_facts`.

    Raises:
        ConfigError: if the file cannot be written.
        NotFiniteError: if a frame holds NaN or infinite values.
    """
    seeds, labels = seeds[:IMAGES], facts["labels"] and facts["labels"][:IMAGES]
    text = sampler.text(prompts_of(facts, seeds), facts["negative"])
    states: list[torch.Tensor] = []  # what the network sees; with guidance, each image twice
    hook = sampler.model.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][: len(seeds)].cpu()))
    request = (sampler.model, sampler.objective, sampler.sampling, seeds, labels, IMAGES, sampler.dtype, text)
    states += [drawn.images for drawn in generate(*request)]
    hook.remove()
    frames = []
    for i in np.unique(np.linspace(0, len(states) - 1, min(FRAMES, len(states))).round().astype(int)):
        png = io.BytesIO()
        names = [f"{name_of(seed)} in frame {i} of the film" for seed in seeds]
        save_grid(to_uint8(sampler.decoding.decode(states[i]), names), png, columns=min(5, len(seeds)))
        frames.append(Image.open(png))
    shown = [*[MILLISECONDS] * (len(frames) - 1), LAST]
    with writing(f"--film: cannot write {str(path)!r}", ConfigError), whole_file(path) as file:
        kind = path.suffix.removeprefix(".")
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=shown, loop=0, quality=90)

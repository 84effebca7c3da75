"""Previews: a grid of images at fixed seeds, drawn with the averaged weights while a run trains."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from diffussm_cli import runs
from diffussm_cli.config import SAMPLERS, Config
from diffussm_cli.data.decoding import Decoding
from diffussm_cli.data.images import save_grid
from diffussm_cli.data.source import Source, captions_of
from diffussm_cli.data.text import check_prompt, open_texts
from diffussm_cli.machine.files import whole_file
from diffussm_cli.model import Backbone
from diffussm_cli.sampling.sampler import Sampler
from diffussm_cli.training.nearest import is_small, write_nearest
from diffussm_cli.training.step import Step

COLUMNS = 10  # at most


def columns_of(images: int, classes: int) -> int:
    """The columns of a grid, each of one class: so many times the classes that it is no higher than
    wide, if that are not too many.
    """
    if not classes or classes >= COLUMNS:
        return min(COLUMNS, classes or images)
    wide = [c for c in range(classes, COLUMNS + 1, classes) if c * c >= images]
    return wide[0] if wide else COLUMNS // classes * classes


class Previews:
    """Draws RUN/samples/step-*.png.

    A run with text draws `sample.prompts` in turn, or captions of its training images, the same
    ones every time.

    Raises:
        DiffussmError: now and not at the first preview, if a prompt or its encoder cannot be used.
    """

    def __init__(
        self, config: Config, source: Source, root: Path, decoding: Callable[[], Decoding]
    ):
        self.config = config
        self.source = source
        self.root = root
        self.decoding = decoding()

        prompts = config.sample.prompts
        for prompt in prompts:
            check_prompt(prompt, "sample.prompts")
        if prompts:
            open_texts(config)

    @property
    def warnings(self) -> list[str]:
        """What the user should know before training begins."""
        return [self.decoding.warning] if self.decoding.warning else []

    def draw(self, step: Step, model: Backbone, last: bool) -> Path:
        """Draw a grid of this step with a model in eval mode.

        The last one of a run looks as `diffussm sample` draws it, and the nearest training image of
        each sample is written too, if the data are a small set of pixels.

        Raises:
            NotFiniteError: if an image holds NaN or infinite values.
            DataError: if a training image cannot be read any more; the preview is there.
        """
        config = self.config
        n = config.train.sample_images
        classes = config.model.num_classes
        columns = columns_of(n, classes)

        # Earlier ones are drawn in fewer steps, by the objective's usual sampler.
        sampling = config.sample
        if not last and not config.diffusion.in_one_step:
            steps = min(config.train.sample_steps, config.diffusion.timesteps)
            sampling = dataclasses.replace(
                sampling, sampler=SAMPLERS[config.diffusion.objective][0], steps=steps
            )
        sampler = Sampler(model, config, sampling, self.decoding, dtype=step.dtype)

        # One class per column, or one caption per image.
        labels = sampler.labels(range(n), range(min(columns, classes)))
        titles = list(itertools.islice(itertools.cycle(config.sample.prompts), n))
        text = None
        if titles:
            text = sampler.text(titles)
        elif config.model.text_width:
            text = captions_of(self.source, n)

        images = torch.cat([images for _, images in sampler.draw(range(n), labels, text)])
        path = self.root / runs.SAMPLES / f"step-{step.number:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            save_grid(images, file, columns, titles)

        if last and config.data.vae is None and is_small(self.source, images[0].numel()):
            write_nearest(self.root, step.number, images, self.source, flip=config.data.flip)
        return path

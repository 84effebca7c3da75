"""A trained model that is ready to draw, and its images as one picture."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffussm_cli.config import Config, SampleConfig, check_whole, is_truth_value, unused_of_request
from diffussm_cli.data.images import grid_mark, image_grid, is_grid
from diffussm_cli.errors import ConfigError, naming_parameters, writing
from diffussm_cli.library.requests import (
    check_labels,
    check_names,
    check_numbers,
    check_paths,
    checked_prompts,
    unused_seed,
    with_fields,
)
from diffussm_cli.machine.device import pick_device, pick_dtype
from diffussm_cli.machine.files import check_output, whole_file
from diffussm_cli.model import Backbone
from diffussm_cli.runs import TrainedRun, find_run
from diffussm_cli.sampling.beginning import Beginning, Picture, read_beginning, unused_of_beginning
from diffussm_cli.sampling.sampler import Sampler, open_sampler


@dataclass(frozen=True)
class Run:
    """A trained model that is ready to draw.

    Attributes:
        trained: where it comes from: folder, configuration, weights, step and average.
        device: where images are drawn, as `diffussm sample` takes it.
        precision: in which precision, as `diffussm sample` takes it.
    """

    trained: TrainedRun
    device: str = "auto"
    precision: str = "auto"

    @property
    def folder(self) -> Path:
        """The run folder; of a model that is none, the folder to which its images go."""
        return self.trained.root

    @property
    def config(self) -> Config:
        """Everything that determined the run."""
        return self.trained.config

    @property
    @naming_parameters()
    def model(self) -> Backbone:
        """The network with averaged weights, in eval mode: (x_t, t, y) -> what its objective
        predicts.
        """
        return self._sampler().model

    @naming_parameters()
    def sample(
        self,
        num: int = 40,
        *,
        classes: Sequence[int | str] = (),
        prompts: Sequence[str] = (),
        negative: str | None = None,
        seed: int = 0,
        batch_size: int = 64,
        image: Picture | None = None,
        mask: Picture | None = None,
        strength: float | None = None,
        interpolate: Sequence[int] | None = None,
        callback: Callable[[int, Tensor], Any] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Draw images of the seeds seed, seed + 1, ...: uint8 (num, C, H, W).

        Args:
            classes: labels or names of classes, used in turn; if empty, each seed draws its own.
            prompts: a list of captions, used in turn, for a model with text; by default the run's
                `sample.prompts`.
            negative: a prompt that guidance leads away from.
            image: an image to begin with in place of noise: a file, an image of Pillow, or uint8
                (C, H, W), of the size of the run's images.
            mask: the same with white pixels, or bool (H, W), where `image` is drawn anew; the rest
                of it is kept.
            strength: how much of `image` is drawn again, from 0 (nothing) to 1; by default 0.8, and
                1 with a mask.
            interpolate: two seeds in place of `seed`; the images go from that of the first to that
                of the second. Without `classes`, all have the label of the first.
            callback: is called with the number of the step, from 0, and x_t (B, C, H, W) after each
                step of each batch.
            sampling: fields of the section `sample` to change: steps, sampler, guidance, ...

        Raises:
            DiffussmError: for a request that the model does not support.

        Warns:
            UserWarning: about the parts of the request that nothing uses.
        """
        from diffussm_cli.data.text import check_prompts

        check_names(sampling, Run.sample)
        check_numbers({"num": num, "seed": seed, "batch_size": batch_size})
        labels = check_labels(classes, self.config)
        prompts = checked_prompts(prompts, negative)
        if callback is not None and not callable(callback):
            raise ConfigError(f"callback: {callback!r:.80} must be a function of step and x_t")

        # How to draw, and what of the request has no effect.
        request = with_fields(self.config, sampling, "sample").sample
        beginning = read_beginning(self.config, request, num, image, mask, strength, interpolate)
        sampler = self._sampler(request, batch_size, beginning)
        lines = [unused_of_request(self.config, request, num, labels, prompts)]
        lines += [unused_seed(seed, interpolate), unused_of_beginning(beginning, request)]
        for line in filter(None, lines):
            warnings.warn(line, stacklevel=3)

        # The seeds and captions of the images.
        prompts = prompts or self.config.sample.prompts
        check_prompts(prompts, negative, self.config, sampler.sampling)
        seeds = range(num) if interpolate else range(seed, seed + num)
        captions = [prompts[i % len(prompts)] for i in range(num) if prompts]
        text = sampler.text(captions, negative)

        def after_step(step: int, _: Any, x: Tensor) -> Tensor:
            if callback is not None:
                callback(step, x)
            return x

        drawn = sampler.draw(seeds, sampler.labels(seeds, labels), text, after_step)
        return torch.cat([images for _, images in drawn])

    def _sampler(
        self,
        sampling: SampleConfig | None = None,
        batch_size: int = 64,
        beginning: Beginning | None = None,
    ) -> Sampler:
        where = self.precision, self.device
        return open_sampler(self.trained, sampling, batch_size, *where, beginning)


@naming_parameters()
def load(
    run: Path | str | None = None,
    *,
    ema: float | None = None,
    objective: str | None = None,
    ema_width: float | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
) -> Run:
    """Open a trained model.

    Args:
        run: a run folder, its `final/`, a checkpoint, a published DiT's .pt file, a model of the
            package ("mnist", "mnist-one-step", "emoji"), or OWNER/NAME[@REVISION] on the hub; by
            default the newest run in runs/.
        ema: the decay of the average, if the run has several.
        objective: what a published .pt file predicts: noise, as DiT's, or flow, as SiT's.
        ema_width: the width of an average that the snapshots of the run give, such as 0.1.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: auto, fp32, bf16.

    Raises:
        DiffussmError: if there is no such run, it is damaged, or the device is not here.
    """
    # The request. With "auto" nothing is asked of a device before it draws.
    if run is not None:
        check_paths(run=run)
    for name, value in {"ema": ema, "ema_width": ema_width}.items():
        if value is not None and (is_truth_value(value) or not isinstance(value, int | float)):
            raise ConfigError(f"{name}: {value!r:.80} must be a number")
    if isinstance(device, torch.device):
        device = str(device)
    for name, choice in {"device": device, "precision": precision}.items():
        if not isinstance(choice, str):
            raise ConfigError(f"{name}: {choice!r:.80} must be text, such as 'auto'")
    if (device, precision) != ("auto", "auto"):
        pick_dtype(precision, pick_device(device))

    trained = find_run(None if run is None else Path(run), ema, objective, ema_width)
    return Run(trained, device, precision)


@naming_parameters()
def grid(images: Tensor, path: Path | str | None = None, columns: int = 10) -> Image.Image:
    """Images in rows as one picture; small ones are enlarged.

    Args:
        images: uint8 (n, 1 or 3, H, W), n at least 1.
        path: also write it there, as .png. It replaces nothing but an earlier grid.
        columns: images in a row, at least 1.

    Raises:
        DiffussmError: for images or columns that make no grid, and for a path that cannot be
            written.
    """
    # The request.
    is_tensor = isinstance(images, Tensor)
    shape = tuple(images.shape) if is_tensor else ()
    is_pixels = is_tensor and images.dtype == torch.uint8 and len(shape) == 4 and 0 not in shape
    if not is_pixels or shape[1] not in (1, 3):
        kind = f"{images.dtype} {shape}" if is_tensor else type(images).__name__
        raise ConfigError(f"images: {kind} must be uint8 (n, 1 or 3, H, W), n at least 1")
    check_whole("columns", columns, least=1)
    target = None if path is None else Path(path)
    if target is not None:
        check_output(target, "path", [".png"])
        if target.exists() and not is_grid(target):
            raise ConfigError(
                f"path: {str(target)!r} exists and would be replaced; name another file"
            )

    # The picture.
    pixels = np.asarray(image_grid(images.cpu(), min(columns, len(images))).permute(1, 2, 0))
    picture = Image.fromarray(pixels[..., 0] if shape[1] == 1 else pixels)
    if target is not None:
        with writing(f"path: cannot write {str(target)!r}"), whole_file(target) as file:
            picture.save(file, "PNG", pnginfo=grid_mark())
    return picture

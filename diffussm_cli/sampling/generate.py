"""From seeds to images in model space. Image i depends only on seed i and its class: one CPU
generator per image.

B batch   C channels   H x W grid   images in model space, (B, C, H, W) float32
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffussm_cli.config import SampleConfig
from diffussm_cli.data.text import Text
from diffussm_cli.diffusion.denoiser import (
    Denoiser,
    LabelledModel,
    autoguided,
    clipped,
    guided,
    keeping,
    labelled,
)
from diffussm_cli.diffusion.integrators import AfterStep
from diffussm_cli.diffusion.process import Objective
from diffussm_cli.diffusion.samplers import sample_by_name
from diffussm_cli.errors import NotFiniteError
from diffussm_cli.model.backbone import Backbone
from diffussm_cli.model.mixer import kept_kernels
from diffussm_cli.sampling.beginning import Beginning
from diffussm_cli.sampling.precision import autocast, products_cast


def generate(
    model: Backbone,
    objective: Objective,
    sampling: SampleConfig,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    text: Text | None = None,
    beginning: Beginning | None = None,
    after_step: AfterStep | None = None,
    guide: Backbone | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Draw one image per seed; yields seeds and images, (B, C, H, W) float32 on the CPU, batch by
    batch.

    Kernels are made and weights are cast once for all batches.

    Args:
        model: a DiffuSSM or another backbone with its attributes, in eval mode, on the device of
            `objective`.
        sampling: sampler, steps and guidance.
        labels: one per seed; by default each is drawn uniformly with the generator of its seed
            (`labels_of`).
        dtype: autocast dtype; float32 means no autocast.
        text: one caption per seed, for a model with text.
        beginning: what images begin with in place of the noise of their seeds; if it is noise
            between two seeds, `seeds` are the places between them.
        after_step: is called after each step of each batch; see `samplers.sample`.
        guide: the model that guidance leads away from, in place of the null class.

    Raises:
        NotFiniteError: if an image becomes NaN or infinite; it names the seed and the step.
    """
    beginning = beginning or Beginning()
    with contextlib.ExitStack() as stack:
        for network in (model, guide):
            if network is not None:
                stack.enter_context(kept_kernels(network))
                stack.enter_context(products_cast(network, dtype))
        for start in range(0, len(seeds), batch_size):
            chosen = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[chosen]]
            noise = _between(model, beginning, seeds[chosen]) if beginning.ends else None
            y, x = begin(model, objective.device, generators, labels and labels[chosen], noise)
            captions = text and text.of(chosen)
            denoise = make_denoiser(model, objective, sampling, y, captions, guide)

            # An image to begin with, whose known pixels stay.
            x_0, redrawn = beginning.x_0, beginning.redrawn
            if x_0 is not None:
                x_0 = x_0.to(x).expand_as(x)
            if x_0 is not None and redrawn is not None:
                redrawn = redrawn.to(x.device)
                denoise = keeping(denoise, objective, x_0, x, redrawn)

            try:
                with torch.no_grad(), autocast(objective.device, dtype):
                    images = sample_by_name(
                        sampling.sampler,
                        denoise,
                        objective,
                        x,
                        sampling.steps,
                        generators,
                        model.learn_sigma,
                        x_0,
                        beginning.strength,
                        after_step,
                    )
            except NotFiniteError as e:
                raise NotFiniteError(name_of(seeds[start + e.index]), e.index, e.where) from None

            yield list(seeds[chosen]), beginning.keep(images).float().cpu()


def _between(model: Backbone, beginning: Beginning, places: Sequence[int]) -> Tensor:
    """x_T at places between the two seeds of a beginning, (B, C, H, W)."""
    assert beginning.ends is not None, "checked by the caller"
    generators = [torch.Generator().manual_seed(seed) for seed in beginning.ends]
    _, ends = begin(model, torch.device("cpu"), generators)
    return beginning.noise(ends, places)


def name_of(seed: int) -> str:
    """What an error calls the image of a seed."""
    return f"the image of seed {seed}"


def labels_of(seeds: Sequence[int], num_classes: int) -> list[int]:
    """The labels that `generate` draws for these seeds if the model has `num_classes` classes."""
    generator = torch.Generator()
    return [_label(generator.manual_seed(seed), num_classes) for seed in seeds]


def _label(generator: torch.Generator, num_classes: int) -> int:
    return int(torch.randint(max(1, num_classes), (), generator=generator))


def begin(
    model: Backbone,
    device: torch.device,
    generators: Sequence[torch.Generator],
    labels: Sequence[int] | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """What images begin with: labels, (B,) or None for an unconditional model, and x_T, (B, C, H,
    W), on `device`.

    Args:
        generators: each gives what `labels` and `noise` do not, first the label.
        noise: x_T, (B, C, H, W).
    """
    drawn = [_label(g, model.num_classes) for g in generators]
    chosen = drawn if labels is None else list(labels)
    y = torch.tensor(chosen, device=device) if model.num_classes else None
    if noise is None:
        shape = (model.in_channels, *model.input_size)
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    return y, noise.to(device, _solver_dtype(device))


def _solver_dtype(device: torch.device) -> torch.dtype:
    """The dtype of x_t between steps: near t = T, noise is 150 times larger than the image and
    float32 loses digits.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def make_denoiser(
    model,
    objective: Objective,
    sampling: SampleConfig,
    y: Tensor | None,
    text: Text | None = None,
    guide: Backbone | None = None,
) -> Denoiser:
    """Wrap the model with its labels, captions, guidance and clipping as `sampling` specifies; a
    guide gets the same labels and captions.
    """
    # first half: conditional; second half: unconditional or negative
    labels = None if y is None else torch.cat([y, torch.full_like(y, model.null_class)])
    captions = None
    if text is not None:
        positive = text.captions.to(objective.device)
        null = (
            torch.zeros_like(positive)
            if text.negative is None
            else text.negative.to(positive).expand_as(positive)
        )
        captions = torch.cat([positive, null])

    def predictor(network: Any) -> LabelledModel:
        def predict(x: Tensor, t: Tensor, rows: Tensor | None) -> Tensor:
            y, text = (None if each is None else each[rows] for each in (labels, captions))
            return network(x.float(), t, y, text).to(x.dtype)

        return predict

    condition = captions if labels is None else labels
    conditional = unconditional = None
    if condition is not None:
        rows = torch.arange(len(condition), device=condition.device)
        conditional, unconditional = rows.chunk(2)

    channels = None if sampling.guidance_channels == "all" else int(sampling.guidance_channels)
    how = sampling.guidance, channels, sampling.guidance_interval or None
    if guide is not None:
        weaker = labelled(predictor(guide), conditional)
        denoise = autoguided(labelled(predictor(model), conditional), weaker, *how)
    elif conditional is None or unconditional is None:
        denoise = labelled(predictor(model), None)
    else:
        denoise = guided(predictor(model), conditional, unconditional, *how)
    return clipped(denoise, objective) if sampling.clip else denoise

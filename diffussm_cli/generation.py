"""Seeds to images. Image i is a function of seed i (and its class) alone: one CPU generator an image.

B batch   C channels   H x W grid   images in model space, (B, C, H, W) float32
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffussm_cli.config import SampleConfig
from diffussm_cli.diffusion.process import GaussianDiffusion
from diffussm_cli.diffusion.sampling import Denoiser, clipped, guided, labelled, make_scheduler, sample
from diffussm_cli.model.block import HourglassLinear


class Drawn(NamedTuple):
    """A batch of finished images."""

    seeds: list[int]
    labels: list[int] | None  # None for an unconditional model
    images: Tensor  # (B, C, H, W), on the CPU


def generate(
    model: nn.Module,
    process: GaussianDiffusion,
    how: SampleConfig,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Drawn]:
    """Draw one image a seed, batch by batch. Afterwards the model keeps no kernels.

    Args:
        model: a DiffuSSM or another backbone with its attributes, in eval mode, on the device of `process`.
        labels: one a seed; without them each is drawn uniformly from its seed's generator (`labels_of`).
        dtype: of autocast; float32 for none.
    """
    try:
        for start in range(0, len(seeds), batch_size):
            chosen = slice(start, start + batch_size)
            yield _draw(model, process, how, seeds[chosen], labels and labels[chosen], dtype)
    finally:
        model.forget_kernels()


def labels_of(seeds: Sequence[int], num_classes: int) -> list[int]:
    """The labels that `generate` draws for seeds of a model with that many classes."""
    generator = torch.Generator()
    return [_label(generator.manual_seed(seed), num_classes) for seed in seeds]


def _label(generator: torch.Generator, num_classes: int) -> int:
    return int(torch.randint(max(1, num_classes), (), generator=generator))


def _draw(model, process, how: SampleConfig, seeds, wanted, dtype) -> Drawn:
    device = process.signal.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = [_label(g, model.num_classes) for g in generators]
    labels = None if not model.num_classes else drawn if wanted is None else list(wanted)
    shape = (model.in_channels, *model.input_size)
    x = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device, _solver_dtype(device))
    y = None if labels is None else torch.tensor(labels, device=device)
    scheduler = make_scheduler(how.sampler, process, how.steps, model.learn_sigma)
    with torch.no_grad(), in_precision(model, dtype):
        images = sample(make_denoiser(model, process, how, y), scheduler, x, generators)
    return Drawn(list(seeds), labels, images.float().cpu())


@contextlib.contextmanager
def in_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to `dtype`, unless it is float32, with the weights of products cast once and not at each call."""
    whole = [(p, p.data) for p in _product_parameters(model)]
    try:
        cast_products(model, dtype)
        with torch.autocast(next(model.parameters()).device.type, dtype, enabled=dtype != torch.float32):
            yield
    finally:
        for p, data in whole:
            p.data = data


def cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """For good what `in_precision` does for a while. No result under autocast to `dtype` changes; float32 is none."""
    if dtype != torch.float32:
        for p in _product_parameters(model):
            p.data = p.data.to(dtype)


def _product_parameters(model: nn.Module) -> list[nn.Parameter]:
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | HourglassLinear)]
    return [p for layer in layers for p in layer.parameters(recurse=False)]


def _solver_dtype(device: torch.device) -> torch.dtype:
    """Of x_t outside the network: at t near T noise and image differ 150-fold in size, where float32 loses digits."""
    return torch.float32 if device.type == "mps" else torch.float64


def make_denoiser(model, process: GaussianDiffusion, how: SampleConfig, y: Tensor | None) -> Denoiser:
    """The model with its labels, guidance and clipping, as a sampling request wants them."""

    def predict(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return model(x.float(), t, y).to(x.dtype)

    if y is None:
        denoise = labelled(predict, None)
    else:
        channels = None if how.guidance_channels == "all" else int(how.guidance_channels)
        interval = how.guidance_interval or None
        denoise = guided(predict, y, model.null_class, how.guidance, channels, interval)
    return clipped(denoise, process) if how.clip else denoise

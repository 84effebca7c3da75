"""The work that is measured: models with random weights, and the calls that are timed."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from diffussm_cli.config import Config, SampleConfig
from diffussm_cli.diffusion.process import GaussianDiffusion
from diffussm_cli.diffusion.sampling import make_scheduler, sample
from diffussm_cli.model import Backbone, build_model
from diffussm_cli.model.s4d.layer import S4D
from diffussm_cli.sampling.generate import Text, make_denoiser
from diffussm_cli.sampling.precision import cast_products

FORWARD, TRAINING, GUIDED = "forward", "forward+backward", "guided step"
KINDS = (FORWARD, TRAINING, GUIDED)


@dataclass(frozen=True)
class Setting:
    """How time and memory are measured."""

    device: torch.device
    dtype: torch.dtype = torch.float32  # of autocast; float32 means no autocast
    batch_size: int = 1
    repeats: int = 5
    depth: int | None = None  # measure that many blocks and scale to all
    compiled: bool = False  # with torch.compile


def build(config: Config, setting: Setting, depth: int) -> Backbone:
    """A model of `depth` blocks with small random weights: the published initialisation would multiply by zeros."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=depth))
    with torch.device("meta"):
        model = build_model(config)
    model.materialize(setting.device)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
        for module in model.modules():
            if isinstance(module, S4D):
                module.reset_parameters()
    if setting.compiled:
        model.compile()
    return model


def workload(model: Backbone, config: Config, kind: str, setting: Setting) -> Callable[[], None]:
    """The call to time, on a fixed batch. The first call puts the model into train or eval mode."""
    B, device = setting.batch_size, setting.device
    x = torch.randn(B, model.in_channels, *model.input_size, device=device)
    t = torch.full((B,), 500, device=device)
    y = torch.zeros(B, dtype=torch.long, device=device) if model.num_classes else None
    text = torch.ones(B, 1 + model.text_tokens, model.text_width, device=device) if model.text_width else None
    process = GaussianDiffusion.from_config(config.diffusion, device)
    sampling = SampleConfig(guidance=1.5 if model.num_classes or model.text_width else 1.0)
    denoise = make_denoiser(model, process, sampling, y, None if text is None else Text(text))
    generators = [torch.Generator() for _ in range(B)]

    def forward() -> None:
        with torch.no_grad():
            model(x, t, y, text)

    def forward_backward() -> None:
        model(x, t, y, text).square().mean().backward()
        model.zero_grad()

    def guided_step() -> None:
        sample(denoise, make_scheduler("ddpm", process, 1, model.learn_sigma), x, generators)

    if kind != TRAINING:
        cast_products(model, setting.dtype)  # as sampling does
    call = {FORWARD: forward, TRAINING: forward_backward, GUIDED: guided_step}[kind]

    def run() -> None:
        if model.training != (kind == TRAINING):
            model.train(kind == TRAINING)  # frees kept kernels, so only if the mode changes
        with torch.autocast(device.type, setting.dtype, enabled=setting.dtype != torch.float32):
            call()

    return run


def product(setting: Setting, rows: int = 4096, width: int = 1152) -> tuple[Callable[[], object], float]:
    """A matrix product of the size that XL uses at 512, and its multiply-adds."""
    x = torch.randn(rows, width, device=setting.device, dtype=setting.dtype)
    W = torch.randn(2 * width, width, device=setting.device, dtype=setting.dtype)
    return lambda: nn.functional.linear(x, W), rows * width * 2 * width

"""Analytic cost of a configuration: parameters, tokens, multiply-adds of a forward pass, memory of training.

    L = HW/P^2 tokens   M compression   J = L/M positions   D width   N state size   n FFT length   F = n/2 + 1
    E width of text vectors   K text tokens, which stand twice in the sequence and take a position each

"Gflops" are billions of multiply-adds of one forward pass for one image, the convention of DiT and of the paper.
Transforms and complex products are converted at two real operations per multiply-add. Elementwise work on real
numbers (activations, norms, gates) is not counted, as in the literature. `count.py` counts the same from a trace.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch

from diffussm_cli.config import Config, ModelConfig
from diffussm_cli.model import Backbone, build_model, count_parameters
from diffussm_cli.model.mixer import Mixer


@dataclass(frozen=True)
class Cost:
    """Cost of one model per image. `parts` are Gflops by name; `kernel_gflops` is spent once per weight update.

    `training_bytes` is the memory per process when `processes` of them train the model together.
    """

    name: str
    resolution: tuple[int, int]
    parameters: int
    tokens: int
    positions: int
    parts: dict[str, float]
    kernel_gflops: float
    training_images: int
    training_bytes: int
    processes: int

    @property
    def gflops(self) -> float:
        """Gflops of a forward pass, kernels not included."""
        return sum(self.parts.values())

    @property
    def training_gflops(self) -> float:
        """Forward Gflops times training images: what the paper calls total Gflops."""
        return self.gflops * self.training_images


def cost(config: Config, name: str | None = None, processes: int = 1) -> Cost:
    """The cost of a configuration, under its preset's name or another; builds one block, on the meta device.

    Args:
        processes: number of processes, which share the batch of a step and, with `train.parallel=fsdp`, the parameters.
    """
    model, m, t = with_one_block(config), config.model, config.train
    parameters = count_parameters(model) + (m.depth - 1) * count_parameters(model.blocks[0])
    H, W = config.data.grid
    tokens = (H // m.patch_size, W // m.patch_size)
    L = math.prod(tokens)
    sequence = in_sequence(m, L)
    if m.backbone == "dit":
        blocks, kernel = _dit_block(m, sequence), 0.0
    else:
        blocks, kernel = _diffussm_block(m, mixer_of(model), sequence, tokens)
    parts = {part: m.depth * macs for part, macs in blocks.items()}
    for part, macs in _outside(config, L).items():
        parts[part] = parts.get(part, 0) + macs
    return Cost(
        name=name or config.preset,
        resolution=config.data.size,
        parameters=parameters,
        tokens=L,
        positions=L // m.compression,
        parts={part: macs / 1e9 for part, macs in parts.items()},
        kernel_gflops=m.depth * kernel / 1e9,
        training_images=t.steps * t.batch_size,
        training_bytes=training_bytes(config, model, parameters, processes),
        processes=processes,
    )


def in_sequence(m: ModelConfig, L: int) -> int:
    """Tokens that the blocks see: L of the image, and M for each of the 2K text positions."""
    return L + 2 * m.text_tokens * m.compression


def with_one_block(config: Config) -> Backbone:
    """The model of a configuration on the meta device, with a single block, as all blocks are alike."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=1))
    with torch.device("meta"):
        return build_model(config)


def mixer_of(model: Backbone) -> Mixer:
    """The mixer of the first block of a DiffuSSM."""
    return model.blocks[0].mixer  # type: ignore[return-value]


def _diffussm_block(m: ModelConfig, mixer: Mixer, L: int, grid: tuple[int, int]) -> tuple[dict[str, float], float]:
    """Multiply-adds of one block per image, and of its kernels: (13/M + 1) L D^2 is the paper's formula."""
    M, D = m.compression, m.hidden_size
    parts = {"dense layers": (13 / M + 1) * L * D**2, "conditioning": 2 * D**2, **mixer.macs(L, grid)}
    return parts | ({"local": 9 * L * D} if m.local else {}), mixer.kernel_macs(L, grid)


def _dit_block(m: ModelConfig, L: int) -> dict[str, float]:
    """Multiply-adds of one block per image: q, k and v of every token, output and MLP of every position."""
    M, D = m.compression, m.hidden_size
    return {"dense layers": (3 + 9 / M) * L * D**2, "attention": 2 * L**2 * D, "conditioning": 6 * D**2}


def _outside(config: Config, L: int) -> dict[str, float]:
    """Multiply-adds outside the blocks, by name of the part."""
    m = config.model
    D, taps = m.hidden_size, config.data.channels * m.patch_size**2
    out = (2 if m.learn_sigma else 1) * taps
    parts: dict[str, float] = {"conditioning": (256 + D) * D + 2 * D**2, "in and out": L * D * (taps + out)}
    return parts | ({"text": ((1 + m.text_tokens) * m.text_width + D) * D} if m.text_width else {})


def training_bytes(config: Config, model: Backbone, parameters: int, processes: int = 1) -> int:
    """An estimate of peak memory in training: weights, gradients, two Adam moments, EMAs, saved activations, workspace.

    `model` has a single block. It is per process if several share the batch. With FSDP they also share the
    parameters, and each gathers the weights and gradients of two blocks at a time; otherwise each holds all of them.

    Activations are those that eager autograd saves for one part of the batch, in float32 unless `train.precision` is
    bf16, plus the kernels. A backward pass needs another two blocks. Peaks measured on a CPU were within 25% of it
    (s-256 at batch 8, with and without checkpointing and with every mixer; mnist at batch 64).
    """
    m, t = config.model, config.train
    H, W = config.data.grid
    L = in_sequence(m, H * W // m.patch_size**2)
    B, D, M = max(1, t.batch_size // t.accumulate // processes), m.hidden_size, m.compression
    wide, narrow = 4, 2 if t.precision == "bf16" else 4
    kernels = 0.0
    if m.backbone == "dit":
        per_token = (8 * D + 20 * D / M) * narrow  # qkv twice, attention out twice; norms, MLP, residuals
    else:
        positions = 20 * D * narrow / M  # residual, norm, W0, W_down, W1, W2, before and after GELU, and the gate
        mixer = mixer_of(model)
        tokens = 4 * D * narrow  # U before and after GELU, Y
        per_token = positions + tokens + (mixer.saved() + (2 * D if m.local else 0)) * narrow
        kernels = mixer.saved_kernels(L, (H // m.patch_size, W // m.patch_size)) * wide
    activations = B * L * per_token
    blocks = 1 if t.gradient_checkpointing else m.depth
    kept = B * L / M * D * wide * m.depth if t.gradient_checkpointing else 0
    state: float = parameters * (4 + len(t.ema)) * 4
    if t.parallel == "fsdp" and processes > 1:
        state = state / processes + 2 * parameters / m.depth * 2 * 4
    return int(state + blocks * (activations + kernels) + kept + 2 * activations)

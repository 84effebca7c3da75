"""Analytic cost of a configuration: parameters, tokens, multiply-adds of a forward pass, memory of training.

    L = HW/P^2 tokens   M compression   J = L/M positions   D width   N state size   n FFT length   F = n/2 + 1
    E width of text vectors   K text tokens, which stand twice in the sequence and take a position each

"Gflops" are billions of multiply-adds of one forward pass for one image, the convention of DiT and of the paper.
Transforms and complex products are converted at two real operations per multiply-add. Elementwise work on real
numbers (activations, norms, gates) is not counted, as in the literature. `count.py` counts the same from a trace.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffussm_cli.config import Config, ModelConfig
from diffussm_cli.model import Backbone, build_model, count_parameters
from diffussm_cli.model.mixers.linear import CHUNK
from diffussm_cli.model.s4d.convolution import fft_length
from diffussm_cli.model.s4d.kernel import levels

COMPLEX_PRODUCT = 3  # 4 products and 2 sums, two per multiply-add


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
    L = H * W // m.patch_size**2
    sequence = in_sequence(m, L)
    blocks, kernel = _dit_block(m, sequence) if m.backbone == "dit" else _diffussm_block(m, sequence)
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
        training_bytes=training_bytes(config, parameters, processes),
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


def _diffussm_block(m: ModelConfig, L: int) -> tuple[dict[str, float], float]:
    """Multiply-adds of one block per image, and of its kernels: (13/M + 1) L D^2 is the paper's formula."""
    M, D = m.compression, m.hidden_size
    mixer, kernel = MIXER_MACS[m.mixer](m, D, L)
    parts = {"dense layers": (13 / M + 1) * L * D**2, "conditioning": 2 * D**2, **mixer}
    return parts | ({"local": 9 * L * D} if m.local else {}), kernel


def _s4d(m: ModelConfig, D: int, L: int) -> tuple[dict[str, float], float]:
    (A, T), n = levels(L), fft_length(L)
    parts = {
        "FFT": 3 * D * fft_macs(n),  # one forward transform, two inverse
        "spectra": 2 * D * (n // 2 + 1) * COMPLEX_PRODUCT,
    }
    tables = (_table(A) + A + _table(T)) * m.d_state // 2 * COMPLEX_PRODUCT
    return parts, 2 * D * (m.d_state * A * T + tables + fft_macs(n))


def _linear(m: ModelConfig, D: int, L: int) -> tuple[dict[str, float], float]:
    """Queries, keys and gates; then, per direction and token, T products with keys and values, and two with a state."""
    whole = math.ceil(L / CHUNK) * CHUNK
    return {"mixer": 2 * L * D * (D + m.heads) + 2 * whole * (2 * CHUNK * D + 2 * D**2 / m.heads)}, 0


# Multiply-adds of a mixer by name of the part, and of its kernels, from (sizes, D, L).
MIXER_MACS: dict[str, Callable[[ModelConfig, int, int], tuple[dict[str, float], float]]] = {
    "s4d": _s4d,
    "linear": _linear,
    "conv": lambda _, D, L: ({"mixer": 9 * L * D + D**2}, 0),
    "attention": lambda _, D, L: ({"mixer": 2 * L * D**2, "attention": 2 * L**2 * D}, 0),
}


def _table(count: int) -> int:
    """The size of the product of two short tables that holds at least `count` powers."""
    p = math.ceil(math.sqrt(count))
    return p * math.ceil(count / p)


def _dit_block(m: ModelConfig, L: int) -> tuple[dict[str, float], float]:
    """Multiply-adds of one block per image: q, k and v of every token, output and MLP of every position."""
    M, D = m.compression, m.hidden_size
    return {"dense layers": (3 + 9 / M) * L * D**2, "attention": 2 * L**2 * D, "conditioning": 6 * D**2}, 0


def _outside(config: Config, L: int) -> dict[str, float]:
    """Multiply-adds outside the blocks, by name of the part."""
    m = config.model
    D, taps = m.hidden_size, config.data.channels * m.patch_size**2
    out = (2 if m.learn_sigma else 1) * taps
    parts: dict[str, float] = {"conditioning": (256 + D) * D + 2 * D**2, "in and out": L * D * (taps + out)}
    return parts | ({"text": ((1 + m.text_tokens) * m.text_width + D) * D} if m.text_width else {})


def fft_macs(n: int) -> float:
    """Multiply-adds of a real transform of length n: 5/2 n log2 n real operations, two per multiply-add."""
    return 5 / 2 * n * math.log2(n) / 2


def training_bytes(config: Config, parameters: int, processes: int = 1) -> int:
    """An estimate of peak memory in training: weights, gradients, two Adam moments, EMAs, saved activations, workspace.

    It is per process if several share the batch. With FSDP they also share the parameters, and each gathers the weights
    and gradients of two blocks at a time; otherwise each holds all of them.

    Activations are those that eager autograd saves for one part of the batch, in float32 unless `train.precision` is
    bf16, plus the kernels. A backward pass needs another two blocks. Peaks measured on a CPU were within 25% of it
    (s-256 at batch 8, with and without checkpointing and with every mixer; mnist at batch 64).
    """
    m, t = config.model, config.train
    H, W = config.data.grid
    L = in_sequence(m, H * W // m.patch_size**2)
    B, D, M = max(1, t.batch_size // t.accumulate // processes), m.hidden_size, m.compression
    wide, narrow = 4, 2 if t.precision == "bf16" else 4
    kernels = 0
    if m.backbone == "dit":
        per_token = (8 * D + 20 * D / M) * narrow  # qkv twice, attention out twice; norms, MLP, residuals
    else:
        positions = 20 * D * narrow / M  # residual, norm, W0, W_down, W1, W2, before and after GELU, and the gate
        inside = {"s4d": 0, "linear": 19 * D + 6 * m.heads * CHUNK, "conv": 3 * D, "attention": 4 * D}  # of the mixer
        tokens = 4 * D * narrow  # U before and after GELU, Y
        per_token = positions + tokens + (inside[m.mixer] + (2 * D if m.local else 0)) * narrow
        kernels = 4 * D * L * wide if m.mixer == "s4d" else 0  # as complex spectra
    activations = B * L * per_token
    blocks = 1 if t.gradient_checkpointing else m.depth
    kept = B * L / M * D * wide * m.depth if t.gradient_checkpointing else 0
    state: float = parameters * (4 + len(t.ema)) * 4
    if t.parallel == "fsdp" and processes > 1:
        state = state / processes + 2 * parameters / m.depth * 2 * 4
    return int(state + blocks * (activations + kernels) + kept + 2 * activations)

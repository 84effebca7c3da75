"""Analytic cost of a configuration: parameters, tokens, multiply-adds of a forward pass, memory of training.

    L = HW/P^2 tokens   M compression   J = L/M positions   D width   N state size   n FFT length

"Gflops" are billions of multiply-adds of one forward pass for one image, the convention of DiT and of the paper.
Elementwise work (activations, norms, gates, spectra products) is not counted, as in the literature.
"""

import math
from dataclasses import dataclass, field

import torch

from diffussm_cli.config import Config
from diffussm_cli.model import build_model
from diffussm_cli.model.s4d import fft_length


@dataclass(frozen=True)
class Cost:
    """Cost of one image through one model. `parts` are Gflops by name; `kernel_gflops` is paid once a weight update."""

    name: str
    parameters: int
    tokens: int
    positions: int
    parts: dict[str, float] = field(default_factory=dict)
    kernel_gflops: float = 0.0
    training_bytes: int = 0

    @property
    def gflops(self) -> float:
        """Gflops of a forward pass, kernels not included."""
        return sum(self.parts.values())


def cost(config: Config) -> Cost:
    """The cost of a configuration; builds the model on the meta device only."""
    with torch.device("meta"):
        model = build_model(config)
    count = sum(p.numel() for p in model.parameters())
    m, C = config.model, config.data.channels
    H, W = config.data.grid
    P, M, D, N = m.patch_size, m.compression, m.hidden_size, m.d_state
    L = H * W // P**2
    J, n = L // M, fft_length(L)
    taps_out = (2 if m.learn_sigma else 1) * C * P * P
    fft = 5 / 2 * n * math.log2(n) / 2  # real operations of one real transform, two to a multiply-add
    parts = {
        "hourglass and gate": m.depth * (13 / M + 1) * L * D**2,  # the paper's formula; its Y of width 2D
        "fft": m.depth * 3 * D * fft,  # one forward transform, two backward
        "conditioning": (256 + D) * D + (m.depth + 1) * 2 * D**2,
        "in and out": L * D * (C * P * P) + L * D * taps_out,
    }
    root = math.sqrt(L)
    kernel = m.depth * 2 * D * N * math.ceil(L / math.ceil(root)) * math.ceil(root)
    return Cost(
        name=config.preset,
        parameters=count,
        tokens=L,
        positions=J,
        parts={k: v / 1e9 for k, v in parts.items()},
        kernel_gflops=kernel / 1e9,
        training_bytes=training_bytes(config, count),
    )


def training_bytes(config: Config, parameters: int) -> int:
    """An estimate of peak memory in training: weights, gradients, two Adam moments, EMA, kept activations, work space.

    Activations are those that eager autograd keeps for one part of the batch, in float32 unless `train.precision` is
    bf16, and what making the kernels keeps; three blocks more are what a backward pass works in. Peaks measured on a
    CPU lay within 20% (s-256 at batch 8, with and without checkpointing; mnist at batch 64).
    """
    m, t = config.model, config.train
    H, W = config.data.grid
    L = H * W // m.patch_size**2
    B, D, M = t.batch_size // t.accumulate, m.hidden_size, m.compression
    wide, narrow = 4, 2 if t.precision == "bf16" else 4
    positions = 15 * D * narrow / M  # norm, W0, W1, W2, gate, residual, each kept before and after its activation
    tokens = (6 * D) * narrow  # W_up before and after, Y in and out of the convolution
    spectra = 2 * 3 * D * wide  # U and its two products, complex, n/2 long with n = 2L
    a_part = B * L * (positions + tokens + spectra)
    kernels = 12 * 2 * D * math.ceil(math.sqrt(L)) * m.d_state // 2 * wide
    blocks = 1 if t.gradient_checkpointing else m.depth
    kept = B * L / M * D * wide * m.depth if t.gradient_checkpointing else 0
    return int(parameters * 5 * 4 + blocks * (a_part + kernels) + kept + 3 * a_part)

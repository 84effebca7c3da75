"""Analytic cost of a configuration: parameters, tokens, multiply-adds of a forward pass, memory of
training.

    L = HW/P^2 tokens   M compression   J = L/M positions   D width   N state size
    n FFT length   F = n/2 + 1   E width of text vectors
    K text tokens, which stand twice in the sequence and take a position each

"Gflops" are billions of multiply-adds of one forward pass for one image, the convention of DiT and
of the paper. Transforms and complex products are converted at two real operations per multiply-add.
Elementwise work on real numbers (activations, norms, gates) is not counted, as in the literature.
`count.py` counts the same from a trace.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn

from diffussm_cli.config import Config, ModelConfig
from diffussm_cli.errors import ConfigError
from diffussm_cli.machine.device import pick_device, pick_dtype
from diffussm_cli.model import Backbone, build_model, count_parameters
from diffussm_cli.model.mixer import Mixer
from diffussm_cli.training.muon import matrices_of
from diffussm_cli.training.optimizer import make_optimizer


@dataclass(frozen=True)
class Cost:
    """Cost of one model per image. A Gflop is a billion multiply-adds of one forward pass.

    Attributes:
        name: the preset's, or another.
        resolution: (height, width) in pixels.
        parameters: their number.
        tokens: L, of one image; `positions` are L/M.
        parts: Gflops by the name of the part; `gflops` is their sum.
        kernel_gflops: Gflops that are spent once per weight update.
        training_images: how many images a training sees, for `training_gflops`.
        training_bytes: the memory in bytes of each of `processes` that train the model together.
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


def cost(
    config: Config,
    name: str | None = None,
    processes: int = 1,
    auto: torch.dtype | None = None,
) -> Cost:
    """The cost of a configuration, under its preset's name or another, from a shorter model on the
    meta device.

    Args:
        processes: number of processes, which share the batch of a step and, with
            `train.parallel=fsdp`, the parameters.
        auto: what `train.precision=auto` means where the model is trained, for the memory; by
            default what it means on `train.device`, or float32 if that is not here.
    """
    m, t = config.model, config.train
    model, missing = shortened(config)
    parameters = count_parameters(model)
    for part, times in missing.items():
        parameters += times * count_parameters(model.get_submodule(part))

    # Multiply-adds by part, first of the blocks.
    L = math.prod(token_grid(config))
    sequence = in_sequence(m, L)
    parts: dict[str, float] = {}
    kernels = 0.0
    for i, block in enumerate(model.blocks):
        times = 1 + missing[f"blocks.{i}"]
        macs = _dit_block(m, sequence)
        if m.backbone == "diffussm":
            macs = _diffussm_block(m, mixer_of(block), sequence, token_grid(config))
            kernels += times * mixer_of(block).kernel_macs(sequence, token_grid(config))
        _add(parts, macs, times)
    _add(parts, _outside(config, L))

    return Cost(
        name=name or config.preset,
        resolution=config.data.size,
        parameters=parameters,
        tokens=L,
        positions=L // m.compression,
        parts={part: macs / 1e9 for part, macs in parts.items()},
        kernel_gflops=kernels / 1e9,
        training_images=t.steps * t.batch_size,
        training_bytes=training_bytes(config, parameters, processes, auto),
        processes=processes,
    )


def training_operations(config: Config) -> float:
    """Operations per image of a training step, two per multiply-add: the backward pass takes twice
    as many as a forward pass; what gradient checkpointing computes again does not count, nor does
    the optimiser.
    """
    model = cost(config)
    kernels = model.kernel_gflops / config.train.batch_size
    return (6e9 + 2e9 * passes_without_gradient(config)) * (model.gflops + kernels)


def passes_without_gradient(config: Config) -> int:
    """Forward passes of a training step beside the one whose gradient is taken.

    A mean velocity is learned from a second pass of the model, and from its teacher, which takes
    two passes with guidance (`MeanFlow.losses`).
    """
    if not config.diffusion.in_one_step:
        return 0
    is_guided = config.diffusion.teacher_guidance != 1 and config.model.is_conditional
    return 3 if is_guided else 2


def _add(parts: dict[str, float], more: dict[str, float], times: int = 1) -> None:
    for part, macs in more.items():
        parts[part] = parts.get(part, 0) + times * macs


def token_grid(config: Config) -> tuple[int, int]:
    """(H, W) in tokens."""
    H, W = config.data.grid
    return H // config.model.patch_size, W // config.model.patch_size


def in_sequence(m: ModelConfig, L: int) -> int:
    """Tokens that the blocks see: L of the image, and M for each of the 2K text positions."""
    return L + 2 * m.text_tokens * m.compression


def shortened(config: Config) -> tuple[Backbone, dict[str, int]]:
    """A model on the meta device with a block of each kind, and how often its parts are missing, by
    name.

    Blocks are alike if they have the same mixer, and all skips are.
    """
    m = config.model
    kinds = len(m.mixers) if m.backbone == "diffussm" else 1
    depth = min(m.depth, max(kinds, 2 if m.skips else 1))
    short = dataclasses.replace(config, model=dataclasses.replace(m, depth=depth))
    with torch.device("meta"):
        model = build_model(short)

    missing = {f"blocks.{i}": 0 for i in range(depth)}
    for i in range(depth, m.depth):
        missing[f"blocks.{i % kinds}"] += 1
    if m.skips and depth > 1:
        missing["skips.0"] = m.depth // 2 - depth // 2
    return model, missing


def mixer_of(block: nn.Module) -> Mixer:
    """The mixer of a block of a DiffuSSM."""
    return block.mixer  # type: ignore[return-value]


def _diffussm_block(
    m: ModelConfig, mixer: Mixer, L: int, grid: tuple[int, int]
) -> dict[str, float]:
    """Multiply-adds of one block per image: (13/M + 1) L D^2 is the paper's formula."""
    M, D = m.compression, m.hidden_size
    parts = {
        "dense layers": (13 / M + 1) * L * D**2,
        "conditioning": 2 * D**2,
        **mixer.macs(L, grid),
    }
    return parts | ({"local": 9 * L * D} if m.local else {})


def _dit_block(m: ModelConfig, L: int) -> dict[str, float]:
    """Multiply-adds of one block per image: q, k and v of every token, output and MLP of every
    position.
    """
    M, D = m.compression, m.hidden_size
    parts = {
        "dense layers": (3 + 9 / M) * L * D**2,
        "attention": 2 * L**2 * D,
        "conditioning": 6 * D**2,
    }
    return parts | ({"local": 9 * L / M * D} if m.local else {})


def _outside(config: Config, L: int) -> dict[str, float]:
    """Multiply-adds outside the blocks, by name of the part."""
    m = config.model
    D, C, area = m.hidden_size, config.data.channels, m.patch_size**2
    taps = (m.stem or C) * area
    out = (2 if m.learn_sigma else 1) * C * area
    parts: dict[str, float] = {
        "conditioning": (256 + D) * D + 2 * D**2,
        "in and out": L * D * (taps + out),
    }

    # What only some models have.
    if m.stem:
        parts["stem"] = 9 * L * area * m.stem * (C + m.stem)
    if m.skips:
        parts["skips"] = m.depth // 2 * in_sequence(m, L) / m.compression * D**2
    if m.text_width:
        parts["text"] = ((1 + m.text_tokens) * m.text_width + D) * D
    return parts


def training_bytes(
    config: Config,
    parameters: int,
    processes: int = 1,
    auto: torch.dtype | None = None,
) -> int:
    """An estimate of peak memory in training: weights, gradients, moments (two of a parameter under
    AdamW, one of a matrix under Muon), EMAs, saved activations, workspace.

    It is per process if several share the batch. With FSDP they also share the parameters, and each
    gathers the weights and gradients of two blocks at a time; otherwise each holds all of them.

    Activations are those that eager autograd saves for one part of the batch, in the dtype of
    `train.precision` (see `cost` for auto), plus the kernels. A backward pass needs another two
    blocks. Peaks measured on a CPU were within 25% of it (s-256 at batch 8, with and without
    checkpointing and with every mixer; mnist at batch 64).
    """
    m, t = config.model, config.train
    model, missing = shortened(config)
    L = in_sequence(m, math.prod(token_grid(config)))
    B, D, M = max(1, t.batch_size // t.accumulate // processes), m.hidden_size, m.compression
    wide = 4
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    narrow = (dtypes.get(t.precision) or auto or _auto_here(t.device)).itemsize

    # What each block saves, as often as there are such blocks.
    saved: list[tuple[float, float, int]] = []
    for i, block in enumerate(model.blocks):
        kernels = 0.0
        if m.backbone == "dit":
            # qkv twice, attention out twice; norms, MLP, residuals
            positions = (20 + (2 if m.local else 0)) * D / M
            per_token = (8 * D + positions + block.attention.attend.saved() * D) * narrow  # type: ignore[union-attr, operator]
        else:
            mixer = mixer_of(block)
            # residual, norm, W0, W_down, W1, W2, before and after GELU, and the gate
            positions = 20 * D * narrow / M
            tokens = 4 * D * narrow  # U before and after GELU, Y
            per_token = positions + tokens + (mixer.saved() + (2 * D if m.local else 0)) * narrow
            kernels = mixer.saved_kernels(L, token_grid(config)) * wide
        saved.append((B * L * per_token, kernels, 1 + missing[f"blocks.{i}"]))
    most = max(activations for activations, _, _ in saved)

    # All blocks at once, or one at a time.
    if t.gradient_checkpointing:
        blocks = max(activations + kernels for activations, kernels, _ in saved)
        blocks += B * L / M * D * wide * m.depth
    else:
        blocks = sum(times * (activations + kernels) for activations, kernels, times in saved)

    # the stem's convolutions, before and after GELU
    stem = B * math.prod(config.data.grid) * 4 * m.stem * narrow

    # weights, gradients, two moments but one of Muon, averages, and a frozen teacher
    teachers = config.diffusion.in_one_step
    of_muon = {id(p) for p in matrices_of(make_optimizer(model, t))}
    single = sum(
        (1 + missing[f"blocks.{i}"])
        * sum(p.numel() for p in block.parameters() if id(p) in of_muon)
        for i, block in enumerate(model.blocks)
    )
    state: float = (parameters * (4 + t.averages + teachers) - single) * 4
    if t.parallel == "fsdp" and processes > 1:
        state = state / processes + 2 * parameters / m.depth * 2 * 4
    return int(state + stem + blocks + 2 * most)


def _auto_here(device: str) -> torch.dtype:
    """What `train.precision=auto` means on a device of this machine; float32 if it is not here."""
    try:
        return pick_dtype("auto", pick_device(device))
    except ConfigError:
        return torch.float32

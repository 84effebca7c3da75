"""The batch of each optimiser step, as a function of (seed, step) alone, so that a resumed run sees the same.

B global batch, of which each process takes its part   C channels   H x W grid
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.config import Config
from diffussm_cli.data.source import Source
from diffussm_cli.device import helpers
from diffussm_cli.distributed import ALONE, Share


@dataclass(frozen=True)
class Batch:
    """Everything random about a step, decided, of the images of one process."""

    x_0: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    noise: Tensor  # (B, C, H, W)
    y: Tensor | None  # (B,), labels with the null class dropped in; None if unconditional

    def part(self, start: int, stop: int, device: torch.device) -> "Batch":
        """Images start..stop on a device."""
        tensors = (self.x_0, self.t, self.noise, self.y)
        return Batch(*(v if v is None else v[start:stop].to(device, non_blocking=True) for v in tensors))


def batches(source: Source, config: Config, start: int, share: Share = ALONE) -> Iterator[Batch]:
    """Batches of steps start, start + 1, ..., the next one made in a thread while this one is used."""
    with helpers() as worker:
        following = worker.submit(make_batch, source, config, start, share)
        for step in range(start, config.train.steps):
            batch = following.result()
            if step + 1 < config.train.steps:
                following = worker.submit(make_batch, source, config, step + 1, share)
            yield batch


def make_batch(source: Source, config: Config, step: int, share: Share = ALONE) -> Batch:
    """One process's part of the batch of optimiser step `step` (0, 1, ...)."""
    seed, B = config.train.seed, config.train.batch_size
    generator = torch.Generator().manual_seed(mixed_seed(seed, step))
    part = slice(B * share.rank // share.of, B * (share.rank + 1) // share.of)
    x_0, labels = source.read(indices_at(seed, step * B, B, len(source)), generator, part)
    t = torch.randint(config.diffusion.timesteps, (B,), generator=generator)[part]
    dropped = (torch.rand(B, generator=generator) < config.train.label_dropout)[part]
    noise = torch.randn(B, *x_0.shape[1:], generator=generator)[part]
    classes = config.model.num_classes
    return Batch(x_0, t, noise, torch.where(dropped, classes, labels) if classes else None)


def indices_at(seed: int, position: int, count: int, n: int) -> np.ndarray:
    """`count` indices from `position` on in an endless row of epochs, each a shuffle of 0..n-1 of its own."""
    found: list[np.ndarray] = []
    while count > 0:
        epoch, offset = divmod(position, n)
        part = epoch_order(seed, epoch, n)[offset : offset + count]
        found.append(part)
        position, count = position + len(part), count - len(part)
    return np.concatenate(found)


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of epoch `epoch`: a permutation of 0..n-1."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, without the collisions of a sum."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)

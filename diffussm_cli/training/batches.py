"""The batch of each optimiser step, as a function of (seed, step) alone, so that a resumed run sees the same.

B global batch, of which each process takes its part   C channels   H x W grid
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.config import Config
from diffussm_cli.data.source import Source
from diffussm_cli.machine.device import helpers
from diffussm_cli.machine.processes import ALONE, World

PREFETCH = 3  # batches


@dataclass(frozen=True)
class Batch:
    """Everything random about a step, decided, of the images of one process."""

    x_0: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    noise: Tensor  # (B, C, H, W)
    y: Tensor | None  # (B,), labels with the null class dropped in; None if unconditional

    def part(self, start: int, stop: int, device: torch.device) -> "Batch":
        """Images start..stop on a device."""
        return self.each(lambda tensor: tensor[start:stop].to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """With every tensor changed."""
        return Batch(*(v if v is None else change(v) for v in (self.x_0, self.t, self.noise, self.y)))


def batches(source: Source, config: Config, start: int, world: World = ALONE, pinned: bool = False) -> Iterator[Batch]:
    """Batches of steps start, start + 1, ..., made in a thread, up to PREFETCH of them ahead.

    Args:
        pinned: in page-locked memory, from which a CUDA device copies without a wait.
    """
    with helpers() as worker:
        waiting: deque[Future] = deque()
        try:
            for step in range(start, config.train.steps):
                while len(waiting) < PREFETCH and step + len(waiting) < config.train.steps:
                    waiting.append(worker.submit(make_batch, source, config, step + len(waiting), world, pinned))
                yield waiting.popleft().result()
        finally:
            for batch in waiting:
                batch.cancel()


def make_batch(source: Source, config: Config, step: int, world: World = ALONE, pinned: bool = False) -> Batch:
    """One process's part of the batch of optimiser step `step` (0, 1, ...).

    Everything random about an image is a function of (seed, step, its place in the batch), whoever draws it.
    """
    seed, B = config.train.seed, config.train.batch_size
    places = range(B)[B * world.rank // world.size : B * (world.rank + 1) // world.size]
    indices = indices_at(seed, step * B, B, len(source))[places.start : places.stop]
    generators = [torch.Generator().manual_seed(s) for s in image_seeds(seed, step, B)[places.start : places.stop]]
    x_0, labels = source.read(indices, generators)
    t = torch.cat([torch.randint(config.diffusion.timesteps, (1,), generator=g) for g in generators])
    dropped = torch.cat([torch.rand(1, generator=g) for g in generators]) < config.train.label_dropout
    noise = torch.stack([torch.randn(x_0.shape[1:], generator=g) for g in generators])
    classes = config.model.num_classes
    batch = Batch(x_0, t, noise, torch.where(dropped, classes, labels) if classes else None)
    return batch.each(Tensor.pin_memory) if pinned else batch


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


def image_seeds(seed: int, step: int, count: int) -> list[int]:
    """One 63-bit seed for each image of a batch, without the collisions of a sum."""
    states = np.random.SeedSequence([seed, step]).generate_state(count, np.uint64)
    return (states >> np.uint64(1)).tolist()

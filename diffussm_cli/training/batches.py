"""The batch of each optimiser step, a function of (seed, step): a resumed run sees the same.

B global batch, of which each process takes its part   C channels   H x W grid
K text tokens   E width of text vectors
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
from diffussm_cli.diffusion.objectives import draw_timestep
from diffussm_cli.machine.device import helpers
from diffussm_cli.machine.processes import ALONE, World

PREFETCH = 3  # batches


@dataclass(frozen=True)
class Batch:
    """One process's part of the batch of a step, with all random choices made."""

    x_0: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    noise: Tensor  # (B, C, H, W)
    y: Tensor | None  # (B,), labels, some replaced by the null class; None if unconditional
    text: Tensor | None = None  # (B, 1 + K, E), captions, some replaced by zeros; None without text

    def part(self, start: int, stop: int, device: torch.device) -> "Batch":
        """Images start to stop on a device, which need not wait for them if they are pinned."""
        return self.each(lambda tensor: tensor[start:stop].to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply `change` to every tensor."""
        tensors = (self.x_0, self.t, self.noise, self.y, self.text)
        return Batch(*(None if tensor is None else change(tensor) for tensor in tensors))  # type: ignore[arg-type]


def batches(
    source: Source, config: Config, start: int, world: World = ALONE, pinned: bool = False
) -> Iterator[Batch]:
    """Yield the batches of steps start, start + 1, ..., made by a thread up to PREFETCH batches
    ahead.

    Args:
        pinned: use page-locked memory, from which a CUDA device copies asynchronously.
    """
    steps = config.train.steps
    with helpers() as worker:
        waiting: deque[Future] = deque()
        try:
            for step in range(start, steps):
                while len(waiting) < PREFETCH and step + len(waiting) < steps:
                    following = step + len(waiting)
                    waiting.append(
                        worker.submit(make_batch, source, config, following, world, pinned)
                    )

                yield waiting.popleft().result()
        finally:
            for batch in waiting:
                batch.cancel()


def make_batch(
    source: Source, config: Config, step: int, world: World = ALONE, pinned: bool = False
) -> Batch:
    """One process's part of the batch of optimiser step `step` (0, 1, ...).

    Everything random about an image depends only on (seed, step, its place in the batch), not on
    the process.
    """
    seed = config.train.seed
    B = config.train.batch_size

    # Which images, and one random generator for each.
    places = world.share(B)
    here = slice(places.start, places.stop)
    indices = indices_at(seed, step * B, B, len(source))[here].tolist()
    generators = [torch.Generator().manual_seed(s) for s in image_seeds(seed, step, B)[here]]

    # The order of these draws is part of what a seed means.
    x_0, labels = source.read(indices, generators)
    t = torch.cat([draw_timestep(config.diffusion, g) for g in generators])
    dropped = (
        torch.cat([torch.rand(1, generator=g) for g in generators]) < config.train.label_dropout
    )
    noise = torch.stack([torch.randn(x_0.shape[1:], generator=g) for g in generators])
    text = _captions(source, indices, generators, config) if config.model.text_width else None

    classes = config.model.num_classes  # also the label of the null class
    y = torch.where(dropped, classes, labels) if classes else None
    batch = Batch(x_0, t, noise, y, text)
    return batch.each(Tensor.pin_memory) if pinned else batch


def _captions(
    source: Source, indices: list[int], generators: list[torch.Generator], config: Config
) -> Tensor:
    """One caption per image, some dropped; drawn last, so that a run without text draws the same
    numbers.
    """
    text = source.text(indices, generators)  # (B, 1 + K, E)
    kept = torch.cat([torch.rand(1, generator=g) for g in generators]) >= config.train.label_dropout
    return text * kept[:, None, None]


def indices_at(seed: int, position: int, count: int, n: int) -> np.ndarray:
    """`count` indices from `position` on in an endless sequence of epochs, each with its own
    shuffle of 0..n-1.
    """
    parts: list[np.ndarray] = []
    while count > 0:
        epoch, offset = divmod(position, n)
        part = epoch_order(seed, epoch, n)[offset : offset + count]
        parts.append(part)
        position += len(part)
        count -= len(part)
    return np.concatenate(parts)


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of epoch `epoch`: a permutation of 0..n-1."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def image_seeds(seed: int, step: int, count: int) -> list[int]:
    """One 63-bit seed per image of a batch, hashed because sums of seed, step and place would
    collide.
    """
    states = np.random.SeedSequence([seed, step]).generate_state(count, np.uint64)
    return (states >> np.uint64(1)).tolist()

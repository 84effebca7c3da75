"""The loss on held-out images, with the same timesteps and noise at every evaluation, so that it shows progress.

n images   Q = 4 quarters of the timesteps   B = nQ, each image once per quarter   C channels   H x W grid
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.config import MANY, Config
from diffussm_cli.data.source import Source
from diffussm_cli.machine.processes import ALONE, World, gather
from diffussm_cli.training.batches import Batch, image_seeds
from diffussm_cli.training.record import QUARTERS

AT_ONCE = 16  # images per batch
GOLDEN = 0.618033988749895  # its multiples modulo 1 are evenly spread, however many there are


class HeldOut:
    """Up to `eval.held_out_images` images, evenly spread over a source. Raises DataError for an unreadable one.

    Timesteps and noise depend only on the seed of the run and the place of an image among these; batches do not depend
    on the number of processes, so that the result is the same number.
    """

    def __init__(self, source: Source, config: Config, device: torch.device, world: World = ALONE):
        self.source, self.config, self.device, self.world = source, config, device, world
        n = min(len(source), config.eval.held_out_images)
        self.indices = [i * len(source) // n for i in range(n)]
        self.seeds = image_seeds(config.train.seed, MANY, n)  # training ends before step MANY
        self.parts = [range(n)[i : i + AT_ONCE] for i in range(0, n, AT_ONCE)][world.rank :: world.size]
        for places in self.parts:
            self.batch(places)  # an image that cannot be read should end training before it begins

    @torch.no_grad()
    def measure(self, losses: Callable[[Batch], dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss as `held_out`, by quarter as `held_out/q1` (least noisy) to `q4`. Every process must call this."""
        found = torch.zeros(len(self.indices), QUARTERS, dtype=torch.float64)
        for places in self.parts:
            batch = self.batch(places).part(0, len(places) * QUARTERS, self.device)
            found[places.start : places.stop] = losses(batch)["loss"].double().cpu().view(-1, QUARTERS)
        found = sum(gather(found, self.world))
        quarters = {f"held_out/q{i + 1}": value for i, value in enumerate(found.mean(0).tolist())}
        return {"held_out": found.mean().item(), **quarters}

    def batch(self, places: range) -> Batch:
        """The images at some places, Q times each."""
        generators = [torch.Generator().manual_seed(self.seeds[k]) for k in places]
        x_0, labels = self.source.read([self.indices[k] for k in places], generators)
        noise = torch.cat([torch.randn(QUARTERS, *x_0.shape[1:], generator=g) for g in generators])
        within = (self.seeds[0] / 2**63 + GOLDEN * np.array(places)) % 1  # (n,), from one end of a quarter to the other
        share = (np.arange(QUARTERS) + within[:, None]) / QUARTERS  # (n, Q), of all timesteps
        t = torch.from_numpy((share * self.config.diffusion.timesteps).astype(np.int64)).flatten()
        y = labels.repeat_interleave(QUARTERS) if self.config.model.num_classes else None
        text = None
        if self.config.model.text_width:
            text = self.source.text([self.indices[k] for k in places], generators).repeat_interleave(QUARTERS, 0)
        return Batch(x_0.repeat_interleave(QUARTERS, 0), t, noise, y, text)

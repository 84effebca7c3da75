"""The images of a run as a set to evaluate: drawn when they are read, never written."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from diffussm_cli.errors import ConfigError
from diffussm_cli.samples import FIXED, Sampler


class Drawn:
    """An ImageSet of seeds; `facts` are the sampler's for them."""

    lossy = False

    def __init__(self, sampler: Sampler, seeds: range, channels: int, facts: dict[str, Any]):
        data = sampler.trained.config.data
        if channels == 1 and not data.is_grey:
            raise ConfigError("--extractor: this one sees one channel, and the run draws colours")
        self.sampler, self.seeds, self.channels, self.facts = sampler, seeds, channels, facts
        self.name, self.size, self.labels = str(sampler.trained.root), data.size, facts["labels"]

    def __len__(self) -> int:
        return len(self.seeds)

    def read(self, places: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            labels = self.labels and [self.labels[i] for i in chosen]
            for _, images in self.sampler.draw([self.seeds[i] for i in chosen], labels):
                yield images.expand(-1, self.channels, -1, -1)

    def sha256(self) -> str:
        """Of what decides the images: weights, sampler, seeds."""
        facts = {k: self.facts[k] for k in (*FIXED, "num")} | {"channels": self.channels}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

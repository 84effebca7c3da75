"""The images of a model as a set to evaluate: drawn when they are read, never written to disk."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from diffussm_cli.errors import ConfigError
from diffussm_cli.sampling.folder import FIXED
from diffussm_cli.sampling.generate import Text
from diffussm_cli.sampling.sampler import Sampler


class DrawnImages:
    """An ImageSet that draws one image per seed.

    Args:
        labels: one per seed; None for an unconditional model.
        channels: number of channels that the extractor takes.
        facts: what determines the images, from `sample_facts`; needed to cache features.
        text: one caption per seed; None for a model without text.
    """

    lossy = False
    left_out = ""
    captions: Sequence[tuple[str, ...]] = ()  # `text` is what was asked for

    def __init__(
        self,
        sampler: Sampler,
        seeds: range,
        labels: Sequence[int] | None,
        channels: int,
        name: str,
        facts: Mapping[str, Any] | None = None,
        text: Text | None = None,
    ):
        data = sampler.config.data
        if channels == 1 and not data.is_grey:
            raise ConfigError("--extractor: this one takes grey images, but the run draws colour images")
        self.sampler, self.seeds, self.labels, self.channels = sampler, seeds, labels, channels
        self.name, self.size, self.grey, self.facts, self.text = name, data.size, data.is_grey, facts, text

    def __len__(self) -> int:
        return len(self.seeds)

    def read(self, places: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            labels = self.labels and [self.labels[i] for i in chosen]
            text = self.text and self.text.of(list(chosen))
            for _, images in self.sampler.draw([self.seeds[i] for i in chosen], labels, text):
                yield images.expand(-1, self.channels, -1, -1)

    def image_name(self, i: int) -> str:
        """The name of an image, for an error."""
        return f"{self.name}: the image of seed {self.seeds[i]}"

    def sha256(self) -> str:
        """Hash of what determines the images: weights, sampler, seeds."""
        assert self.facts is not None, "the hash of drawn images needs their facts"
        facts = {k: self.facts[k] for k in (*FIXED, "num")} | {"channels": self.channels}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

"""Gathers what the metrics need from a set of images: batch by batch, by one process or several, with a cache.

n images   d pool features   s spatial features   K classes
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffussm_cli.evaluation.features import Extractor
from diffussm_cli.evaluation.metrics import Moments, SplitSums
from diffussm_cli.evaluation.sets import ImageSet
from diffussm_cli.machine.device import full_float32
from diffussm_cli.machine.files import whole_file
from diffussm_cli.machine.processes import ALONE, World, gather


@dataclass
class Gathered:
    """Pool features (n, d); moments of spatial features and sums of class probabilities, where there are any."""

    pool: Tensor
    spatial: Moments | None
    classes: SplitSums | None

    def tensors(self) -> dict[str, Tensor]:
        """As a flat dictionary, for files and other processes."""
        found = {"pool": self.pool}
        if self.spatial:
            found |= {"spatial.n": torch.tensor(self.spatial.n)}
            found |= {"spatial.mean": self.spatial.mean, "spatial.M2": self.spatial.M2}
        if self.classes:
            found |= {f"classes.{k}": v for k, v in vars(self.classes).items()}
        return found

    @classmethod
    def of(cls, found: dict[str, Tensor]) -> "Gathered":
        """The inverse of `tensors`."""
        parts = {key: {k.partition(".")[2]: v for k, v in found.items() if k.startswith(key)} for key in PARTS}
        spatial, classes = (parts[key] for key in PARTS)
        return cls(
            found["pool"],
            Moments(int(spatial["n"]), spatial["mean"], spatial["M2"]) if spatial else None,
            SplitSums(**classes) if classes else None,
        )

    def joined(self, other: "Gathered") -> "Gathered":
        """Both parts together, with this one's images first."""
        return Gathered(
            torch.cat([self.pool, other.pool]),
            self.spatial.joined(other.spatial) if self.spatial and other.spatial else None,
            self.classes.joined(other.classes) if self.classes and other.classes else None,
        )


PARTS = ("spatial.", "classes.")


class Gathering:
    """Feature extraction for one set. After `run`, every process has the whole `result`; `warning` is for the user.

    Cached features are used only if every process of the job has them: the caches of several machines may differ.
    """

    def __init__(
        self,
        images: ImageSet,
        extractor: Extractor,
        batch_size: int = 64,
        cache: Path | None = None,
        world: World = ALONE,
    ):
        self.images, self.extractor, self.batch_size, self.world = images, extractor, batch_size, world
        self.file = cache and cache / f"{images.sha256()}-{extractor.identity}.safetensors".replace("/", "_")
        kept = _read(self.file) if self.file else None
        self._result = kept if all(gather(kept is not None, world)) else None
        self.warning: str | None = None

    def run(self) -> Iterator[int]:
        """Yield the number of images done since the last yield. Raises DataError."""
        if self._result is not None:
            return
        part, at = Collector(len(self.images)), self.part.start
        for batch in self.images.read(self.part, self.batch_size) if self.part else ():
            with full_float32():
                part.add(at, self.extractor(batch))
            at += len(batch)
            yield len(batch)
        first, *others = [Gathered.of(t) for t in gather(part.gathered(), self.world) if t]
        for other in others:
            first = first.joined(other)
        self._result = first
        if self.file and self.world.rank == 0:
            try:
                _write(self.file, first)
            except OSError as e:  # a full disk must not cost hours of work
                self.warning = f"--cache: features cannot be saved in {str(self.file.parent)!r}: {e.strerror}"

    @property
    def result(self) -> Gathered:
        """The features of the whole set, once `run` has ended."""
        assert self._result is not None, "run it first"
        return self._result

    @property
    def part(self) -> range:
        """This process's share of the images, a contiguous range; empty once there is a result."""
        n, (rank, size) = 0 if self._result is not None else len(self.images), self.world
        return range(n * rank // size, n * (rank + 1) // size)


class Collector:
    """Collects the features of a set of n images, batch by batch."""

    def __init__(self, n: int):
        self.n = n
        self.pool: list[Tensor] = []
        self.spatial: Moments | None = None
        self.classes: SplitSums | None = None

    def add(self, at: int, features) -> None:
        """Add the features of images at, at + 1, ..."""
        self.pool.append(features.pool.float().cpu())
        if features.spatial is not None:
            moments = Moments.of(features.spatial.cpu())
            self.spatial = self.spatial.joined(moments) if self.spatial else moments
        if features.logits is not None:
            self.classes = self.classes or SplitSums.empty(self.n, features.logits.shape[1])
            self.classes.add(at, features.logits)

    def gathered(self) -> dict[str, Tensor]:
        """The collected features, as `Gathered.tensors` returns them; empty if there were no images."""
        return Gathered(torch.cat(self.pool), self.spatial, self.classes).tensors() if self.pool else {}


def _read(path: Path) -> Gathered | None:
    """The cached features; None if there are none or the file is damaged, which `_write` then replaces."""
    try:
        return Gathered.of(load_file(path)) if path.is_file() else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write(path: Path, gathered: Gathered) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(save({k: v.contiguous() for k, v in gathered.tensors().items()}))

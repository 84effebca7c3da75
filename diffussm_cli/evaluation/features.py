"""Gathers what the metrics need from a set of images: batch by batch, by one process or several,
with a cache.

n images   d pool features   s spatial features   K classes
"""

import functools
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffussm_cli.errors import DataError
from diffussm_cli.evaluation.extractors import Extractor, Features
from diffussm_cli.evaluation.metrics import Moments, SplitSums
from diffussm_cli.evaluation.sets import ImageSet
from diffussm_cli.events import Event, Progress, Stage, Warned
from diffussm_cli.machine.device import full_float32
from diffussm_cli.machine.files import whole_file
from diffussm_cli.machine.processes import ALONE, World, gather

PARTS = ("spatial.", "classes.")  # beginnings of the names of tensors
N = "spatial.n"  # the only whole number among the tensors


@dataclass
class Gathered:
    """Pool features (n, d); moments of spatial features and sums of class probabilities, where
    there are any.
    """

    pool: Tensor
    spatial: Moments | None
    classes: SplitSums | None

    def tensors(self) -> dict[str, Tensor]:
        """As a flat dictionary, for files."""
        tensors = {"pool": self.pool}
        if self.spatial:
            tensors |= {N: torch.tensor(self.spatial.n)}
            tensors |= {"spatial.mean": self.spatial.mean, "spatial.M2": self.spatial.M2}
        if self.classes:
            tensors |= {f"classes.{name}": value for name, value in vars(self.classes).items()}
        return tensors

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Gathered":
        """From what `tensors` returned."""
        spatial, classes = (
            {
                name.removeprefix(part): value
                for name, value in tensors.items()
                if name.startswith(part)
            }
            for part in PARTS
        )

        return cls(
            tensors["pool"],
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


def gather_features(
    images: ImageSet,
    extractor: Extractor,
    batch_size: int = 64,
    cache: Path | None = None,
    world: World = ALONE,
    unit: str = "image",
) -> Generator[Event, None, Gathered]:
    """Compute the features of a set, or load them from the folder `cache`; every process gets those
    of all images.

    Each process computes a contiguous share. Cached features are used only if every process of the
    job has them: the caches of several machines may differ.

    Args:
        unit: what the progress counts.

    Raises:
        DataError: if an image cannot be read, or has features that are not finite numbers.
    """
    # Cached features.
    yield Stage("looking for cached features")
    file = cache and cache / f"{images.sha256()}-{extractor.identity}.safetensors".replace("/", "_")
    kept = _read(file, len(images)) if file else None
    if all(gather(kept is not None, world)):
        assert kept is not None, "this process is one of all"
        return kept

    # Those of a share of the images, batch by batch.
    part = world.share(len(images))
    at = part.start
    yield Progress(0, len(part), unit)
    pool: list[Tensor] = []
    spatial: Moments | None = None
    classes: SplitSums | None = None
    for batch in images.read(part, batch_size) if part else ():
        with full_float32():
            features = extractor(batch)
        _check_finite(features, images, at, extractor)

        pool.append(features.pool.float().cpu())
        if features.spatial is not None:
            moments = Moments.of(features.spatial.cpu())
            spatial = spatial.joined(moments) if spatial else moments
        if features.logits is not None:
            classes = classes or SplitSums.empty(len(images), features.logits.shape[1])
            classes.add(at, features.logits)

        at += len(batch)
        yield Progress(at - part.start, len(part), unit)

    # Those of all images.
    share = Gathered(torch.cat(pool), spatial, classes) if pool else None
    gathered = functools.reduce(Gathered.joined, filter(None, gather(share, world)))
    if file and world.rank == 0:
        try:
            _write(file, gathered)
        except OSError as e:  # a full disk must not cost hours of work
            yield Warned(f"cache: features cannot be saved in {str(file.parent)!r}: {e.strerror}")
    return gathered


def _check_finite(features: Features, images: ImageSet, first: int, extractor: Extractor) -> None:
    """Raises DataError if features of a batch, which begins with the image `first` of a set, are
    not finite.
    """
    for part, values in features._asdict().items():
        if values is None:
            continue
        finite = values.flatten(1).isfinite().all(1)
        if not finite.all():
            name = images.image_name(first + int(finite.cpu().int().argmin()))
            raise DataError(
                f"{name}: {part} features of {extractor.identity} that are not finite numbers"
            )


def _read(path: Path, n: int) -> Gathered | None:
    """The cached features of n images; None if there are none or the file is damaged, which
    `_write` then replaces.
    """
    try:
        gathered = Gathered.of(load_file(path)) if path.is_file() else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return gathered if gathered is not None and _is_sound(gathered, n) else None


def _is_sound(gathered: Gathered, n: int) -> bool:
    """Whether cached features are those of n images, in shapes that fit each other, and finite."""
    pool = gathered.pool
    sound = pool.ndim == 2 and len(pool) == n

    spatial = gathered.spatial
    if spatial is not None:
        d = spatial.mean.numel()
        sound &= spatial.n == n and spatial.mean.shape == (d,) and spatial.M2.shape == (d, d)

    classes = gathered.classes
    if classes is not None:
        splits = len(SplitSums.empty(n, 1).p)
        sound &= classes.p.ndim == 2 and len(classes.p) == splits and classes.n.sum().item() == n
        sound &= classes.n.shape == classes.negentropy.shape == (splits,)

    values = [tensor for name, tensor in gathered.tensors().items() if name != N]
    return sound and all(
        tensor.is_floating_point() and tensor.isfinite().all() for tensor in values
    )


def _write(path: Path, gathered: Gathered) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(save({k: v.contiguous() for k, v in gathered.tensors().items()}))

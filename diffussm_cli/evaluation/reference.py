"""References: statistics and images to compare samples with, read from ADM's files or made from
images.

FILE.npz: arr_0 (m, H, W, 3) uint8; mu (d,), sigma (d, d) of pool features; mu_s (s,), sigma_s (s,
s) of spatial ones.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.config import BUILTIN
from diffussm_cli.data.arrays import Rows, open_npz, write_npz
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation.extractors import Extractor
from diffussm_cli.evaluation.features import Gathered
from diffussm_cli.evaluation.metrics import moments
from diffussm_cli.evaluation.sets import IMAGES, ImageSet, open_images

POOL, SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")
EXTRACTOR = "extractor"  # not in ADM's files: the identity of the extractor, as bytes
MAX_NAME = 256
RECALL_IMAGES = 10_000
# of a covariance in a file: negative eigenvalues and asymmetry, relative to its largest number
TOLERANCE = 1e-4
BLOCK = 64

Statistics = tuple[Tensor, Tensor]  # mean (d,), covariance (d, d), float64


@dataclass
class Reference:
    """What samples are compared with. Statistics that a file lacks are computed from its images
    when needed.
    """

    name: str
    images: ImageSet | None
    pool: Statistics | None = None
    spatial: Statistics | None = None
    gathered: Gathered | None = None

    def complete(self, gathered: Gathered) -> None:
        """Add the features of its images; statistics from the file take precedence."""
        self.gathered = gathered
        if self.pool is None:
            pool = moments(gathered.pool)
            self.pool = (pool.mean, pool.covariance)
        if gathered.spatial:
            self.spatial = self.spatial or (gathered.spatial.mean, gathered.spatial.covariance)


def open_reference(
    path: str, extractor: Extractor, size: tuple[int, int] | None = None
) -> Reference:
    """Open one of ADM's .npz files, one written by `make_reference`, or any set of images.

    Raises:
        DataError, ConfigError: if it is none of these, or was made with another extractor.
    """
    if not path.endswith(".npz"):
        return Reference(path, open_images(path, extractor.channels, size, "reference"))

    arrays = open_npz(Path(path))
    if IMAGES not in arrays and not set(POOL) <= set(arrays):
        has = ", ".join(sorted(arrays)) or "nothing"
        raise DataError(
            f"reference: {path} holds neither {IMAGES} nor {' and '.join(POOL)}, only {has}"
        )
    made_with = _made_with(arrays)
    if made_with not in (None, extractor.identity):
        raise ConfigError(f"reference: {path} was made with {made_with}, not {extractor.identity}")
    images = open_images(path, extractor.channels, size, "reference") if IMAGES in arrays else None
    return Reference(path, images, _statistics(arrays, POOL), _statistics(arrays, SPATIAL))


def check_present(path: str, name: str = "reference") -> None:
    """Check that there is something at the path of images or of a reference, without an extractor;
    `name` is what errors call the path.

    Raises:
        DataError: if there is nothing, as `open_images` and `open_reference` do.
    """
    if not path.startswith(BUILTIN) and not os.path.lexists(path):
        open_images(path, 3, None, name)


def check_replaced(path: Path) -> None:
    """Check that a reference may be written here: nothing, or what `write_reference` wrote.

    Raises:
        ConfigError: if another file has this name, such as a downloaded reference.
    """
    if not path.exists():
        return
    try:
        is_ours = EXTRACTOR in open_npz(path)
    except DataError:
        is_ours = False
    if not is_ours:
        raise ConfigError(
            f"target: {path} exists and was not written by --make-ref; move it, or choose another "
            "name"
        )


def _made_with(arrays: dict[str, Rows]) -> str | None:
    """The identity of the extractor that a reference names, or None. Raises DataError."""
    name = arrays.get(EXTRACTOR)
    if name is None:
        return None
    if name.dtype != np.uint8 or len(name.shape) != 1 or name.shape[0] > MAX_NAME:
        raise DataError(
            f"{name.path}: {EXTRACTOR} is {name.dtype} of shape {name.shape}, not a name"
        )
    return name.read_all().tobytes().decode(errors="replace")


def _statistics(arrays: dict[str, Rows], names: tuple[str, str]) -> Statistics | None:
    if not set(names) <= set(arrays):
        return None
    mean, covariance = (arrays[name] for name in names)

    # Their types and shapes, before anything is read.
    d = mean.shape[0]
    if {mean.dtype.kind, covariance.dtype.kind} != {"f"}:
        raise DataError(
            f"{mean.path}: {names[0]} and {names[1]} are {mean.dtype} and {covariance.dtype}, "
            "not floating-point"
        )
    if not d or mean.shape != (d,) or covariance.shape != (d, d):
        raise DataError(
            f"{mean.path}: {names[0]} and {names[1]} are {mean.shape} and {covariance.shape}, "
            "not (d,) and (d, d)"
        )
    if d > 1 << 14:
        raise DataError(
            f"{mean.path}: {names[0]} has {d} numbers; no extractor has so many features"
        )

    m, S = (torch.from_numpy(rows.read_all().astype(np.float64)) for rows in (mean, covariance))
    if not (m.isfinite().all() and S.isfinite().all()):
        raise DataError(f"{mean.path}: {names[0]} or {names[1]} holds values that are not finite")
    _check_covariance(S, f"{mean.path}: {names[1]}")
    return m, S


def _check_covariance(S: Tensor, name: str) -> None:
    """Raises DataError for a matrix (d, d) that is not symmetric or has negative eigenvalues,
    beyond rounding.
    """
    largest = S.abs().max()
    if (S - S.T).abs().max() > TOLERANCE * largest:
        raise DataError(f"{name} is not symmetric, so it is no covariance; make the file again")
    lowest = torch.linalg.eigvalsh((S + S.T) / 2).min()
    if lowest < -TOLERANCE * largest:
        raise DataError(
            f"{name} has the eigenvalue {lowest:.3g}, so it is no covariance; make the file again"
        )


# ------------------------------------------------------------------------------------------- making
def write_reference(
    path: Path,
    images: ImageSet,
    gathered: Gathered,
    extractor: Extractor,
    count: int = RECALL_IMAGES,
    seed: int = 0,
) -> int:
    """Write an .npz that ADM's evaluator can also read: statistics of all images, and `count` of
    them drawn by `seed`.

    Args:
        gathered: the features of all images.

    Returns:
        The number of images written.

    Raises:
        DataError, OSError: if an image can no longer be read; if the file cannot be written.
    """
    # The images that are kept.
    n = min(count, len(images))
    chosen = sorted(np.random.default_rng(seed).choice(len(images), n, replace=False).tolist())
    blocks = (block.permute(0, 2, 3, 1).numpy() for block in images.read(chosen, BLOCK))
    arrays = {IMAGES: ((n, *images.size, extractor.channels), np.uint8, blocks)}

    # The statistics of all.
    pool = moments(gathered.pool)
    arrays |= {"mu": _array(pool.mean), "sigma": _array(pool.covariance)}
    if spatial := gathered.spatial:
        arrays |= {"mu_s": _array(spatial.mean), "sigma_s": _array(spatial.covariance)}

    identity = np.frombuffer(extractor.identity.encode(), np.uint8)
    write_npz(path, arrays | {EXTRACTOR: (identity.shape, np.uint8, [identity])})
    return n


def _array(tensor: Tensor) -> tuple:
    """Shape, type and blocks of an array, as `write_npz` takes them."""
    return tuple(tensor.shape), np.float64, [tensor.numpy()]


def check_extractor(reference: Reference, features: int, extractor: Extractor) -> None:
    """Raises ConfigError if the statistics and the samples differ in their number of features."""
    if reference.pool is not None and len(reference.pool[0]) != features:
        raise ConfigError(
            f"reference: {reference.name} has statistics of {len(reference.pool[0])} features, "
            f"but {extractor.identity.partition('-')[0]} has {features}: "
            "it was made with another extractor"
        )

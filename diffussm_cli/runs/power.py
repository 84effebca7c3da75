"""Averages of the weights whose width is chosen after training (Karras et al., arXiv 2312.02696,
section 3).

An average with a power-function profile weights the step s of t by s^gamma: its update after step t
has the decay (1 - 1/t)^(gamma + 1). Its width is the standard deviation of that profile as a share
of t. From snapshots of two such averages at several steps, a profile of another width is put
together by least squares.

n snapshots   t their steps   gamma their exponents
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffussm_cli.errors import RunError
from diffussm_cli.machine.files import sha256

WIDEST = 0.28  # the width of the mean of all steps is 1 / sqrt(12) = 0.289
MOST_ERROR = 0.1  # of a profile that is put together, relative to it


class Mixture(NamedTuple):
    """Weights as a sum of files times coefficients."""

    width: float
    parts: tuple[tuple[Path, float], ...]

    @property
    def sha256(self) -> str:
        """A hash of the files and coefficients."""
        lines = (f"{sha256(path)} {coefficient!r}\n" for path, coefficient in self.parts)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def exponent_of(width: float) -> float:
    """gamma of a width: the largest root of width^2 (gamma + 2)^2 (gamma + 3) = gamma + 1."""
    a = width**-2
    return float(np.roots([1, 7, 16 - a, 12 - a]).real.max())


def decay_at(step: int, exponent: float) -> float:
    """The decay of the update after optimiser step `step` (1, 2, ...)."""
    return (1 - 1 / step) ** (exponent + 1)


def coefficients(
    steps: Sequence[int], widths: Sequence[float], step: int, width: float
) -> tuple[list[float], float]:
    """How to sum snapshots so that their profiles come nearest to that of a width at a step.

    The coefficients sum to 1, so that weights that do not change are kept.

    Args:
        steps, widths: of each snapshot.

    Returns:
        The coefficients, and the relative L2 error of the profile.
    """
    t = np.array([*steps, step], dtype=np.float64)
    gamma = np.array([exponent_of(w) for w in (*widths, width)])
    n = len(steps)

    # The inner products of the profiles p(s) = (gamma + 1) s^gamma / t^(gamma + 1) on [0, t].
    least = np.minimum(t[:, None], t)
    powers = (least / t[:, None]) ** gamma[:, None] * (least / t) ** gamma
    factors = (gamma[:, None] + 1) * (gamma + 1) / (gamma[:, None] + gamma + 1)
    products = factors * powers * least / (t[:, None] * t)

    # Least squares under the condition that the coefficients sum to 1.
    scale = products[n, n]
    system = np.ones((n + 1, n + 1))
    system[:n, :n] = products[:n, :n] / scale
    system[n, n] = 0
    right = np.append(products[:n, n] / scale, 1)
    x = np.linalg.lstsq(system, right, rcond=1e-14)[0][:n]
    error = 1 - 2 * x @ right[:n] + x @ system[:n, :n] @ x
    return x.tolist(), math.sqrt(max(0.0, error))


def mixture_of(
    files: Sequence[tuple[Path, int, float]], step: int, width: float, where: Path
) -> Mixture:
    """The average of a width at a step from files of snapshots.

    Args:
        files: path, step and width of each.
        where: the folder of the run, for errors.

    Raises:
        RunError: if the width cannot be, or these snapshots do not give it.
    """
    if not 0 < width < WIDEST:
        raise RunError(f"--ema-width: {width} must be above 0 and below {WIDEST}")
    if not files:
        raise RunError(
            f"--ema-width: {str(where)!r} holds no snapshots of averages up to step {step}; "
            "they are made in training, by --set train.snapshot_every=STEPS"
        )

    paths, steps, widths = zip(*files)
    shares, error = coefficients(steps, widths, step, width)
    if error > MOST_ERROR:
        raise RunError(
            f"--ema-width: {width} cannot be put together from the {len(set(steps))} snapshots of "
            f"{str(where)!r}, whose nearest profile is {error:.0%} off; take a width nearer to "
            f"{min(widths)} or {max(widths)}, or train with a smaller train.snapshot_every"
        )
    return Mixture(width, tuple(zip(paths, shares)))

"""FID, sFID, Inception Score, precision, recall and KID of features, as ADM's evaluation defines
them.

    n images   d features   K classes   distances are squared L2

Statistics are float64 and can be gathered in parts, in any order, by any number of processes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3  # k of precision and recall
SPLIT = 5000  # consecutive images per split of the Inception Score
BLOCK = 2048  # rows of a distance matrix computed at a time
KID_SUBSETS, KID_SIZE = 100, 1000
EXTRAPOLATED_FROM = 8  # sample sizes that FID-infinity is fitted to


@dataclass
class Moments:
    """Mean and covariance of features, gathered in parts: n, mean (d,), and M2 (d, d), the sum of
    squared deviations.

    Parts are joined by the update of Chan, Golub and LeVeque (1979), which stays accurate for large
    means.
    """

    n: int
    mean: Tensor
    M2: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Moments of one part, features (n, d)."""
        x = features.double()
        mean = x.mean(0)
        deviation = x - mean
        return cls(len(x), mean, deviation.T @ deviation)

    def joined(self, other: "Moments") -> "Moments":
        n = self.n + other.n
        step = other.mean - self.mean
        M2 = self.M2 + other.M2 + torch.outer(step, step) * (self.n * other.n / n)
        return Moments(n, self.mean + step * (other.n / n), M2)

    @property
    def covariance(self) -> Tensor:
        """(d, d), divided by n - 1."""
        return self.M2 / (self.n - 1)


def moments(features: Tensor) -> Moments:
    """Moments of all features (n, d), computed in blocks."""
    first, *others = (Moments.of(block) for block in features.split(BLOCK))
    for part in others:
        first = first.joined(part)
    return first


# ----------------------------------------------------------------------------------------- distance
def frechet_distance(
    mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor
) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); float64 throughout.

    The trace of the root is the sum of the square roots of the eigenvalues of R S2 R with R =
    S1^(1/2). That matrix is symmetric, so no complex numbers arise, and the result is finite for
    singular covariances. The distance of two equal distributions, which rounding may put below
    zero, is zero.
    """
    m1, S1, m2, S2 = (t.double() for t in (mean1, covariance1, mean2, covariance2))

    # The eigenvalues of R S2 R.
    values, vectors = torch.linalg.eigh((S1 + S1.T) / 2)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ S2 @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()

    distance = (m1 - m2).square().sum() + S1.trace() + S2.trace() - 2 * trace
    return distance.clamp(min=0).item()  # NaN stays NaN


def fid_infinity(features: Tensor, mean: Tensor, covariance: Tensor, seed: int = 0) -> float:
    """FID for infinitely many samples (Chong and Forsyth 2020): the intercept of a line fitted to
    FID against 1/n.

    The line is fitted at eight sample sizes, from a tenth of the samples to all, drawn without
    replacement. It needs at least nine samples. As an estimate it may be below zero.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    sizes = np.linspace(max(2, len(features) // 10), len(features), EXTRAPOLATED_FROM).astype(int)
    values = []
    for size in sizes:
        part = moments(features[order[: int(size)]])
        values.append(frechet_distance(part.mean, part.covariance, mean, covariance))
    return float(np.polyfit(1 / sizes, values, 1)[1])


def kid(features1: Tensor, features2: Tensor, seed: int = 0) -> tuple[float, float]:
    """Kernel Inception Distance (Binkowski 2018): mean and standard error over 100 subsets of up to
    1,000.

    The unbiased MMD^2 with the kernel (x.y / d + 1)^3. As an estimate it may be below zero.
    """
    generator = np.random.default_rng(seed)
    size = min(KID_SIZE, len(features1), len(features2))
    values = []
    for _ in range(KID_SUBSETS):
        x, y = (
            f[generator.choice(len(f), size, replace=False)].double()
            for f in (features1, features2)
        )
        values.append(_mmd2(x, y))
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(KID_SUBSETS))


def _mmd2(x: Tensor, y: Tensor) -> float:
    m, d = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / d + 1) ** 3

    within = sum((k.sum() - k.trace()) / (m * (m - 1)) for k in (kernel(x, x), kernel(y, y)))
    return (within - 2 * kernel(x, y).mean()).item()


# ---------------------------------------------------------------------------------- inception score
@dataclass
class SplitSums:
    """Sums for the Inception Score, per split of consecutive images: n (s,), sum of p log p (s,),
    sum of p (s, K).
    """

    n: Tensor
    negentropy: Tensor
    p: Tensor

    @classmethod
    def empty(cls, images: int, classes: int, split: int = SPLIT) -> "SplitSums":
        """Zeros, for a set of `images` images."""
        splits = max(1, math.ceil(images / split))
        return cls(
            *(
                torch.zeros(s, dtype=torch.float64)
                for s in ((splits,), (splits,), (splits, classes))
            )
        )

    def add(self, first: int, logits: Tensor, split: int = SPLIT) -> None:
        """Add the logits (n, K) of images first, first + 1, ..."""
        place = (first + torch.arange(len(logits))) // split
        log_p = logits.cpu().double().log_softmax(-1)  # MPS has no float64
        p = log_p.exp()
        self.n.index_add_(0, place, torch.ones(len(p), dtype=torch.float64))
        self.negentropy.index_add_(0, place, (p * log_p).sum(-1))
        self.p.index_add_(0, place, p)

    def joined(self, other: "SplitSums") -> "SplitSums":
        return SplitSums(self.n + other.n, self.negentropy + other.negentropy, self.p + other.p)

    def score(self) -> float:
        """exp(E KL(p(y|x) || p(y))) of each split, averaged."""
        marginal = self.p / self.n[:, None]
        return (
            (self.negentropy / self.n - torch.xlogy(marginal, marginal).sum(-1)).exp().mean().item()
        )


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """Inception Score of logits (n, K), in consecutive splits."""
    sums = SplitSums.empty(len(logits), logits.shape[1], split)
    sums.add(0, logits, split)
    return sums.score()


# -------------------------------------------------------------------------------- precision, recall
def precision_recall(reference: Tensor, samples: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi 2019), k = 3: shares of samples and of references
    inside the balls.

    The ball of a feature reaches to its third nearest neighbour in the same set, boundary included.
    ADM's evaluator computes distances in float16, so that many are equal to the radius; its shares
    differ by up to 0.003.

    Args:
        reference: (n, d).
        samples: (m, d).
    """
    reference_radii, sample_radii = _radii(reference), _radii(samples)
    inside_reference = torch.zeros(len(samples), dtype=torch.bool)
    inside_samples = torch.zeros(len(reference), dtype=torch.bool)

    # Distances between the sets, one block at a time.
    for i, rows in _blocks(reference):
        for j, columns in _blocks(samples):
            distance = _distances(rows, columns)
            inside_reference[j] |= (distance <= reference_radii[i][:, None]).any(0)
            inside_samples[i] |= (distance <= sample_radii[j]).any(1)

    return inside_reference.double().mean().item(), inside_samples.double().mean().item()


def _radii(features: Tensor) -> Tensor:
    """Squared distance of each feature to its k-th nearest neighbour, not counting itself: (n,)."""
    radii = []
    for _, rows in _blocks(features):
        nearest = torch.full((len(rows), 0), 0.0)
        for _, columns in _blocks(features):
            nearest = torch.cat([nearest, _distances(rows, columns)], 1)
            nearest = nearest.topk(min(NEIGHBOURS + 1, nearest.shape[1]), largest=False).values
        radii.append(nearest.max(1).values)
    return torch.cat(radii)


def _blocks(features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(features), BLOCK):
        part = slice(start, min(start + BLOCK, len(features)))
        yield part, features[part]


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (n, m), float32."""
    a, b = a.float(), b.float()
    return (a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)).clamp(min=0)

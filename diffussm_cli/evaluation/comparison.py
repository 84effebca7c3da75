"""The metrics of one set of samples against one reference, in the order they were asked for."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation.gathering import Gathered
from diffussm_cli.evaluation.metrics import (
    SPLIT,
    fid_infinity,
    frechet_distance,
    kid,
    moments,
    precision_recall,
)
from diffussm_cli.evaluation.reference import RECALL_IMAGES, Reference

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid", "fid_infinity")
USUAL = METRICS[:-1]
PUBLISHED_SAMPLES = 50_000


def evaluate_features(
    samples: Gathered, reference: Reference, metrics: Sequence[str] = USUAL, half: bool = False
) -> Iterator[tuple[str, float]]:
    """Yield names and values; KID with `kid_error` after it.

    Args:
        half: precision and recall in ADM's float16.

    Raises:
        ConfigError, DataError: for a metric that this extractor or this reference cannot give.
    """
    ours = moments(samples.pool)
    for metric in metrics:
        if metric == "fid":
            yield metric, frechet_distance(ours.mean, ours.covariance, *_pool(reference))
        elif metric == "fid_infinity":
            yield metric, fid_infinity(samples.pool, *_pool(reference))
        elif metric == "sfid":
            if samples.spatial is None or reference.spatial is None:
                raise DataError(f"--metrics: sfid needs spatial features, of the extractor and in {reference.name}")
            yield metric, frechet_distance(samples.spatial.mean, samples.spatial.covariance, *reference.spatial)
        elif metric == "is":
            if samples.classes is None:
                raise ConfigError(
                    "--metrics: is needs the class probabilities of a classifier; this extractor gives none"
                )
            yield metric, samples.classes.score()
        elif metric in ("precision", "recall"):
            if metric == "precision" or "precision" not in metrics:
                both = dict(zip(("precision", "recall"), precision_recall(_features(reference), samples.pool, half)))
            yield metric, both[metric]
        elif metric == "kid":
            value, error = kid(samples.pool, _features(reference))
            yield from ((metric, value), ("kid_error", error))


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names between commas, or `all`. Raises ConfigError."""
    chosen = METRICS if text == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [m for m in chosen if m not in METRICS]
    if unknown:
        raise ConfigError(f"--metrics: {unknown[0]!r} is none of {', '.join(METRICS)}, all")
    # precision comes with recall: one pass over the distances gives both
    return tuple(m for m in METRICS if m in chosen)


def needs_images(metrics: Sequence[str], reference: Reference) -> bool:
    """Whether the features of the reference's images are needed, beyond statistics in its file."""
    wanted = {"precision", "recall", "kid"}
    if reference.pool is None:
        wanted |= {"fid", "fid_infinity"}
    if reference.spatial is None:
        wanted |= {"sfid"}
    return bool(wanted & set(metrics))


def possible(metrics: Sequence[str], samples: Gathered, reference: Reference, lenient: bool) -> Sequence[str]:
    """The metrics themselves, or if `lenient` those that these features and this reference can give."""
    if not lenient:
        return metrics
    missing = set() if samples.classes is not None else {"is"}
    if samples.spatial is None or reference.spatial is None:
        missing |= {"sfid"}
    if reference.gathered is None:
        missing |= {"precision", "recall", "kid"}
    return [m for m in metrics if m not in missing]


def warnings(samples: Any, gathered: Gathered, reference: Reference, metrics: Sequence[str]) -> list[str]:
    """What makes these figures incomparable with published ones, in words. `samples` is an ImageSet."""
    n, d = gathered.pool.shape
    found = []
    if n < PUBLISHED_SAMPLES and "fid" in metrics:
        bias = frechet_bias(gathered)
        found.append(
            f"{n:,} samples: published FID is of {PUBLISHED_SAMPLES:,}, and fewer give a larger one, by about "
            f"{bias:.3g} here; --metrics all adds fid_infinity, which is free of it"
        )
    if n <= d:
        found.append(
            f"the covariance of {n:,} samples lacks rank: FID needs more than the {d:,} features, and is too large"
        )
    if "is" in metrics and _in_order(samples.labels):
        found.append(f"samples are in the order of their classes: splits of {SPLIT:,} make the Inception Score too low")
    if reference.size and tuple(reference.size) != tuple(samples.size):
        theirs, ours = ("x".join(map(str, s)) for s in (reference.size, samples.size))
        found.append(f"the reference is of {theirs}, the samples of {ours}: figures of two resolutions do not compare")
    if samples.lossy:
        found.append("samples are JPEG or WebP: lossy compression alone moves FID; write PNG")
    if reference.gathered is not None and len(reference.gathered.pool) != RECALL_IMAGES and "recall" in metrics:
        has = len(reference.gathered.pool)
        found.append(f"recall is of {has:,} reference images; published recall is of {RECALL_IMAGES:,}")
    return found


def frechet_bias(gathered: Gathered) -> float:
    """How much FID is too large with n samples instead of 50,000, by half of a set against the whole, roughly.

    FID grows as c / n; a random half of the samples against the other half differs by 4 c / n of equal sets.
    """
    n = len(gathered.pool)
    if n < 8:
        return float("inf")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    halves = [moments(gathered.pool[part]) for part in (order[: n // 2], order[n // 2 :])]
    apart = frechet_distance(halves[0].mean, halves[0].covariance, halves[1].mean, halves[1].covariance)
    return apart / 4 * (1 - n / PUBLISHED_SAMPLES)


def _in_order(labels: Sequence[int] | None) -> bool:
    """Whether classes come in one piece or two each, and there are several."""
    if labels is None:
        return False
    runs, classes = 1 + sum(a != b for a, b in itertools.pairwise(labels)), len(set(labels))
    return classes > 1 and runs <= min(2 * classes, len(labels) // 2)


def _pool(reference: Reference):
    if reference.pool is None:
        raise DataError(f"--reference: {reference.name} holds no statistics and no images")
    return reference.pool


def _features(reference: Reference):
    if reference.gathered is None:
        raise DataError(
            f"--reference: {reference.name} holds statistics only; precision, recall and kid need its images (arr_0): "
            "leave them out by --metrics fid,sfid,is"
        )
    return reference.gathered.pool

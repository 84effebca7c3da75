"""The metrics of one set of samples against one reference, in the requested order."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation.gathering import Gathered
from diffussm_cli.evaluation.metrics import (
    LEAST,
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
    samples: Gathered, reference: Reference, metrics: Sequence[str] = USUAL
) -> Iterator[tuple[str, float]]:
    """Yield the name and value of each metric; `kid_error` follows `kid`.

    Raises:
        ConfigError, DataError: if the extractor or the reference does not support a metric.
    """
    ours = moments(samples.pool)
    both: dict[str, float] = {}  # precision and recall, which come from one pass over the distances
    for metric in metrics:
        if metric == "fid":
            yield metric, frechet_distance(ours.mean, ours.covariance, *_pool(reference))
        elif metric == "fid_infinity":
            yield metric, fid_infinity(samples.pool, *_pool(reference))
        elif metric == "sfid":
            if samples.spatial is None or reference.spatial is None:
                raise DataError(f"--metrics: sfid needs spatial features, from the extractor and in {reference.name}")
            yield metric, frechet_distance(samples.spatial.mean, samples.spatial.covariance, *reference.spatial)
        elif metric == "is":
            if samples.classes is None:
                raise ConfigError(
                    "--metrics: is needs the class probabilities of a classifier; this extractor gives none"
                )
            yield metric, samples.classes.score()
        elif metric in ("precision", "recall"):
            if not both:
                both = dict(zip(("precision", "recall"), precision_recall(_features(reference), samples.pool)))
            yield metric, both[metric]
        elif metric == "kid":
            value, error = kid(samples.pool, _features(reference))
            yield from ((metric, value), ("kid_error", error))


def parse_metrics(text: str) -> tuple[str, ...]:
    """Parse comma-separated names, or `all`. Raises ConfigError."""
    chosen = METRICS if text == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [m for m in chosen if m not in METRICS]
    if unknown:
        raise ConfigError(f"--metrics: {unknown[0]!r} is not one of {', '.join(METRICS)}, all")
    return tuple(m for m in METRICS if m in chosen)


def needs_images(metrics: Sequence[str], reference: Reference) -> bool:
    """Whether the metrics need features of the reference's images, not only the statistics in its file."""
    wanted = {"precision", "recall", "kid"}
    if reference.pool is None:
        wanted |= {"fid", "fid_infinity"}
    if reference.spatial is None:
        wanted |= {"sfid"}
    return bool(wanted & set(metrics))


def check_counts(metrics: Sequence[str], samples: Any, reference: Reference) -> None:
    """Raises DataError if a metric needs more images than there are. `samples` is an ImageSet.

    Statistics of a reference that come from its file need no images.
    """
    for metric in metrics:
        least = LEAST.get(metric, 1)
        of_reference = needs_images([metric], reference) and reference.images is not None
        for option, images in (("SAMPLES", samples), ("--reference", reference.images if of_reference else None)):
            if images is not None and len(images) < least:
                has = f"{len(images)} image" + ("s" if len(images) != 1 else "")
                raise DataError(f"{option}: {images.name} holds {has}, but {metric} needs at least {least}")


def possible(metrics: Sequence[str], samples: Gathered, reference: Reference, lenient: bool) -> Sequence[str]:
    """The given metrics, or if `lenient`, only those that the features and the reference support."""
    if not lenient:
        return metrics
    missing = set() if samples.classes is not None else {"is"}
    if samples.spatial is None or reference.spatial is None:
        missing |= {"sfid"}
    if reference.gathered is None:
        missing |= {"precision", "recall", "kid"}
    return [m for m in metrics if m not in missing]


def warnings(samples: Any, gathered: Gathered, reference: Reference, metrics: Sequence[str]) -> list[str]:
    """Reasons why these scores cannot be compared with published ones. `samples` is an ImageSet."""
    n, d = gathered.pool.shape
    found = []
    if n < PUBLISHED_SAMPLES and "fid" in metrics:
        found.append(
            f"{n:,} samples: published FID uses {PUBLISHED_SAMPLES:,}; fewer samples raise it; "
            "--metrics all adds fid_infinity, which does not have this bias"
        )
    if n <= d:
        found.append(
            f"the covariance of {n:,} samples is singular: FID is too high; it needs more samples than features ({d:,})"
        )
    if "is" in metrics and _in_order(samples.labels):
        found.append(f"samples are sorted by class: with splits of {SPLIT:,}, the Inception Score is too low")
    if reference.images and tuple(reference.images.size) != tuple(samples.size):
        theirs, ours = ("x".join(map(str, s)) for s in (reference.images.size, samples.size))
        found.append(f"reference images are {theirs}, samples {ours}: scores at two resolutions cannot be compared")
    if samples.lossy:
        found.append("samples are JPEG or WebP: lossy compression alone moves FID; write PNG")
    if reference.gathered is not None and len(reference.gathered.pool) != RECALL_IMAGES and "recall" in metrics:
        has = len(reference.gathered.pool)
        found.append(f"recall uses {has:,} reference images; published recall uses {RECALL_IMAGES:,}")
    return found


def _in_order(labels: Sequence[int] | None) -> bool:
    """Whether samples are sorted by class: there are several classes, each in one or two runs."""
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
            "leave them out with --metrics fid,sfid,is"
        )
    return reference.gathered.pool

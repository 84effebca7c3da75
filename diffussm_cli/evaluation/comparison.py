"""The metrics of one set of samples against one reference: what each of them needs, and what makes
it incomparable.

To add a metric, add a row to `TABLE`, and one to `METRIC_FACTS` in `config/metrics.py`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from diffussm_cli.config import METRICS, USUAL_METRICS
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation.features import Gathered
from diffussm_cli.evaluation.metrics import (
    EXTRAPOLATED_FROM,
    KID_SIZE,
    NEIGHBOURS,
    SPLIT,
    fid_infinity,
    frechet_distance,
    kid,
    moments,
    precision_recall,
)
from diffussm_cli.evaluation.reference import RECALL_IMAGES, Reference
from diffussm_cli.evaluation.sets import ImageSet

PUBLISHED_SAMPLES = 50_000
SAME = 1e-5  # of a deviation, by which means of features of the same images may differ by rounding
# of `Gathered`
LAYERS = {"spatial": "spatial features", "classes": "the class probabilities of a classifier"}

Values = dict[str, float]


# ------------------------------------------------------------------------------------------- values
def _fid(samples: Gathered, reference: Reference) -> Values:
    assert reference.pool is not None, "checked by Metric.lack"
    ours = moments(samples.pool)
    return {"fid": frechet_distance(ours.mean, ours.covariance, *reference.pool)}


def _fid_infinity(samples: Gathered, reference: Reference) -> Values:
    assert reference.pool is not None, "checked by Metric.lack"
    return {"fid_infinity": fid_infinity(samples.pool, *reference.pool)}


def _sfid(samples: Gathered, reference: Reference) -> Values:
    assert samples.spatial is not None, "checked by Metric.lack"
    assert reference.spatial is not None, "checked by Metric.lack"
    return {
        "sfid": frechet_distance(
            samples.spatial.mean, samples.spatial.covariance, *reference.spatial
        )
    }


def _inception_score(samples: Gathered, _: Reference) -> Values:
    assert samples.classes is not None, "checked by Metric.lack"
    return {"is": samples.classes.score()}


def _precision_recall(samples: Gathered, reference: Reference) -> Values:
    assert reference.gathered is not None, "checked by Metric.lack"
    precision, recall = precision_recall(reference.gathered.pool, samples.pool)
    return {"precision": precision, "recall": recall}


def _kid(samples: Gathered, reference: Reference) -> Values:
    assert reference.gathered is not None, "checked by Metric.lack"
    value, error = kid(samples.pool, reference.gathered.pool)
    return {"kid": value, "kid_error": error}


# ------------------------------------------------------------------------------------------ remarks
def _few_images(_: ImageSet, samples: Gathered, reference: Reference) -> list[str]:
    n, d = samples.pool.shape
    remarks = []

    if n < PUBLISHED_SAMPLES:
        remarks.append(
            f"{n:,} samples: published FID uses {PUBLISHED_SAMPLES:,}; fewer samples raise it; "
            "the metric fid_infinity does not have this bias"
        )

    if n <= d:
        remarks.append(
            f"the covariance of {n:,} samples is singular: FID is too high; "
            f"it needs more samples than features ({d:,})"
        )

    if reference.gathered is not None and len(reference.gathered.pool) <= d:
        remarks.append(
            f"the covariance of {len(reference.gathered.pool):,} reference images is singular: "
            f"FID is too high; it needs more of them than features ({d:,})"
        )

    return remarks


def _sorted_samples(images: ImageSet, _: Gathered, __: Reference) -> list[str]:
    if not in_order(images.labels):
        return []
    return [
        f"samples are sorted by class: with splits of {SPLIT:,}, the Inception Score is too low"
    ]


def _other_number_of_references(_: ImageSet, __: Gathered, reference: Reference) -> list[str]:
    if reference.gathered is None or len(reference.gathered.pool) == RECALL_IMAGES:
        return []
    n = len(reference.gathered.pool)
    return [f"recall uses {n:,} reference images; published recall uses {RECALL_IMAGES:,}"]


def _same_subsets(_: ImageSet, samples: Gathered, reference: Reference) -> list[str]:
    n = len(samples.pool)
    if reference.gathered is None or n != len(reference.gathered.pool) or n > KID_SIZE:
        return []
    return [f"kid: each of its subsets is all {n:,} images, so that its error is not known"]


def _same_images(samples: Gathered, reference: Reference) -> bool:
    """Whether samples and reference are the same images, in any order, by the means of their
    features; those of two sets of n images differ by about a deviation / sqrt(n).
    """
    if reference.pool is None:
        return False
    mean, covariance = reference.pool
    apart = (samples.pool.double().mean(0) - mean).abs()
    return bool((apart <= SAME * covariance.diagonal().sqrt()).all())


def in_order(labels: Sequence[int] | None) -> bool:
    """Whether samples are sorted by class: there are several classes, each in one or two runs."""
    if labels is None:
        return False
    runs = 1 + sum(a != b for a, b in itertools.pairwise(labels))
    classes = len(set(labels))
    return classes > 1 and runs <= min(2 * classes, len(labels) // 2)


# ---------------------------------------------------------------------------------------- the table
@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Attributes:
        samples: the field of `Gathered` that it reads of the samples.
        reference: the field of `Reference` that it reads; None if it has no reference.
        least: the number of images that each set needs at least.
        compute: (samples, reference) -> values by name, and perhaps the error of one as
            `NAME_error`. Rows may share a function.
        remarks: (images, samples, reference) -> why its value cannot be compared with published
            ones.
    """

    samples: str
    reference: str | None
    least: int
    compute: Callable[[Gathered, Reference], Values]
    remarks: Callable[[ImageSet, Gathered, Reference], list[str]] = lambda *_: []

    def reads_images(self, reference: Reference) -> bool:
        """Whether it needs features of the reference's images, not only the statistics in its
        file.
        """
        if self.reference is None:
            return False
        return self.reference == "gathered" or getattr(reference, self.reference) is None

    def lack(self, samples: Gathered, reference: Reference) -> str:
        """What it needs and does not have, as the end of an error line; empty if it can be
        computed.
        """
        if getattr(samples, self.samples) is None:
            return f"needs {LAYERS[self.samples]}, which this extractor does not give"
        if self.reference is not None and getattr(reference, self.reference) is None:
            return f"needs images or statistics that {reference.name} does not hold"
        for sort, gathered in (("samples", samples), ("reference images", reference.gathered)):
            if gathered is not None and len(gathered.pool) < self.least:
                return f"needs at least {self.least} {sort}"
        return ""


TABLE = {
    "fid": Metric("pool", "pool", 2, _fid, _few_images),
    "sfid": Metric("spatial", "spatial", 2, _sfid),
    "is": Metric("classes", None, 1, _inception_score, _sorted_samples),
    "precision": Metric("pool", "gathered", NEIGHBOURS + 1, _precision_recall),
    "recall": Metric(
        "pool", "gathered", NEIGHBOURS + 1, _precision_recall, _other_number_of_references
    ),
    "kid": Metric("pool", "gathered", 2, _kid, _same_subsets),
    "fid_infinity": Metric("pool", "pool", EXTRAPOLATED_FROM + 1, _fid_infinity),
}
USUAL = USUAL_METRICS

_only_once = ", ".join(sorted({*TABLE} ^ {*METRICS}))
assert not _only_once, f"metric {_only_once}: needs a row here and in config/metrics.py"


def evaluate_features(
    samples: Gathered, reference: Reference, metrics: Sequence[str] = USUAL
) -> Iterator[tuple[str, float]]:
    """Yield the name and value of each metric; `kid_error` follows `kid`.

    Raises:
        DataError: if the extractor or the reference does not support a metric.
    """
    computed: dict[Callable, Values] = {}
    for name in metrics:
        metric = TABLE[name]
        if lack := metric.lack(samples, reference):
            raise DataError(f"metrics: {name} {lack}")

        # One computation may give several metrics.
        if metric.compute not in computed:
            computed[metric.compute] = metric.compute(samples, reference)
        values = computed[metric.compute]
        assert name in values, f"metric {name}: its function gives {', '.join(values)} alone"
        yield from ((key, values[key]) for key in (name, f"{name}_error") if key in values)


def possible(metrics: Sequence[str], samples: Gathered, reference: Reference) -> list[str]:
    """Those of the metrics that the features and the reference support."""
    return [name for name in metrics if not TABLE[name].lack(samples, reference)]


def parse_metrics(metrics: str | Sequence[str]) -> tuple[str, ...]:
    """Check names of metrics, or one text with commas between them, or "all"; returned in the order
    of `METRICS`.

    Raises:
        ConfigError: for a name that is none.
    """
    names = [name.strip() for name in metrics.split(",")] if isinstance(metrics, str) else metrics
    if metrics == "all":
        names = METRICS
    unknown = [name for name in names if name not in TABLE]
    if unknown:
        raise ConfigError(f"metrics: {unknown[0]!r} is not one of {', '.join(METRICS)}, all")
    return tuple(name for name in METRICS if name in names)


def needs_images(metrics: Sequence[str], reference: Reference) -> bool:
    """Whether the metrics need features of the reference's images, not only the statistics in its
    file.
    """
    return any(TABLE[name].reads_images(reference) for name in metrics)


def check_images(metrics: Sequence[str], samples: ImageSet | None, reference: Reference) -> None:
    """Raises DataError if there are fewer images than a metric needs, or none where it needs those
    of the reference. Samples that are not drawn yet are None.
    """
    reading = [name for name in metrics if TABLE[name].reads_images(reference)]
    if reading and reference.images is None and reference.gathered is None:
        raise DataError(
            f"reference: {reference.name} holds no images (arr_0) for {', '.join(reading)}; "
            "give one that does, or other metrics"
        )

    for name in metrics:
        least = TABLE[name].least
        for parameter, images in (
            ("samples", samples),
            ("reference", reference.images if name in reading else None),
        ):
            if images is not None and len(images) < least:
                count = f"{len(images)} image" + ("s" if len(images) != 1 else "")
                raise DataError(
                    f"{parameter}: {images.name} holds {count}, but {name} needs at least {least}"
                )


def warnings(
    images: ImageSet, samples: Gathered, reference: Reference, metrics: Sequence[str]
) -> list[str]:
    """Reasons why these scores cannot be compared with published ones. `samples` are the features
    of `images`.
    """
    remarks = [line for name in metrics for line in TABLE[name].remarks(images, samples, reference)]
    if reference.images and tuple(reference.images.size) != tuple(images.size):
        theirs, ours = ("x".join(map(str, s)) for s in (reference.images.size, images.size))
        remarks.append(
            f"reference images are {theirs}, samples {ours}: "
            "scores at two resolutions cannot be compared"
        )

    if _same_images(samples, reference):
        remarks.append(
            "the reference has the same features as the samples, as of the same images: "
            "distances between them say nothing"
        )
    if images.lossy:
        remarks.append("samples are JPEG or WebP: lossy compression alone moves FID; write PNG")
    return remarks

"""What is known of each metric of `diffussm eval` without torch. They are computed by
`evaluation/comparison.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricFacts:
    """A row of `METRIC_FACTS`.

    Attributes:
        title: its name on pages.
        higher_is_better: whether the best value of a run is its highest.
        is_usual: whether it is computed if nobody names metrics.
    """

    title: str
    higher_is_better: bool
    is_usual: bool


METRIC_FACTS = {
    "fid": MetricFacts("FID", higher_is_better=False, is_usual=True),
    "sfid": MetricFacts("sFID", higher_is_better=False, is_usual=True),
    "is": MetricFacts("Inception score", higher_is_better=True, is_usual=True),
    "precision": MetricFacts("Precision", higher_is_better=True, is_usual=True),
    "recall": MetricFacts("Recall", higher_is_better=True, is_usual=True),
    "kid": MetricFacts("KID", higher_is_better=False, is_usual=True),
    "fid_infinity": MetricFacts("FID infinity", higher_is_better=False, is_usual=False),
}
METRICS = tuple(METRIC_FACTS)
USUAL_METRICS = tuple(name for name, row in METRIC_FACTS.items() if row.is_usual)

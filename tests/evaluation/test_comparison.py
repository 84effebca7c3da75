"""Metrics of features against a reference, and what is said of them."""

import dataclasses
import math

import pytest
import torch

from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation import comparison as ev
from diffussm_cli.evaluation.features import Gathered
from diffussm_cli.evaluation.metrics import Moments
from diffussm_cli.evaluation.reference import Reference, open_reference
from diffussm_cli.evaluation.sets import open_images
from tests.evaluation.conftest import folder, gathered


def test_warnings_name_what_makes_scores_incomparable(tmp_path, digits):
    images = open_images(str(folder(tmp_path / "a", 12)), 1)
    reference = open_reference(str(folder(tmp_path / "b", 9, side=32)), digits, None)
    small = gathered(images, digits)[0]
    reference.gathered = small
    found = " | ".join(ev.warnings(images, small, reference, ev.USUAL))
    for words in (
        (
            "12 samples: published FID uses 50,000; fewer samples raise it; the metric "
            "fid_infinity does"
        ),
        (
            "the covariance of 12 samples is singular: FID is too high; it needs more samples "
            "than features (64)"
        ),
        "samples are sorted by class",
        "reference images are 32x32, samples 28x28",
        (
            "the covariance of 12 reference images is singular: FID is too high; it needs more of "
            "them than features (64)"
        ),
        "recall uses 12 reference images",
    ):
        assert words in found
    assert "JPEG" not in found


def test_metrics_are_named_in_any_order_and_computed_in_one():
    assert ev.parse_metrics("kid, fid,kid") == ("fid", "kid")
    assert ev.parse_metrics("all") == ev.METRICS
    assert ev.parse_metrics(["kid", "fid"]) == ("fid", "kid")
    for wrong in ("fid,fdi", ["fid", "fdi"]):
        with pytest.raises(ConfigError, match="^metrics: 'fdi' is not one of fid, sfid"):
            ev.parse_metrics(wrong)


POOL = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2
STATISTICS = torch.tensor([3.0]).double(), torch.tensor([[4.0]]).double()


def evaluated(metrics, samples, **reference):
    return dict(ev.evaluate_features(samples, Reference("r", None, **reference), metrics))


def test_distances_of_one_feature_equal_closed_form():
    """(m - m')^2 + (s - s')^2, of pool and of spatial features."""
    samples = Gathered(POOL, Moments.of(POOL + 1), None)
    found = evaluated(["fid", "sfid"], samples, pool=STATISTICS, spatial=STATISTICS)
    spread = (math.sqrt(2) - 2) ** 2
    assert found == pytest.approx({"fid": 4 + spread, "sfid": 1 + spread})


def test_kid_comes_with_its_error_and_recall_can_come_alone():
    real = Gathered(torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]]), None, None)
    samples = Gathered(torch.tensor([[0.5], [1.5], [90.0], [99.0], [108.0]]), None, None)
    found = evaluated(["precision", "recall", "kid"], samples, gathered=real)
    assert list(found) == ["precision", "recall", "kid", "kid_error"]
    assert (found["precision"], found["recall"]) == (2 / 5, 1.0)
    assert evaluated(["recall"], samples, gathered=real) == {"recall": 1.0}
    assert evaluated(["recall", "precision"], samples, gathered=real) == {
        "recall": 1.0,
        "precision": 2 / 5,
    }


@pytest.mark.parametrize(("n", "is_known"), [(5, False), (6, True), (1001, True)])
def test_kid_of_all_images_in_each_subset_has_no_error(n, is_known):
    """As many samples as reference images, at most 1,000: the subsets do not differ."""
    samples = Gathered(torch.rand(n, 2), None, None)
    real = Gathered(torch.rand(n if n > 1000 else 5, 2), None, None)
    remarks = ev.TABLE["kid"].remarks(None, samples, Reference("r", None, gathered=real))
    line = "kid: each of its subsets is all 5 images, so that its error is not known"
    assert remarks == ([] if is_known else [line])


@pytest.mark.parametrize(
    "metric", ["fid", "fid_infinity", "sfid", "is", "precision", "recall", "kid"]
)
def test_unsupported_metric_is_error_or_left_out(metric):
    samples, reference = Gathered(torch.rand(40, 1), None, None), Reference("r", None)
    with pytest.raises(DataError, match=f"^metrics: {metric} needs "):
        dict(ev.evaluate_features(samples, reference, [metric]))
    possible = ev.possible([metric], samples, Reference("r", None, pool=STATISTICS))
    assert possible == ([metric] if metric.startswith("fid") else [])


def test_metric_that_its_function_does_not_give_is_an_error(monkeypatch):
    metric = dataclasses.replace(ev.TABLE["fid"], compute=lambda *_: {"fd": 1.0})
    monkeypatch.setitem(ev.TABLE, "fid", metric)
    samples, reference = Gathered(torch.rand(4, 2), None, None), Reference("r", None)
    reference.complete(samples)
    with pytest.raises(AssertionError, match="metric fid: its function gives fd alone"):
        dict(ev.evaluate_features(samples, reference, ["fid"]))


@pytest.mark.parametrize(
    ("n", "names"),
    [(1, []), (2, ["fid", "kid"]), (3, ["fid", "kid"]), (4, ["fid", "precision", "recall", "kid"])],
)
def test_metric_of_too_few_images_is_left_out(n, names):
    """Of samples and of reference images: a covariance needs two, third neighbours need four."""
    few, many = (Gathered(torch.rand(images, 2), None, None) for images in (n, 40))
    for samples, real in ((few, many), (many, few)):
        reference = Reference("r", None)
        reference.complete(real)
        assert ev.possible(ev.USUAL, samples, reference) == names


def test_reference_without_statistics_needs_images():
    def needed(**statistics):
        return {m for m in ev.METRICS if ev.needs_images([m], Reference("r", None, **statistics))}

    always = {"precision", "recall", "kid"}
    assert needed(pool=STATISTICS, spatial=STATISTICS) == always
    assert needed(pool=STATISTICS) == always | {"sfid"}
    assert needed() == always | {"sfid", "fid", "fid_infinity"}


@pytest.mark.parametrize(
    ("labels", "in_order"),
    [
        ([0, 0, 0, 1, 1, 1], True),
        ([0, 0, 1, 1, 0, 0, 1, 1], True),  # two pieces a class
        ([0, 1, 0, 1, 0, 1], False),
        ([0, 0, 0], False),  # there is one class
        (None, False),
    ],
)
def test_labels_follow_order_of_classes(labels, in_order):
    assert ev.in_order(labels) == in_order

"""Metrics against the ADM evaluator's figures, closed forms, and what is known of special sets."""

import pytest
import torch

from diffussm_cli.evaluation import metrics
from diffussm_cli.evaluation.metrics import (
    Moments,
    SplitSums,
    fid_infinity,
    frechet_distance,
    inception_score,
    kid,
    moments,
    precision_recall,
)
from tests.conftest import golden
from tests.evaluation import adm_half

CPU = torch.device("cpu")  # where metrics are computed, whatever device the features come from


@pytest.fixture(scope="module")
def adm():
    return golden("adm_metrics", CPU)


def distance(a, b):
    one, two = moments(a), moments(b)
    return frechet_distance(one.mean, one.covariance, two.mean, two.covariance)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "name"), [("pool", "fid"), ("spatial", "sfid")])
def test_distance_equals_adm(adm, kind, name):
    assert distance(adm[f"gen_{kind}"], adm[f"ref_{kind}"]) == pytest.approx(
        adm[name].item(), rel=1e-6
    )


class OnMPS(torch.Tensor):
    """A tensor of a device without float64, until it is copied to the CPU."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("MPS has no float64")


def test_probabilities_are_summed_on_the_cpu():
    logits = normal(20, 5)
    assert inception_score(logits.as_subclass(OnMPS)) == inception_score(logits)


@pytest.mark.parametrize("split", [5000, 1000])
def test_inception_score_equals_adm(adm, split):
    logits = adm["gen_pool"] @ adm["logit_weight"]
    assert inception_score(logits, split) == pytest.approx(adm[f"is_split{split}"].item(), rel=1e-5)


def test_precision_and_recall_in_half_equal_adm(adm):
    found = adm_half.precision_recall(adm["ref_pool"], adm["gen_pool"], adm_half.half_distances)
    assert found == (adm["precision"].item(), adm["recall"].item())


def test_precision_and_recall_in_single_are_near(adm):
    found = precision_recall(adm["ref_pool"], adm["gen_pool"])
    assert found != (adm["precision"].item(), adm["recall"].item())
    assert found == pytest.approx((adm["precision"].item(), adm["recall"].item()), abs=0.003)


def test_blocks_do_not_change_precision_and_recall(adm, monkeypatch):
    in_one_block = precision_recall(adm["ref_pool"], adm["gen_pool"])
    monkeypatch.setattr(metrics, "BLOCK", 257)
    assert precision_recall(adm["ref_pool"], adm["gen_pool"]) == in_one_block


def test_precision_and_recall_equal_their_definition():
    reference, samples = normal(90, 6), 0.8 * normal(70, 6, seed=1) + 0.3
    expected = adm_half.precision_recall(reference, samples, adm_half.exact_distances)
    assert precision_recall(reference, samples) == expected
    assert 0.2 < expected[1] < expected[0] < 0.98


@pytest.mark.parametrize("d", [5, 20, 61, 512, 2048])
def test_half_sum_rounds_as_tensorflow_does(d):
    sums = golden("adm_half", CPU)
    assert torch.equal(adm_half.half_sum(sums[f"x{d}"].square()), sums[f"n{d}"])


# ------------------------------------------------------------------------------------ known answers
def test_distance_of_set_to_itself_is_zero():
    assert abs(distance(normal(500, 12), normal(500, 12))) < 1e-9


def test_distance_of_gaussians_has_a_closed_form():
    """Commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2."""
    a, b, shift = (
        torch.tensor([1.0, 4.0, 9.0]),
        torch.tensor([16.0, 1.0, 0.25]),
        torch.tensor([1.0, -2.0, 0.5]),
    )
    turn = torch.linalg.qr(normal(3, 3).double())[0]
    covariances = [turn @ torch.diag(v).double() @ turn.T for v in (a, b)]
    found = frechet_distance(torch.zeros(3), covariances[0], shift, covariances[1])
    assert found == pytest.approx(
        (shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item(), rel=1e-12
    )


def test_distance_without_full_rank_is_finite():
    assert 0 < distance(normal(10, 40), normal(12, 40, seed=1)) < 200


def test_moments_in_parts_equal_those_of_all():
    x = normal(1000, 6) + 1e6  # a large mean, which naive sums of squares lose
    parts = [Moments.of(p) for p in x.split([1, 399, 600])]
    joined = parts[2].joined(parts[0]).joined(parts[1])
    torch.testing.assert_close(joined.covariance, torch.cov(x.double().T), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(joined.mean, x.double().mean(0))


def test_fid_infinity_removes_bias():
    reference = moments(normal(100_000, 8))
    few = normal(400, 8, seed=1)
    ours = moments(few)
    biased = frechet_distance(ours.mean, ours.covariance, reference.mean, reference.covariance)
    assert abs(fid_infinity(few, reference.mean, reference.covariance)) < biased / 2


def test_kid_is_zero_for_equal_sets_and_positive_for_shifted():
    same, _ = kid(normal(500, 4), normal(500, 4, seed=1))
    apart, _ = kid(normal(500, 4), normal(500, 4, seed=1) + 2)
    assert abs(same) < 0.03
    assert apart > 1


def test_kid_is_the_unbiased_estimate():
    """By the double sum, on sets that one subset takes whole."""
    x, y = normal(30, 3).double(), normal(30, 3, seed=1).double() + 0.3

    def mean_kernel(a, b, pairs):
        return sum(((a[i] @ b[j]) / 3 + 1) ** 3 for i, j in pairs).item() / len(pairs)

    apart = [(i, j) for i in range(30) for j in range(30) if i != j]
    every = [(i, j) for i in range(30) for j in range(30)]
    expected = mean_kernel(x, x, apart) + mean_kernel(y, y, apart) - 2 * mean_kernel(x, y, every)
    assert kid(x, y)[0] == pytest.approx(expected, rel=1e-9)


def test_inception_score_of_certain_and_blind_classifier_is_known():
    certain = 100 * torch.eye(10).repeat(50, 1)
    assert inception_score(certain) == pytest.approx(10)
    assert inception_score(torch.zeros(500, 10)) == pytest.approx(1)
    in_order = certain[:10].repeat_interleave(50, 0)
    # sorted by class: each split sees one
    assert inception_score(in_order, split=50) == pytest.approx(1)


def test_split_sums_of_parts_equal_those_of_all():
    logits = normal(1203, 7)
    parts = [SplitSums.empty(1203, 7, 500) for _ in range(3)]
    for part, start in zip(parts, (0, 400, 900)):
        part.add(start, logits[start : {0: 400, 400: 900, 900: 1203}[start]], 500)
    assert parts[0].joined(parts[2]).joined(parts[1]).score() == pytest.approx(
        inception_score(logits, 500), rel=1e-12
    )


def test_collapsed_generator_has_precision_without_recall():
    real = normal(1000, 6)
    collapsed = real[:1] + 1e-4 * normal(500, 6, seed=1)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1
    assert recall <= 0.01


def test_swapping_the_sets_swaps_precision_and_recall():
    a, b = normal(300, 5), 0.5 * normal(400, 5, seed=1)
    assert precision_recall(a, b) == precision_recall(b, a)[::-1]
    assert precision_recall(a, b)[0] > precision_recall(a, b)[1]


def test_ball_reaches_to_the_third_neighbour():
    """On a line at 0, 1, 2, 3, 10: the ball at 0 has radius 3 and the distance 3
    counts as inside.
    """
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    samples = torch.tensor([[-3.0], [-3.01], [6.0], [6.01]])
    precision, _ = precision_recall(reference, samples)
    assert precision == 0.5

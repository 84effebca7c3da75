"""Charts: where points and ticks lie, and numbers as people read them."""

import numpy as np
import pytest

from diffussm_cli.pages import Curve, chart, moving_mean, number, round_values


def test_chart_points_lie_at_their_values():
    linear = chart("", {"": Curve([0, 10], [0.0, 1.0])})
    assert linear["lines"] == ["44.0,144.9 354.0,17.1"]  # 4% of the range is free above and below
    assert [label for _, label in linear["rows"]] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    ratio = chart("", {"": Curve([0, 5, 10], [0.01, 0.1, 1.0])})
    assert ratio["lines"] == ["44.0,144.9 199.0,81.0 354.0,17.1"]
    assert [label for _, label in ratio["rows"]] == ["0.01", "0.1", "1"]
    assert [label for _, label in ratio["columns"]] == ["0", "5", "10"]
    assert chart("", {"": Curve([3], [0.0])})["lines"] == ["354.0,81.0"]
    assert [label for _, label in chart("", {"": Curve([1, 2], [1e3, 1e5])})["rows"]] == [
        "1,000",
        "10,000",
        "1e+05",
    ]


def test_range_of_values_is_that_of_the_late_steps():
    """A loss from 1.7 to 0.19: the first tenth is cut off above, and told in the legend."""
    x = list(range(1, 101))
    y = [1.7, 1.0] + [0.25 - 0.06 * i / 97 for i in range(98)]
    cut, full = (chart("", {"": Curve(x, y)}, early=early) for early in (0.1, 0.0))
    assert {label for _, label in cut["rows"]} == {"0.2", "0.22", "0.24"}
    assert cut["begins"] == [1.7]
    assert full["begins"] == [None]
    assert {label for _, label in full["rows"]} == {"0.5", "1", "1.5"}
    heights = [float(point.split(",")[1]) for point in cut["lines"][0].split()]
    assert heights[0] < 0  # above the picture
    assert max(heights[10:]) - min(heights[10:]) > 120  # of 138


def test_best_point_lies_in_the_picture_even_if_it_is_early():
    drawn = chart("", {"": Curve([1, 50, 100], [0.1, 5.0, 6.0])}, (1, 0.1), early=0.1)
    assert 12 < drawn["best"]["y"] < 150


def test_linear_chart_has_no_log_scale():
    rate = {"": Curve([0, 10, 100], [1e-6, 1e-3, 1e-3])}
    assert "1e-06" not in [label for _, label in chart("", rate, linear=True)["rows"]]
    assert "1e-05" in [label for _, label in chart("", rate)["rows"]]


def test_zero_before_the_range_of_a_log_scale_is_cut_off():
    values = {"": Curve([1, 50, 100], [0.0, 1.0, 100.0])}
    drawn = chart("", values, early=0.1)
    assert float(drawn["lines"][0].split(",")[1].split()[0]) > 1000
    assert drawn["begins"] == [0.0]


@pytest.mark.parametrize(("n", "size"), [(3, 1), (39, 1), (40, 5), (100, 11), (30_000, 1001)])
def test_moving_mean_is_that_of_the_values_around_each(n, size):
    """One spike, which no sum over all values survives, is only in the means around it."""
    y = np.random.default_rng(0).standard_normal(n)
    y[n // 2] = 1e20
    curve, found = moving_mean(Curve(np.arange(n), y))
    assert found == size
    side = size // 2
    for i in {0, 1, side, n // 2, n - 1 - side, n - 2, n - 1}:
        left = min(i, side)
        expected = y[i - left : i + min(side, left if i < side else side) + 1].mean()
        assert curve.y[i] == pytest.approx(expected)


def test_average_lies_over_its_faint_curve_in_the_colour_of_the_run():
    long, short = Curve(range(40), [1.0, 3.0] * 20), Curve(range(3), [1.0, 2.0, 1.0])
    both = chart("", {"a": long, "b": short}, averaged=True, runs=[4, 7])
    assert [name for name, _ in both["legend"]] == ["a", "b", "a, mean of 5 records"]
    assert both["faint"] == [True, False, False]
    assert both["colours"] == [0, 1, 0]
    assert both["runs"] == [4, 7, 4]
    alone = chart("", {"": long}, averaged=True)
    assert alone["legend"] == [("", 3.0), ("mean of 5 records", pytest.approx(7 / 3))]
    assert chart("", {"": long})["faint"] == [False]


def test_values_that_hardly_change_have_ticks_that_differ():
    ticks = [text for _, text in chart("decay", {"": Curve([1, 2], [0.5, 0.50003])})["rows"]]
    assert len(ticks) > 1
    assert len(set(ticks)) == len(ticks)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 8.5), (0.49, 0.51), (1e-6, 2e-6), (0, 12399), (5, 6.1)]
)
def test_axis_has_two_to_seven_round_values(low, high):
    found = round_values(low, high, integers=False)
    assert 2 <= len(found) <= 7
    assert all(low <= v <= high for v in found)


def test_numbers_are_formatted_for_people():
    assert [number(v) for v in (0, 0.012345, 12.345, 1234.5, 1e-7)] == [
        "0",
        "0.0123",
        "12.3",
        "1,234",
        "1e-07",
    ]

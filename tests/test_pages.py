"""Charts: where points and ticks lie, and numbers as people read them."""

import pytest

from diffussm_cli.pages import Curve, chart, number, round_values


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

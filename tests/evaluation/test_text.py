"""Retrieval of names and categories, on features whose neighbours are known."""

import pytest
import torch

from diffussm_cli.evaluation.text import retrieval

# Seven names in the plane, at 0, 10, ... 60 degrees; the first has a second picture at 180.
DEGREES = torch.tensor([0.0, 10, 20, 30, 40, 50, 60, 180])
NAMES, CATEGORIES = list("abcdefga"), list("xxyyyyyx")


def at(degrees):
    angle = torch.as_tensor(degrees).deg2rad()
    return 3 * torch.stack([angle.cos(), angle.sin()], 1)  # the length must not matter


def test_names_and_categories_are_found_by_the_nearest_picture():
    """The first is right by its second picture, the second is of a neighbour, the third is the sixth nearest."""
    found = retrieval(at([179.0, 11, 1]), ["a", "c", "f"], at(DEGREES), NAMES, CATEGORIES)
    assert found["top1"] == pytest.approx(1 / 3)
    assert found["top5"] == pytest.approx(2 / 3)
    assert found["category"] == pytest.approx(1 / 3)
    assert (found["chance_top1"], found["chance_top5"]) == (1 / 7, 5 / 7)
    assert found["chance_category"] == pytest.approx((2 + 5 + 5) / 3 / 7)

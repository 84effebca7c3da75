"""Slices that fit the cache."""

import pytest
import torch

from diffussm_cli.model.s4d import numerics
from diffussm_cli.model.s4d.numerics import slices_of


@pytest.mark.parametrize(
    ("count", "numbers", "sizes"),
    [(7, 300, [3, 3, 1]), (6, 333, [3, 3]), (4, 10, [4]), (3, 5000, [1, 1, 1])],
)
def test_slices_hold_as_many_as_fit_and_one_at_least(monkeypatch, count, numbers, sizes):
    monkeypatch.setattr(numerics, "SLICE", {True: 1000, False: 1})
    found = slices_of(count, numbers, torch.device("cpu"))
    assert [s.stop - s.start for s in found] == sizes
    assert [i for s in found for i in range(s.start, s.stop)] == list(range(count))


def test_gpu_takes_slices_of_its_own_size(monkeypatch):
    monkeypatch.setattr(numerics, "SLICE", {True: 1, False: 1000})
    assert slices_of(7, 300, torch.device("cuda")) == [slice(0, 3), slice(3, 6), slice(6, 7)]


@pytest.mark.parametrize(
    ("images", "tokens", "sizes"),
    [(32, 1024, [1152]), (32, 4096, [576, 576]), (96, 4096, [288, 288, 288, 288])],
)
def test_gpu_takes_the_channels_of_xl_in_few_equal_slices(images, tokens, sizes):
    """Each further slice costs as many launches; the convolution counts two numbers per token."""
    found = slices_of(1152, 2 * images * tokens, torch.device("cuda"))
    assert [s.stop - s.start for s in found] == sizes

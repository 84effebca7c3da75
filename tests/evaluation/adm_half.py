"""Precision and recall by their definition, with whole matrices, and the float16 distances of ADM's
evaluator.

The evaluator computes in float16 with TensorFlow. What is rounded, and in which order, decides how
many distances are equal to a radius. The functions below round where TensorFlow does on a CPU; with
them, the shares are exactly ADM's.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NEIGHBOURS = 3


def precision_recall(
    reference: Tensor, samples: Tensor, distances: Callable
) -> tuple[float, float]:
    """Shares of samples and of references in the balls of the other set.

    `distances` maps (n, d) and (m, d) to squared distances (n, m).
    """
    radii = [distances(x, x).kthvalue(NEIGHBOURS + 1, 1).values for x in (reference, samples)]
    between = distances(reference, samples)
    precision = (between <= radii[0][:, None]).any(0).double().mean().item()
    recall = (between <= radii[1]).any(1).double().mean().item()
    return precision, recall


def exact_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (n, m) in float64."""
    return (a.double()[:, None] - b.double()).square().sum(-1)


def half_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (n, m), rounded to float16 after each step; matrix products accumulate in
    float32.
    """
    a, b = a.half(), b.half()
    products = (a.float() @ b.float().T).half()
    distance = half_sum(a.square())[:, None] - 2 * products + half_sum(b.square())
    return distance.clamp(min=0).float()


def half_sum(x: Tensor) -> Tensor:
    """Sum of float16 (n, d) over d in the order of TensorFlow.

    2,048 or more numbers are split into halves. Packets of eight lanes are added, every fourth one;
    then the four sums and the packets that are left; then the lanes in float32; then the numbers
    that are left.
    """
    n, d = x.shape
    if d >= 2048:
        return half_sum(x[:, : d // 2]) + half_sum(x[:, d // 2 :])

    packets = [x[:, i : i + 8] for i in range(0, d // 8 * 8, 8)]
    fours = len(packets) // 4 * 4
    total = torch.zeros(n, 8, dtype=x.dtype)
    for first in range(min(4, fours)):
        total = total + functools.reduce(torch.add, packets[first:fours:4])
    total = functools.reduce(torch.add, packets[fours:], total)

    lanes = total.float().sum(1).half()
    return lanes + functools.reduce(
        torch.add, x[:, d // 8 * 8 :].unbind(1), torch.zeros_like(lanes)
    )

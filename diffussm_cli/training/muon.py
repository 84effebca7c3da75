"""Muon (Jordan et al. 2024): matrices are updated by their orthogonalised momentum, everything else
by AdamW.

A matrix A x B of a group with the flag `muon` takes the step lr 0.2 sqrt(max(A, B)) U V^T, where U
S V^T is its momentum. Its entries then have the size that AdamW's updates have, so a rate that
suits AdamW suits it (Liu et al., 2025, arXiv 2502.16982).
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the polynomial that brings singular values close to 1
ITERATIONS = 5
MOMENT = "momentum"  # the state of a matrix


class Muon(torch.optim.Optimizer):
    """Muon for the parameters of groups with `muon` true, fused AdamW for those of other groups.

    Like fused AdamW, it skips a step on the device, without waiting for it, when its `found_inf` is
    1. Without one, as in a training loop of your own, it takes every step.

    Args:
        groups: each with `params`, `lr`, `weight_decay` and `muon`.
        parts: how many matrices lie one below the other in a parameter, by its id; 1 for others.
            Leading dimensions of a parameter are separate matrices anyway.
        betas: of AdamW.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, groups: list[dict[str, Any]], parts: dict[int, int], betas: tuple[float, float]
    ):
        others = [group for group in groups if not group["muon"]]
        self.adamw = torch.optim.AdamW(others, betas=betas, fused=True)
        super().__init__(groups, {**self.adamw.defaults, "muon": False})
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        # AdamW works on what is ours now: a state that is loaded replaces groups and moments.
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        self.step_of_matrices()

    @torch.no_grad()
    def step_of_matrices(self) -> None:
        """The part of a step that is not AdamW's."""
        for group in self.param_groups:
            if group["muon"]:
                self._step_of_group(group)

    def _step_of_group(self, group: dict[str, Any]) -> None:
        moved = torch.zeros((), device=group["params"][0].device)
        skipped = moved > 0 if self.found_inf is None else self.found_inf > 0
        for pieces in self._by_shape(group):
            # momentum, and Nesterov's look ahead
            gradients = torch.cat([gradient for _, _, gradient in pieces])
            before = torch.cat([moment for _, moment, _ in pieces])
            after = torch.where(skipped, before, before.lerp(gradients, 1 - MOMENTUM))
            direction = orthogonalised(gradients.lerp(after, MOMENTUM))

            # the step, or nothing if the step is skipped: a product with 0 would keep what is not
            # finite
            scale = 0.2 * math.sqrt(max(direction.shape[-2:]))
            update = group["lr"] * (
                scale * direction + group["weight_decay"] * torch.cat([w for w, _, _ in pieces])
            )
            update = torch.where(skipped, 0.0, update)
            moved += update.square().sum()

            sizes = [len(weights) for weights, _, _ in pieces]
            for (weights, moment, _), new, moves in zip(
                pieces, after.split(sizes), update.split(sizes)
            ):
                moment.copy_(new)
                weights.sub_(moves)
        group["moved"] = moved

    def _by_shape(self, group: dict[str, Any]) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
        """Weights, momentum and gradient of each parameter as matrices (n, A, B), those of one
        shape together.
        """
        shapes: dict[torch.Size, list] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p][MOMENT] = torch.zeros_like(p)

            tensors = p, self.state[p][MOMENT], p.grad
            pieces = tuple(self._matrices(p, tensor) for tensor in tensors)
            shapes[pieces[0].shape[1:]].append(pieces)
        yield from shapes.values()

    def _matrices(self, p: Tensor, tensor: Tensor) -> Tensor:
        """A parameter, or what has its shape, as matrices (n, A, B), without a copy."""
        rows = p.shape[-2] // self.parts.get(id(p), 1)
        return tensor.view(-1, rows, p.shape[-1])


def matrices_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that Muon updates by their momentum; none of another optimiser."""
    groups = optimizer.param_groups
    return [p for group in groups if group.get("muon") for p in group["params"]]


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U V^T of matrices (n, A, B) = U S V^T, by Newton and Schulz: singular values come to
    lie in 0.7 to 1.2.

    On a GPU it computes in bfloat16, as Muon's authors do, and on the meta device, where steps
    on a GPU are predicted. A matrix of zeros stays one.
    """
    X = matrices.to(torch.bfloat16) if matrices.is_cuda or matrices.is_meta else matrices
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)

    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        S = X @ X.mT
        X = a * X + (b * S + c * S @ S) @ X
    return (X.mT if tall else X).to(matrices.dtype)

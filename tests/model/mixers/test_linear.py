"""Gated linear attention in chunks against its recurrence, and its two directions."""

import pytest
import torch

from diffussm_cli.model.mixers.linear import (
    CHUNK,
    TEMPERATURE,
    LinearAttention,
    gated_linear_attention,
)
from tests.conftest import device, fill, randn, relative


def recurrence(q, k, v, log_decay):
    """The definition, token by token."""
    S, y = torch.zeros(*q.shape[:-2], q.shape[-1], v.shape[-1], dtype=q.dtype, device=q.device), []
    for l in range(q.shape[-2]):  # noqa: E741
        S = log_decay[..., l, None, None].exp() * S + k[..., l, :, None] * v[..., l, None, :]
        y.append((q[..., l, None, :] @ S)[..., 0, :])
    return torch.stack(y, -2)


@pytest.mark.parametrize(("L", "T"), [(12, 4), (11, 4), (3, 8), (9, 1), (2 * CHUNK + 5, CHUNK)])
@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0], ids=lambda s: f"gates of {s}")
def test_chunks_equal_the_recurrence_with_gradients(L, T, strength):
    q, k, v = (randn(2, 3, L, 5, seed=i, dtype=torch.double).requires_grad_() for i in range(3))
    log_decay = (-strength * randn(2, 3, L, seed=3, dtype=torch.double).abs()).requires_grad_()
    weights = randn(2, 3, L, 5, seed=4, dtype=torch.double)
    results = []
    for y in (gated_linear_attention(q, k, v, log_decay, T), recurrence(q, k, v, log_decay)):
        results.append((y, *torch.autograd.grad((weights * y).sum(), [q, k, v, log_decay])))
    for fast, slow in zip(*results):
        assert relative(fast, slow) < 1e-12


def made(D=8, heads=2):
    return fill(LinearAttention(D, heads), 0.5).double()


def test_layer_equals_two_recurrences_over_tokens():
    B, D, J, M, h = 2, 8, 5, 2, 2
    layer, u = made(D, h), randn(B, D, J, M, dtype=torch.double)
    tokens = torch.stack([u[:, :, j, m] for j in range(J) for m in range(M)], 1)  # (B, L, D)
    qk, gates = layer.qk(tokens), layer.gates(tokens)
    y = layer(u, (1, J))
    for direction in (0, 1):
        for head in range(h):
            own = slice(head * D // h, (head + 1) * D // h)
            q, k, v = qk[..., :D][..., own], qk[..., D:][..., own], tokens[..., own]
            log_decay = torch.sigmoid(gates[..., direction * h + head]).log() / TEMPERATURE
            way = (lambda x: x.flip(1)) if direction else (lambda x: x)
            o = way(recurrence(way(q), way(k), way(v), way(log_decay)))
            o = o / o.square().mean(-1, keepdim=True).add(1e-6).sqrt()
            found = y[:, direction * D :][:, own].permute(0, 2, 3, 1).reshape(o.shape)
            assert relative(found, o) < 1e-12, (direction, head)


def test_reversing_the_sequence_exchanges_the_directions():
    layer, u = made(), randn(2, 8, 6, 2, dtype=torch.double)
    forward, backward = layer(u).chunk(2, dim=1)
    for p in layer.gates.parameters():
        p.data = p.data.unflatten(0, (2, -1)).flip(0).flatten(0, 1)
    swapped_forward, swapped_backward = layer(u.flip(2, 3)).flip(2, 3).chunk(2, dim=1)
    torch.testing.assert_close(swapped_forward, backward)
    torch.testing.assert_close(swapped_backward, forward)


def test_directions_see_only_their_side():
    layer, u = made(), randn(1, 8, 4, 2, dtype=torch.double).requires_grad_()
    y = layer(u)
    for half, seen in ((slice(0, 8), range(5)), (slice(8, 16), range(4, 8))):
        # of token 4
        (gradient,) = torch.autograd.grad(y[0, half, 2, 0].sum(), u, retain_graph=True)
        assert gradient[0].flatten(1).any(0).nonzero().flatten().tolist() == list(seen)


def test_half_precision_is_close_to_full():
    layer, u = fill(LinearAttention(32, 2), 0.2), randn(2, 32, 50, 4)
    with torch.no_grad(), torch.autocast(device().type, torch.bfloat16):
        mixed = layer(u)
    low = layer.bfloat16()(u.bfloat16())
    assert low.dtype == torch.bfloat16
    exact = layer.double()(u.double())
    assert relative(mixed, exact) < 0.02
    assert relative(low, exact) < 0.03

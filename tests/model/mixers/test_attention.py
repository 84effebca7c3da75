"""Attention against softmax, head by head."""

import pytest
import torch

from diffussm_cli.model.mixers.attention import Attention
from tests.conftest import fill, randn


def test_attention_equals_softmax_of_all_tokens_in_both_halves():
    B, D, J, M, h = 2, 8, 3, 2, 2
    layer, u = fill(Attention(D, h), 0.5).double(), randn(B, D, J, M, dtype=torch.double)
    tokens = torch.stack([u[:, :, j, m] for j in range(J) for m in range(M)], 1)  # (B, L, D)
    q, k = layer.qk(tokens).chunk(2, dim=-1)
    y, rest = layer(u, (1, J)).chunk(2, dim=1)
    assert torch.equal(rest, u)
    for head in range(h):
        own = slice(head * D // h, (head + 1) * D // h)
        weights = torch.softmax(q[..., own] @ k[..., own].mT / (D // h) ** 0.5, -1)
        expected = (weights @ tokens[..., own]).mT.reshape(B, D // h, J, M)
        torch.testing.assert_close(y[:, own], expected)


def test_heads_that_do_not_divide_width_are_rejected():
    with pytest.raises(ValueError, match="hidden_size 8 must be a multiple of heads 3"):
        Attention(8, 3)

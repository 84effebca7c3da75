"""Timesteps, positions and patches."""

import math

import torch

from diffussm_cli.model.embeddings import (
    TextEmbedding,
    patchify,
    position_table,
    sinusoids,
    unpatchify,
)
from tests.conftest import device, fill, randn


def test_unpatchify_inverts_patchify():
    x = torch.arange(2 * 3 * 4 * 8.0).view(2, 3, 4, 8)
    tokens = patchify(x, P=2, M=2)
    assert tokens.shape == (2, 4, 2 * 3 * 4)
    assert torch.equal(
        tokens[0, 1, :4], x[0, 0, 0:2, 4:6].flatten()
    )  # raster order: the second position, its first token
    # and the neighbour beside it
    assert torch.equal(tokens[0, 1, 12:16], x[0, 0, 0:2, 6:8].flatten())
    out = torch.arange(2 * 4 * 24.0).view(2, 4, 24)
    image = unpatchify(out, P=2, M=2, H=4, W=8)
    assert torch.equal(image[0, :, 0, 0], out[0, 0, :3])
    assert torch.equal(image[0, :, 1, 0], out[0, 0, 6:9])  # p = 1, q = 0 of the first token
    assert torch.equal(image[0, :, 0, 3], out[0, 0, 15:18])  # p = 0, q = 1 of the second


def test_positions_differ_and_keep_one_scale():
    table = position_table(6, 8, 2, 32)
    assert table.shape == (24, 32)
    assert len(torch.unique(table, dim=0)) == 24
    single = position_table(6, 8, 1, 32).view(6, 8, 32)
    # rows as without compression
    torch.testing.assert_close(table.view(6, 4, 32)[:, :, :16], single[:, ::2, :16])
    torch.testing.assert_close(position_table(1, 4, 4, 32)[0, 16:], torch.tensor(_sincos(1.5, 16)))


def _sincos(position, width):
    angles = [position / 10_000 ** (i / (width // 2)) for i in range(width // 2)]
    return [*torch.tensor(angles).cos().tolist(), *torch.tensor(angles).sin().tolist()]


def test_sinusoids_have_geometric_frequencies_and_take_fractions():
    """Of width 4 and period 10,000: frequencies 1 and 1/100."""
    found = sinusoids(torch.tensor([0.0, 2.5], device=device()), 4)
    expected = [[1, 1, 0, 0], [math.cos(2.5), math.cos(0.025), math.sin(2.5), math.sin(0.025)]]
    torch.testing.assert_close(found, torch.tensor(expected, device=device()))


def test_missing_text_embeds_as_zeros():
    embedding = fill(TextEmbedding(4, 8, 2))
    text = randn(3, 3, 4)
    text[1, 2], text[2] = 0, 0  # a short caption, and none
    filled = text.clone()
    filled[1, 2], filled[2] = embedding.null[2].detach(), embedding.null.detach()
    pooled, tokens = embedding(text)
    assert (pooled.shape, tokens.shape) == ((3, 8), (3, 2, 8))
    for found, expected in zip((pooled, tokens), embedding(filled)):
        assert torch.equal(found, expected)
        assert len(torch.unique(found.detach().flatten(1), dim=0)) == 3
    assert fill(TextEmbedding(4, 8, 0))(text[:, :1])[1] is None

"""What may be done to queries and keys: by formula, and by what a score depends on."""

import itertools

import pytest
import torch

from diffussm_cli.model.heads import BASE, AttentionOfHeads, angles_of, turned
from diffussm_cli.model.mixers.attention import Attention
from diffussm_cli.model.scan import RASTER, SCANS
from tests.conftest import device, fill, randn, relative

H, W, M, d = 3, 4, 2, 10  # of the channels, two do not turn


def angles(scan=RASTER, H=H, W=W, M=M):
    return angles_of((H, W // M), M, d // 4, scan, device(), torch.float64)


def test_rope_score_is_closed_form_of_distance():
    """Pairs of channels are complex numbers; with a shift they turn by rate times shift."""
    q, k = randn(2, 1, d, dtype=torch.float64)
    scores = turned(q.expand(H * W, d), angles()) @ turned(k.expand(H * W, d), angles()).mT
    pairs = torch.complex(q[0, :4], q[0, 4:8]) * torch.complex(k[0, :4], k[0, 4:8]).conj()
    rates = BASE ** -torch.tensor([0, 0.5], dtype=torch.float64, device=device())

    places = list(itertools.product(range(H), range(W)))
    for (i, a), (j, b) in itertools.product(enumerate(places), enumerate(places)):
        down, right = a[0] - b[0], a[1] - b[1]
        turns = torch.cat([down * rates, right * rates])
        expected = (pairs * torch.polar(torch.ones_like(turns), turns)).real.sum()
        expected = expected + (q[0, 8:] * k[0, 8:]).sum()
        torch.testing.assert_close(scores[i, j], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scan", SCANS["four"], ids=str)
def test_rope_of_mixer_gives_tokens_their_places_in_every_order(scan):
    """The same image by any order: the same result."""
    layers = [fill(Attention(8, 2, s, rope=True), 0.5).double() for s in (RASTER, scan)]
    image, grid = randn(2, 8, H, W, dtype=torch.float64), (H, W // M)
    by_raster, by_scan = (
        layer.scan.to_image(layer(layer.scan.to_sequence(image, grid), grid), grid)
        for layer in layers
    )
    torch.testing.assert_close(by_scan, by_raster, rtol=1e-10, atol=1e-12)


def test_text_tokens_are_not_turned():
    """Turned by hand before plain attention: the words around the image stay."""
    words = 3
    q, k, v = randn(3, 2, 2, words + H * W + words, d, dtype=torch.float64)
    hand = [x.clone() for x in (q, k)]
    for x in hand:
        x[:, :, words:-words] = turned(x[:, :, words:-words], angles())
    ours = AttentionOfHeads(d, rope=True)(q, k, v, (H, W // M), M)
    torch.testing.assert_close(ours, AttentionOfHeads(d)(*hand, v), rtol=1e-12, atol=1e-12)


def test_qk_norm_equals_formula_and_bounds_scores():
    layer = fill(AttentionOfHeads(d, qk_norm=True), 1.0).double()
    q, k, v = randn(3, 2, 2, 5, d, dtype=torch.float64)

    def normed(x, norm):
        return norm.weight * x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()

    scores = normed(q, layer.q_norm) @ normed(k, layer.k_norm).mT / d**0.5
    torch.testing.assert_close(layer(q, k, v), scores.softmax(-1) @ v, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer(1e3 * q, k, v), layer(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_in_is_bfloat16_out(autocast):
    exact = fill(AttentionOfHeads(d, qk_norm=True, rope=True), 1.0)
    q, k, v = randn(3, 2, 2, H * W, d)
    expected = exact(q, k, v, (H, W // M), M)
    layer = exact if autocast else exact.bfloat16()
    with torch.autocast(device().type, torch.bfloat16, enabled=autocast):
        y = layer(*(x.bfloat16() for x in (q, k, v)), (H, W // M), M)
    assert y.dtype == torch.bfloat16
    assert relative(y, expected) < 0.03

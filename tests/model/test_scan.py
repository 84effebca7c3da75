"""Orders of positions: written out by hand, undone, and turned with the image."""

import itertools

import pytest
import torch

from diffussm_cli.model.block import DiffuSSMBlock
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.model.scan import RASTER, SCANS, Scan
from tests.conftest import device, fill, randn

COLUMNS = Scan(columns=True)
ORDERS = SCANS["four"]
GRIDS = [(2, 3), (5, 4), (1, 6), (7, 1)]


@pytest.mark.parametrize(
    ("scan", "order"),
    list(
        zip(
            ORDERS, ([0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [0, 1, 2, 5, 4, 3], [0, 3, 4, 1, 2, 5])
        )
    ),
    ids=str,
)
def test_orders_of_two_rows_of_three_are_known(scan, order):
    assert scan.apply(torch.arange(6)[None], (2, 3)).tolist() == [order]


def test_blocks_take_the_orders_in_turn():
    assert {name: len(orders) for name, orders in SCANS.items()} == {
        "raster": 1,
        "alternate": 2,
        "four": 4,
    }
    assert SCANS["raster"] == SCANS["four"][:1]
    assert SCANS["alternate"] == SCANS["four"][:2]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("scan", ORDERS, ids=str)
def test_order_is_a_permutation_with_its_inverse(scan, grid):
    H, W = grid
    x = randn(2, H * W, 3)
    order = scan.apply(torch.arange(H * W)[None], grid)[0]
    assert sorted(order.tolist()) == list(range(H * W))
    assert torch.equal(scan.apply(x, grid), x[:, order.to(device())])
    assert torch.equal(scan.undo(scan.apply(x, grid), grid), x)


@pytest.mark.parametrize("scan", ORDERS[2:], ids=str)
def test_consecutive_positions_of_turning_orders_are_neighbours(scan):
    order = scan.apply(torch.arange(20)[None], (5, 4))[0].tolist()
    places = [divmod(i, 4) for i in order]
    assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in itertools.pairwise(places))


@pytest.mark.parametrize("scan", ORDERS, ids=str)
def test_tokens_of_sequence_return_to_their_image(scan):
    """The image counts its tokens:
    position p holds the M neighbours p M .. p M + M - 1 of a row.
    """
    H, W, M = 3, 8, 2
    image = torch.arange(H * W, device=device()).view(1, 1, H, W)
    order = scan.apply(torch.arange(H * W // M)[None], (H, W // M))[0].tolist()
    u = scan.to_sequence(image, (H, W // M))
    assert u[0, 0].tolist() == [[p * M, p * M + 1] for p in order]
    assert torch.equal(scan.to_image(u, (H, W // M)), image)


def block(mixer, scan, M=1):
    return fill(DiffuSSMBlock(8, M, 4, mixer, 2, scan), 0.5).double()


@pytest.mark.parametrize("mixer", ["s4d", "linear"])
def test_columns_of_image_are_rows_of_its_transpose(mixer):
    H, W = 3, 5
    rows, columns = block(mixer, RASTER), block(mixer, COLUMNS)
    columns.load_state_dict(rows.state_dict())
    x, c = randn(2, H, W, 8, dtype=torch.double), randn(2, 8, seed=1, dtype=torch.double)
    transposed = (
        rows(x.transpose(1, 2).flatten(1, 2), c, (W, H))
        .unflatten(1, (W, H))
        .transpose(1, 2)
        .flatten(1, 2)
    )
    torch.testing.assert_close(columns(x.flatten(1, 2), c, (H, W)), transposed)
    assert not torch.allclose(rows(x.flatten(1, 2), c, (H, W)), transposed)


@pytest.mark.parametrize("scan", ORDERS[1:], ids=str)
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_order_matters_to_sequences_only(mixer, scan):
    """Attention sees a set and convolution an image, so that a wrong order or a wrong way back
    would show.
    """
    H, W, M = 4, 3, 2
    rows, other = block(mixer, RASTER, M), block(mixer, scan, M)
    other.load_state_dict(rows.state_dict())
    x, c = randn(2, H * W, 8, dtype=torch.double), randn(2, 8, seed=1, dtype=torch.double)
    same = torch.allclose(rows(x, c, (H, W)), other(x, c, (H, W)), rtol=1e-9, atol=1e-10)
    assert same == (mixer in ("attention", "axial", "conv"))


@pytest.mark.parametrize("scan", ORDERS, ids=str)
def test_text_stays_around_the_image(scan):
    image, before, behind = randn(2, 6, 3), randn(2, 4, 3, seed=1), randn(2, 4, 3, seed=2)
    ordered = scan.apply(torch.cat([before, image, behind], 1), (2, 3))
    assert torch.equal(ordered, torch.cat([before, scan.apply(image, (2, 3)), behind], 1))
    assert torch.equal(scan.undo(ordered, (2, 3))[:, 4:-4], image)

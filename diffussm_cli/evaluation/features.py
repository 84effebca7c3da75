"""Feature extractors: pictures in, what the metrics compare out.

B batch   pool features (B, d)   spatial features (B, s), of sFID   logits (B, K), of the Inception Score
"""

import importlib
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.files import sha256

NAMES = ("inception", "digits")
SPATIAL_CHANNELS = 7  # of the 192 of Mixed_6d.branch1x1


class Features(NamedTuple):
    """Of a batch; None where an extractor has no such layer."""

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Extractor(Protocol):
    """What `load_extractor` gives: `identity` tells weights apart, `channels` is 1 or 3."""

    identity: str
    channels: int

    def __call__(self, images: Tensor) -> Features:
        """Of uint8 images (B, channels, H, W)."""


class Inception:
    """The Inception of 2015-12-05 with ADM's layers, as torch-fidelity carries it.

    Pool: 2,048 features. Spatial: the first 7 channels of Mixed_6d.branch1x1 after its ReLU, 17 x 17, flattened in NHWC
    order, 2,023 numbers. Logits: 1,008 classes, without bias. Images are resized to 299 as TensorFlow 1 does.
    """

    channels = 3

    def __init__(self, weights: Path | None, device: torch.device):
        module = _optional("torch_fidelity.feature_extractor_inceptionv3", "inception", "torch-fidelity")
        path = weights or _download(module.URL_INCEPTION_V3)
        _refuse_code(path)
        try:
            network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
        except (RuntimeError, AttributeError, TypeError) as e:
            raise DataError(f"--extractor-weights: {path} holds no Inception of torch-fidelity") from e
        self.network = network.to(device)
        self.identity = f"inception-{sha256(path)[:16]}"
        self._spatial: list[Tensor] = []
        network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _args, out: self._spatial.append(out))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        pool, logits = self.network(images)
        spatial = self._spatial.pop()[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17)
        return Features(pool, spatial.permute(0, 2, 3, 1).flatten(1).float(), logits)


class Digits:
    """The embedded default for 28x28 digits: a small classifier of them."""

    channels = 1

    def __init__(self, device: torch.device):
        from diffussm_cli.evaluation import digits

        self.network = digits.load_digits().to(device)
        self.identity = f"digits-{digits.weights_sha256()[:16]}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        if images.shape[2:] != (28, 28):
            raise ConfigError(f"--extractor: digits sees 28x28 images, not {images.shape[2]}x{images.shape[3]}")
        return Features(*self.network(images))


class Own:
    """A network of the user: uint8 images (B, 3, H, W) -> pool features, or (pool, spatial, logits), None for none.

    An attribute `channels` of 1 makes it see grey images.
    """

    channels = 3

    def __init__(self, network: nn.Module, identity: str, device: torch.device):
        self.network, self.identity = network.to(device), identity
        self.channels = getattr(network, "channels", 3)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        found = self.network(images)
        return Features(found) if isinstance(found, Tensor) else Features(*found)


AUTO = "auto"


def usual_extractor(size: tuple[int, int], grey: bool) -> str:
    """What `auto` stands for: digits for grey images of 28x28, else inception."""
    return "digits" if tuple(size) == (28, 28) and grey else "inception"


def load_extractor(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """`inception`, `digits`, a file of torch.jit.save or torch.export (.pt, .pt2), or `package.module:factory`.

    The last two run what they name. FD-DINOv2 is FID with a factory that gives torch.hub's dinov2_vitl14 behind its own
    resize and normalisation.

    Raises:
        ConfigError, DataError: naming what is missing and where to put it.
    """
    if weights is not None and name != "inception":
        raise ConfigError(f"--extractor-weights: of no use to {name}; only inception takes them")
    if name == "inception":
        return Inception(weights, device)
    if name == "digits":
        return Digits(device)
    if name.endswith((".pt", ".pt2")):
        return Own(_load_file(Path(name)), f"file-{sha256(Path(name))[:16]}", device)
    if ":" in name:
        return Own(_call_factory(name), name, device)
    raise ConfigError(f"--extractor: {name!r} must be {', '.join(NAMES)}, a .pt2 file, or package.module:factory")


def _load_file(path: Path) -> nn.Module:
    if not path.is_file():
        raise ConfigError(f"--extractor: there is no file {str(path)!r}")
    if not zipfile.is_zipfile(path):
        raise DataError(f"--extractor: {path} cannot be loaded: no file of torch.export or TorchScript")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is on its way out, and says so
            return torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(path, "cpu").eval()
    except (RuntimeError, ValueError, OSError, KeyError) as e:
        raise DataError(f"--extractor: {path} cannot be loaded: {str(e).splitlines()[0]}") from e


def _call_factory(name: str) -> nn.Module:
    module, _, factory = name.partition(":")
    try:
        return getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"--extractor: {name!r} cannot be imported: {e}") from e


def _optional(module: str, name: str, package: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise ConfigError(f"--extractor: {name} needs {package}: pip install 'diffussm[eval]'") from e


def _download(url: str) -> Path:
    """Where torch keeps the file; fetched if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=False)
        except (OSError, RuntimeError) as e:
            raise DataError(
                f"--extractor: cannot download {url} ({getattr(e, 'reason', e)}); fetch it elsewhere and put it at "
                f"{path}, or name it by --extractor-weights"
            ) from e
    return path


def _refuse_code(path: Path) -> None:
    """torch-fidelity unpickles the file; so it must hold tensors and nothing else."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as e:
        raise DataError(f"--extractor-weights: {path} cannot be read as weights: {str(e).splitlines()[0]}") from e

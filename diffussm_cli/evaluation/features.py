"""Feature extractors: pictures in, what the metrics compare out.

B batch   pool features (B, d)   spatial features (B, s), of sFID   logits (B, K), of the Inception Score
"""

import hashlib
import importlib
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffussm_cli.data.source import BUILTIN
from diffussm_cli.data.vae import weights_sha256
from diffussm_cli.errors import ConfigError, DataError, reason
from diffussm_cli.machine.files import sha256

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
        """Of uint8 images (B, channels, H, W) on any device."""


class Inception:
    """The Inception of 2015-12-05 with ADM's layers, as torch-fidelity carries it.

    Pool: 2,048 features. Spatial: the first 7 channels of Mixed_6d.branch1x1 after its ReLU, 17 x 17, flattened in NHWC
    order, 2,023 numbers. Logits: 1,008 classes, without bias. Images are resized to 299 as TensorFlow 1 does.
    """

    channels = 3

    def __init__(self, weights: Path | None, device: torch.device):
        import torch_fidelity.feature_extractor_inceptionv3 as module

        path = weights or _download(module.URL_INCEPTION_V3)
        digest = _checked_sha256(path, module.URL_INCEPTION_V3)
        try:
            network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
        except (RuntimeError, AttributeError, TypeError) as e:
            raise DataError(f"--extractor-weights: {path} holds no Inception of torch-fidelity") from e
        self.network, self.device = network.to(device), device
        self.identity = f"inception-{digest[:16]}"
        self._spatial: list[Tensor] = []
        network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _args, out: self._spatial.append(out))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        pool, logits = self.network(images.to(self.device))
        spatial = self._spatial.pop()[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17)
        return Features(pool, spatial.permute(0, 2, 3, 1).flatten(1).float(), logits)


class Digits:
    """The embedded default for 28x28 digits: a small classifier of them."""

    channels = 1

    def __init__(self, device: torch.device):
        from diffussm_cli.evaluation import digits

        self.network, self.device = digits.load_digits().to(device), device
        self.identity = f"digits-{digits.weights_sha256()[:16]}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        if images.shape[2:] != (28, 28):
            raise ConfigError(f"--extractor: digits sees 28x28 images, not {images.shape[2]}x{images.shape[3]}")
        return Features(*self.network(images.to(self.device)))


class Own:
    """A network of the user: uint8 images (B, 3, H, W) -> pool features, or (pool, spatial, logits), None for none.

    An attribute `channels` of 1 makes it see grey images.
    """

    channels = 3

    def __init__(self, network: nn.Module, identity: str, device: torch.device):
        self.network, self.identity, self.device = network.to(device), identity, device
        self.channels = getattr(network, "channels", 3)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        found = self.network(images.to(self.device))
        return Features(found) if isinstance(found, Tensor) else Features(*found)


AUTO = "auto"


def usual_extractor(size: tuple[int, int], grey: bool) -> str:
    """What `auto` stands for: digits for grey images of 28x28, else inception."""
    return "digits" if tuple(size) == (28, 28) and grey else "inception"


def doubts(asked: str, used: str, compared_with: str) -> list[str]:
    """What is to be said of the extractor that stands for `asked`, by the name of what samples are compared with."""
    if asked != AUTO or used != "digits" or compared_with.startswith(BUILTIN):
        return []
    return [
        "the extractor digits was chosen for grey 28x28 images, and it knows handwritten digits only; for other "
        "pictures choose inception"
    ]


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
    if re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        return Own(*_call_factory(name), device)
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
        raise DataError(f"--extractor: {path} cannot be loaded: {reason(e)}") from e


def _call_factory(name: str) -> tuple[nn.Module, str]:
    """The network of a factory, and its identity: name, weights, and source file, which may hold its preprocessing."""
    module, _, factory = name.partition(":")
    try:
        source = importlib.import_module(module)
        make = getattr(source, factory)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"--extractor: {name!r} cannot be imported: {e}") from e
    try:
        network = make()
    except ImportError as e:  # of a package that it needs
        raise ConfigError(f"--extractor: {name!r} cannot be imported: {e}") from e
    if not isinstance(network, nn.Module):
        raise ConfigError(f"--extractor: {name!r} gives a {type(network).__name__}, not a torch.nn.Module")
    code = getattr(source, "__file__", None)
    parts = (name, weights_sha256(network), sha256(Path(code)) if code else "")
    return network, f"factory-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _download(url: str) -> Path:
    """Where torch keeps the file; fetched if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=False)
        except (OSError, RuntimeError) as e:
            raise DataError(
                f"--extractor: cannot download {url} ({getattr(e, 'reason', e)}); fetch it elsewhere and put it at "
                f"{path}, or name it by --extractor-weights"
            ) from e
    return path


def _checked_sha256(path: Path, url: str) -> str:
    """Hash of a weights file, checked to be the published one if it has its name, and to hold nothing but tensors.

    torch-fidelity unpickles the file, so code in it would run.
    """
    name = url.rpartition("/")[2]
    expected = Path(name).stem.rpartition("-")[2]  # torch.hub's rule
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
    except Exception as e:  # whatever torch says of a damaged pickle
        why = reason(e) if isinstance(e, OSError) else "it is damaged, or holds code"
        raise DataError(f"--extractor-weights: {path} cannot be read as weights: {why}") from e
    return digest

"""Feature extractors by name: networks that turn images into the features that metrics compare.

B batch   pool features (B, d)   spatial features (B, s), for sFID
logits (B, K), for the Inception Score
"""

import hashlib
import importlib
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor, nn

from diffussm_cli.config import BUILTIN, EvalConfig
from diffussm_cli.errors import ConfigError, DataError, reason
from diffussm_cli.evaluation.networks import (
    load_digits,
    load_dinov2,
    load_efficientnet,
    load_inception,
)
from diffussm_cli.evaluation.text import load_clip
from diffussm_cli.machine.files import sha256
from diffussm_cli.machine.hub import HUB_NAME, weights_sha256

AUTO = "auto"
NAMES: tuple[str, ...] = get_args(get_type_hints(EvalConfig)["extractor"])[1:]


class Features(NamedTuple):
    """Features of a batch; None where an extractor has no such layer."""

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Extractor:
    """A network of the user or of ours: uint8 images (B, channels, H, W) -> pool features, or
    (pool, spatial, logits).

    Spatial features and logits may be None. `identity` identifies the weights. If the attribute
    `channels` of a network is 1, it gets grey images.
    """

    def __init__(self, network: nn.Module, identity: str, device: torch.device):
        self.network = network.to(device)
        self.identity = identity
        self.device = device
        self.channels: int = getattr(network, "channels", 3)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (B, channels, H, W) on any device."""
        output = self.network(images.to(self.device))
        return Features(output) if isinstance(output, Tensor) else Features(*output)


def load_extractor(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """A name of NAMES, a file of torch.jit.save or torch.export (.pt, .pt2),
    `package.module:factory`, or a CLIP model.

    Files and factories run the code they name. FD-DINOv2 is FID with `dinov2`.

    Args:
        weights: in place of a download, the file of `inception`, or the folder of `dinov2`.

    Raises:
        ConfigError, DataError: if it cannot be loaded; the message names what is missing and where
            to put it.
    """
    if weights is not None and name not in ("inception", "dinov2"):
        raise ConfigError(
            f"extractor_weights: {name} does not take them; only inception and dinov2 do"
        )

    # Names.
    if name == "inception":
        return Extractor(*load_inception(weights), device)
    if name == "digits":
        return Extractor(*load_digits(), device)
    if name == "efficientnet":
        return Extractor(*load_efficientnet(), device)
    if name == "dinov2":
        return Extractor(*load_dinov2(weights), device)

    # Files and code.
    if name.endswith((".pt", ".pt2")):
        return Extractor(_load_file(Path(name)), f"file-{sha256(Path(name))[:16]}", device)
    if re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        return Extractor(*_call_factory(name), device)
    if os.path.isdir(name) or re.fullmatch(HUB_NAME, name):
        return Extractor(*load_clip(name), device)

    known = (
        f"{', '.join(NAMES)}, a .pt2 file, package.module:factory, or a folder or hub name of CLIP"
    )
    raise ConfigError(f"extractor: {name!r} must be {known}")


def doubts(requested: str, used: str, reference: str) -> list[str]:
    """Warnings about the extractor that `auto` chose for a comparison with the reference of this
    name.
    """
    if requested != AUTO or used != "digits" or reference.startswith(BUILTIN):
        return []
    return [
        "the extractor digits was chosen for grey 28x28 images, but it knows only handwritten "
        "digits; for other images choose inception"
    ]


# -------------------------------------------------------------------------------------- of the user
def _load_file(path: Path) -> nn.Module:
    if not path.is_file():
        raise ConfigError(f"extractor: there is no file {str(path)!r}")
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"extractor: {path} cannot be loaded: it is not a torch.export or TorchScript file"
        )

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript warns that it is deprecated
            return (
                torch.export.load(path).module()
                if path.suffix == ".pt2"
                else torch.jit.load(path, "cpu").eval()
            )
    except (RuntimeError, ValueError, OSError, KeyError) as e:
        raise DataError(f"extractor: {path} cannot be loaded: {reason(e)}") from e


def _call_factory(name: str) -> tuple[nn.Module, str]:
    """A factory's network, and its identity: name, weights, and source file, which may hold the
    preprocessing.
    """
    module, _, factory = name.partition(":")
    try:
        source = importlib.import_module(module)
        make = getattr(source, factory)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"extractor: {name!r} cannot be imported: {e}") from e
    try:
        network = make()
    except ImportError as e:  # of a package that the factory needs
        raise ConfigError(f"extractor: {name!r} cannot be imported: {e}") from e
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"extractor: {name!r} returns a {type(network).__name__}, not a torch.nn.Module"
        )

    code = getattr(source, "__file__", None)
    parts = (name, weights_sha256(network), sha256(Path(code)) if code else "")
    return network, f"factory-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"

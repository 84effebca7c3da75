"""Read DiT's published checkpoints (a state dict in a .pt file) as one of our models with a
configuration; also those of SiT, which have the same names.

SiT (arXiv 2401.08740) predicts the velocity x_0 - noise of a flow, at times s from 0 for noise to 1
for the image. Ours is noise - x_0 at t = T (1 - s). So the last layer changes its sign and loses
the channels of the covariance, which SiT's sampling does not use, and the embedding sees s.

The names and shapes are those of the files DiT-XL-2-256x256.pt and DiT-XL-2-512x512.pt. Training
checkpoints, with the averaged weights under `ema`, can be read too.
"""

import argparse
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffussm_cli.config import DEFAULT_VAE, Config, config_from_dict
from diffussm_cli.errors import ConfigError, RunError, reason
from diffussm_cli.model import Backbone, build_model

SUFFIX = ".pt"
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: S, B, L, XL
DOWNSAMPLE = 8
# Settings of sampling by what a file predicts; DiT's own are the default ones.
SAMPLERS_OF: dict[str, dict[str, Any]] = {"noise": {}, "flow": {"sampler": "heun", "steps": 50}}
NAMES = {
    r"x_embedder\.proj\.(\w+)": r"patch_in.\1",
    r"t_embedder\.mlp\.(\d)\.(\w+)": r"t_embed.mlp.\1.\2",
    r"y_embedder\.embedding_table\.weight": r"y_embed.weight",
    r"blocks\.(\d+)\.attn\.(qkv|proj)\.(\w+)": r"blocks.\1.attention.\2.\3",
    r"blocks\.(\d+)\.mlp\.fc1\.(\w+)": r"blocks.\1.mlp.0.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(\w+)": r"blocks.\1.mlp.2.\2",
    r"blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)": r"blocks.\1.adaLN.\2",
    r"final_layer\.linear\.(\w+)": r"patch_out.\1",
    r"final_layer\.adaLN_modulation\.1\.(\w+)": r"norm_out.adaLN.\1",
}


def published_config(path: Path, objective: str = "noise") -> Config:
    """The configuration that the shapes in a published checkpoint imply. Raises RunError.

    Args:
        objective: what the model predicts, which nothing in the file tells: noise or flow.
    """
    state = _read(path)
    if objective not in SAMPLERS_OF:
        raise ConfigError(f"--objective: {objective!r} must be one of {', '.join(SAMPLERS_OF)}")
    sampling = SAMPLERS_OF[objective]
    try:
        D, C, P, _ = state["x_embedder.proj.weight"].shape
        has_sigma = len(state["final_layer.linear.bias"]) == 2 * C * P * P
        values = {
            "backbone": "dit",
            "hidden_size": D,
            "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            "heads": HEADS[D],
            "patch_size": P,
            "compression": 1,
            "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
            "learn_sigma": objective != "flow" and has_sigma,
        }

        side = math.isqrt(state["pos_embed"].shape[1]) * P
        data = {
            "resolution": side * DOWNSAMPLE,
            "channels": C,
            "downsample": DOWNSAMPLE,
            "vae": DEFAULT_VAE,
        }
        sections = {"model": values, "data": data, "sample": sampling}
        sections["diffusion"] = {"objective": objective}
        return config_from_dict(sections, str(path), name=path.stem)
    except (LookupError, ValueError, AttributeError, TypeError, ConfigError) as e:
        raise RunError(f"RUN: {path} is not a DiT checkpoint: {reason(e)} does not fit") from e


def assumption(path: Path, config: Config) -> str:
    """One line that says what is assumed of a file, because neither its names nor its shapes tell
    it.
    """
    unknown = f"{path} does not say how it was trained: it is read as"
    if config.diffusion.objective == "flow":
        return (
            f"{unknown} a SiT, which predicts the velocity from noise to image at times in [0, 1]"
        )
    return (
        f"{unknown} a DiT, which predicts noise; the files of SiT have the same names, and would "
        "give images of noise: read them with --objective flow"
    )


def adapt(model: Backbone, config: Config) -> None:
    """Let a model of the weights of a SiT see the times that it was trained with."""
    if config.diffusion.objective == "flow":
        model.t_embed.start = 1.0
        model.t_embed.scale = -1 / config.diffusion.timesteps


def published_weights(path: Path, config: Config) -> dict[str, Tensor]:
    """The weights of a published checkpoint under the names of `model.DiT`. Raises RunError.

    Args:
        config: from `published_config`.
    """
    state = _read(path)
    with torch.device("meta"):
        model = build_model(config)

    # The positions are computed, not stored.
    expected = model.positions(*model.input_size)
    stored = state.pop("pos_embed")[0]
    if stored.shape != expected.shape or (stored - expected).abs().max() > 1e-5:
        raise RunError(f"{path}: its position embedding is not DiT's sines and cosines")

    weights = {_our_name(name, path): tensor for name, tensor in state.items()}
    weights["patch_in.weight"] = weights["patch_in.weight"].flatten(1)
    for name in weights:
        if ".attention.proj." in name:
            weights[name] = weights[name][None]  # our weight has a leading dimension M = 1
    if config.diffusion.objective == "flow":
        for name in ("patch_out.weight", "patch_out.bias"):
            weights[name] = _reversed_velocity(weights[name], config)
    return weights


def _reversed_velocity(last: Tensor, config: Config) -> Tensor:
    """The rows of the last layer, (P P C, ...) or (P P 2C, ...), of the velocity with our sign, (P
    P C, ...).
    """
    C, taps = config.data.channels, config.model.patch_size**2
    return -last.unflatten(0, (taps, -1))[:, :C].flatten(0, 1)


def _our_name(name: str, path: Path) -> str:
    for pattern, ours in NAMES.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    raise RunError(f"{path}: {name} is not part of a DiT")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        # the options in DiT's training checkpoints
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as e:  # torch raises all kinds of errors for a damaged pickle
        why = reason(e) if isinstance(e, OSError) else "it is damaged, or holds code"
        raise RunError(f"RUN: {path} cannot be read as a state dict: {why}") from e
    state = state.get("ema", state) if isinstance(state, dict) else {}
    if not isinstance(state, dict) or not all(_is_stored(v) for v in state.values()):
        raise RunError(f"RUN: {path} holds more than tensors; it is not a DiT checkpoint")
    return dict(state)


def _is_stored(value: Any) -> bool:
    """Whether a value is a tensor whose numbers are all in the file; a view may claim any size."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return plain and value.nbytes <= value.untyped_storage().nbytes()

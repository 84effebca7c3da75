"""How the output of a model becomes images: by the VAE of its run, or as a preview of the latents.

B batch   C channels   H x W grid   f downsampling of the VAE
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffussm_cli.config import Config, DataConfig
from diffussm_cli.data.vae import VAE, load_vae
from diffussm_cli.data.vae_facts import read_facts
from diffussm_cli.errors import DataError


class Decoding(NamedTuple):
    """How the output of a model becomes images."""

    # (B, C, H, W) in model space to (B, 1 or 3, fH, fW) in [-1, 1]
    decode: Callable[[Tensor], Tensor]
    record: dict[str, Any]  # for meta.json
    warning: str | None = None
    vae: VAE | None = None


def open_decoding(config: Config, device: torch.device) -> Decoding:
    """The VAE of a run; the identity for pixels; a preview with a warning if the VAE cannot be
    used.

    The warning also says if the VAE is not the one that made the latents of the run.
    """
    d = config.data
    if d.vae is None:
        return Decoding(lambda x: x, {"vae": None, "decoded_by": "none, these are pixels"})

    try:
        facts = read_facts(d.vae, "data.vae")
        if (facts.channels, facts.downsample) != (d.channels, d.downsample):
            has = f"{facts.channels} channels and downsampling {facts.downsample}"
            raise DataError(
                f"data.vae: {d.vae!r} has {has}, but the run has {d.channels} and {d.downsample}"
            )
        vae = load_vae(facts, device, option="data.vae").in_space_of(d)
    except DataError as e:
        warning = (
            f"the images are only previews of the latents, because the VAE cannot be used: {e}"
        )
        return Decoding(
            lambda x: preview(x, d.downsample),
            {"vae": d.vae, "decoded_by": "linear preview"},
            warning,
        )

    return Decoding(
        vae.decode, {"vae": vae.identity, "decoded_by": "vae"}, _another_vae(vae, d), vae
    )


def _another_vae(vae: VAE, d: DataConfig) -> str | None:
    """A warning if a run recorded that another VAE made its latents."""
    if d.vae_sha256 in ("", vae.weights_sha256):
        return None
    hashes = (
        f"its weights have the sha256 {vae.weights_sha256[:12]}..., "
        f"those of the run's VAE {d.vae_sha256:.12}..."
    )
    return f"data.vae: {d.vae!r} is not the VAE that made the latents of this run: {hashes}"


def preview(latents: Tensor, downsample: int) -> Tensor:
    """Map latents (B, C, H, W) to RGB in [-1, 1] without a VAE: channels c, c + 3, ... are summed
    into one of three.
    """
    C = latents.shape[1]
    parts = [latents[:, [c for c in range(C) if c % 3 == k % C]] for k in range(3)]
    # latents have about unit variance
    x = torch.stack([p.sum(1) / p.shape[1] ** 0.5 for p in parts], 1) / 2
    return x.repeat_interleave(downsample, 2).repeat_interleave(downsample, 3).clamp(-1, 1)

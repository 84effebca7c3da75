"""The autoencoder between pixels and latents, loaded through diffusers by hub name or from a
folder.

B batch   C latent channels   H x W grid   images (B, 3, fH, fW) in [-1, 1]   latents (B, C, H, W)
P side of the neighbours that are folded; 1 but for AutoencoderKLFlux2
Latents are in the VAE's own units or in model space, (z - shift) * scale, where they have about
unit variance.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.config import DataConfig
from diffussm_cli.data.vae_facts import VAEFacts, facts_of, load_or_explain, place_of, space_of
from diffussm_cli.errors import DataError
from diffussm_cli.machine.device import full_float32
from diffussm_cli.machine.hub import check_finite, weights_sha256

OVERLAP = 8  # tiles of AutoencoderDC share an eighth of their side
TILE = 512  # pixels; larger images are decoded in overlapping tiles of this side
# decoded at a time: 8 images of 256x256, about 2 GB of activations in SD's VAE
DECODE_PIXELS = 1 << 19


class VAE:
    """A loaded, frozen VAE. `dtype` is that of its weights; inputs and outputs are float32."""

    def __init__(self, model: nn.Module, facts: VAEFacts, device: torch.device, dtype: torch.dtype):
        self.facts, self.device, self.dtype = facts, device, dtype
        self.weights_sha256 = weights_sha256(model)
        # diffusers' own `to` warns
        self.model: Any = nn.Module.to(model, device, dtype).eval().requires_grad_(False)
        self.scale, self.shift = (
            torch.tensor(v).view(1, -1, 1, 1) for v in (facts.scale, facts.shift)
        )

    def in_space_of(self, data: DataConfig) -> "VAE":
        """The same, and from here on latents in model space are those of a run."""
        scale, shift = space_of(self.facts.scale, self.facts.shift, data)
        self.scale, self.shift = (torch.tensor(v).view(1, -1, 1, 1) for v in (scale, shift))
        return self

    @property
    def identity(self) -> dict[str, str]:
        """Name and hashes, for manifests and meta.json."""
        facts = self.facts
        return {
            "name": facts.name,
            "config_sha256": facts.config_sha256,
            "weights_sha256": self.weights_sha256,
        }

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode (B, 3, fH, fW) to mean and standard deviation of the posterior, in the VAE's
        units, on its device.
        """
        x = images.to(self.device, self.dtype)
        with full_float32():
            output = self.model.encode(x)
        if self.facts.kind in ("AutoencoderTiny", "AutoencoderDC"):
            mean = output[0].float()
            return mean, torch.zeros_like(mean)

        mean, logvar = output.latent_dist.parameters.float().chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(-30, 20))
        P = self.facts.folded
        return F.pixel_unshuffle(mean, P), F.pixel_unshuffle(std, P)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents in model space to images on the CPU, DECODE_PIXELS at a time and large
        images in tiles.
        """
        z = latents.cpu().float() / self.scale + self.shift
        f = self.facts.downsample
        height, width = (side * f for side in z.shape[2:])

        if max(height, width) > TILE:
            self._enable_tiling()
        else:
            self.model.disable_tiling()

        z = F.pixel_shuffle(z, self.facts.folded)
        size = max(1, DECODE_PIXELS // (min(height, TILE) * min(width, TILE)))
        with full_float32():
            parts = [
                self.model.decode(part.to(self.device, self.dtype)).sample for part in z.split(size)
            ]
        return torch.cat([part.float().cpu() for part in parts])

    def _enable_tiling(self) -> None:
        """Let the network decode in tiles of TILE pixels; each class has its own attributes."""
        f = self.facts.downsample // self.facts.folded
        if self.facts.kind == "AutoencoderDC":
            self.model.enable_tiling(TILE, TILE, *[TILE - TILE // OVERLAP] * 2)
            return

        self.model.enable_tiling()
        self.model.tile_sample_min_size, self.model.tile_latent_min_size = TILE, TILE // f
        self.model.spatial_scale_factor = f  # AutoencoderTiny assumes 8


def load_vae(
    facts: VAEFacts, device: torch.device, dtype: torch.dtype = torch.float32, option: str = "--vae"
) -> VAE:
    """Load the VAE of `facts` with its weights, from safetensors only.

    Raises:
        DataError: if the weights cannot be loaded, are damaged, incomplete or not finite.
    """
    import diffusers

    _check_weight_files(facts, option)
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    cls = getattr(diffusers, facts.kind)
    where = place_of(facts.name, option)
    model, info = load_or_explain(
        facts.name, option, lambda: cls.from_pretrained(**where, **options)
    )
    if info["missing_keys"]:
        raise DataError(f"{option}: the weights of {facts.name!r} lack {info['missing_keys'][0]}")
    check_finite(model, facts.name, option)
    facts = facts_of(model, facts.name, facts.config_sha256, option)  # some stand in the weights
    return VAE(model.float(), facts, device, dtype)


def _check_weight_files(facts: VAEFacts, option: str) -> None:
    """Raises DataError if the network of a folder needs more weights than its files can hold:
    memory comes first.
    """
    files = Path(facts.name).glob("*.safetensors") if os.path.isdir(facts.name) else ()
    sizes = [path.stat().st_size for path in files if path.is_file()]
    if sizes and sum(sizes) < facts.parameters:  # no format takes less than a byte for each
        what = f"{facts.parameters:,} parameters, but its weights have {sum(sizes):,} bytes"
        raise DataError(
            f"{option}: cannot load the folder {facts.name!r}: its config describes {what}"
        )

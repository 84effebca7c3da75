"""The autoencoder between pixels and latents, loaded through diffusers by hub name or from a folder.

Nothing about it is hard-coded: channels, downsampling, scale and shift come from its config.

B batch   C latent channels   H x W grid   images (B, 3, fH, fW) in [-1, 1]   latents (B, C, H, W)
Latents are in the VAE's own units or in model space, (z - shift) * scale, where they have about unit variance.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffussm_cli.config import DEFAULT_VAE, Config
from diffussm_cli.errors import DataError, reason
from diffussm_cli.machine.device import full_float32

KINDS = ("AutoencoderKL", "AutoencoderTiny")
TILE = 512  # pixels; larger images are decoded in overlapping tiles of this side
DECODE_PIXELS = 1 << 19  # decoded at a time: 8 images of 256x256, about 2 GB of activations in SD's VAE


class VAEFacts(NamedTuple):
    """Properties of a VAE, read from its config."""

    name: str
    kind: str
    channels: int
    downsample: int
    scale: tuple[float, ...]  # one per channel
    shift: tuple[float, ...]
    config_sha256: str


class VAE:
    """A loaded, frozen VAE. `dtype` is that of its weights; inputs and outputs are float32."""

    def __init__(self, model: nn.Module, facts: VAEFacts, device: torch.device, dtype: torch.dtype):
        self.facts, self.device, self.dtype = facts, device, dtype
        self.weights_sha256 = weights_sha256(model)
        self.model: Any = nn.Module.to(model, device, dtype).eval().requires_grad_(False)  # diffusers' own `to` warns
        self.scale, self.shift = (torch.tensor(v).view(1, -1, 1, 1) for v in (facts.scale, facts.shift))

    @property
    def identity(self) -> dict[str, str]:
        """Name and hashes, for manifests and meta.json."""
        facts = self.facts
        return {"name": facts.name, "config_sha256": facts.config_sha256, "weights_sha256": self.weights_sha256}

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode (B, 3, fH, fW) to mean and standard deviation of the posterior, in the VAE's units, on its device."""
        x = images.to(self.device, self.dtype)
        with full_float32():
            found = self.model.encode(x)
        if self.facts.kind == "AutoencoderTiny":
            mean = found.latents.float()
            return mean, torch.zeros_like(mean)
        mean, logvar = found.latent_dist.parameters.float().chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents in model space to images on the CPU, DECODE_PIXELS at a time and large images in tiles."""
        z = latents.cpu().float() / self.scale + self.shift
        f = self.facts.downsample
        height, width = (side * f for side in z.shape[2:])
        if max(height, width) > TILE:
            self.model.enable_tiling()
            self.model.tile_sample_min_size, self.model.tile_latent_min_size = TILE, TILE // f
            self.model.spatial_scale_factor = f  # AutoencoderTiny assumes 8
        else:
            self.model.disable_tiling()
        size = max(1, DECODE_PIXELS // (min(height, TILE) * min(width, TILE)))
        with full_float32():
            parts = [self.model.decode(part.to(self.device, self.dtype)).sample for part in z.split(size)]
        return torch.cat([part.float().cpu() for part in parts])


# ------------------------------------------------------------------------------------------------- loading
def read_facts(name: str) -> VAEFacts:
    """Read the config of a VAE, without its weights.

    Args:
        name: a folder, or a hub name as OWNER/NAME or OWNER/NAME/SUBFOLDER.

    Raises:
        DataError: if the config cannot be loaded, or the VAE is not supported.
    """
    import diffusers

    where = _where(name)

    def load() -> Any:
        reach_hub(**where)
        return diffusers.AutoencoderKL.load_config(**where)

    values = _load(name, load)
    kind = values.get("_class_name")
    if kind not in KINDS:
        raise DataError(f"--vae: {name!r} holds {kind}, not {' or '.join(KINDS)}")
    try:
        with quiet(), torch.device("meta"):
            c = getattr(diffusers, kind).from_config(values).config  # with the defaults of its class filled in
        C = int(c.latent_channels)
        blocks = c.block_out_channels if kind == "AutoencoderKL" else c.encoder_block_out_channels
        means, stds = c.get("latents_mean") or [0.0] * C, c.get("latents_std") or [1.0] * C
        scale = tuple(float(c.scaling_factor / std) for std in stds)
        shift = tuple(float(mean + (c.shift_factor or 0)) for mean in means)
    except Exception as e:  # constructors raise all kinds of errors for values that do not match
        raise DataError(f"--vae: the config of {name!r} is damaged: {reason(e)}") from e
    if len(scale) != C or len(shift) != C or c.in_channels != 3 or c.out_channels != 3:
        raise DataError(f"--vae: {name!r} does not map between RGB images and {C} channels")
    plain = {k: v for k, v in values.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return VAEFacts(name, kind, C, 2 ** (len(blocks) - 1), scale, shift, digest)


def load_vae(facts: VAEFacts, device: torch.device, dtype: torch.dtype = torch.float32) -> VAE:
    """Load the VAE of `facts` with its weights, from safetensors only.

    Raises:
        DataError: if the weights cannot be loaded, are damaged or incomplete.
    """
    import diffusers

    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    cls = getattr(diffusers, facts.kind)
    model, info = _load(facts.name, lambda: cls.from_pretrained(**_where(facts.name), **options))
    if info["missing_keys"]:
        raise DataError(f"--vae: the weights of {facts.name!r} lack {info['missing_keys'][0]}")
    return VAE(model.float(), facts, device, dtype)


def _where(name: str) -> dict[str, str]:
    """Arguments of `from_pretrained` for a name. Raises DataError if it is neither a folder nor a hub name."""
    if os.path.isdir(name):  # unlike Path.is_dir, this raises no error for a name that is too long
        return {"pretrained_model_name_or_path": name}
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?", name)
    if not found:
        raise DataError(f"--vae: no folder {name!r}, and it is not a hub name such as {DEFAULT_VAE}")
    return {"pretrained_model_name_or_path": found[1], **({"subfolder": found[2]} if found[2] else {})}


def reach_hub(pretrained_model_name_or_path: str, subfolder: str = "") -> None:
    """Fail at once if the hub is needed and does not answer; diffusers would retry for 23 s."""
    import huggingface_hub as hub

    repository, file = pretrained_model_name_or_path, f"{subfolder}/config.json".lstrip("/")
    if os.path.isdir(repository) or isinstance(hub.try_to_load_from_cache(repository, file), str):
        return
    with contextlib.suppress(hub.errors.HfHubHTTPError):  # the hub answers; diffusers reports its errors
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, file))


def _load(name: str, call: Callable[[], Any]) -> Any:
    """Return the result of `call`, or raise a DataError that says how to get the files."""
    try:
        with quiet():
            return call()
    except Exception as e:  # the hub's client raises errors of several HTTP libraries
        if os.path.isdir(name):
            raise DataError(f"--vae: cannot load the folder {name!r}: {reason(e)}") from e
        raise DataError(
            f"--vae: cannot load {name!r} from the hub: download its config.json and "
            f"diffusion_pytorch_model.safetensors into a folder and pass --vae FOLDER ({reason(origin(e))})"
        ) from e


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence libraries that comment on configs that they wrote, and the hub's client, which logs every retry."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def origin(e: BaseException) -> BaseException:
    """The first error of a chain: diffusers reports a missing network as a missing file."""
    while cause := e.__cause__ or e.__context__:
        e = cause
    return e


def weights_sha256(model: nn.Module) -> str:
    """Hash of the names, shapes and bytes of all tensors, independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())  # numpy has no bfloat16
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ decoding
class Decoding(NamedTuple):
    """How the output of a model becomes images."""

    decode: Callable[[Tensor], Tensor]  # (B, C, H, W) in model space to (B, 1 or 3, fH, fW) in [-1, 1]
    record: dict[str, Any]  # for meta.json
    warning: str | None = None


def open_decoding(config: Config, device: torch.device) -> Decoding:
    """The VAE of a run; the identity for pixels; a preview with a warning if the VAE cannot be used."""
    d = config.data
    if d.vae is None:
        return Decoding(lambda x: x, {"vae": None, "decoded_by": "none, these are pixels"})
    try:
        facts = read_facts(d.vae)
        if (facts.channels, facts.downsample) != (d.channels, d.downsample):
            has = f"{facts.channels} channels and downsampling {facts.downsample}"
            raise DataError(f"--vae: {d.vae!r} has {has}, but the run has {d.channels} and {d.downsample}")
        vae = load_vae(facts, device)
    except DataError as e:
        warning = f"the images are only previews of the latents, because data.vae cannot be used: {e}"
        return Decoding(lambda x: preview(x, d.downsample), {"vae": d.vae, "decoded_by": "linear preview"}, warning)
    return Decoding(vae.decode, {"vae": vae.identity, "decoded_by": "vae"})


def preview(latents: Tensor, downsample: int) -> Tensor:
    """Map latents (B, C, H, W) to RGB in [-1, 1] without a VAE: channels c, c + 3, ... are summed into one of three."""
    C = latents.shape[1]
    parts = [latents[:, [c for c in range(C) if c % 3 == k % C]] for k in range(3)]
    x = torch.stack([p.sum(1) / p.shape[1] ** 0.5 for p in parts], 1) / 2  # latents have about unit variance
    return x.repeat_interleave(downsample, 2).repeat_interleave(downsample, 3).clamp(-1, 1)

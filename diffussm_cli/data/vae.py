"""The autoencoder between pixels and latents, loaded through diffusers by hub name or from a
folder.

Nothing about it is hard-coded: channels, downsampling, scale and shift come from its config; those
of AutoencoderKLFlux2 are statistics among its weights, of latents whose 2 x 2 neighbours are folded
into channels.

B batch   C latent channels   H x W grid   images (B, 3, fH, fW) in [-1, 1]   latents (B, C, H, W)
P side of the neighbours that are folded; 1 but for AutoencoderKLFlux2
Latents are in the VAE's own units or in model space, (z - shift) * scale, where they have about
unit variance.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.config import DEFAULT_VAE, Config, DataConfig
from diffussm_cli.errors import DataError, reason
from diffussm_cli.machine.device import full_float32
from diffussm_cli.machine.files import read_regular
from diffussm_cli.machine.hub import HUB_NAME, quiet, reach_hub, root_cause, weights_sha256

KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AutoencoderKLFlux2")
MAX_FOLDED = 8  # P
OVERLAP = 8  # tiles of AutoencoderDC share an eighth of their side
TILE = 512  # pixels; larger images are decoded in overlapping tiles of this side
MAX_CONFIG_BYTES = 1 << 20
# in a config; the largest VAEs in use have 3e8 parameters
MAX_LAYERS, MAX_WIDTH, MAX_PARAMETERS = 64, 1 << 14, 1 << 30
# decoded at a time: 8 images of 256x256, about 2 GB of activations in SD's VAE
DECODE_PIXELS = 1 << 19


class VAEFacts(NamedTuple):
    """Properties of a VAE, read from its config."""

    name: str  # on the hub, or the absolute path of a folder
    kind: str
    channels: int
    downsample: int
    scale: tuple[float, ...]  # one per channel
    shift: tuple[float, ...]
    config_sha256: str
    parameters: int  # their number
    folded: int = 1  # P


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


# ------------------------------------------------------------------------------------------ loading
def read_facts(name: str, option: str = "--vae") -> VAEFacts:
    """Read the config of a VAE, without its weights.

    Args:
        name: a folder, or a hub name as OWNER/NAME or OWNER/NAME/SUBFOLDER.
        option: the option or field that names the VAE, for errors.

    Raises:
        DataError: if the config cannot be loaded, or the VAE is not supported.
    """
    import diffusers

    # The config as it is.
    where = _where(name, option)

    def load() -> Any:
        _check_config_file(name)
        reach_hub(**where)
        return diffusers.AutoencoderKL.load_config(**where)

    values = _load(name, option, load)
    kind = values.get("_class_name")
    if kind not in KINDS:
        raise DataError(_other_kind(option, name, kind))
    plain = {k: v for k, v in values.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    try:
        _check_sizes(values)
        with quiet(), torch.device("meta"):
            # with the defaults of its class filled in
            model = getattr(diffusers, kind).from_config(values)
    except Exception as e:  # constructors raise all kinds of errors for values that do not match
        raise DataError(f"{option}: the config of {name!r} is damaged: {reason(e)}") from e
    return facts_of(model, full_name(name), digest, option)


def facts_of(model: Any, name: str, config_sha256: str = "", option: str = "--vae") -> VAEFacts:
    """The network of diffusers and the numbers that it stands for.

    Raises:
        DataError: if it is no VAE that maps between RGB images and latents; the line begins with
            `option`.
    """
    kind = type(model).__name__
    c = model.config
    if kind not in KINDS:
        raise DataError(_other_kind(option, name, kind))

    try:
        P = _folded(c)
        C = P * P * int(c.latent_channels)
        in_pairs = kind in ("AutoencoderTiny", "AutoencoderDC")  # blocks of encoder and decoder
        blocks = c.encoder_block_out_channels if in_pairs else c.block_out_channels
        if kind == "AutoencoderKLFlux2":
            scale, shift = _of_batch_norm(model)
        else:
            means, stds = c.get("latents_mean") or [0.0] * C, c.get("latents_std") or [1.0] * C
            scale = tuple(float(c.scaling_factor / std) for std in stds)
            shift = tuple(float(mean + (c.get("shift_factor") or 0)) for mean in means)
        parameters = sum(p.numel() for p in model.parameters())

        if parameters > MAX_PARAMETERS:
            raise ValueError(
                f"{parameters:,} parameters are more than the limit of {MAX_PARAMETERS:,}"
            )
        if not usable_scale(scale, shift):
            raise ValueError("its scale or shift is not a finite number, or its scale is 0")
    except Exception as e:  # values of any type may stand there
        raise DataError(f"{option}: the config of {name!r} is damaged: {reason(e)}") from e

    images = {c.in_channels, c.get("out_channels", c.in_channels)}
    if len(scale) != C or len(shift) != C or images != {3}:
        raise DataError(f"{option}: {name!r} does not map between RGB images and {C} channels")
    f = P * 2 ** (len(blocks) - 1)
    return VAEFacts(name, kind, C, f, scale, shift, config_sha256, parameters, P)


def _other_kind(option: str, name: str, kind: Any) -> str:
    return f"{option}: {name!r} holds {kind}, not {', '.join(KINDS[:-1])} or {KINDS[-1]}"


def _folded(config: Mapping[str, Any]) -> int:
    """P of a VAE. Raises ValueError for neighbours that are no small square."""
    height, width = config.get("patch_size") or (1, 1)
    if height != width or not 1 <= height <= MAX_FOLDED:
        size = f"{height} x {width}"
        raise ValueError(f"patch_size is {size}, and not a square of up to {MAX_FOLDED}")
    return int(height)


def _of_batch_norm(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift by which AutoencoderKLFlux2 normalises latents; 1 and 0 before its weights
    are loaded.
    """
    bn = model.bn
    if bn.running_mean.is_meta:
        return (1.0,) * bn.num_features, (0.0,) * bn.num_features
    std = (bn.running_var.double() + bn.eps).sqrt()
    return tuple((1 / std).tolist()), tuple(bn.running_mean.double().tolist())


def usable_scale(scale: Sequence[float], shift: Sequence[float]) -> bool:
    """Whether latents can be scaled and scaled back in float32."""
    numbers = torch.tensor([*scale, *shift], dtype=torch.float32)
    return bool(numbers.isfinite().all() and numbers[: len(scale)].all())


def space_of(
    scale: Sequence[float], shift: Sequence[float], data: DataConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift that lead to the model space of a run: those of its VAE, and then the
    statistics of its latents if it has any.
    """
    if not data.latents_std:
        return tuple(scale), tuple(shift)
    pairs = zip(scale, shift, data.latents_mean)
    return (
        tuple(s / std for s, std in zip(scale, data.latents_std)),
        tuple(offset + mean / s for s, offset, mean in pairs),
    )


def full_name(name: str) -> str:
    """The name of a VAE that is valid in every working directory: a hub name, or the absolute path
    of a folder.
    """
    return os.path.abspath(name) if os.path.isdir(name) else name


def _check_config_file(name: str) -> None:
    """Raises OSError, ValueError for a config of a folder that is too large, or no regular file."""
    path = os.path.join(name, "config.json")
    if os.path.exists(path):
        read_regular(path, MAX_CONFIG_BYTES)


def _check_sizes(values: Mapping[str, Any]) -> None:
    """Raises ValueError for a config that asks for absurdly many layers or channels, which would
    take for ever.
    """
    for field, value in values.items():
        parts = list(_flat(value))
        counts = "layers" in field or field.startswith("num_")
        for part in parts:
            if isinstance(part, int) and part > (MAX_LAYERS if counts else MAX_WIDTH):
                raise ValueError(
                    f"{field} is {part}, more than {MAX_LAYERS if counts else MAX_WIDTH}"
                )
        if len(parts) > (MAX_LAYERS if "block" in field else MAX_WIDTH):
            raise ValueError(f"{field} has {len(parts)} parts")


def _flat(value: Any) -> Iterator[Any]:
    """The parts of a value of a config, which may be a list of lists."""
    for part in value if isinstance(value, list) else [value]:
        yield from part if isinstance(part, list) else [part]


def load_vae(
    facts: VAEFacts, device: torch.device, dtype: torch.dtype = torch.float32, option: str = "--vae"
) -> VAE:
    """Load the VAE of `facts` with its weights, from safetensors only.

    Raises:
        DataError: if the weights cannot be loaded, are damaged or incomplete.
    """
    import diffusers

    _check_weight_files(facts, option)
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    cls = getattr(diffusers, facts.kind)
    where = _where(facts.name, option)
    model, info = _load(facts.name, option, lambda: cls.from_pretrained(**where, **options))
    if info["missing_keys"]:
        raise DataError(f"{option}: the weights of {facts.name!r} lack {info['missing_keys'][0]}")
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


def _where(name: str, option: str) -> dict[str, str]:
    """Arguments of `from_pretrained` for a name. Raises DataError if it is neither a folder nor a
    hub name.
    """
    if os.path.isdir(name):  # unlike Path.is_dir, this raises no error for a name that is too long
        return {"pretrained_model_name_or_path": name}

    parts = re.fullmatch(rf"({HUB_NAME})(?:/(\w[\w.-]*))?", name)
    if not parts:
        raise DataError(
            f"{option}: no folder {name!r}, and it is not a hub name such as {DEFAULT_VAE}"
        )

    first = name.partition("/")[0]
    if os.path.lexists(first):  # a relative path with a mistake must not be looked up on the hub
        raise DataError(
            f"{option}: no folder {name!r}; {first!r} exists here, "
            "so it is not taken for a hub name"
        )
    return {
        "pretrained_model_name_or_path": parts[1],
        **({"subfolder": parts[2]} if parts[2] else {}),
    }


def _load(name: str, option: str, call: Callable[[], Any]) -> Any:
    """Return the result of `call`, or raise a DataError that says how to get the files."""
    try:
        with quiet():
            return call()
    except Exception as e:  # the hub's client raises errors of several HTTP libraries
        if os.path.isdir(name):
            raise DataError(f"{option}: cannot load the folder {name!r}: {reason(e)}") from e

        remedy = "pass --vae FOLDER"
        if option != "--vae":
            remedy = (
                f"name it by {option}: in training by --set, in a finished run in the config.yaml "
                "of its weights"
            )
        raise DataError(
            f"{option}: cannot load {name!r} from the hub, and there is no such folder here: "
            "download its config.json and diffusion_pytorch_model.safetensors into a folder and "
            f"{remedy} ({reason(root_cause(e))})"
        ) from e


# ----------------------------------------------------------------------------------------- decoding
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

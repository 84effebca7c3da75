"""What a VAE is, read from its config: channels, downsampling, scale and shift.

Nothing about it is hard-coded; scale and shift of AutoencoderKLFlux2 are statistics among its
weights, of latents whose 2 x 2 neighbours are folded into channels.

C latent channels   P side of the neighbours that are folded; 1 but for AutoencoderKLFlux2
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from diffussm_cli.config import DEFAULT_VAE, DataConfig
from diffussm_cli.errors import DataError, reason
from diffussm_cli.machine.files import read_regular
from diffussm_cli.machine.hub import HUB_NAME, quiet, reach_hub, root_cause

KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AutoencoderKLFlux2")
MAX_FOLDED = 8  # P
MAX_CONFIG_BYTES = 1 << 20
# in a config; the largest VAEs in use have 3e8 parameters
MAX_LAYERS, MAX_WIDTH, MAX_PARAMETERS = 64, 1 << 14, 1 << 30


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
    where = place_of(name, option)

    def load() -> Any:
        _check_config_file(name)
        reach_hub(**where)
        return diffusers.AutoencoderKL.load_config(**where)

    values = load_or_explain(name, option, load)
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


# ---------------------------------------------------------------------------------------- its files
def place_of(name: str, option: str) -> dict[str, str]:
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


def load_or_explain(name: str, option: str, call: Callable[[], Any]) -> Any:
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

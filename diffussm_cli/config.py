"""Turns a preset and overrides into one checked, frozen configuration. No torch, so errors and
`--help` are quick.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from diffussm_cli.errors import ConfigError, reading

MAX_YAML_BYTES = 1 << 20
YAML_SUFFIXES = (".yaml", ".yml")
DEFAULT_PRESET = "mnist"
DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
BUILTIN = "builtin:"  # prefix of `data.path` for a data set that a Python package ships
# The bounds of the fields are generous: a value outside them is a typo or comes from a hostile
# file.
MANY = 10**8  # steps
MAX_SEED = 2**62
MAX_BATCH = 2**16
MAX_CLASSES = 10**6
MAX_SIDE = 2**14  # pixels
SMALLEST = 1e-9  # smallest magnitude of a nonzero number
MAX_PARAMETERS = 10**11
MAX_VALUES = 2**31  # in one tensor of one image
MIN_SIGNAL = -87.0  # log of the signal left at the last timestep; a weaker signal is 0 in float32
MAX_NAME = 255  # bytes in a file name
BUNDLED = Path(__file__).parent / "bundled"
COLUMNS = ("image", "label", "text")  # what columns of parquet shards hold

# Other spellings of truth values, as in YAML 1.1, and numbers that no field takes.
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOT_FINITE = (".nan", ".inf", "-.inf")

MIXERS = ("s4d", "axial", "linear", "conv", "attention")
# The samplers that fit each objective; the first one draws the previews during training.
SAMPLERS: dict[str, Any] = {
    "noise": ("ddim", "ddpm", "dpmpp", "unipc", "euler", "heun"),
    "velocity": ("euler", "ddim", "ddpm", "dpmpp", "unipc", "heun"),
    "flow": ("euler", "heun", "sde", "dpmpp", "unipc"),
}


def _option(default: Any, help: str, commas: bool = True, **bounds: float) -> Any:
    """A field with its help and bounds: `least`, `above`, `most`, `below`; `commas`: whether they
    separate values.
    """
    return field(default=default, metadata={"help": help, "commas": commas, **bounds})


@dataclass(frozen=True)
class ModelConfig:
    """The backbone and its sizes, in the paper's letters (arXiv 2311.18257)."""

    backbone: Literal["diffussm", "dit"] = _option("diffussm", "DiffuSSM, or the DiT baseline")
    hidden_size: int = _option(1152, "D", least=4, most=2**14)
    depth: int = _option(29, "number of blocks", least=1, most=1000)
    patch_size: int = _option(1, "P; 1 makes every latent or pixel a token", least=1, most=256)
    compression: int = _option(
        2, "M, tokens that each position becomes inside a block", least=1, most=256
    )
    d_state: int = _option(
        64, "N, state size of s4d and axial (16 is enough for axial)", least=2, most=4096
    )
    heads: int = _option(
        16, "heads of DiT and of the mixers linear and attention", least=1, most=256
    )
    mixer: str = _option(
        "s4d",
        "layer that mixes tokens: s4d, axial, linear, conv or attention; "
        "a list such as conv,axial repeats along the blocks; not used by DiT",
    )
    kernel: Literal[3, 5, 7] = _option(3, "side of the convolution of the mixer conv, in tokens")
    scan: Literal["raster", "alternate", "four"] = _option(
        "raster", "orders of tokens by block; not used by DiT"
    )
    local: Literal[0, 3] = _option(
        0, "3: a depthwise 3x3 convolution before each mixer; not used by DiT"
    )
    skips: bool = _option(
        False, "add each block of the first half to its mirror image, by layers that start at zero"
    )
    num_classes: int = _option(
        1000, "number of classes; 0: unconditional", least=0, most=MAX_CLASSES
    )
    learn_sigma: bool = _option(True, "also learn the covariance")
    label_std: float = _option(
        0.02, "initial standard deviation of the label table", above=0, most=100
    )
    text_width: int = _option(
        0, "E, width of the text encoder's vectors; 0: no text", least=0, most=2**14
    )
    text_tokens: int = _option(
        0, "K, positions for tokens of a caption; 0: its pooled vector only", least=0, most=1024
    )

    @property
    def mixers(self) -> list[str]:
        """The mixers of the blocks, in turn."""
        return mixer_names(self.mixer)


@dataclass(frozen=True)
class DataConfig:
    """What the model is trained on. Resolution is in pixels; the grid is resolution /
    downsample.
    """

    path: str = _option(
        "", "builtin:mnist, :digits or :emoji, a folder of images, or a folder of encoded latents"
    )
    resolution: int | str = _option(256, "N or HxW, in pixels")
    channels: int = _option(4, "C: 1 or 3 for pixels, the VAE's for latents", least=1, most=1024)
    downsample: int = _option(8, "f: 1 for pixels, the VAE's for latents", least=1, most=256)
    vae: str | None = _option(
        None, "hub name or folder of the VAE that made the latents; null for pixels"
    )
    vae_sha256: str = _option(
        "", "hash of the VAE's weights, found in the latents and recorded with the run"
    )
    flip: bool = _option(False, "random horizontal flips")
    skip_unreadable: bool = _option(
        False, "leave out images that cannot be read at the start of a run"
    )
    held_out: float | str = _option(
        "",
        "never trained on: a share, or a folder; empty: a built-in set's own part",
        least=0,
        below=1,
    )
    class_names: tuple[str, ...] = _option(
        (), "class names, found in the data and recorded with the run"
    )
    columns: tuple[str, ...] = _option(
        (),
        "columns of parquet shards, such as image=photo,label=breed,text=title; "
        "those not given are found by name",
    )
    text: str | None = _option(
        None, "text encoder: wordllama, a folder or a hub name; null: captions are not used"
    )
    text_sha256: str = _option(
        "", "hash of the text encoder's weights, found and recorded with the run"
    )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.resolution, int):
            return self.resolution, self.resolution
        height, width = self.resolution.split("x")
        return int(height), int(width)

    @property
    def is_grey(self) -> bool:
        """Whether the images have one channel."""
        return self.vae is None and self.channels == 1

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the model's input."""
        height, width = self.size
        return height // self.downsample, width // self.downsample


@dataclass(frozen=True)
class DiffusionConfig:
    """What the model predicts, and how images are noised: by ADM's linear variances, or by a flow's
    straight lines.
    """

    objective: Literal["noise", "velocity", "flow"] = _option(
        "noise", "what the model predicts; flow: also its path"
    )
    predicts: Literal["velocity", "image"] = _option(
        "velocity", "what the model of a flow predicts; not used by others"
    )
    timesteps: int = _option(
        1000, "T, number of timesteps; of a flow, the scale of its times", least=2, most=10_000
    )
    beta_start: float = _option(1e-4, "first variance; not used by flow", above=0, most=0.999)
    beta_end: float = _option(0.02, "last variance; not used by flow", above=0, most=0.999)
    zero_terminal_snr: bool = _option(
        False, "rescale the variances so that x_T is pure noise; for velocity"
    )
    timesteps_drawn: Literal["uniform", "logit_normal", "shifted"] = _option(
        "uniform", "timesteps in training"
    )
    logit_mean: float = _option(
        0.0, "logit_normal: mean of log(t / (1 - t)), t in (0, 1)", least=-100, most=100
    )
    logit_std: float = _option(1.0, "logit_normal: its standard deviation", above=0, most=100)
    shift: float = _option(
        3.0, "shifted: alpha in alpha t / (1 + (alpha - 1) t), t uniform", above=0, most=1000
    )


@dataclass(frozen=True)
class TrainConfig:
    """The training recipe. Defaults are the paper's."""

    steps: int = _option(400_000, "number of optimiser steps", least=1, most=MANY)
    batch_size: int = _option(
        256, "images per optimiser step, over all accumulated parts", least=1, most=MAX_BATCH
    )
    accumulate: int = _option(
        1, "number of parts that the batch is computed in", least=1, most=MAX_BATCH
    )
    lr: float = _option(1e-4, "learning rate", above=0, most=10)
    optimizer: Literal["adamw", "muon"] = _option(
        "adamw", "muon: for the matrices of the blocks, adamw for all others"
    )
    ssm_lr: float = _option(
        1e-3, "cap on the learning rate of the SSM's parameters", above=0, most=10
    )
    warmup_steps: int = _option(0, "steps of linear warm-up", least=0, most=MANY)
    lr_decay: Literal["constant", "linear", "cosine"] = _option(
        "constant", "learning rate schedule after warm-up"
    )
    weight_decay: float = _option(0.0, "AdamW's weight decay, on matrices only", least=0, most=100)
    beta2: float = _option(0.999, "AdamW's decay of the second moment", above=0, below=1)
    grad_clip: float = _option(0.0, "maximum gradient norm; 0: no clipping", least=0, most=1e6)
    ema: tuple[float, ...] = _option(
        (0.9999,),
        "decays of the averaged weights; previews, best/ and sampling use the first",
        least=0,
        below=1,
    )
    mse_weight_cap: float = _option(
        1.0,
        "cap on the weight 1 + 1/SNR(t) of the noise MSE; 1: the paper's loss",
        least=1,
        most=1e6,
    )
    loss_weight: Literal["none", "min_snr"] = _option(
        "none", "min_snr: weight the MSE of x_0 by min(SNR(t), gamma)"
    )
    min_snr_gamma: float = _option(5.0, "gamma of min_snr", above=0, most=1e6)
    label_dropout: float = _option(
        0.1, "share of labels replaced by the null class, and of captions by none", least=0, most=1
    )
    seed: int = _option(0, "seed of all random numbers", least=0, most=MAX_SEED)
    precision: Literal["auto", "fp32", "bf16"] = _option(
        "auto", "auto: bf16 where the hardware supports it"
    )
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, mps")
    compile: bool = _option(False, "torch.compile the model")
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward pass")
    checkpoint_every: int = _option(5000, "steps between checkpoints", least=1, most=MANY)
    keep_checkpoints: int = _option(2, "number of newest checkpoints to keep", least=1, most=MANY)
    keep_every: int = _option(
        0, "steps between checkpoints that are never deleted; 0: none", least=0, most=MANY
    )
    async_checkpoint: bool = _option(
        True, "write checkpoints in the background, from a copy in memory"
    )
    max_bad_steps: int = _option(
        10, "non-finite steps in a row after which training ends", least=1, most=MANY
    )
    parallel: Literal["ddp", "fsdp"] = _option(
        "ddp", "several processes: each holds the model, or a part of it"
    )
    sample_every: int = _option(5000, "steps between preview grids; 0: none", least=0, most=MANY)
    sample_images: int = _option(40, "number of images in a preview grid", least=1, most=10_000)
    sample_steps: int = _option(
        25, "steps of a preview (DDIM; Euler for velocities)", least=1, most=10_000
    )
    log_every: int = _option(100, "steps between log records", least=1, most=MANY)
    logger: Literal["tensorboard", "wandb", "trackio"] = _option(
        "tensorboard",
        "wandb, trackio: send the log there too; TensorBoard's files are always written",
    )


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn: defaults for `diffussm sample` and for the last grid of a training
    run.
    """

    sampler: Literal["ddpm", "ddim", "dpmpp", "unipc", "euler", "heun", "sde"] = _option(
        "ddpm", "sampling method; see diffusion/samplers.py"
    )
    steps: int = _option(
        250, "denoising steps; a step of heun computes the model twice", least=1, most=10_000
    )
    guidance: float = _option(1.0, "classifier-free guidance scale; 1: none", least=0, most=1000)
    guidance_channels: Literal["all", "3"] = _option(
        "all", "guide all channels, or the first three as in DiT"
    )
    guidance_interval: tuple[int, ...] = _option((), "LO,HI: guide only at timesteps LO <= t <= HI")
    clip: bool = _option(False, "clamp the predicted image to [-1, 1]; for pixels")
    prompts: tuple[str, ...] = _option(
        (),
        "prompts of the grids of a run with text, such as [red heart, sun]; "
        "empty: captions of its data",
        commas=False,
    )


@dataclass(frozen=True)
class EvalConfig:
    """How a run is measured, by `diffussm eval RUN` and during training."""

    every: int = _option(
        0, "training steps between evaluations of the averaged weights; 0: none", least=0, most=MANY
    )
    held_out_images: int = _option(
        2000, "maximum held-out images for the held-out loss", least=1, most=10**6
    )
    images: int = _option(
        5000, "images drawn for each evaluation; 0: only the held-out loss", least=0, most=10**6
    )
    steps: int = _option(
        50, "maximum denoising steps for these, with the run's sampler", least=1, most=10_000
    )
    reference: str = _option("", "an .npz or images; empty: the run's own built-in data set")
    extractor: Literal["auto", "inception", "digits", "efficientnet"] = _option(
        "auto", "features that scores compare; auto: digits for grey 28x28, else inception"
    )


@dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    preset: str = ""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def reference(self) -> str | None:
        """What samples are compared with by default: `eval.reference`, or the built-in data set
        that is trained on.
        """
        return self.eval.reference or (
            self.data.path if self.data.path.startswith(BUILTIN) else None
        )


# Fields of earlier versions, which files may still hold: the only value that is accepted, and the
# remedy for another.
RETIRED: dict[str, tuple[Any, str]] = {
    "train.processes": (
        1,
        "several processes are started by torchrun --nproc-per-node N -m diffussm_cli train",
    ),
}
SECTIONS: dict[str, Any] = {
    f.name: f.type for f in dataclasses.fields(Config) if f.name != "preset"
}


# ------------------------------------------------------------------------------------------ reading
def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(
        f.name.removesuffix(".yaml") for f in _presets().iterdir() if f.name.endswith(".yaml")
    )


def bundled_names() -> list[str]:
    """Names of the trained models that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.yaml"))


def _presets():
    """The folder of presets: a package once installed, presets/ in a checkout."""
    try:
        return resources.files("diffussm_cli.presets")
    except ModuleNotFoundError:
        return Path(__file__).parents[1] / "presets"


def preset_text(name: str, option: str = "--preset") -> str:
    """The text of a preset: one of the package's by name, or a YAML file by path.

    Args:
        option: what named it, for errors.

    Raises:
        ConfigError: if there is no such preset or file.
    """
    if name in preset_names():
        return (_presets() / f"{name}.yaml").read_text(encoding="utf-8")
    path = Path(name)
    if path.suffix in YAML_SUFFIXES:
        return read_text(path, option)
    raise ConfigError(f"{option}: there is no preset {name!r}{nearest(name, preset_names())}")


def read_text(path: Path, option: str) -> str:
    """The content of a small text file. Raises a ConfigError that names the option."""
    with reading(f"{option}: cannot read {str(path)!r}", ConfigError):
        size = path.stat().st_size
        if not path.is_file():  # reading a pipe would block
            raise ConfigError(f"{option}: {path} is not a regular file")
        if size > MAX_YAML_BYTES:
            raise ConfigError(
                f"{option}: {path} is larger than {MAX_YAML_BYTES} bytes, "
                "too large for a configuration"
            )
        return path.read_text(encoding="utf-8-sig")  # Notepad begins a file with a byte order mark


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases (nine lines of them can expand to a terabyte) and without duplicate
    keys.

    Unlike YAML 1.1, it takes text for something else only where nothing of its spelling is lost:
    `no`, `2024-01-01`, `0100` and `1:30` stay text, which the type of a field may turn into a
    decimal number or a truth value.
    """

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        seen = set()
        for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    """A number, or its text if the number would be written in another way."""
    text = loader.construct_scalar(node)
    number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return number if repr(number) == text or not math.isfinite(number) else text


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _decimal)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _float)
for _kind, _pattern in {
    "null": r"~|null|",
    "bool": r"true|false",
    "int": r"0|-?[1-9]\d*",
    "float": r"-?\d+(\.\d+)?([eE][-+]?\d+)?|-?\.inf|\.nan",
}.items():
    _PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$", re.ASCII), None
    )


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML with a safe loader; `where` names the file or option in errors."""
    try:
        return yaml.load(text, Loader=_PlainLoader)  # noqa: S506 (a SafeLoader)
    # `!!bool x` raises KeyError
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(e, "problem", None) or str(e).split("\n")[0] or type(e).__name__
        raise ConfigError(f"{where}: not valid YAML{line}: {problem}") from e


def load_config(
    preset: str, overrides: Iterable[str] = (), fields: Mapping[str, Any] | None = None
) -> Config:
    """Load a preset, apply overrides, and check the result.

    Args:
        preset: a name from `preset_names()` or the path of a YAML file.
        overrides: strings `section.field=value`; the value is YAML, or plain text for a field of
            text.
        fields: more overrides, such as {"data.path": "folder"}.

    Raises:
        ConfigError: one line that names the field, its value and the remedy.
    """
    values = _preset_values(preset)
    return config_from_dict(values, f"preset {preset}", overrides, fields, name=Path(preset).stem)


def _preset_values(
    preset: str, chain: tuple[str, ...] = (), option: str = "--preset"
) -> dict[str, Any]:
    """The values of a preset, laid over those of the preset or file that it names as its `base`.

    Args:
        chain: the presets that led to this one, as `base` of each other.
        option: what named this preset, for errors.
    """
    where = f"preset {preset}"
    values = dict(_mapping(parse_yaml(preset_text(preset, option), where), where))
    base = values.pop("base", None)
    if base is None:
        return values

    # A file is looked for beside the one that names it.
    option = f"{where}: base"
    if not isinstance(base, str):
        raise ConfigError(f"{option}: {base!r} must be the name of a preset or a YAML file")
    if Path(base).suffix in YAML_SUFFIXES:
        base = os.path.realpath(Path(preset).parent / base)
    chain = (*chain, preset if preset in preset_names() else os.path.realpath(preset))
    if base in chain:
        raise ConfigError(f"{option}: {' -> '.join((*chain, base))} goes in a circle")

    merged = _preset_values(base, chain, option)
    for section, fields in values.items():
        if section in SECTIONS:
            inherited = _mapping(merged.get(section), f"preset {base}: {section}")
            fields = {**inherited, **_mapping(fields, f"{where}: {section}")}
        merged[section] = fields
    return merged


def config_from_dict(
    values: Any,
    where: str,
    overrides: Iterable[str] = (),
    fields: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Config:
    """Make a checked Config from nested plain values, as read from YAML. Raises ConfigError."""
    values = {
        s: dict(v) if isinstance(v, Mapping) else v for s, v in _mapping(values, where).items()
    }
    saved_name = values.pop("preset", "")

    for key, value in [*map(_split_override, overrides), *(fields or {}).items()]:
        section, _, option = key.partition(".")
        if section not in SECTIONS or not option:
            raise ConfigError(f"--set: unknown field {key!r}{nearest(key, field_names())}")
        if not isinstance(values.setdefault(section, {}), dict):
            raise ConfigError(f"{where}: {section} must hold fields, not {values[section]!r}")
        values[section][option] = value

    unknown = [s for s in values if s not in SECTIONS]
    if unknown:
        raise ConfigError(
            f"{where}: unknown section {unknown[0]!r}{nearest(str(unknown[0]), SECTIONS)}"
        )

    sections = {s: read_section(s, _mapping(v, f"{where}: {s}")) for s, v in values.items()}
    config = Config(preset=name if name is not None else str(saved_name), **sections)
    check(config)
    return config


def field_names() -> list[str]:
    """Every field that `--set` takes, as section.field."""
    return [f"{s}.{f.name}" for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)]


def _mapping(values: Any, where: str) -> Mapping:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: must be a mapping of names to values, not {values!r:.60}")
    return values


def _split_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set: {text!r} must read section.field=value, such as train.lr=2e-4")
    return key.strip(), _override_value(key.strip(), value.strip())


def _override_value(key: str, text: str) -> Any:
    """The value that text stands for: YAML, but a field of text takes it as it stands, or what
    quotes enclose.
    """
    section, _, option = key.partition(".")
    hint = typing.get_type_hints(SECTIONS[section]).get(option) if section in SECTIONS else None
    choices = typing.get_args(hint)
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    is_list = typing.get_origin(hint) is tuple and text.startswith("[")
    if is_quoted or is_list or not (hint is str or str in choices):
        return parse_yaml(text, f"--set {key}")
    return None if type(None) in choices and text in ("null", "~", "") else text


def read_section(section: str, values: Mapping) -> Any:
    """One section from plain values; types and bounds are checked, but nothing across fields.
    Raises ConfigError.
    """
    cls = SECTIONS[section]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)

    values = _without_retired(section, values)
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"unknown field {section}.{name}{nearest(f'{section}.{name}', field_names())}"
            )

    values = {
        n: [v] if isinstance(v, str) and v and not fields[n].metadata["commas"] else v
        for n, v in values.items()
    }
    read = {
        name: _coerce(hints[name], value, f"{section}.{name}") for name, value in values.items()
    }

    for name, value in read.items():
        for item in value if isinstance(value, tuple) else (value,):
            _check_bounds(fields[name].metadata, item, f"{section}.{name}")
    return cls(**read)


def _without_retired(section: str, values: Mapping) -> Mapping:
    """The fields of a section that are still in use. Raises ConfigError for a retired one that asks
    for something.
    """
    retired = {
        name: RETIRED[f"{section}.{name}"] for name in values if f"{section}.{name}" in RETIRED
    }
    for name, (neutral, remedy) in retired.items():
        if _coerce(type(neutral), values[name], f"{section}.{name}") != neutral:
            raise ConfigError(
                f"{section}.{name}: {values[name]!r} given, but the field was removed; {remedy}"
            )
    return {name: value for name, value in values.items() if name not in retired}


def _coerce(hint: Any, value: Any, name: str) -> Any:
    """Convert a YAML value to the field's type. Numbers and truth values may be given as text (see
    `_PlainLoader`).
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        choices = {str(option): option for option in options}
        if str(value) not in choices:
            raise ConfigError(f"{name}: {value!r} is not a choice{nearest(str(value), choices)}")
        return choices[str(value)]

    if origin is tuple:
        text = "" if value is None else str(value)
        items = value if isinstance(value, (list, tuple)) else [v for v in text.split(",") if v]
        return tuple(_coerce(options[0], v, name) for v in items)

    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        for kind_of_number in {int, float} & set(options):
            is_number = (
                isinstance(value, kind_of_number) or _as_number(value, kind_of_number) is not None
            )
            if is_number or value in NOT_FINITE:
                return _coerce(kind_of_number, value, name)
        return _coerce(str, value, name)

    if hint in (int, float):
        number = _as_number(value, hint)
        if number is None:
            raise ConfigError(
                f"{name}: {value!r} must be {'a whole' if hint is int else 'a finite'} number"
            )
        return number

    if hint is str and isinstance(value, (bool, int, float, type(None))):
        return (
            "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        )
    if hint is bool and isinstance(value, str):
        value = TRUTH.get(value.lower(), value)

    if not isinstance(value, hint):
        kind = {bool: "true or false", str: "text"}[hint]
        raise ConfigError(f"{name}: {value!r} must be {kind}")
    return value


def _as_number(value: Any, kind: type) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        if kind is int and isinstance(value, str) and value.lstrip("+-").isdecimal():
            return int(value)  # all its digits
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        return None
    return kind(value) if isinstance(value, kind) else kind(number)


def _check_bounds(bounds: Mapping, value: Any, name: str) -> None:
    if isinstance(value, str):
        check_text(value, name)
        return

    if isinstance(value, float) and 0 < abs(value) < SMALLEST:
        raise ConfigError(
            f"{name}: {value} is too small to have an effect; it must be at least {SMALLEST}"
        )

    if "least" in bounds and value < bounds["least"]:
        raise ConfigError(f"{name}: {value} must be at least {bounds['least']}")
    if "above" in bounds and value <= bounds["above"]:
        raise ConfigError(f"{name}: {value} must be greater than {bounds['above']}")
    if "most" in bounds and value > bounds["most"]:
        raise ConfigError(f"{name}: {value} must be at most {bounds['most']}")
    if "below" in bounds and value >= bounds["below"]:
        raise ConfigError(f"{name}: {value} must be less than {bounds['below']}")


def named_columns(texts: Iterable[str], option: str) -> dict[str, str]:
    """The names of columns in texts like `image=photo`, by what the columns hold. Raises
    ConfigError.
    """
    found = {}
    for text in texts:
        kind, _, name = text.partition("=")
        if kind not in COLUMNS or not name:
            raise ConfigError(
                f"{option}: {text!r} must read {', '.join(f'{kind}=NAME' for kind in COLUMNS)}"
            )
        found[kind] = name
    return found


def whole(value: Any) -> int | None:
    """A number of any kind as an int; None for what is not a whole number."""
    try:
        return int(value) if int(value) == value else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # also a list, NaN, infinity
        return None


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ConfigError, naming the parameter, for what is not an int within bounds."""
    is_int = hasattr(value, "__index__") and whole(value) is not None
    if not is_int or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name}: {value!r:.80} must be a whole number {bounds}")


def check_text(text: str | os.PathLike, name: str) -> None:
    """Raises ConfigError for text that cannot name a file: not UTF-8, with a NUL byte, or a path
    with a long name.
    """
    path = os.fspath(text)
    try:
        parts = path.encode().split(b"/")
    except UnicodeEncodeError as e:
        raise ConfigError(f"{name}: {path!r} is not UTF-8 text; rename it") from e
    if "\0" in path:
        raise ConfigError(f"{name}: {path!r} holds a NUL byte")
    if isinstance(text, os.PathLike) and max(map(len, parts)) > MAX_NAME:
        raise ConfigError(f"{name}: {path!r:.40}... has a name of more than {MAX_NAME} bytes")


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error line: the closest valid name, or all valid names if there are few."""
    valid = [str(v) for v in valid]
    leaf = name.rpartition(".")[-1]  # `lr` or `model.lr` for train.lr
    close = [v for v in valid if v.rpartition(".")[-1] == leaf]
    close = close or difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid: {', '.join(valid)}" if len(valid) <= 16 else ""


# ----------------------------------------------------------------------------------------- checking
def check(config: Config) -> None:
    """Raises ConfigError for fields that do not fit together; single fields were checked when they
    were read.
    """
    m, d, t, s = config.model, config.data, config.train, config.sample

    # the size of images and of their grid
    if not isinstance(d.resolution, int) and not re.fullmatch(
        r"[1-9]\d{0,4}x[1-9]\d{0,4}", d.resolution
    ):
        raise ConfigError(
            f"data.resolution: {d.resolution!r} must be a number of pixels or HxW, "
            "like 256 or 256x384"
        )
    if not 1 <= min(d.size) <= max(d.size) <= MAX_SIDE:
        raise ConfigError(f"data.resolution: {d.resolution} must be from 1 to {MAX_SIDE}")
    if any(side % d.downsample for side in d.size):
        raise ConfigError(
            f"data.resolution: {d.resolution} must be a multiple of data.downsample {d.downsample}"
        )
    if d.vae is None and d.downsample != 1:
        raise ConfigError(
            f"data.downsample: {d.downsample} needs data.vae; pixels have downsample 1"
        )

    # patches, tokens and channels
    H, W = d.grid
    if H % m.patch_size or W % m.patch_size:
        raise ConfigError(
            f"model.patch_size: {m.patch_size} must divide the {H}x{W} grid of data.resolution"
        )
    if (W // m.patch_size) % m.compression:
        raise ConfigError(
            f"model.compression: {m.compression} must divide "
            f"the {W // m.patch_size} tokens of a row"
        )
    if m.hidden_size % 4:
        raise ConfigError(f"model.hidden_size: {m.hidden_size} must be a multiple of 4")
    wide = m.hidden_size if m.backbone == "dit" else 2 * m.hidden_size
    if wide % m.compression:
        raise ConfigError(
            f"model.compression: {m.compression} must divide the {wide} channels that the "
            "hourglass contracts"
        )

    # the mixers
    wrong = [name for name in m.mixers if name not in MIXERS]
    if wrong:
        raise ConfigError(f"model.mixer: {wrong[0]!r} is not a choice; valid: {', '.join(MIXERS)}")
    with_heads = m.backbone == "dit" or {"linear", "attention"} & set(m.mixers)
    if with_heads and m.hidden_size % m.heads:
        raise ConfigError(f"model.heads: {m.heads} must divide model.hidden_size {m.hidden_size}")
    if m.d_state % 2:
        raise ConfigError(f"model.d_state: {m.d_state} must be even")

    # training
    if t.optimizer == "muon" and t.parallel == "fsdp":
        raise ConfigError(
            "train.optimizer: muon needs whole matrices, which train.parallel=fsdp splits; take ddp"
        )
    if t.batch_size % t.accumulate:
        raise ConfigError(
            f"train.accumulate: {t.accumulate} must divide train.batch_size {t.batch_size}"
        )
    if not t.ema or len(set(t.ema)) < len(t.ema):
        raise ConfigError(
            f"train.ema: {','.join(map(str, t.ema))!r} must be one or more different numbers"
        )

    # the data
    if (
        isinstance(d.held_out, str)
        and d.held_out
        and (d.held_out == d.path or d.held_out.startswith(BUILTIN))
    ):
        raise ConfigError(
            f"data.held_out: {d.held_out!r} must be a share or a folder of other images than "
            "data.path"
        )
    if named_columns(d.columns, "data.columns") and (
        d.vae is not None or d.path.startswith(BUILTIN)
    ):
        raise ConfigError(
            f"data.columns: {d.columns[0]!r} given, but {d.path} is no folder of parquet shards"
        )
    _check_text(config)
    if d.path.startswith(BUILTIN) and d.vae is not None:
        raise ConfigError(f"data.vae: {d.vae!r} given, but {d.path} holds pixels; leave it out")

    _check_size(config)
    _check_schedule(config.diffusion)
    _check_objective(config)
    if 0 < config.eval.images < 16:
        raise ConfigError(f"eval.images: {config.eval.images} must be 0 or at least 16")
    check_sampling(s, config)


def mixer_names(text: str) -> list[str]:
    """The names in a list of mixers such as `conv,axial`."""
    return [name.strip() for name in text.split(",")]


def _check_size(config: Config) -> None:
    """Raises ConfigError, before anything is built, for sizes that are valid one by one but absurd
    together.
    """
    m, d = config.model, config.data
    D, taps = m.hidden_size, d.channels * m.patch_size**2
    tokens = math.prod(d.grid) // m.patch_size**2
    block = (16 + m.compression) * D**2 + 8 * D * m.d_state
    parameters = (
        m.depth * block
        + m.depth // 2 * m.skips * D**2
        + m.num_classes * D
        + 3 * m.compression * taps * D
    )  # to a few percent

    if parameters > MAX_PARAMETERS:
        raise ConfigError(
            f"model.hidden_size: {D} with model.depth {m.depth} makes about {parameters:.1e} "
            f"parameters; at most {MAX_PARAMETERS:.0e} are allowed"
        )
    if tokens * max(D, taps) > MAX_VALUES:
        raise ConfigError(
            f"data.resolution: {d.resolution} makes {tokens:,} tokens of {max(D, taps):,} values; "
            "take a larger model.patch_size or data.downsample"
        )


def _check_text(config: Config) -> None:
    """Raises ConfigError for a text encoder without a width, a width without an encoder, or layers
    without text.
    """
    m, d = config.model, config.data
    if d.text is None and m.text_width:
        raise ConfigError(
            f"model.text_width: {m.text_width} needs a text encoder, such as data.text=wordllama"
        )
    if d.text is not None and not m.text_width:
        raise ConfigError(
            f"data.text: {d.text!r} needs model.text_width, the width of its vectors "
            "(wordllama: 256)"
        )

    if m.text_tokens and not m.text_width:
        raise ConfigError(
            f"model.text_tokens: {m.text_tokens} needs model.text_width and data.text"
        )
    if (
        m.text_tokens
        and m.backbone == "diffussm"
        and (m.local or {"conv", "axial"} & set(m.mixers))
    ):
        given = f"model.local={m.local}" if m.local else f"model.mixer={m.mixer}"
        raise ConfigError(
            f"model.text_tokens: {m.text_tokens} given, but {given} reads an image, "
            "and text tokens have no place in one; set text_tokens to 0"
        )


def _check_schedule(d: DiffusionConfig) -> None:
    """Raises ConfigError for a process whose last signal level underflows in float32."""
    if d.beta_end < d.beta_start:
        raise ConfigError(
            f"diffusion.beta_end: {d.beta_end} must be at least diffusion.beta_start {d.beta_start}"
        )
    step = (d.beta_end - d.beta_start) / (d.timesteps - 1)
    if sum(math.log1p(-(d.beta_start + i * step)) for i in range(d.timesteps)) < MIN_SIGNAL:
        raise ConfigError(
            f"diffusion.timesteps: {d.timesteps} with variances up to {d.beta_end} leave nothing "
            "of the image; lower diffusion.beta_end"
        )


def _check_objective(config: Config) -> None:
    """Raises ConfigError for options that make no sense with the objective, or with each other."""
    d, t = config.diffusion, config.train
    flow, min_snr = d.objective == "flow", t.loss_weight == "min_snr"

    if d.predicts == "image" and not flow:
        raise ConfigError(
            "diffusion.predicts: image needs diffusion.objective=flow; "
            f"{d.objective} says what the model predicts"
        )
    if flow and config.model.learn_sigma:
        raise ConfigError(
            "model.learn_sigma: true given, but a flow has no covariance to learn; set it to false"
        )

    if d.zero_terminal_snr and d.objective != "velocity":
        why = (
            "a flow ends in pure noise anyway"
            if flow
            else "a model that predicts pure noise learns no image from it"
        )
        raise ConfigError(
            f"diffusion.zero_terminal_snr: true needs diffusion.objective=velocity; {why}"
        )

    if t.mse_weight_cap > 1 and (min_snr or d.objective != "noise"):
        other = "train.loss_weight=min_snr" if min_snr else f"diffusion.objective={d.objective}"
        cap = f"train.mse_weight_cap: {t.mse_weight_cap:g}"
        raise ConfigError(
            f"{cap} turns the MSE of the noise into that of the velocity; "
            f"leave it at 1 with {other}"
        )

    if min_snr and (flow or d.zero_terminal_snr):
        why = "is for discrete timesteps; weight a flow by diffusion.timesteps_drawn"
        if not flow:
            why = (
                "gives the first step of sampling the weight 0; "
                "leave it out with diffusion.zero_terminal_snr"
            )
        raise ConfigError(f"train.loss_weight: min_snr {why}")


def check_sampling(s: SampleConfig, config: Config) -> None:
    """Raises ConfigError for a sampling request that the model does not support."""
    objective = config.diffusion.objective
    if s.sampler not in SAMPLERS[objective]:
        of = "flow" if s.sampler == "sde" else "discrete process"
        fitting = ", ".join(SAMPLERS[objective])
        raise ConfigError(
            f"sample.sampler: {s.sampler} is for a {of}; with objective {objective}, "
            f"choose {fitting}"
        )
    if s.sampler == "ddim" and config.diffusion.zero_terminal_snr:
        raise ConfigError(
            "sample.sampler: ddim does not begin at pure noise, as zero_terminal_snr needs; "
            "choose euler"
        )

    if s.clip and config.data.vae is not None:
        latents = f"the latents of {config.data.vae!r} go beyond that"
        raise ConfigError(
            f"sample.clip: true clamps pixels to [-1, 1], and {latents}; leave it at false"
        )

    if s.steps > config.diffusion.timesteps:
        raise ConfigError(
            f"sample.steps: {s.steps} must be at most diffusion.timesteps "
            f"{config.diffusion.timesteps}"
        )
    if s.guidance != 1 and not (config.model.num_classes or config.model.text_width):
        raise ConfigError(
            f"sample.guidance: {s.guidance:g} needs a model of classes or text; leave it at 1"
        )
    if s.prompts and not config.model.text_width:
        raise ConfigError(
            f"sample.prompts: {s.prompts[0]!r:.60} given, but the model takes no text; "
            "see data.text"
        )

    interval = s.guidance_interval
    if interval and (len(interval) != 2 or not 0 <= interval[0] <= interval[1]):
        given = ",".join(map(str, interval))
        raise ConfigError(f"sample.guidance_interval: {given!r} must be LO,HI with 0 <= LO <= HI")


# ------------------------------------------------------------------------------------------ writing
def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, as `config_from_dict` reads them."""
    values, ema = dataclasses.asdict(config), config.train.ema
    values["train"]["ema"] = list(ema) if len(ema) > 1 else ema[0]
    return values


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, which `config_from_dict` can read back."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes text that holds control characters in double quotes, where they have escapes; YAML
    folds some of them.
    """


def _dump_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    )


_Dumper.add_representer(str, _dump_text)

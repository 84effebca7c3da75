"""Presets and trained models by name: those of the package, and YAML files with a `base`."""

import os
from collections.abc import Collection, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from diffussm_cli.config.fields import SECTIONS, Config, DataConfig
from diffussm_cli.config.plain_yaml import parse_yaml, read_text
from diffussm_cli.config.reading import check_mapping, config_from_dict
from diffussm_cli.config.values import nearest
from diffussm_cli.errors import ConfigError

YAML_SUFFIXES = (".yaml", ".yml")
DEFAULT_PRESET = "mnist"
# Values of the default preset that fit any data, until those of the data are known.
STAND_INS = {"data.resolution": 64, "sample.guidance": 1.0}
# Fields of `data` that need a VAE, which a store of latents names: not checked until it is read.
OF_LATENTS = ("normalize", "latents_mean", "latents_std")
BUNDLED = Path(__file__).parents[1] / "bundled"
RUNS, CONFIG = Path("runs"), "config.yaml"  # where runs go, and the configuration in each


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(
        f.name.removesuffix(".yaml") for f in _presets().iterdir() if f.name.endswith(".yaml")
    )


def bundled_names() -> list[str]:
    """Names of the trained models that come with the package."""
    return sorted(path.name for path in run_folders(BUNDLED))


def run_folders(folder: Path = RUNS) -> list[Path]:
    """The run folders in a folder, in no order."""
    return [path.parent for path in folder.glob(f"*/{CONFIG}")]


def _presets():
    """The folder of presets: a package once installed, presets/ in a checkout."""
    try:
        return resources.files("diffussm_cli.presets")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "presets"


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


def preset_title(name: str) -> str:
    """What a preset is: the first line of its file."""
    return preset_text(name).partition("\n")[0].removeprefix("#").strip()


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


def first_reading(
    preset: str | None,
    named: Collection[str],
    overrides: Iterable[str] = (),
    fields: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration before the data are looked at, which shows mistakes at once.

    Args:
        preset: as in `load_config`; None: the default preset, which `training.configure` fits to
            the data if the user names some.
        named: the fields that the user has set, from `set_fields`.

    Raises:
        ConfigError: as `load_config`.
    """
    stand_ins = {}
    if preset is None and "data.path" in named:
        stand_ins = {name: value for name, value in STAND_INS.items() if name not in named}
    defaults = DataConfig()
    later = {f"data.{f}": getattr(defaults, f) for f in OF_LATENTS if f"data.{f}" in named}
    values = {**stand_ins, **(fields or {}), **later}
    return load_config(preset or DEFAULT_PRESET, overrides, values)


def set_fields(overrides: Iterable[str], fields: Mapping[str, Any] | None = None) -> set[str]:
    """The fields that overrides change, as section.field."""
    return {override.partition("=")[0].strip() for override in overrides} | set(fields or {})


def _preset_values(
    preset: str, chain: tuple[str, ...] = (), option: str = "--preset"
) -> dict[str, Any]:
    """The values of a preset, laid over those of the preset or file that it names as its `base`.

    Args:
        chain: the presets that led to this one, as `base` of each other.
        option: what named this preset, for errors.
    """
    where = f"preset {preset}"
    values = dict(check_mapping(parse_yaml(preset_text(preset, option), where), where))
    if "base" not in values:
        return values
    base = values.pop("base")

    # A file is looked for beside the one that names it.
    option = f"{where}: base"
    if not isinstance(base, str) or not base:
        shown = "is empty; it" if base in (None, "") else repr(base)
        raise ConfigError(f"{option}: {shown} must be the name of a preset or a YAML file")
    if Path(base).suffix in YAML_SUFFIXES:
        base = os.path.realpath(Path(preset).parent / base)
    chain = (*chain, preset if preset in preset_names() else os.path.realpath(preset))
    if base in chain:
        raise ConfigError(f"{option}: {' -> '.join((*chain, base))} goes in a circle")

    merged = _preset_values(base, chain, option)
    for section, fields in values.items():
        if section in SECTIONS:
            inherited = check_mapping(merged.get(section), f"preset {base}: {section}")
            fields = {**inherited, **check_mapping(fields, f"{where}: {section}")}
        merged[section] = fields
    return merged

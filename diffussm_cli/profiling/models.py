"""Models by name and size, over a grid of resolutions, patch sizes and compressions."""

import itertools
import re
from collections.abc import Sequence

from diffussm_cli.config import Config, config_from_dict, load_config, preset_names, to_dict
from diffussm_cli.errors import ConfigError

LETTERS = {"M": "compression", "P": "patch_size", "D": "hidden_size", "N": "d_state", "depth": "depth"}
NAME = re.compile(r"(?P<kind>(?:dit-)?(?:s|b|l|xl))(?:/(?P<P>\d+))?(?:-m(?P<M>\d+))?")
PRESET = re.compile(r"(?P<dit>dit-)?(?P<size>s|b|l|xl)-\d+")


def named_model(name: str, resolution: int | str) -> Config:
    """A model such as `xl`, `s/2` or `dit-xl/1-m2` at a resolution, from the preset of its size. Raises ConfigError."""
    parts = NAME.fullmatch(name)
    presets = [n for n in preset_names() if PRESET.fullmatch(n)]
    of_kind = [n for n in presets if parts and n.rpartition("-")[0] == parts["kind"]]
    if parts is None or not of_kind:
        kinds = dict.fromkeys(n.rpartition("-")[0] for n in presets)
        raise ConfigError(f"--models: {name!r} must be one of {', '.join(kinds)}, with /P and -mM as in dit-xl/1-m2")
    wanted = {"model.patch_size": parts["P"], "model.compression": parts["M"], "data.resolution": resolution}
    own = f"{parts['kind']}-{resolution}"
    preset = own if own in of_kind else f"{parts['kind']}-256"
    return load_config(preset, fields={field: value for field, value in wanted.items() if value is not None})


def display_name(config: Config) -> str:
    """DiffuSSM-XL, DiffuSSM-XL/2 M=4, DiT-XL/2, DiT-XL/1 M=2: P and M appear if they are not the papers'."""
    parts, m = PRESET.fullmatch(config.preset), config.model
    assert parts, f"{config.preset} belongs to neither family"
    usual_P, usual_M = (None, 1) if parts["dit"] else (1, 2)
    patch = f"/{m.patch_size}" if m.patch_size != usual_P else ""
    compression = f" M={m.compression}" if m.compression != usual_M else ""
    return f"{'DiT' if parts['dit'] else 'DiffuSSM'}-{parts['size'].upper()}{patch}{compression}"


def swept(name: str, config: Config, sweep: Sequence[str]) -> dict[str, Config]:
    """A configuration with every combination of the values in texts like `M=1,2,4`, by distinct names.

    Raises:
        ConfigError: for a wrong text or value, which the message names.
    """
    combinations = itertools.product(*map(_axis, sweep))
    return {" ".join([name, *map("=".join, pairs)]): _changed(config, pairs) for pairs in combinations}


def _changed(config: Config, pairs: Sequence[tuple[str, str]]) -> Config:
    fields = {f"model.{LETTERS[letter]}": value for letter, value in pairs}
    return config_from_dict(to_dict(config), config.preset, fields=fields)


def _axis(text: str) -> list[tuple[str, str]]:
    """`M=1,2` as M with each of its values."""
    letter, _, values = text.partition("=")
    if letter not in LETTERS or not values:
        raise ConfigError(f"--sweep: {text!r} must read LETTER=VALUES, such as M=1,2,4; letters: {', '.join(LETTERS)}")
    return [(letter, value) for value in values.split(",")]

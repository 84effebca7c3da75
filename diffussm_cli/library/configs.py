"""Configurations by name, for a program. No torch, so that it is quick."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffussm_cli.config import Config
from diffussm_cli.config.presets import load_config as load_preset
from diffussm_cli.errors import PARAMETERS, ConfigError, naming_parameters
from diffussm_cli.library.requests import check_paths, checked_fields


def load_config(
    preset: Path | str,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    fields: Mapping[str, Any] | None = None,
) -> Config:
    """Load a preset, apply overrides, and check the result.

    Args:
        preset: the name of a preset or the path of a YAML file.
        overrides: a list of texts `section.field=value`, as `--set` takes them; or fields.
        fields: fields by their whole name, such as {"model.depth": 4}.

    Returns:
        The configuration, which `train` and `cost` take.

    Raises:
        ConfigError: one line that names the field, its value and the remedy.
    """
    # The parameters.
    check_paths(preset=preset)
    parameter = "overrides" if overrides else "fields"
    values = checked_fields(fields, "fields")
    if isinstance(overrides, Mapping):
        values = checked_fields(overrides, "overrides") | values
        overrides = ()
    is_list = isinstance(overrides, Iterable) and not isinstance(overrides, str)
    texts: list[Any] = list(overrides) if is_list else [overrides]
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"overrides: {overrides!r:.80} must be a list of texts, such as ['model.depth=4'], or "
            "fields, such as {'model.depth': 4}"
        )

    # The configuration.
    with naming_parameters(PARAMETERS | {"--preset": "preset", "--set": parameter}):
        return load_preset(str(preset), texts, values)

"""Checks arguments of the library that are fields of a configuration too, by the fields' types and
bounds.
"""

import dataclasses
import math
import numbers
import typing
from collections.abc import Mapping
from typing import Any

from diffussm_cli.config.values import check_bounds, check_whole, is_truth_value
from diffussm_cli.errors import ConfigError


def check_arguments(
    section: type, arguments: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> None:
    """Check what a network or a process is made from.

    Args:
        section: a section of the configuration, such as ModelConfig.
        arguments: values by name; those that are no field of the section are not looked at.
        names: the field by the name of the argument, where they differ.

    Raises:
        ValueError: one line that names the argument, its value and what it must be.
    """
    fields = {field.name: field for field in dataclasses.fields(section)}
    hints = typing.get_type_hints(section)
    for name, value in arguments.items():
        field = (names or {}).get(name, name)
        if field not in fields:
            continue
        try:
            _check_value(hints[field], fields[field].metadata, value, name)
        except ConfigError as e:
            raise ValueError(str(e)) from None


def _check_value(hint: Any, bounds: Mapping, value: Any, name: str) -> None:
    """Raises ConfigError for a value that has not the type of a field, or is out of its bounds."""
    choices = typing.get_args(hint)
    if choices or hint is bool:
        choices = choices or (True, False)
        if is_truth_value(value) != (hint is bool) or value not in choices:
            raise ConfigError(
                f"{name}: {value!r:.80} must be one of {', '.join(map(str, choices))}"
            )

    elif hint is int:
        check_whole(name, value, bounds["least"], bounds["most"])

    elif hint is float:
        is_number = isinstance(value, numbers.Real) and not is_truth_value(value)
        if not is_number or not math.isfinite(value):
            raise ConfigError(f"{name}: {value!r:.80} must be a finite number")
        check_bounds(bounds, value, name)

    elif not isinstance(value, str):
        raise ConfigError(f"{name}: {value!r:.80} must be text")

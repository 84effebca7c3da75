"""From plain values to a checked configuration and back: each value takes the type of its field."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from diffussm_cli.config.checks import check
from diffussm_cli.config.fields import SECTIONS, Config, field_names
from diffussm_cli.config.plain_yaml import dump_yaml, parse_yaml
from diffussm_cli.config.values import check_bounds, nearest
from diffussm_cli.errors import ConfigError

# Other spellings of truth values, as in YAML 1.1, and numbers that no field takes.
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOT_FINITE = (".nan", ".inf", "-.inf")

# Fields of earlier versions, which files may still hold: the only value that is accepted, and the
# remedy for another.
RETIRED: dict[str, tuple[Any, str]] = {
    "train.processes": (
        1,
        "several processes are started by torchrun --nproc-per-node N -m diffussm_cli train",
    ),
}


def config_from_dict(
    values: Any,
    where: str,
    overrides: Iterable[str] = (),
    fields: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Config:
    """Make a checked Config from nested plain values, as read from YAML. Raises ConfigError."""
    values = {
        s: dict(v) if isinstance(v, Mapping) else v for s, v in check_mapping(values, where).items()
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

    sections = {s: read_section(s, check_mapping(v, f"{where}: {s}")) for s, v in values.items()}
    config = Config(preset=name if name is not None else str(saved_name), **sections)
    check(config)
    return config


def check_mapping(values: Any, where: str) -> Mapping:
    """The values themselves, or none for None. Raises ConfigError for all but a mapping."""
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
            check_bounds(fields[name].metadata, item, f"{section}.{name}")
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
    `plain_yaml`).
    """
    origin = typing.get_origin(hint)
    options = typing.get_args(hint)
    if value is None and (origin is Literal or hint in (int, float, bool)):
        raise ConfigError(f"{name}: has no value; write {name}=VALUE, or leave the field out")
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


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, as `config_from_dict` reads them."""
    values = dataclasses.asdict(config)
    ema = config.train.ema
    values["train"]["ema"] = list(ema) if len(ema) > 1 else ema[0]
    return values


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, which `config_from_dict` can read back."""
    return dump_yaml(to_dict(config))


def shown(value: Any) -> str:
    """A value of a field as `--set` takes it: on one line, in YAML's words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "[]"
    return repr(value) if value == "" else str(value)

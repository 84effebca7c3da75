"""What the Tab key offers for the value of an option. No torch, so the answer is quick.

Typer calls these functions with what stands before the cursor. It offers the names of options and
the values of a choice by itself, and the shell offers files where nothing here fits.
"""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

from diffussm_cli.config import (
    SECTIONS,
    bundled_names,
    preset_names,
    preset_title,
    run_folders,
    shown,
)


def presets(incomplete: str) -> list[tuple[str, str]]:
    """Presets, with what each is."""
    return [(name, preset_title(name)) for name in preset_names() if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Run folders."""
    return [name for name in sorted(map(str, run_folders())) if name.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """Trained models: those of the package, and run folders."""
    return [n for n in bundled_names() if n.startswith(incomplete)] + runs(incomplete)


def fields(incomplete: str) -> list[tuple[str, str]]:
    """Fields of the configuration, as `section.field=`, with their help."""
    return _fields(incomplete, SECTIONS)


def sampling_fields(incomplete: str) -> list[tuple[str, str]]:
    """Those of the section `sample`."""
    return _fields(incomplete, ["sample"])


def _fields(incomplete: str, sections: Iterable[str]) -> list[tuple[str, str]]:
    """Fields that fit; if it is a single one, also its values, and so the shell adds no space
    after the equals sign.
    """
    beginning, equals, _ = incomplete.partition("=")
    rows: list[tuple[str, str, list[str]]] = []
    for section in sections:
        hints = typing.get_type_hints(SECTIONS[section])
        for field in dataclasses.fields(SECTIONS[section]):
            name = f"{section}.{field.name}"
            if name == beginning or (name.startswith(beginning) and not equals):
                values = _values(hints[field.name], field.default)
                rows.append((f"{name}=", field.metadata["help"], values))

    offered = [(name, text) for name, text, _ in rows]
    if len(rows) == 1:
        (name, text, values) = rows[0]
        offered += [(name + value, text) for value in values]
    return [entry for entry in offered if entry[0].startswith(incomplete)]


def _values(hint: Any, default: Any) -> list[str]:
    """The choices of a field, as YAML has them; without choices, its default."""
    choices = list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else []
    if hint is bool:
        choices = [False, True]
    return [shown(value) for value in choices or [default]]

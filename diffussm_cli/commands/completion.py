"""What the Tab key offers for the value of an option. No torch, so the answer is quick.

Typer calls these functions with what stands before the cursor. It offers the names of options and
the values of a choice by itself, and the shell offers files where nothing here fits.
"""

import contextlib
import dataclasses
import io
import os
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import typer

from diffussm_cli.config import (
    SECTIONS,
    bundled_names,
    preset_names,
    preset_title,
    run_folders,
    shown,
)

BREAKS = ("=", ":")  # at which bash breaks words


@contextlib.contextmanager
def as_bash_sees_words() -> Iterator[None]:
    """Let bash complete what stands behind an equals sign or a colon.

    Bash takes `a=b` for three words and replaces the last of them. So the program sees the word as
    it was typed, and bash gets what it offers without the part that stands there already.
    """
    words = os.environ.get("COMP_WORDS", "").split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
    whole, typed = joined(words)
    if len(whole) == len(words):
        yield
        return

    os.environ.update({"COMP_WORDS": "\n".join(whole), "COMP_CWORD": str(len(whole) - 1)})
    answer = io.StringIO()
    try:
        with contextlib.redirect_stdout(answer):
            yield
    finally:
        offered = [line.removeprefix(typed) for line in answer.getvalue().splitlines()]
        typer.echo("\n".join(filter(None, offered)))


def joined(words: Sequence[str]) -> tuple[list[str], str]:
    """The words as they were typed, and what of the last one stands before the part that bash
    replaces.
    """
    whole: list[str] = []
    typed = before = ""
    for word in words:
        if whole and (word in BREAKS or before in BREAKS):
            typed = whole[-1] + (word if word in BREAKS else "")
            whole[-1] += word
        else:
            typed = ""
            whole.append(word)
        before = word
    return whole, typed


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

"""What the texts of options ask for: settings of sampling, labels, prompts and sizes."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffussm_cli.config import Config, SampleConfig, config_from_dict, nearest, read_text, to_dict
from diffussm_cli.errors import ConfigError


def sampling_request(config: Config, **changes: Any) -> SampleConfig:
    """The run's sampling settings, with the values of those `changes` that are not None. Raises
    ConfigError.
    """
    fields = {f"sample.{name}": value for name, value in changes.items() if value is not None}
    return config_from_dict(to_dict(config), "RUN", fields=fields).sample


def overridden_sampling(config: Config, overrides: Sequence[str]) -> SampleConfig:
    """The run's sampling settings, changed by overrides such as `sample.steps=25`.

    Raises:
        ConfigError: for a field of another section, or a wrong value.
    """
    for override in overrides:
        field = override.partition("=")[0].strip()
        if field == "sample.prompts":
            raise ConfigError(
                "--set: sample.prompts are those of a run's grids; "
                "name a file of prompts with --prompts"
            )

        if not field.startswith("sample."):
            raise ConfigError(
                f"--set: {field!r} does not change how a run draws; fields such as sample.steps do"
            )
    return config_from_dict(to_dict(config), "RUN", overrides).sample


def parse_classes(
    text: str | None, config: Config, balanced: bool = False, prompts: str = "--prompt"
) -> tuple[int, ...]:
    """Labels from `3,7`, `0-9`, class names of the run, or a mix of them; empty for None, all if
    `balanced`.

    Args:
        prompts: the option that a model of text takes instead.

    Raises:
        ConfigError: for a label or name that the model does not have, or for both options.
    """
    n, names = config.model.num_classes, config.data.class_names
    if balanced and (text is not None or not n):
        raise ConfigError("--balanced: needs a class-conditional model, and no --classes")
    if text is None:
        return tuple(range(n)) if balanced else ()
    if not n:
        why = f"the run draws prompts; use {prompts}"
        if not config.model.text_width:
            why = "the model is unconditional"
        raise ConfigError(f"--classes: {text!r} given, but {why}")

    try:
        parts = next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error as e:
        raise ConfigError(
            f"--classes: {text!r:.80} must be labels or names separated by commas: {e}"
        ) from e

    # Where classes have other numbers than their places as names, a number is a name.
    numbered = any(name.isdecimal() and int(name) != place for place, name in enumerate(names))

    labels: list[int] = []
    for part in parts:
        span = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part)
        if numbered and part.strip() in names:
            labels.append(names.index(part.strip()))
        elif numbered and span:
            raise ConfigError(
                f"--classes: the run has no class {part.strip()!r}; its classes are named by "
                f"numbers that are not their places, so write these, such as {names[0]}"
            )
        elif span:
            first, last = int(span[1]), int(span[2] or span[1])
            if not first <= last < n:
                raise ConfigError(f"--classes: {text!r} must name labels from 0 to {n - 1}")
            labels += range(first, last + 1)
        elif part in names:
            labels.append(names.index(part))
        elif names:
            raise ConfigError(f"--classes: the run has no class {part!r}{nearest(part, names)}")
        else:
            raise ConfigError(
                f"--classes: {part!r} must be labels such as 3,7 or 0-9; the run has no class names"
            )

    if not labels:
        raise ConfigError(f"--classes: {text!r} must name labels from 0 to {n - 1}")
    return tuple(labels)


def parse_prompts(prompts: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """The prompts of --prompt, then the lines of the file of --prompts that are not empty. Raises
    ConfigError.
    """
    lines = (
        []
        if file is None
        else [line for line in read_text(file, "--prompts").splitlines() if line.strip()]
    )
    if file is not None and not lines:
        raise ConfigError(f"--prompts: {file} holds no prompt")
    return (*(prompts or []), *lines)


def parse_size(text: str) -> tuple[int, int]:
    """`256` or `256x384` as (height, width). Raises ConfigError."""
    size = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", text)
    if not size:
        raise ConfigError(
            f"--resolution: {text!r} must be a number of pixels or HxW, like 256 or 256x384, "
            "up to 9999"
        )
    return int(size[1]), int(size[2] or size[1])

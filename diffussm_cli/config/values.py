"""Checks of one value, which a file, an option or a parameter of the library gives."""

import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Any

from diffussm_cli.errors import ConfigError

SMALLEST = 1e-9  # smallest magnitude of a nonzero number
MAX_NAME = 255  # bytes in a file name
# least likeness, from 0 to 1, of a name to one that was perhaps meant; in another section
NEAR, NEARER = 0.65, 0.75
COLUMNS = ("image", "label", "text")  # what columns of parquet shards hold


def check_bounds(bounds: Mapping, value: Any, name: str) -> None:
    """Raises ConfigError for text that cannot name a file, and for a number outside the bounds
    `least`, `above`, `most` and `below`.
    """
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


def whole_number(value: Any) -> int | None:
    """A number of any kind as an int; None for what is not a whole number."""
    try:
        return int(value) if int(value) == value else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # also a list, NaN, infinity
        return None


def is_truth_value(value: Any) -> bool:
    """Whether a value is true or false, which Python, numpy and torch take as 1 and 0."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ConfigError, naming the parameter, for what is not an int within bounds."""
    is_number = hasattr(value, "__index__") and not is_truth_value(value)
    is_int = is_number and whole_number(value) is not None
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


def named_columns(texts: Iterable[str], option: str) -> dict[str, str]:
    """The names of columns in texts like `image=photo`, by what the columns hold. Raises
    ConfigError.
    """
    columns = {}
    for text in texts:
        kind, _, name = text.partition("=")
        if kind not in COLUMNS or not name:
            raise ConfigError(
                f"{option}: {text!r} must read {', '.join(f'{kind}=NAME' for kind in COLUMNS)}"
            )
        columns[kind] = name
    return columns


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error line: the closest valid name, or all valid names if there are few."""
    valid = [str(v) for v in valid]
    if close := closest(name, valid):
        return f"; did you mean {close!r}?"

    section, dot, _ = name.rpartition(".")
    names = [v for v in valid if dot and v.startswith(f"{section}.")] or valid
    return f"; valid: {', '.join(names)}" if len(names) <= 16 else ""


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that was probably meant.

    Names of fields are looked for in their section, and then in others, which one may mistake.
    """
    valid = [str(v) for v in valid]
    section, dot, leaf = name.rpartition(".")
    in_section = [v for v in valid if dot and v.startswith(f"{section}.")]

    for names, cutoff in ((in_section, NEAR), (valid, NEARER if dot else NEAR)):
        leaves = {v.rpartition(".")[-1]: v for v in reversed(names)}
        close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=cutoff)
        if close:
            return leaves[close[0]]
    return None

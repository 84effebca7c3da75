"""The small text files of a run: configuration, state, metrics, skipped images. Errors name the damaged file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffussm_cli.config import Config, config_from_dict, parse_yaml, read_text
from diffussm_cli.data.listing import skipped_text
from diffussm_cli.errors import ConfigError, RunError
from diffussm_cli.machine.files import write_text
from diffussm_cli.runs.layout import CONFIG, METRICS, SKIPPED, STATE


def read_config(folder: Path, option: str = "RUN") -> Config:
    """Read the configuration of a run; `option` is the option that gave the run. Raises RunError."""
    path = folder / CONFIG
    try:
        return config_from_dict(_saved_values(read_text(path, option), f"{option}: {path}"), str(path))
    except ConfigError as e:
        raise RunError(str(e)) from e


def _saved_values(text: str, where: str) -> dict[str, Any]:
    try:
        values, problem = parse_yaml(text, where), ""
    except ConfigError as e:
        values, problem = None, f" ({str(e).removeprefix(f'{where}: ')})"
    if not isinstance(values, dict) or not {"model", "data", "train"} <= values.keys():
        remedy = "delete it and repeat the command that made the run, with --preset and --resume"
        raise ConfigError(f"{where} is empty or damaged{problem}; {remedy}")
    return values


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint: step, counts and hashes. Raises RunError."""
    state = _read_object(folder / STATE)
    if type(state.get("step")) is not int or state["step"] < 0:
        raise RunError(f"{folder / STATE}: damaged")
    return state


def _read_object(path: Path, remedy: str = "") -> dict[str, Any]:
    """Read a small JSON object. Raises RunError."""
    try:
        found = json.loads(read_text(path, "RUN"))
        if isinstance(found, dict):
            return found
    except (ConfigError, ValueError, RecursionError):
        pass
    raise RunError(f"{path}: damaged{remedy}")


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the file that `read_state` reads. Raises OSError."""
    write_text(folder / STATE, json.dumps(state))


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read the metrics of `best/`; empty if there are none. Raises RunError."""
    path, remedy = folder / METRICS, f"; delete the folder {folder}"
    if not path.is_file():
        return {}
    found = _read_object(path, remedy)
    if not all(isinstance(v, (int, float)) for v in found.values()):
        raise RunError(f"{path}: damaged{remedy}")
    return found


def write_skipped(root: Path, skipped: Sequence[tuple[int | None, str, str]]) -> None:
    """Write index, name and reason of the images that a run skips, in the format of `encode`. Raises OSError."""
    write_text(root / SKIPPED, skipped_text(skipped))


def read_skipped(root: Path) -> list[tuple[int | None, str, str]]:
    """Read the file that `write_skipped` writes. Raises RunError."""
    path = root / SKIPPED
    try:
        if not path.is_file():
            raise ValueError
        lines = path.read_text(encoding="utf-8").splitlines()
        skipped = [(s["index"], s["file"], s["reason"]) for s in map(json.loads, lines)]
        if not all(i is None or type(i) is int for i, _, _ in skipped):
            raise ValueError
        return skipped
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise RunError(f"{path}: damaged; the run cannot know which images it skipped") from e

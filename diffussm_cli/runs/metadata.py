"""The small text files of a run: configuration, state, metrics, skipped images. Errors name the
damaged file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffussm_cli.config import (
    MAX_YAML_BYTES,
    Config,
    check_text,
    config_from_dict,
    parse_yaml,
    read_text,
    to_yaml,
)
from diffussm_cli.data.listing import skipped_text
from diffussm_cli.errors import ConfigError, RunError
from diffussm_cli.machine.files import write_text
from diffussm_cli.runs.layout import CONFIG, DATA, METRICS, SKIPPED, STATE

STATE_HASH = "state_sha256"  # in state.json: the hash of its other values


def read_config(folder: Path, option: str = "RUN") -> Config:
    """Read the configuration of a run; `option` is the option that gave the run.

    Raises RunError.
    """
    path = folder / CONFIG
    try:
        values = _saved_values(read_text(path, option), f"{option}: {path}")
    except ConfigError as e:
        raise RunError(str(e)) from e

    try:
        config = config_from_dict(values, str(path))
        _refuse_guide(config)
        return config
    except ConfigError as e:  # a field: no option changes it, so the line names the file
        line = str(e)
        raise RunError(line if line.startswith(str(path)) else f"{path}: {line}") from e


def _saved_values(text: str, where: str) -> dict[str, Any]:
    try:
        values, problem = parse_yaml(text, where), ""
    except ConfigError as e:
        values, problem = None, f" ({str(e).removeprefix(f'{where}: ')})"
    if not isinstance(values, dict) or not {"model", "data", "train"} <= values.keys():
        remedy = "delete it and repeat the command that made the run, with --preset and --resume"
        raise ConfigError(f"{where} is empty or damaged{problem}; {remedy}")
    return values


def write_config(folder: Path, config: Config) -> None:
    """Write the file that `read_config` reads. Raises OSError."""
    write_text(folder / CONFIG, to_yaml(config))


def check_config(config: Config) -> None:
    """Check, before a run begins, that the configuration that it will write can be read again.
    Raises ConfigError.
    """
    for name in config.data.class_names:
        check_text(name, "data.class_names")
    _refuse_guide(config)

    text = to_yaml(config)
    if len(text.encode()) > MAX_YAML_BYTES:
        n = len(config.data.class_names)
        raise ConfigError(
            f"data.class_names: the names of {n:,} classes make {CONFIG} larger than "
            f"{MAX_YAML_BYTES} bytes, which is the most that is read; use shorter names"
        )

    assert config_from_dict(parse_yaml(text, CONFIG), CONFIG) == config, (
        "what is written is what is read"
    )


def _refuse_guide(config: Config) -> None:
    """Raises ConfigError if a run names another model, which would not be there for others."""
    if config.sample.guide:
        raise ConfigError(
            f"sample.guide: {config.sample.guide!r} is no part of a run; name it where images are "
            "drawn, as by diffussm sample --guide-with"
        )


def write_data(root: Path, facts: Mapping[str, Any]) -> None:
    """Write where the images of a run are (`path`, absolute), their number `images` and the hash of
    their list.

    `content` are hashes of what the list does not show, by name. `checked` is whether all of them
    could be read, or are skipped; `first` are the same facts of the images that the run began with.
    Raises OSError.
    """
    write_text(root / DATA, json.dumps(dict(facts)) + "\n")


def read_data(root: Path) -> dict[str, Any] | None:
    """Read the file that `write_data` writes; None if it is missing, as in runs of earlier
    versions, or damaged.
    """
    try:
        facts = _read_object(root / DATA)
    except RunError:
        return None
    kinds = {"path": str, "images": int, "sha256": str, "checked": bool}
    if not all(type(facts.get(name)) is kind for name, kind in kinds.items()):
        return None

    first = facts.get("first")  # missing in runs of earlier versions
    is_right = isinstance(first, dict) and all(
        type(first.get(name)) is kind for name, kind in kinds.items() if name != "checked"
    )
    return facts if is_right else {name: facts[name] for name in kinds}


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint: step, counts and hashes. Raises RunError, also if it has
    changed since it was written; that of earlier versions has no hash of its own.
    """
    state = _read_object(folder / STATE)
    digest = state.pop(STATE_HASH, None)
    is_changed = digest is not None and digest != _hash_of(state)
    if is_changed or type(state.get("step")) is not int or state["step"] < 0:
        raise RunError(f"{folder / STATE}: damaged")
    return state


def _hash_of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _read_object(path: Path, remedy: str = "") -> dict[str, Any]:
    """Read a small JSON object. Raises RunError."""
    try:
        value = json.loads(read_text(path, "RUN"))
        if isinstance(value, dict):
            return value
    except (ConfigError, ValueError, RecursionError):
        pass
    raise RunError(f"{path}: damaged{remedy}")


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the file that `read_state` reads. Raises OSError."""
    write_text(folder / STATE, json.dumps({**state, STATE_HASH: _hash_of(state)}))


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read the metrics of `best/`; empty if there are none. Raises RunError."""
    path = folder / METRICS
    remedy = f"; delete the folder {folder}"
    if not path.is_file():
        return {}
    metrics = _read_object(path, remedy)
    if not all(isinstance(v, (int, float)) for v in metrics.values()):
        raise RunError(f"{path}: damaged{remedy}")
    return metrics


def write_skipped(root: Path, skipped: Sequence[tuple[int | None, str, str]]) -> None:
    """Write index, name and reason of the images that a run skips, in the format of `encode`.
    Raises OSError.
    """
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

"""Checks what a caller in Python asks for: fields of the configuration, numbers, prompts and
classes.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from diffussm_cli.config import (
    MAX_SEED,
    Config,
    SampleConfig,
    check_whole,
    config_from_dict,
    is_truth_value,
    nearest,
    to_dict,
    whole_number,
)
from diffussm_cli.errors import ConfigError

# what determines how a run draws, beside fields of the section `sample`
OF_DRAWING = ("num", "seed", "classes", "prompts", "negative", "precision")
OF_LOAD = ("device", "precision")  # what a run that is loaded has
# what a parameter must be, if it is more than a name or a path
KINDS = {
    "run": "a run, its name or its path",
    "samples": "a run, or the path of a run or of images, which ds.sample writes",
    "reference": "a path of images or of an .npz, or a Dataset",
}


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration with other values of fields, given by their whole names; checked. Raises
    ConfigError.
    """
    return config_from_dict(to_dict(config), "config", fields=changes, name=config.preset)


def with_fields(config: Config, fields: Mapping[str, Any], section: str) -> Config:
    """A configuration with other fields of a section, checked. Raises ConfigError."""
    return with_changes(config, {f"{section}.{name}": value for name, value in fields.items()})


def split_fields(config: Config, request: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The section `sample` with what a request changes of it, and the rest of the request. Raises
    ConfigError.
    """
    fields = {
        name: value
        for name, value in request.items()
        if hasattr(config.sample, name) and name != "prompts"
    }
    rest = {name: value for name, value in request.items() if name not in fields}
    return with_fields(config, fields, "sample").sample, rest


def checked_fields(fields: Mapping[str, Any] | None, name: str = "set") -> dict[str, Any]:
    """Fields by their whole name. Raises ConfigError, naming the parameter, for anything else."""
    is_mapping = fields is None or isinstance(fields, Mapping)
    if not is_mapping or not all(isinstance(key, str) for key in fields or {}):
        raise ConfigError(
            f"{name}: {fields!r:.80} must be fields by their whole name, such as "
            "{'model.depth': 4}"
        )
    return dict(fields or {})


def check_paths(**paths: Any) -> None:
    """Raises ConfigError, naming the parameter, for a value that is neither text nor a path."""
    for name, value in paths.items():
        if not isinstance(value, str | os.PathLike):
            shown = repr(value) if isinstance(value, int | float) else f"a {type(value).__name__}"
            kind = KINDS.get(name, "a name or a path")
            raise ConfigError(f"{name}: {shown} must be {kind}")


def check_names(request: Mapping[str, Any], function: Callable, hidden: Iterable[str] = ()) -> None:
    """Raises ConfigError for a name of a request that is no parameter of the function that takes
    it, given by name, and no field of the section `sample`, if the function draws images.

    Args:
        hidden: parameters that a caller does not give.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in hidden]
    if "classes" in names:
        names += [field.name for field in dataclasses.fields(SampleConfig)]

    for name in request:
        if name in names:
            continue
        if name in OF_LOAD:
            raise ConfigError(f"{name}: the run has its own; choose it by load(run, {name}=...)")
        raise ConfigError(f"{name}: there is no such parameter{nearest(name, names)}")


def checked_size(resolution: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of images. Raises ConfigError for what is neither that nor one number."""
    sides = [resolution, resolution] if isinstance(resolution, int) else resolution
    if isinstance(sides, str) or not isinstance(sides, Sequence) or len(sides) != 2:
        raise ConfigError(f"resolution: {resolution!r:.80} must be pixels, or (height, width)")
    for side in sides:
        check_whole("resolution", side, least=1)
    return sides[0], sides[1]


def check_numbers(request: Mapping[str, Any]) -> None:
    """Raises ConfigError for a wrong num, batch_size or seed of a request."""
    for name in ("num", "batch_size"):
        check_whole(name, request.get(name, 1), least=1)
    check_whole("seed", request.get("seed", 0), least=0, most=MAX_SEED)


def without_drawing(request: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A request without what determines how a run draws, and a line about what was left out; empty
    if there is nothing.
    """
    fields = [field.name for field in dataclasses.fields(SampleConfig)]
    names = [name for name in request if name in (*OF_DRAWING, *fields)]
    kept = {name: value for name, value in request.items() if name not in names}
    line = f"{', '.join(names)}: not used, because samples are images, not a run" if names else ""
    return kept, line


def unused_seed(seed: int, interpolate: Sequence[int] | None) -> str:
    """A line about a seed, other than by default, that nothing uses; empty if there is none."""
    return f"not used: seed={seed} (interpolate names the seeds)" if interpolate and seed else ""


def checked_prompts(prompts: Sequence[str], negative: str | None) -> list[str]:
    """The prompts as a list. Raises ConfigError for one text in place of a list, whose letters
    would be taken in turn, and for what is no text.
    """
    is_list = isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes | Mapping)
    texts = list(prompts) if is_list else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"prompts: {prompts!r:.80} must be a list of texts, such as ['red heart']"
        )
    if negative is not None and not isinstance(negative, str):
        raise ConfigError(f"negative: {negative!r:.80} must be one text")
    return texts


def check_labels(classes: Sequence[int | str], config: Config) -> list[int]:
    """Labels, or names of classes, as whole numbers. Raises ConfigError for those that the model
    does not have.
    """
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise ConfigError(
            f"classes: {classes!r:.80} must be a list of labels or class names, such as [0]"
        )

    n, names = config.model.num_classes, config.data.class_names
    labels = []
    for value in classes:
        is_name = isinstance(value, str) and value in names
        number = None if is_truth_value(value) else whole_number(value)
        label = names.index(value) if is_name else number
        if label is None or not 0 <= label < n:
            has = f"0 to {n - 1}" if n else "none, as it was trained without classes"
            near = nearest(value, names) if names and isinstance(value, str) else ""
            raise ConfigError(
                f"classes: {value!r:.80} is not a class of this model; it has {has}{near}"
            )
        labels.append(label)
    return labels

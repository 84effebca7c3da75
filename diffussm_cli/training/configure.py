"""The configuration of a run, from what a user names: a preset, data, fields, a run to continue."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from diffussm_cli import runs
from diffussm_cli.config import DEFAULT_PRESET, HUB, Config, first_reading, load_config, set_fields
from diffussm_cli.data.fitting import fit_to_data
from diffussm_cli.data.listing import Listing
from diffussm_cli.data.listing.hub import fetch_shards
from diffussm_cli.errors import DataError


class Request(NamedTuple):
    """What `session.train` takes, and lines about what was read from the data."""

    config: Config
    out: Path | None
    lines: list[str]
    listing: Listing | None = None  # of the images, if their size and classes were read


def configure(
    preset: str | None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    fields: Mapping[str, Any] = {},
    *,
    continues: bool = False,
    dataset: Dataset | None = None,
) -> Request:
    """The configuration of a run.

    Args:
        preset: a name or a YAML file, whose values stay. None: the default preset; if the user
            names data, its size, channels, classes and guidance are read from them.
        out: the run folder, if it is named.
        overrides, fields: as in `load_config`.
        continues: whether a run that has begun in `out`, or else the newest run of the preset,
            keeps the values that it began with.
        dataset: the data as an object.

    Raises:
        DiffussmError: for a wrong value, for data that are missing or damaged, and for a damaged
            run.
    """
    if continues:
        option = "--out" if out else "--resume"
        out = out or runs.newest_run(runs.RUNS, preset or DEFAULT_PRESET)
        if out is not None:
            fields = {**fields, **_pinned_before(out, fields)}
        saved = runs.resumed_config(out, overrides, fields, option) if out else None
        if saved is not None:
            return Request(saved, out, [])

    named = set_fields(overrides, fields) | ({"data.path"} if dataset is not None else set())
    config = first_reading(preset, named, overrides, fields)
    if config.data.path.startswith(HUB):
        fields = {**fields, "data.path": _pinned(config.data.path)}
        config = first_reading(preset, named, overrides, fields)
    is_own = preset is None and "data.path" in named
    fitted = fit_to_data(config, named, is_own, dataset)
    config = load_config(preset or DEFAULT_PRESET, overrides, {**fields, **fitted.fields})
    return Request(config, out, fitted.lines, fitted.listing)


def _pinned(path: str) -> str:
    """The name of a data set of the hub with its revision. Raises DataError."""
    try:
        return fetch_shards(path).name
    except DataError as e:
        raise DataError(f"data.path: {e}") from e


def _pinned_before(out: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The data set of a run that continues, at the revision that the run began with, if the user
    names the set without a revision.
    """
    path = str(fields.get("data.path", ""))
    before = runs.read_data(out) if path.startswith(HUB) else None
    is_same = before is not None and str(before["path"]).startswith(f"{path}@")
    return {"data.path": before["path"]} if before is not None and is_same else {}

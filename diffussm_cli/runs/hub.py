"""Runs that are not folders of the user: models that come with the package, and models on the Hugging Face hub."""

import os
import re
from pathlib import Path

from diffussm_cli.config import BUNDLED, bundled_names
from diffussm_cli.data.vae import origin, quiet
from diffussm_cli.errors import RunError, reason
from diffussm_cli.runs.layout import FILES_TO_SAMPLE, RUNS

NAME = re.compile(r"(\w[\w.-]*)/(\w[\w.-]*)(?:@(\w[\w./-]*))?")  # OWNER/NAME or OWNER/NAME@REVISION
NOT_NAMES = (".npz", ".pt")


def is_elsewhere(path: Path | str) -> bool:
    """Whether a path that does not exist is the name of a model of the package or on the hub.

    It is not OWNER/NAME if OWNER is a folder here: then NAME was mistyped.
    """
    name = Path(path).as_posix()
    if os.path.exists(path) or name.endswith(NOT_NAMES):  # unlike Path.exists, False for a name that is too long
        return False
    found = NAME.fullmatch(name)
    return name in bundled_names() or (found is not None and found[1] != str(RUNS) and not os.path.exists(found[1]))


def locate(name: str) -> tuple[Path, Path]:
    """The folder of a model that `is_elsewhere`, and the run folder, in runs/, to which its images go.

    Raises:
        RunError: if it is neither in the hub's cache nor can be fetched.
    """
    if name in bundled_names():
        return BUNDLED / name, RUNS / f"{name}-bundled"
    return fetch(name), RUNS / name.replace("/", "--")


def fetch(name: str, cache: Path | None = None) -> Path:
    """Fetch weights and configuration of OWNER/NAME or OWNER/NAME@REVISION into the hub's cache. Raises RunError."""
    import huggingface_hub as hub

    found = NAME.fullmatch(name)
    assert found is not None, "checked by is_elsewhere"
    try:
        with quiet():
            repository = f"{found[1]}/{found[2]}"
            place = hub.snapshot_download(
                repository, revision=found[3], cache_dir=cache, allow_patterns=FILES_TO_SAMPLE
            )
            return Path(place)
    except Exception as e:  # the hub's client raises errors of several HTTP libraries
        raise RunError(
            f"RUN: there is no folder {name!r}, and it cannot be fetched from the hub: check its name and the network, "
            f"or download it and give the folder ({reason(origin(e))})"
        ) from e

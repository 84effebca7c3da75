"""Runs that are not folders of the user: models that come with the package, and models on the
Hugging Face hub.
"""

import os
from pathlib import Path

from diffussm_cli.config import BUNDLED, RUNS, bundled_names
from diffussm_cli.machine.hub import AT_REVISION, fetch
from diffussm_cli.runs.layout import FILES_TO_SAMPLE

NOT_NAMES = (".npz", ".pt")


def is_elsewhere(path: Path | str) -> bool:
    """Whether a path that does not exist is the name of a model of the package or on the hub.

    It is not OWNER/NAME if OWNER is a folder here: then NAME was mistyped.
    """
    name = Path(path).as_posix()
    # unlike Path.exists, False for a name that is too long
    if os.path.exists(path) or name.endswith(NOT_NAMES):
        return False
    if name in bundled_names():
        return True
    owner = name.partition("/")[0]
    return (
        AT_REVISION.fullmatch(name) is not None and owner != str(RUNS) and not os.path.exists(owner)
    )


def locate(name: str) -> tuple[Path, Path]:
    """The folder of a model that `is_elsewhere`, and the run folder, in runs/, to which its images
    go.

    Raises:
        RunError: if it is neither in the hub's cache nor can be fetched.
    """
    if name in bundled_names():
        return BUNDLED / name, RUNS / f"{name}-bundled"
    return fetch(name, "RUN", FILES_TO_SAMPLE), RUNS / name.replace("/", "--")

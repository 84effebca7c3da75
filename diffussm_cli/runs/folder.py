"""Which folder a run is in, what it may hold when a run begins, and who writes to it."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffussm_cli.config import RUNS, Config, config_from_dict, to_dict
from diffussm_cli.errors import RunError
from diffussm_cli.machine.files import content, held_folder
from diffussm_cli.runs.layout import BEFORE_CHECKPOINTS, BEST, CONFIG, FINAL, list_checkpoints
from diffussm_cli.runs.metadata import read_config

MOST = 10_000  # runs of a preset in runs/


def resumed_config(
    root: Path,
    overrides: Iterable[str] = (),
    fields: Mapping[str, Any] | None = None,
    option: str = "--out",
) -> Config | None:
    """The configuration of the run in `root` with changes, or None if no run has begun there.

    Args:
        overrides, fields: as in `load_config`.
        option: what named the folder, for errors.

    Raises:
        RunError, ConfigError: if the configuration is missing, damaged or does not fit the changes.
    """
    if (root / CONFIG).exists():
        saved = read_config(root, option)
        return config_from_dict(to_dict(saved), str(root), overrides, fields)
    if list_checkpoints(root):
        raise RunError(
            f"{option}: {str(root)!r} has checkpoints but no {CONFIG}; "
            "give the --preset and --set that the run was made with"
        )
    return None


@contextlib.contextmanager
def run_folder(root: Path | None, config: Config, resume: bool) -> Iterator[Path]:
    """Lock the folder to train in: `root`, or the first of runs/PRESET, runs/PRESET-2, ... that is
    free.

    Raises:
        RunError: if a run cannot begin there or, with `resume`, cannot continue there.
    """
    if root is not None:
        _check_run_folder(root, resume)
        with locked_folder(root):
            yield root
        return

    for i in range(1, MOST):
        folder = RUNS / (config.preset if i == 1 else f"{config.preset}-{i}")
        if folder.exists() and not (folder.is_dir() and not content(folder)):
            continue
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked_folder(folder))
            except RunError:
                if not folder.exists():  # runs/ cannot be written
                    raise
                continue  # another run has begun there
            if not content(folder):
                yield folder
                return
    raise RunError(f"--out: {RUNS}/ holds {MOST - 1} runs of {config.preset}; choose a folder")


def _check_run_folder(root: Path, resume: bool) -> None:
    """Raises RunError if a run cannot begin in a folder or, with `resume`, cannot continue
    there.
    """
    if root.exists() and not root.is_dir():
        raise RunError(f"--out: {str(root)!r} is a file; choose a folder")

    names = content(root) if root.exists() else set()
    has_begun = bool(list_checkpoints(root) or names & {FINAL, BEST})
    is_foreign = bool(names - BEFORE_CHECKPOINTS)
    if is_foreign and not has_begun and CONFIG not in names:
        raise RunError(f"--out: {str(root)!r} is not empty and holds no run; choose another folder")
    if not resume and (has_begun or is_foreign):
        raise RunError(
            f"--out: {str(root)!r} is not empty; add --resume to continue it, or choose another "
            "folder"
        )


@contextlib.contextmanager
def locked_folder(root: Path, rank: int = 0) -> Iterator[None]:
    """Lock a run folder so that no other job writes to it, and create it if needed.

    Raises RunError.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held_folder(root, rank))
        except BlockingIOError as e:
            raise RunError(
                f"--out: another process is training in {str(root)!r}; "
                "wait for it, or stop it first"
            ) from e
        except OSError as e:
            raise RunError(
                f"--out: cannot write to {str(root)!r}: {e.strerror}; choose another --out"
            ) from e

        yield

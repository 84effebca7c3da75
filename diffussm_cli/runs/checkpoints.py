"""Write folders of weights atomically, and find damage in them."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffussm_cli.errors import DiffussmError, RunError
from diffussm_cli.machine.files import PARTIAL, sha256, sync
from diffussm_cli.runs.layout import (
    EMA,
    FINAL,
    MODEL,
    OPTIMIZER,
    STATE,
    is_named_by_step,
    list_checkpoints,
    step_of,
)
from diffussm_cli.runs.metadata import read_config, read_state


def has_final(root: Path, step: int) -> bool:
    """Whether `final/` is complete, undamaged and from this step."""
    try:
        read_config(root / FINAL)
        return (
            damage(root / FINAL, [MODEL], others=True) is None
            and read_state(root / FINAL)["step"] == step
        )
    except RunError:
        return False


def newest_good(
    root: Path, files: Sequence[str] | None = None, after: int = -1
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run, of those after a step, whose `files` (default: all that it
    holds) are undamaged, and what is wrong with newer ones.
    """
    damaged: list[str] = []
    candidates = [path for path in list_checkpoints(root) if step_of(path) > after]
    for path in reversed(candidates):
        wrong = damage(path, files or (MODEL, EMA, OPTIMIZER), others=files is None)
        if wrong is None:
            return path, damaged
        damaged.append(wrong)
    return None, damaged


def damage(checkpoint: Path, files: Sequence[str], others: bool = False) -> str | None:
    """A description of what is wrong with the state and with `files`, and if `others`, with all
    other files that it has hashes of; or None.
    """
    try:
        state = read_state(checkpoint)
        if is_named_by_step(checkpoint) and state["step"] != step_of(checkpoint):
            return f"{checkpoint / STATE} is of step {state['step']}"

        hashes = state["sha256"]
        names = dict.fromkeys((*files, *(hashes if others else ())))
        for name in names:
            if Path(name).name != name:
                return f"{checkpoint / STATE} names {name!r}, which is no file beside it"
            if sha256(checkpoint / name) != hashes[name]:
                return f"{checkpoint / name} has changed since it was written"
    except RunError as e:
        return str(e)
    except OSError as e:
        return f"{e.filename}: {e.strerror}"
    except (KeyError, TypeError, ValueError):  # the last one for a name that no file can have
        return f"{checkpoint / STATE} holds no hashes"

    return None


# ------------------------------------------------------------------------------------------ writing
def remove(path: Path) -> None:
    """Remove a folder, a file or a link, but never the target of a link. What cannot be removed
    stays.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Write a folder atomically: it appears under its name complete and on disk, or not at all.

    Raises:
        RunError: if the folder cannot be written; an older folder of this name is kept.
    """
    temporary = path.with_name(f"{PARTIAL}{path.name}")
    replaced = path.with_name(f"{PARTIAL}{path.name}.old")
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        yield temporary

        # All of it on disk before it gets its name.
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)

        # An older folder of this name is moved away and removed last.
        if os.path.lexists(path):
            remove(replaced)
            path.rename(replaced)
        temporary.rename(path)
        sync(path.parent)
        remove(replaced)
    except DiffussmError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise RunError(
            f"{path}: cannot be written: {e.strerror or e}; what was saved before is intact"
        ) from e

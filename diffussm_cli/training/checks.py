"""What stops a training before its first step."""

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path

from diffussm_cli import runs
from diffussm_cli.config import Config
from diffussm_cli.data.listing import Listing
from diffussm_cli.errors import ConfigError, DiffussmError
from diffussm_cli.events import Event, Message
from diffussm_cli.machine.device import pick_device
from diffussm_cli.machine.processes import ALONE, World, read_world
from diffussm_cli.training.data import compare_data, completed, list_images
from diffussm_cli.training.resuming import compare_config


def check_batch(config: Config, world: World) -> None:
    """Raises ConfigError if the processes cannot share the batch equally."""
    t = config.train
    if t.batch_size % (world.size * t.accumulate):
        raise ConfigError(
            f"train.batch_size: {t.batch_size} cannot be shared by {world.size} processes in "
            f"{t.accumulate} part(s) each; take a multiple of {world.size * t.accumulate}"
        )


def check(
    config: Config,
    out: Path | str | None = None,
    resume: bool = False,
    listing: Listing | None = None,
) -> Generator[Event, None, list[DiffussmError]]:
    """What would stop `train` before its first step, without decoding an image or writing a file.

    Yields:
        the events of `train` about the data, and how many images there are.

    Returns:
        The errors that `train` would raise. Of those of the data, the first one.
    """
    world = read_world()
    root = Path(out) if out else None
    if resume and root is None:
        root = runs.newest_run(runs.RUNS, config.preset)

    # The folder, the batch and the device.
    problems: list[DiffussmError] = []
    with _collected(problems):
        if root is not None:
            runs.check_run_folder(root, resume)
    with _collected(problems):
        check_batch(config, world)
    with _collected(problems):
        pick_device(config.train.device)

    # The data, and what a run that continues may not change.
    with _collected(problems):
        source = yield from list_images(root, config, world, listing=listing)
        config = completed(config, source)
        classes = config.model.num_classes
        of_classes = f" of {classes:,} classes" if classes else ""
        yield Message(f"data: {config.data.path}, {len(source):,} images{of_classes}")
        if root is not None and resume and (newest := runs.list_checkpoints(root)):
            facts = yield from compare_data(source, config, root, runs.read_data(root))
            yield from compare_config(config, root, newest[-1], ALONE, facts)

    # The weights that it begins with.
    with _collected(problems):
        begins = root is None or not (resume and runs.list_checkpoints(root))
        if config.train.init and begins:
            yield Message(runs.initial_weights(config).line)
    return problems


@contextlib.contextmanager
def _collected(problems: list[DiffussmError]) -> Iterator[None]:
    try:
        yield
    except DiffussmError as e:
        problems.append(e)

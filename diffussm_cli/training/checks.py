"""What a training needs before its model is built, and what stops it there."""

from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from diffussm_cli import runs
from diffussm_cli.config import Config, unused_fields
from diffussm_cli.data.listing import Listing
from diffussm_cli.data.source import Source
from diffussm_cli.errors import ConfigError
from diffussm_cli.events import Event, Message, Stage, Warned
from diffussm_cli.machine.device import pick_device, pick_dtype
from diffussm_cli.machine.processes import ALONE, World, gather, read_world
from diffussm_cli.training.between import Between, open_between
from diffussm_cli.training.checkpoint import agree_on_checkpoint
from diffussm_cli.training.data import (
    Skipped,
    compare_data,
    completed,
    leave_out_unreadable,
    list_images,
)
from diffussm_cli.training.record import find_tracker
from diffussm_cli.training.resuming import compare_config


class Opened(NamedTuple):
    """What a run needs besides a model.

    Attributes:
        config: with what is found in the data.
        checkpoint: where it continues.
        facts: of its images, for RUN/data.json.
        skipped: images that cannot be read, if RUN is to record them anew.
        initial: weights of another model that it begins with.
        between: what is done between its steps.
    """

    config: Config
    source: Source
    checkpoint: Path | None
    facts: dict[str, Any]
    skipped: list[Skipped] | None
    initial: runs.InitialWeights | None
    between: Between


def named_folder(config: Config, out: Path | str | None, resume: bool) -> Path | None:
    """The folder of a run, if a user names it, or continues the newest run of a preset."""
    if resume and not out:
        return runs.newest_run(runs.RUNS, config.preset)
    return Path(out) if out else None


def check_job(config: Config, world: World) -> None:
    """Raises ConfigError if the processes cannot share the batch equally, the device or the
    precision is not available, or the package of `train.logger` is missing.
    """
    t = config.train
    if t.batch_size % (world.size * t.accumulate):
        raise ConfigError(
            f"train.batch_size: {t.batch_size} cannot be shared by {world.size} processes in "
            f"{t.accumulate} part(s) each; take a multiple of {world.size * t.accumulate}"
        )
    pick_dtype(t.precision, pick_device(t.device))
    find_tracker(t.logger)


def open_run(
    root: Path,
    config: Config,
    resume: bool,
    world: World,
    dataset: Dataset | None = None,
    listing: Listing | None = None,
) -> Generator[Event, None, Opened]:
    """Open and check everything that a run needs besides a model; writes nothing.

    Raises:
        DiffussmError: for anything that a user can fix.
    """
    # The images.
    source = yield from list_images(root, config, dataset, listing)

    # Where the run stands, and whether its images are still the same.
    yield Stage("looking for checkpoints")
    checkpoint, damaged = agree_on_checkpoint(root, world)
    remedy = "its folder is removed when the next checkpoint is written"
    yield from (Message(f"skipped: {line}; {remedy}") for line in damaged)
    if resume and checkpoint is None:
        yield Message(f"no checkpoint in {root} yet; training begins")
    before = gather(runs.read_data(root) if checkpoint is not None else None, world)[0]
    facts = yield from compare_data(source, config, root, before)
    config = completed(config, source)
    yield from compare_config(config, root, checkpoint, world, facts)
    is_unchecked = checkpoint is None or not facts["checked"]
    skipped = yield from leave_out_unreadable(source, config, root, world, fresh=is_unchecked)

    # The weights that it begins with, and what is done between steps.
    yield Stage("loading")
    initial = None
    if config.train.init and checkpoint is None:
        initial = runs.initial_weights(config)
        yield Message(initial.line)
    device = pick_device(config.train.device)
    between = open_between(config, source, root, device, world)
    return Opened(config, source, checkpoint, facts, skipped, initial, between)


def check(
    config: Config,
    out: Path | str | None = None,
    resume: bool = False,
    listing: Listing | None = None,
) -> Generator[Event, None, None]:
    """Do all that `train` does before its first step, but for the model, and leave no file behind.

    It is done in this process, also for a job of several.

    Yields:
        the events of `train`, and how many images there are.

    Raises:
        DiffussmError: the one that `train` would raise.
    """
    world = read_world()
    with runs.run_folder(named_folder(config, out, resume), config, resume) as root:
        check_job(config, world)
        if line := unused_fields(config, world.size):
            yield Warned(line)
        opened = yield from open_run(root, config, resume, ALONE, listing=listing)

        # What the data are.
        d, classes = opened.config.data, opened.config.model.num_classes
        of_classes = f" of {classes:,} classes" if classes else ""
        yield Message(f"data: {d.path}, {len(opened.source):,} images{of_classes}")
        if opened.skipped:
            yield Message(f"skipped: {len(opened.skipped)} images that cannot be read")
        yield from map(Warned, opened.between.warnings)

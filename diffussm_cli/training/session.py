"""A training run from beginning to end: its folder, its configuration, resuming, and the loop.

`diffussm train` shows the events of `train`. A notebook may call `train` too, and gets the same run
folder.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from diffussm_cli import runs
from diffussm_cli.config import PYTHON, Config, unused_fields
from diffussm_cli.data.listing import Listing
from diffussm_cli.errors import RunError, reason
from diffussm_cli.events import Event, FirstStep, Message, Stage, TrainingRecord, Warned
from diffussm_cli.machine.device import facts_of_program, keep_freed_memory
from diffussm_cli.machine.processes import (
    World,
    any_of,
    gather,
    process_group,
    read_world,
)
from diffussm_cli.runs.report import write_report
from diffussm_cli.training.checks import Opened, check_job, named_folder, open_run
from diffussm_cli.training.data import remedies
from diffussm_cli.training.loop import Trainer, due
from diffussm_cli.training.record import RecordWriter, open_tracker, quiet_threads

COMPILING = (
    "compiling: the first step takes a minute or more and shows no progress "
    "(a block of XL: 44 s of a CPU core)"
)


@dataclass(frozen=True)
class TrainingResult:
    """Where training ended; `step` is less than `steps` if a stop was requested."""

    root: Path
    step: int
    steps: int
    was_finished: bool = False  # before this call
    processes: int = 1
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)  # by kind of work

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps


def train(
    config: Config,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    dataset: Dataset | None = None,
    listing: Listing | None = None,
    stop: Callable[[], bool] = lambda: False,
    operations: Callable[[Config], float] | None = None,
) -> Generator[Event, None, TrainingResult]:
    """Train a model and write a self-describing run folder; under torchrun, in all processes.

    Args:
        config: the configuration; of a run that continues, see `runs.resumed_config`. Of several
            processes, that of the first one counts.
        out: the run folder; by default the first free one of runs/PRESET, runs/PRESET-2, ...
        resume: continue the run in `out`, or the newest run of the preset, from its newest
            undamaged checkpoint. A run without checkpoints starts from the beginning; a finished
            run is not changed.
        dataset: data as an object, in place of those at `data.path`; `DatasetSource` says what it
            may hold.
        listing: of the images at `data.path`, if `configure` has listed them.
        stop: called before the first step and after every step; if it returns true, a checkpoint of
            the steps so far is written and training ends.
        operations: counts the operations per image of a training step, for `mfu` in the log.

    Yields:
        events, a TrainingRecord every `train.log_every` steps.

    Returns:
        Where training ended.

    Raises:
        DiffussmError: for anything that a user can fix; before the model is built where possible.
    """
    world = read_world()
    if dataset is not None:
        path = f"{PYTHON}{type(dataset).__name__}"
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))

    with contextlib.ExitStack() as stack:
        # Only rank 0 looks for a folder: on network file systems the others may see stale contents.
        root = None
        if world.rank == 0:
            root = named_folder(config, out, resume)
            root = stack.enter_context(runs.run_folder(root, config, resume))
        stack.enter_context(process_group(world, cuda=world.size > 1 and torch.cuda.is_available()))
        root, config = gather((root, config), world)[0]
        if world.rank:
            stack.enter_context(runs.locked_folder(root, world.rank))

        check_job(config, world)  # before images are read
        images = dataset, listing
        return (yield from _train_in(root, config, resume, world, images, stop, operations))


def _train_in(
    root: Path,
    config: Config,
    resume: bool,
    world: World,
    images: tuple[Dataset | None, Listing | None],
    stop: Callable[[], bool],
    operations: Callable[[Config], float] | None,
) -> Generator[Event, None, TrainingResult]:
    is_first = world.rank == 0

    # What it needs besides a model.
    if line := unused_fields(config, world.size):
        yield Warned(line)
    opened = yield from open_run(root, config, resume, world, *images)
    config, source, facts = opened.config, opened.source, opened.facts

    # The model.
    trainer = _prepare(opened, root, world)
    if opened.skipped:
        yield Message(
            f"skipped: {len(opened.skipped)} images that cannot be read; "
            f"reasons in {root / runs.SKIPPED}"
        )
    trainer.operations = operations(config) if operations and trainer.peak else 0.0

    # A run that is finished already.
    first = trainer.step.number
    steps = config.train.steps
    is_complete = first >= steps and is_first and runs.has_final(root, first)
    if gather(is_complete, world)[0]:
        yield Message(f"{root} is at step {first} and train.steps is {steps}; nothing to do")
        return TrainingResult(root, first, steps, was_finished=True, processes=world.size)

    yield Message(f"{root}  {trainer.summary()}")
    if config.train.compile:
        yield Message(COMPILING)

    # The steps.
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_threads())
        writer = None
        if is_first:
            writer = RecordWriter(root, first, open_tracker(config, root))
            stack.enter_context(contextlib.closing(writer))
        yield from map(Warned, opened.between.warnings + (writer.warnings if writer else []))
        yield Stage("training")
        if not any_of(stop(), world):
            stack.enter_context(remedies(source, root, facts, world))
            yield from _steps(trainer, writer, stop, facts)
    spent = trainer.seconds()
    return TrainingResult(root, trainer.step.number, steps, processes=world.size, seconds=spent)


def _steps(
    trainer: Trainer,
    writer: RecordWriter | None,
    stop: Callable[[], bool],
    facts: Mapping[str, Any],
) -> Generator[Event, None, None]:
    """Run the loop. The first process, which has the writer, writes the log and the report."""
    config = trainer.config
    first = trainer.step.number
    measured = config.eval.every, config.eval.held_out_every
    news: dict[str, Any] = {}  # in the first record of the log
    if writer:
        data = {"data_sha256": facts["sha256"]}
        news = {"session": {**trainer.facts(), **data, **facts_of_program()}}
        trainer.after_preview = functools.partial(_renew_report, trainer)

    skipped = 0
    for record in trainer.run(stop, announce=not config.train.compile):
        if not record:
            yield FirstStep(config.train.steps, first)
            continue
        if writer:
            writer.write(record | news | {"seconds": trainer.seconds()})
            news = {}
            if any(due(trainer.step.number, every) for every in measured):
                _renew_report(trainer)
        skipped += len(record.get("left_out", ()))
        yield TrainingRecord(record, config.train.steps, first)
        yield from _notes(trainer)

    if writer:
        writer.end(trainer.seconds())
        _renew_report(trainer)
    yield from _notes(trainer)
    if skipped:
        yield Warned(
            f"{skipped} of {trainer.step.number - first} steps were left out, because their loss "
            f"or gradient was not finite; {runs.LOG} names them"
        )


def _notes(trainer: Trainer) -> Iterator[Warned]:
    """What the trainer noted since the last call."""
    yield from map(Warned, trainer.notes)
    trainer.notes.clear()


def _renew_report(trainer: Trainer) -> None:
    """Write the report of a run; before that, its configuration, if somebody has removed it. A
    failure is a note, and does not end the training.
    """
    root = trainer.root
    try:
        if not (root / runs.CONFIG).exists():
            runs.write_config(root, trainer.config)
        write_report(root)
    except (OSError, RunError) as e:
        trainer.notes.append(f"{root / runs.REPORT} cannot be written: {reason(e)}")


def _prepare(opened: Opened, root: Path, world: World) -> Trainer:
    """Create a Trainer that is ready to run, and write what it trains with to `root`.

    Raises:
        DiffussmError: for a checkpoint that does not fit, or a folder that cannot be written.
    """
    keep_freed_memory()
    config = opened.config
    trainer = Trainer(config, opened.source, root, world, opened.initial, opened.between)
    if opened.checkpoint is not None:
        trainer.step.load(opened.checkpoint)
    if world.rank:
        return trainer

    # The folder: without the snapshots of steps that are made again, with what the run is.
    for snapshot in runs.list_snapshots(root):
        if runs.step_of(snapshot) > trainer.step.number:
            runs.remove(snapshot)
    try:
        runs.write_config(root, config)
        if opened.skipped is not None:
            runs.write_skipped(root, opened.skipped)
        runs.write_data(root, {**opened.facts, "checked": True})
    except OSError as e:
        raise RunError(f"--out: cannot write to {str(root)!r}: {e.strerror}") from e
    return trainer

"""A training run from beginning to end: its folder, its lock, its configuration, resuming, and the loop.

`diffussm train` shows the events of `train`. A notebook may call `train` too, and gets the same run folder.
"""

import contextlib
import dataclasses
import datetime
import functools
import os
import shlex
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from diffussm_cli import runs
from diffussm_cli.config import BUILTIN, DEFAULT_PRESET, Config, config_from_dict, load_config, to_dict
from diffussm_cli.data.datasets import PYTHON
from diffussm_cli.data.latents.manifest import MANIFEST
from diffussm_cli.data.latents.reading import LatentStore, fit_to_store
from diffussm_cli.data.listing import UNREADABLE
from diffussm_cli.data.source import ImageFolder, Part, Source, open_source, text_hash, vae_hash
from diffussm_cli.data.vae import full_name
from diffussm_cli.errors import ConfigError, DataError, RunError
from diffussm_cli.evaluation import extractors
from diffussm_cli.events import Event, Message, Progress, Stage, TrainingRecord, Warned
from diffussm_cli.machine.device import facts_of_machine, keep_freed_memory
from diffussm_cli.machine.files import content, held_folder, sha256
from diffussm_cli.machine.processes import World, first_works, gather, process_group, read_world
from diffussm_cli.model import count_parameters
from diffussm_cli.runs.report import write_report
from diffussm_cli.training.checkpoint import agree_on_checkpoint
from diffussm_cli.training.loop import Trainer
from diffussm_cli.training.record import RecordWriter, open_tracker
from diffussm_cli.training.stopping import TRAINING

NAMED = 5  # number of unreadable images that an error lists
COMPILING = "compiling: the first step takes minutes and shows no progress (mnist on two CPU cores: about four)"


@dataclass(frozen=True)
class TrainingResult:
    """Where training ended; `step` is less than `steps` if a stop was requested."""

    root: Path
    step: int
    steps: int
    was_finished: bool = False  # before this call
    processes: int = 1

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps


def train(
    config: Config | None = None,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    fields: Mapping[str, Any] | None = None,
    dataset: Dataset | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[Event, None, TrainingResult]:
    """Train a model and write a self-describing run folder. Under torchrun, train on all its processes.

    Args:
        config: the configuration. Without it, `preset` is loaded with `overrides` and `fields` (see `load_config`);
            with `resume` and no preset, the run's own configuration is used.
        out: the run folder; by default the first free one of runs/PRESET, runs/PRESET-2, ...
        resume: continue the run in `out`, or the newest run of the preset, from its newest undamaged checkpoint. A run
            without checkpoints starts from the beginning; a finished run is not changed.
        dataset: data as an object, in place of those at `data.path`; `DatasetSource` says what it may hold.
        stop: called after every step; if it returns true, a checkpoint is written and training ends.

    Yields:
        events, a TrainingRecord every `train.log_every` steps.

    Returns:
        Where training ended.

    Raises:
        DiffussmError: for anything that a user can fix; before the model is built where possible.
    """
    world, chosen, line = read_world(), None, ""
    with contextlib.ExitStack() as stack:
        # The first process chooses: the others may see a stale run folder.
        if world.rank == 0:
            as_it_is = config is not None
            found, config = choose(config, Path(out) if out else None, resume, preset, list(overrides), fields)
            if dataset is not None:
                path = f"{PYTHON}{type(dataset).__name__}"
                config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
            elif not as_it_is:
                named = {override.partition("=")[0].strip() for override in overrides}
                config, line = fit_to_store(config, named | set(fields or ()))
            chosen = stack.enter_context(run_folder(found, config, resume)), config
        stack.enter_context(process_group(world, cuda=world.size > 1 and torch.cuda.is_available()))
        root, config = gather(chosen, world)[0]
        if world.rank:
            stack.enter_context(held_alone(root, world.rank))
        check_batch(config, world)

        # The run itself.
        if line:
            yield Message(line)
        return (yield from _train_in(root, config, resume, world, dataset, stop))


def _train_in(
    root: Path, config: Config, resume: bool, world: World, dataset: Dataset | None, stop: Callable[[], bool]
) -> Generator[Event, None, TrainingResult]:
    yield Stage("listing")
    source = open_data(root, config, dataset)
    if source.left_out:
        yield Message(source.left_out)
    warning = getattr(source.whole if isinstance(source, Part) else source, "warning", "")
    if warning:
        yield Warned(warning)
    with contextlib.ExitStack() as stack:
        yield Stage("looking for checkpoints")
        checkpoint, damaged = agree_on_checkpoint(root, world)
        yield from (Message(f"skipped: {line}") for line in damaged)
        if resume and checkpoint is None:
            yield Message(f"no checkpoint in {root} yet; training begins")
        before = gather(runs.read_data(root) if checkpoint is not None else None, world)[0]
        data = yield from compare_data(source, config, root, before)
        yield from leave_out_unreadable(source, config, root, world, fresh=checkpoint is None or not data["checked"])
        yield Stage("loading")
        trainer = yield from _prepare(config, source, root, checkpoint, world, data)
        steps = config.train.steps
        complete = trainer.step.number >= steps and world.rank == 0 and runs.has_final(root, trainer.step.number)
        if gather(complete, world)[0]:
            yield Message(f"{root} is at step {trainer.step.number} and train.steps is {steps}; nothing to do")
            return TrainingResult(root, trainer.step.number, steps, was_finished=True, processes=world.size)
        yield Message(f"{root}  {trainer.summary()}")
        if config.train.compile:
            yield Message(COMPILING)
        stack.enter_context(_quiet_threads())
        writer = None
        if world.rank == 0:
            writer = RecordWriter(root, trainer.step.number, open_tracker(config, root))
            stack.enter_context(contextlib.closing(writer))
        yield from map(Warned, trainer.warnings + (writer.warnings if writer else []))
        yield TRAINING
        begun = {"session": facts_of(trainer)}  # in the first record of the log
        left_out, first = 0, trainer.step.number
        if writer:
            trainer.after_preview = functools.partial(renew_report, root, trainer.config)
        with _ways_on(source, root, data, world):
            for record in trainer.run(stop):
                if writer:
                    writer.write(record | begun)
                    begun = {}
                    if config.eval.every and trainer.step.number % config.eval.every == 0:
                        renew_report(root, trainer.config)
                left_out += len(record.get("left_out", ()))
                yield TrainingRecord(record, steps)
        if writer:
            renew_report(root, trainer.config)
        if left_out:
            yield Warned(
                f"{left_out} of {trainer.step.number - first} steps were left out, because their loss or gradient "
                f"was not finite; {runs.LOG} names them"
            )
    return TrainingResult(root, trainer.step.number, steps, processes=world.size)


# ------------------------------------------------------------------------------------------------- what and where
def choose(
    config: Config | None,
    out: Path | None,
    resume: bool = False,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    fields: Mapping[str, Any] | None = None,
) -> tuple[Path | None, Config]:
    """The requested run folder, if any, and the configuration. Raises ConfigError, RunError."""
    root = out
    if resume and root is None:
        root = runs.newest_run(runs.RUNS, config.preset if config else Path(preset or DEFAULT_PRESET).stem)
    if config is None and resume and root is not None and preset is None:
        config = _saved_config(root, "--out" if out else "--resume", overrides, fields)
    config = config or load_config(preset or DEFAULT_PRESET, overrides, fields)
    check_extractor_is_named(config, overrides)
    return root, config


def _saved_config(root: Path, option: str, overrides: Sequence[str], fields: Mapping[str, Any] | None) -> Config | None:
    """The configuration of a run with changes, or None if the run has not begun. Raises RunError, ConfigError."""
    if (root / runs.CONFIG).exists():
        return config_from_dict(to_dict(runs.read_config(root, option)), str(root), overrides, fields)
    if runs.list_checkpoints(root):
        raise RunError(
            f"{option}: {str(root)!r} has checkpoints but no {runs.CONFIG}; "
            "give the --preset and --set that the run was made with"
        )
    return None


def check_extractor_is_named(config: Config, overrides: Sequence[str]) -> None:
    """Raises ConfigError if a file asks to run code: a run folder or a YAML file may come from a stranger."""
    given = any(override.partition("=")[0].strip() == "eval.extractor" for override in overrides)
    name = config.eval.extractor
    if config.eval.every and not given and name not in (extractors.AUTO, *extractors.NAMES):
        raise ConfigError(
            f"eval.extractor: {name!r} is code, and this command line does not name it; "
            f"if you trust it: --set eval.extractor={shlex.quote(name)}"
        )


@contextlib.contextmanager
def run_folder(root: Path | None, config: Config, resume: bool) -> Iterator[Path]:
    """Lock `root`, or the first of runs/PRESET, runs/PRESET-2, ... that is empty and not locked by another process.

    Raises:
        RunError: if a run cannot begin there or, with `resume`, cannot continue there.
    """
    if root is not None:
        check_run_folder(root, resume)
        with held_alone(root):
            yield root
        return
    names = (config.preset, *(f"{config.preset}-{i}" for i in range(2, 10_000)))
    for folder in (runs.RUNS / name for name in names):
        if folder.exists() and not (folder.is_dir() and not content(folder)):
            continue
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held_alone(folder))
            except RunError:
                if not folder.exists():  # runs/ cannot be written
                    raise
                continue  # another run has begun there
            if not content(folder):
                yield folder
                return
    raise RunError(f"--out: {runs.RUNS}/ holds {len(names)} runs of {config.preset}; choose a folder")


def check_run_folder(root: Path, resume: bool) -> None:
    """Raises RunError if a run cannot begin in a folder or, with `resume`, cannot continue there."""
    if root.exists() and not root.is_dir():
        raise RunError(f"--out: {str(root)!r} is a file; choose a folder")
    held = content(root) if root.exists() else set()
    begun = bool(runs.list_checkpoints(root) or held & {runs.FINAL, runs.BEST})
    foreign = held - runs.BEFORE_CHECKPOINTS
    if resume and foreign and not begun and runs.CONFIG not in held:
        raise RunError(f"--out: {str(root)!r} is not empty and holds no run; choose another folder")
    if not resume and (begun or foreign):
        raise RunError(f"--out: {str(root)!r} is not empty; add --resume to continue it, or choose another folder")


def check_batch(config: Config, world: World) -> None:
    """Raises ConfigError if the processes cannot share the batch equally."""
    t = config.train
    if t.batch_size % (world.size * t.accumulate):
        raise ConfigError(
            f"train.batch_size: {t.batch_size} cannot be shared by {world.size} processes in {t.accumulate} part(s) "
            f"each; take a multiple of {world.size * t.accumulate}"
        )


@contextlib.contextmanager
def held_alone(root: Path, rank: int = 0) -> Iterator[None]:
    """Lock a run folder so that no other job writes to it, and create it if needed. Raises RunError."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held_folder(root, rank))
        except BlockingIOError as e:
            raise RunError(f"--out: another process is training in {str(root)!r}; wait for it, or stop it first") from e
        except OSError as e:
            raise RunError(f"--out: cannot write to {str(root)!r}: {e.strerror}; choose another --out") from e
        yield


# ------------------------------------------------------------------------------------------------- the images
def open_data(root: Path, config: Config, dataset: Dataset | None = None) -> Source:
    """As `open_source`. Raises DataError, which also says where the images of this run were before."""
    try:
        return open_source(config, dataset)
    except DataError as e:
        before = runs.read_data(root)
        if before is None or before["path"] == data_place(config):
            raise
        raise DataError(f"{e}; the run has read {before['path']!r}: give it as --data, or where it is now") from e


def data_place(config: Config) -> str:
    """`data.path` as an absolute path; names of built-in sets and objects as they are."""
    path = config.data.path
    return path if path.startswith((BUILTIN, PYTHON)) or not path else os.path.abspath(path)


def compare_data(
    source: Source, config: Config, root: Path, before: Mapping[str, Any] | None
) -> Generator[Event, None, dict[str, Any]]:
    """The facts of the images for RUN/data.json; `before` is what the file says when a run continues.

    The facts are `checked` if all images were decoded before, and are still the same.
    """
    complete = source.whole if isinstance(source, Part) else source
    identity = ""
    if isinstance(complete, ImageFolder):
        identity = complete.listing.sha256()
    elif isinstance(complete, LatentStore):
        identity = sha256(complete.root / MANIFEST)
    facts = {"path": data_place(config), "images": len(complete), "sha256": identity, "checked": True}
    if before is None:
        return facts
    if before["sha256"] != identity:
        number = f"{before['images']:,} then, {len(complete):,} now"
        if before["images"] == len(complete):
            number = f"{len(complete):,} as before, with other names, labels or sizes"
        yield Warned(
            f"data.path: the images in {config.data.path!r} are not those that {root} began with ({number}); "
            "from here on they come in another order"
        )
    return facts | {"checked": before["checked"] and before["sha256"] == identity}


@contextlib.contextmanager
def _ways_on(source: Source, root: Path, data: Mapping[str, Any], world: World) -> Iterator[None]:
    """Name the ways on if an image cannot be read any more, and have all images checked on resume."""
    try:
        yield
    except DataError as e:
        complete = source.whole if isinstance(source, Part) else source
        if not isinstance(complete, ImageFolder):
            raise
        if world.rank == 0:
            with contextlib.suppress(OSError):
                runs.write_data(root, {**data, "checked": False})
        command = f"diffussm train --resume --out {shlex.quote(str(root))}"
        raise DataError(
            f"data.path: {e}; restore the image, or skip what cannot be read with --set data.skip_unreadable=true; "
            f"then continue with: {command}"
        ) from e


# ------------------------------------------------------------------------------------------------- before the loop
def leave_out_unreadable(
    source: Source, config: Config, root: Path, world: World, fresh: bool
) -> Generator[Event, None, None]:
    """Decode every image before a run begins, so that no bad one ends it after days. On resume, use the run's record,
    unless the images have changed or one of them has ended the run.

    Raises:
        DataError: naming the images that cannot be read, unless data.skip_unreadable is set.
    """
    source = source.whole if isinstance(source, Part) else source
    if not isinstance(source, ImageFolder):
        return
    if world.size > 1 and len(set(gather(source.listing.sha256(), world))) > 1:
        raise DataError(f"data.path: not all processes see the same files in {config.data.path!r}")
    unrecorded = config.data.skip_unreadable and not (root / runs.SKIPPED).exists()  # not set when the run began
    if fresh or gather(unrecorded, world)[0]:
        skipped = yield from _unreadable(source, world)
        if skipped and not config.data.skip_unreadable:
            some = "; ".join(f"{name}: {reason}" for _, name, reason in skipped[:NAMED])
            more = "; ..." if len(skipped) > NAMED else ""
            raise DataError(
                f"data.path: {len(skipped)} of {len(source)} images in {config.data.path!r} cannot be read: "
                f"{some}{more}; skip them: --set data.skip_unreadable=true"
            )
        if world.rank == 0 and config.data.skip_unreadable:
            runs.write_skipped(root, skipped)
        if skipped:
            place = root / runs.SKIPPED
            yield Message(f"skipped: {len(skipped)} images that cannot be read; reasons in {place}")
    elif config.data.skip_unreadable:
        skipped = gather(runs.read_skipped(root) if world.rank == 0 else None, world)[0]
    else:
        return
    source.leave_out({i: name for i, name, _ in skipped if i is not None})


def _unreadable(source: ImageFolder, world: World) -> Generator[Event, None, list[tuple[int | None, str, str]]]:
    """Index, name and reason of every image that cannot be read, found by all processes together."""
    mine, done = range(world.rank, len(source), world.size), 0
    found: dict[int, str] = {}
    yield Progress(0, len(mine), "checking images")
    for checked, reasons in source.check(mine):
        done += checked
        found |= reasons
        yield Progress(done, len(mine), "checking images")
    reasons = {i: reason for part in gather(found, world) for i, reason in part.items()}
    skipped: list[tuple[int | None, str, str]] = [(i, source.entries[i].name, reasons[i]) for i in sorted(reasons)]
    return skipped + [(None, name, why) for name, why in source.listing.ignored if why.startswith(UNREADABLE)]


def _prepare(
    config: Config, source: Source, root: Path, checkpoint: Path | None, world: World, facts: Mapping[str, Any]
) -> Generator[Event, None, Trainer]:
    """Create a Trainer that is ready to run in `root`, and write its configuration and `facts` of its images there.

    Raises:
        DiffussmError: for anything that does not fit; before the model is built where possible.
    """
    keep_freed_memory()
    data = dataclasses.replace(
        config.data,
        class_names=source.class_names,
        text_sha256=text_hash(config, source),
        vae_sha256=vae_hash(source),
    )
    config = dataclasses.replace(config, data=data)
    runs.check_config(config)
    with first_works(world):
        if checkpoint is not None and world.rank == 0:
            if (root / runs.CONFIG).exists():
                before = runs.read_data(root)
                moved = before is not None and bool(facts["sha256"]) and before["sha256"] == facts["sha256"]
                changes = check_unchanged(runs.read_config(root, "--resume"), config, moved)
                yield from (Message(f"changed: {change}") for change in changes)
            else:
                yield Message(f"{root / runs.CONFIG} was missing; it will be written again from this command line")
            runs.read_metrics(root / runs.BEST)  # report damage now, not at the next evaluation
    trainer = Trainer(config, source, root, world)
    if checkpoint is not None:
        trainer.step.load(checkpoint)
    if world.rank == 0:
        try:
            runs.write_config(root, config)
            runs.write_data(root, {**facts, "checked": True})
        except OSError as e:
            raise RunError(f"--out: cannot write to {str(root)!r}: {e.strerror}") from e
    return trainer


def renew_report(root: Path, config: Config) -> None:
    """Write the report of a run; before that, its configuration, if somebody has removed it. Raises OSError."""
    if not (root / runs.CONFIG).exists():
        runs.write_config(root, config)
    write_report(root)


def check_unchanged(saved: Config, config: Config, moved: bool = False) -> list[str]:
    """Check that resuming does not change the nature of the run; returns the harmless changes, one per line.

    Args:
        moved: whether `data.path` may differ, because the same images are there.

    Raises:
        ConfigError: naming the first difference in model, data, diffusion, batch or seed.
    """
    old, new = to_dict(saved), to_dict(config)
    for values in (old["data"], new["data"]):
        values["vae"] = values["vae"] and full_name(values["vae"])
    old["data"]["vae_sha256"] = old["data"]["vae_sha256"] or new["data"]["vae_sha256"]  # not known to earlier versions
    harmless = [("data", "skip_unreadable"), *([("data", "path")] if moved else [])]
    fixed = [(s, f) for s in ("model", "data", "diffusion") for f in new[s] if (s, f) not in harmless]
    for section, name in [*fixed, ("train", "batch_size"), ("train", "seed")]:
        was, now = old[section][name], new[section][name]
        if was != now:
            raise ConfigError(
                f"--resume: {section}.{name} was {was!r} and is now {now!r}; omit --preset and --set to keep the "
                "run's own values, or choose another --out to begin a new run"
            )
    free = [*harmless, *((s, f) for s in ("train", "sample", "eval") for f in new[s])]
    values = [(s, f, old[s][f], new[s][f]) for s, f in free]
    changes = [f"{s}.{f} was {was!r} and is now {now!r}" for s, f, was, now in values if was != now]
    added = [decay for decay in config.train.ema[1:] if decay not in saved.train.ema]
    return changes + [f"the average of {decay} begins as a copy of that of {saved.train.ema[0]}" for decay in added]


def facts_of(trainer: Trainer) -> dict[str, Any]:
    """Where and with what a session of training begins, for the log and the report."""
    return {
        "from_step": trainer.step.number,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": str(trainer.step.device),
        "processes": trainer.world.size,
        "precision": str(trainer.step.dtype).removeprefix("torch."),
        "parameters": count_parameters(trainer.step.model),
        **facts_of_machine(trainer.step.device),
    }


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Hide the traceback of an OSError in TensorBoard's thread; the next record raises the error again."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before

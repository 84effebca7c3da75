"""`diffussm train`."""

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from diffussm_cli.commands.options import bar
from diffussm_cli.commands.presets import show_presets
from diffussm_cli.config import (
    DEFAULT_PRESET,
    Config,
    config_from_dict,
    load_config,
    preset_names,
    to_dict,
    to_yaml,
)
from diffussm_cli.errors import ConfigError, DataError, RunError

RUNS = Path("runs")
INTERRUPTED, PREEMPTED = 130, 75  # exit codes: Ctrl-C; SIGTERM, as EX_TEMPFAIL: saved, run the same command again
ALARMS = {"left_out": "steps without finite numbers, left out", "spike": "risen to three times the median"}
NAMED = 5  # unreadable images that an error names
NEVER, AUTO = "never", "auto"


class TrainCommand(TyperCommand):
    """Lets `--resume` stand without a value; `--resume auto` means the same."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As its parent, with the value put in."""
        full: list[str] = []
        for i, arg in enumerate(args):
            full.append(arg)
            if arg == "--resume" and args[i + 1 : i + 2] != [AUTO]:
                full.append(AUTO)
        return super().parse_args(ctx, full)


def train(
    preset: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(preset_names())}, or a YAML file. Default: {DEFAULT_PRESET}."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="A folder of images or latents, in place of the preset's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/PRESET, numbered if taken.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field, as train.lr=2e-4. Repeatable."),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="",
            help="Continue the run of --out, or the preset's newest run, from its newest good checkpoint; "
            "begin it if it has none; do nothing if it is finished.",
            show_default=False,
        ),
    ] = NEVER,
    eval_every: Annotated[
        int | None, typer.Option(min=0, metavar="STEPS", help="Measure FID and more that often; keep the best weights.")
    ] = None,
    list_presets: Annotated[
        bool, typer.Option("--list", help="Print the presets with their data, size, memory and time, and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration, parameters, tokens and memory, and stop.")
    ] = False,
) -> None:
    """Train a model. Without options: digits, on this machine, in minutes. Under torchrun, on all its processes.

    Exit codes: 0 done, 1 error, 130 Ctrl-C, 75 SIGTERM; after the last two a checkpoint is saved.
    """
    if list_presets:
        show_presets()
        return
    fields = {"data.path": data, "eval.every": eval_every}
    fields = {k: v for k, v in fields.items() if v is not None}
    if resume not in (NEVER, AUTO):
        raise ConfigError(f"--resume: {resume!r} must be {AUTO}, or nothing")
    from diffussm_cli.distributed import gather, meeting, read_share

    share, chosen = read_share(), None
    if share.rank == 0:
        found, config = choose(preset, out, overrides or [], fields, resume == AUTO)
        if dry_run:
            show_plan(config)
        else:
            chosen = run_folder(found, config, resume == AUTO), config
    if dry_run:
        return
    with meeting(share, cuda=share.of > 1 and has_cuda()):
        root, config = gather(chosen, share)[0]  # what another process sees of the run folder may be stale
        check_share(config, share)
        code = run_training(config, root, share, resume == AUTO)
    if share.of > 1:
        leave(code)
    if code:
        raise typer.Exit(code)


def run_training(config: Config, root: Path, share=None, resume: bool = False) -> int:
    """Train into a run folder, from its newest good checkpoint if it has one, with a progress bar on stderr.

    Args:
        resume: whether this was asked for; only changes what is said.

    Returns:
        0, or the exit code of a run that a signal ended.

    Raises:
        DiffussmError: of everything that a user can fix.
    """
    from rich.console import Console
    from rich.text import Text

    from diffussm_cli import runs
    from diffussm_cli.data.source import open_source
    from diffussm_cli.distributed import ALONE, gather
    from diffussm_cli.training.checkpoint import agree_on_checkpoint
    from diffussm_cli.training.record import RecordWriter

    share = share or ALONE
    console = Console(stderr=True, quiet=share.rank > 0)
    say = plain(console)
    with console.status("listing"):
        source = open_source(config)
    with held_alone(root, share), contextlib.ExitStack() as stack:
        with console.status("looking for checkpoints"):
            checkpoint, damaged = agree_on_checkpoint(root, share)
        for line in damaged:
            say(f"skipped: {line}")
        if resume and checkpoint is None:
            say(f"no checkpoint in {root} yet; training begins")
        leave_out_unreadable(console, source, config, root, share, fresh=checkpoint is None)
        with console.status("loading"):
            trainer = prepare(config, source, root, checkpoint, share, say)
        steps = config.train.steps
        finished = trainer.step >= steps and share.rank == 0 and runs.has_final(root, trainer.step)
        if gather(finished, share)[0]:
            say(f"{root} is at step {trainer.step} and train.steps is {steps}; nothing to do")
            say(f"draw from it: diffussm sample {shlex.quote(str(root))}")
            return 0
        where = f"{trainer.device}" + (f", {share.of} processes ({config.train.parallel})" if share.of > 1 else "")
        facts = f"  {parameters(trainer.model)} parameters on {where}, {precision(trainer)}"
        console.print(Text.assemble((str(root), "bold"), facts), soft_wrap=True)
        if config.train.compile:
            say("compiling: the first step takes minutes and shows no progress (mnist on two CPU cores: about four)")
        warnings = [trainer.decoding.warning] if trainer.decoding and trainer.decoding.warning else []
        warnings += trainer.scoring.warnings if trainer.scoring else []
        stack.enter_context(quiet_threads())
        writer = stack.enter_context(contextlib.closing(RecordWriter(root, trainer.step))) if share.rank == 0 else None
        for warning in warnings + (writer.warnings if writer else []):
            console.print(f"warning: {warning}", style="bold", markup=False, soft_wrap=True)
        asked = stack.enter_context(stop_on_signal())
        show = stack.enter_context(progress(console, trainer))
        for record in trainer.run(lambda: asked.code is not None):
            if writer:
                writer.write(record)
                show(record)
    return report(say, trainer, root, asked.code)


def plain(console) -> Callable[[str], None]:
    """Prints a line as it is."""
    return lambda line: console.print(line, soft_wrap=True, markup=False, highlight=False)


def leave_out_unreadable(console, source, config: Config, root: Path, share, fresh: bool) -> None:
    """Decode every image of a folder before a run begins, so that none ends it after days; on resume use its record.

    Raises:
        DataError: naming images that cannot be read, unless data.skip_unreadable is set.
    """
    from diffussm_cli.data.listing import UNREADABLE
    from diffussm_cli.data.source import ImageFolder
    from diffussm_cli.distributed import gather
    from diffussm_cli.runs import SKIPPED, read_skipped, write_skipped

    if not isinstance(source, ImageFolder):
        return
    if share.of > 1 and len(set(gather(source.listing.sha256(), share))) > 1:
        raise DataError(f"data.path: not all processes see the same files in {config.data.path!r}")
    if fresh:
        mine, found = range(share.rank, len(source), share.of), {}
        with bar(console, len(mine), "checking images") as advance:
            for checked, reasons in source.check(mine):
                advance(checked)
                found |= reasons
        reasons = {i: reason for part in gather(found, share) for i, reason in part.items()}
        skipped = [(i, source.entries[i].name, reasons[i]) for i in sorted(reasons)]
        skipped += [(None, name, reason) for name, reason in source.listing.ignored if reason.startswith(UNREADABLE)]
        if skipped and not config.data.skip_unreadable:
            some = "; ".join(f"{name}: {reason}" for _, name, reason in skipped[:NAMED])
            more = "; ..." if len(skipped) > NAMED else ""
            raise DataError(
                f"data.path: {len(skipped)} of {len(source)} images in {config.data.path!r} cannot be read: "
                f"{some}{more}; leave them out: --set data.skip_unreadable=true"
            )
        if share.rank == 0 and config.data.skip_unreadable:
            write_skipped(root, skipped)
        if skipped:
            plain(console)(f"skipped: {len(skipped)} images that cannot be read; reasons in {root / SKIPPED}")
    elif config.data.skip_unreadable:
        skipped = gather(read_skipped(root) if share.rank == 0 else None, share)[0]
    else:
        return
    source.leave_out({i: name for i, name, _ in skipped if i is not None})


def prepare(config: Config, source, root: Path, checkpoint: Path | None, share, say: Callable[[str], None]):
    """A Trainer ready to run in `root`, whose configuration is on disk. Raises DiffussmError."""
    import dataclasses

    from diffussm_cli import runs
    from diffussm_cli.device import keep_freed_memory
    from diffussm_cli.distributed import first_works
    from diffussm_cli.files import write_text
    from diffussm_cli.training.loop import Trainer

    keep_freed_memory()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=source.class_names))
    with first_works(share):
        if checkpoint is not None and share.rank == 0:
            if (root / runs.CONFIG).exists():
                for change in refuse_drift(runs.read_config(root, "--resume"), config):
                    say(f"changed: {change}")
            else:
                say(f"{root / runs.CONFIG} was missing; it is written again from this command line")
            runs.read_metrics(root / runs.BEST)  # named now if damaged, not at the next evaluation
    trainer = Trainer(config, source, root, share)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    if share.rank == 0:
        try:
            write_text(root / runs.CONFIG, to_yaml(config))
        except OSError as e:
            raise RunError(f"--out: cannot write to {str(root)!r}: {e.strerror}") from e
    return trainer


def leave(code: int) -> None:
    """End one process of a job, all of whose work is on disk.

    Without tearing the interpreter down: gloo's threads, which DDP keeps, sometimes abort the process then
    (pytorch/pytorch#179291), and torchrun would call the job failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_share(config: Config, share) -> None:
    """Raises ConfigError for a batch that the processes cannot share equally."""
    t = config.train
    if t.batch_size % (share.of * t.accumulate):
        raise ConfigError(
            f"train.batch_size: {t.batch_size} cannot be shared by {share.of} processes in {t.accumulate} part(s) "
            f"each; take a multiple of {share.of * t.accumulate}"
        )


def has_cuda() -> bool:
    """Whether tensors of several processes may be on CUDA devices."""
    import torch

    return torch.cuda.is_available()


@contextlib.contextmanager
def held_alone(root: Path, share) -> Iterator[None]:
    """A run folder that no other job writes to meanwhile, made if need be. Raises RunError."""
    from diffussm_cli.files import LOCK, content, locked

    lock, made = root / f"{LOCK}-{share.rank}", []

    def tidy() -> None:
        with contextlib.suppress(OSError):
            if made and not content(root):  # nothing came of it
                lock.unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()

    with contextlib.ExitStack() as stack:
        try:
            made += [p for p in (root, *root.parents) if not p.exists()]
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(lock))
        except BlockingIOError as e:
            raise RunError(f"--out: another process is training in {str(root)!r}; wait for it, or stop it first") from e
        except OSError as e:
            tidy()
            raise RunError(f"--out: cannot write to {str(root)!r}: {e.strerror}; name another folder by --out") from e
        stack.callback(tidy)
        yield


def refuse_drift(saved: Config, config: Config) -> list[str]:
    """Resuming must not change what the run is; gives the changes that do no harm, a line each.

    Raises:
        ConfigError: naming the first difference in model, data, diffusion, batch or seed.
    """
    old, new = to_dict(saved), to_dict(config)
    fixed = [(s, f) for s in ("model", "data", "diffusion") for f in new[s]]
    for section, name in [*fixed, ("train", "batch_size"), ("train", "seed")]:
        was, now = old[section][name], new[section][name]
        if was != now:
            raise ConfigError(
                f"--resume: {section}.{name} was {was!r} and is now {now!r}; without --preset and --set the run's own "
                "values are taken, with another --out a new run begins"
            )
    values = [(s, f, old[s][f], new[s][f]) for s in ("train", "sample", "eval") for f in new[s]]
    return [f"{s}.{f} was {was!r} and is now {now!r}" for s, f, was, now in values if was != now]


def choose(
    preset: str | None, out: Path | None, overrides: list[str], fields: dict[str, Any], resume: bool
) -> tuple[Path | None, Config]:
    """The run folder that was asked for, if any, and the configuration. Raises ConfigError, RunError."""
    root, saved = out, None
    if resume:
        from diffussm_cli import runs

        root = out or runs.newest_run(RUNS, Path(preset or DEFAULT_PRESET).stem)
        if root is not None and preset is None:
            saved = _saved_with(root, "--out" if out else "--resume", overrides, fields)
    config = saved or load_config(preset or DEFAULT_PRESET, overrides, fields)
    refuse_foreign_code(config, overrides)
    return root, config


def _saved_with(root: Path, option: str, overrides: list[str], fields: dict[str, Any]) -> Config | None:
    """The configuration of a run with changes, or None of a run that has not begun. Raises RunError, ConfigError."""
    from diffussm_cli import runs

    if (root / runs.CONFIG).exists():
        return config_from_dict(to_dict(runs.read_config(root, option)), str(root), overrides, fields)
    if runs.checkpoints(root):
        raise RunError(
            f"{option}: {str(root)!r} has checkpoints but no {runs.CONFIG}; "
            "give the --preset and --set that the run was made with"
        )
    return None


def refuse_foreign_code(config: Config, overrides: list[str]) -> None:
    """Raises ConfigError for code that a file wants to run: a run folder or a YAML file may come from a stranger."""
    given = any(override.partition("=")[0].strip() == "eval.extractor" for override in overrides)
    if not config.eval.every or given:
        return
    from diffussm_cli.evaluation import features

    name = config.eval.extractor
    if name not in (features.AUTO, *features.NAMES):
        raise ConfigError(
            f"eval.extractor: {name!r} is code, and this command line does not name it; "
            f"if you trust it: --set eval.extractor={shlex.quote(name)}"
        )


def run_folder(root: Path | None, config: Config, resume: bool) -> Path:
    """`root`, or the first of runs/PRESET, runs/PRESET-2, ... that holds nothing and that no process is about to fill.

    Raises:
        RunError: if a run cannot begin there, or with `resume` go on.
    """
    from diffussm_cli import runs
    from diffussm_cli.files import LOCK, content, locked

    if root is None:
        names = (config.preset, *(f"{config.preset}-{i}" for i in range(2, 10_000)))
        for folder in (RUNS / name for name in names):
            if not folder.exists():
                return folder
            if folder.is_dir() and not content(folder):
                with contextlib.suppress(OSError), locked(folder / f"{LOCK}-0"):
                    return folder
        raise RunError(f"--out: {RUNS}/ holds {len(names)} runs of {config.preset}; name a folder")
    if root.exists() and not root.is_dir():
        raise RunError(f"--out: {str(root)!r} is a file; name a folder")
    held = content(root) if root.exists() else set()
    begun = bool(runs.checkpoints(root) or held & {runs.FINAL, runs.BEST})
    foreign = held - runs.BEFORE_CHECKPOINTS
    if resume and foreign and not begun and runs.CONFIG not in held:
        raise RunError(f"--out: {str(root)!r} is not empty and holds no run; name another folder")
    if not resume and (begun or foreign):
        raise RunError(f"--out: {str(root)!r} is not empty; add --resume to go on with it, or name another folder")
    return root


# ------------------------------------------------------------------------------------------------- showing
def show_plan(config: Config) -> None:
    """The resolved configuration on stdout, what it amounts to on stderr."""
    from rich.console import Console

    from diffussm_cli.commands.profile import table
    from diffussm_cli.commands.profile import to_dict as cost_dict
    from diffussm_cli.distributed import read_share
    from diffussm_cli.profiling.flops import cost

    typer.echo(to_yaml(config), nl=False)
    Console(stderr=True).print(table([cost_dict(cost(config, processes=read_share().of))], memory=True))


def parameters(model) -> str:
    """The number of a model's parameters, for people."""
    return f"{sum(p.numel() for p in model.parameters()):,}"


def precision(trainer) -> str:
    """The arithmetic of a trainer, for people."""
    return str(trainer.dtype).removeprefix("torch.") + (", compiled" if trainer.config.train.compile else "")


class Asked:
    """Whether a signal has asked for an end, as the exit code that it will have."""

    code: int | None = None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Asked]:
    """Ctrl-C and SIGTERM ask the loop to finish its step; a second Ctrl-C interrupts at once."""
    asked = Asked()
    codes = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED}

    def ask(number: int, _: Any) -> None:
        asked.code = codes[number]
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = {number: signal.signal(number, ask) for number in codes}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """An OSError of TensorBoard's thread is raised again by the next record; Python would show its traceback too."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before


@contextlib.contextmanager
def progress(console, trainer) -> Iterator[Callable[[dict], None]]:
    """A bar on stderr with rate, loss and remaining time, moved by records."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[news]}"),
    )
    with Progress(*columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=trainer.config.train.steps, completed=trainer.step, news="")

        def show(record: dict) -> None:
            news = f"loss {record['loss']:.4f}  {record['images_per_second']:.1f} images/s"
            news += f"  FID {record['eval/fid']:.4g}" if "eval/fid" in record else ""
            for name, words in ALARMS.items():
                if name in record:
                    console.print(f"warning: step {record['step']}: {words}: {record[name]}", markup=False)
            bar.update(task, completed=record["step"], news=news)
            if not console.is_terminal:
                console.print(f"step {record['step']}/{trainer.config.train.steps}  {news}")

        yield show


def report(say: Callable[[str], None], trainer, root: Path, code: int | None) -> int:
    """What came of it and what to do next; the exit code."""
    from diffussm_cli import runs

    folder, steps = shlex.quote(str(root)), trainer.config.train.steps
    if trainer.step < steps:
        say(f"stopped at step {trainer.step} of {steps}, checkpoint saved; go on with:")
        say(f"  diffussm train --resume --out {folder}")
        return code or PREEMPTED  # of another process's signal
    pictures = sorted((root / runs.SAMPLES).glob("step-*.png"))
    say(f"trained {steps} steps; weights in {root / runs.FINAL}")
    if pictures:
        say(f"pictures: {pictures[-1]}")
    say(f"draw more: diffussm sample {folder}")
    return 0

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

from diffussm_cli.config import (
    DEFAULT_PRESET,
    Config,
    config_from_dict,
    load_config,
    preset_names,
    to_dict,
    to_yaml,
)
from diffussm_cli.errors import ConfigError, RunError

RUNS = Path("runs")
LOCK = ".lock"
INTERRUPTED, PREEMPTED = 130, 75  # exit codes: Ctrl-C; SIGTERM, as EX_TEMPFAIL: saved, run the same command again
ALARMS = {"left_out": "steps without finite numbers, left out", "spike": "risen to three times the median"}
NEVER, NEWEST, AUTO = "never", "newest", "auto"


class TrainCommand(TyperCommand):
    """Lets `--resume` stand without a value, for `--resume newest`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As its parent, with the value put in."""
        full: list[str] = []
        for i, arg in enumerate(args):
            full.append(arg)
            if arg == "--resume" and args[i + 1 : i + 2] not in ([AUTO], [NEWEST], [NEVER]):
                full.append(NEWEST)
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
            metavar="[auto]",
            help="Go on from the newest good checkpoint of --out, or of the preset's newest run; "
            "auto: if there is one, else begin.",
            show_default=False,
        ),
    ] = NEVER,
    eval_every: Annotated[
        int | None, typer.Option(min=0, metavar="STEPS", help="Measure FID and more that often; keep the best weights.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration, parameters, tokens and memory, and stop.")
    ] = False,
) -> None:
    """Train a model. Without options: digits, on this machine, in minutes. Under torchrun, on all its processes.

    Exit codes: 0 done, 1 error, 130 Ctrl-C, 75 SIGTERM; after the last two a checkpoint is saved.
    """
    fields = {"data.path": data, "eval.every": eval_every}
    fields = {k: v for k, v in fields.items() if v is not None}
    if resume not in (NEVER, NEWEST, AUTO):
        raise ConfigError(f"--resume: {resume!r} must be {AUTO}, or nothing")
    root = None if resume == NEVER else _resumed_folder(preset, out, resume == AUTO)
    if root is not None and preset is None:
        config = _saved_with(root, overrides or [], fields)
    else:
        config = load_config(preset or DEFAULT_PRESET, overrides or [], fields)
    if dry_run:
        show_plan(config)
        return
    from diffussm_cli import runs
    from diffussm_cli.distributed import gather, meeting, read_share

    share = read_share()
    check_share(config, share)
    with meeting(share, on_cuda(config)):
        if root is None and share.rank == 0:
            root = new_run_folder(config, out)
        root = gather(root, share)[0]
        code = run_training(config, root, bool(runs.checkpoints(root)), share, finished_is_fine=resume == AUTO)
    if share.of > 1:
        leave(code)
    if code:
        raise typer.Exit(code)


def run_training(config: Config, root: Path, resume: bool = False, share=None, finished_is_fine: bool = False) -> int:
    """Train into a run folder with a progress bar on stderr. Raises DiffussmError.

    Returns:
        0, or the exit code of a run that a signal ended.
    """
    from rich.console import Console

    from diffussm_cli.data.source import open_source
    from diffussm_cli.distributed import ALONE
    from diffussm_cli.training.record import RecordWriter

    share = share or ALONE
    console = Console(stderr=True, quiet=share.rank > 0)
    with console.status("listing"):
        source = open_source(config)
    with held_alone(root, share), contextlib.ExitStack() as stack:
        with console.status("loading"):
            trainer = prepare(config, source, root, resume, share, plain(console))
        if trainer.step >= config.train.steps:
            done = f"{root} is at step {trainer.step} and train.steps is {config.train.steps}; nothing to do"
            if not finished_is_fine:
                raise RunError(f"--resume: {done}; sample it with: diffussm sample {root}")
            console.print(done, soft_wrap=True)
            return 0
        where = f"{trainer.device}" + (f", {share.of} processes ({config.train.parallel})" if share.of > 1 else "")
        console.print(f"[bold]{root}[/]  {parameters(trainer.model)} parameters on {where}, {precision(trainer)}")
        if config.train.compile:
            words = "compiling: the first step takes minutes and shows no progress (mnist on two CPU cores: about four)"
            console.print(words, soft_wrap=True)
        if trainer.decoding and trainer.decoding.warning:
            console.print(f"warning: {trainer.decoding.warning}", style="bold", markup=False, soft_wrap=True)
        writer = stack.enter_context(contextlib.closing(RecordWriter(root, trainer.step))) if share.rank == 0 else None
        asked = stack.enter_context(stop_on_signal())
        show = stack.enter_context(progress(console, trainer))
        for record in trainer.run(lambda: asked.code is not None):
            if writer:
                writer.write(record)
                show(record)
    return report(console, trainer, root, asked.code)


def plain(console) -> Callable[[str], None]:
    """Prints a line as it is."""
    return lambda line: console.print(line, soft_wrap=True, markup=False)


def prepare(config: Config, source, root: Path, resume: bool, share, say: Callable[[str], None]):
    """A Trainer ready to run in `root`, whose configuration is on disk. Raises DiffussmError."""
    import dataclasses

    from diffussm_cli import runs
    from diffussm_cli.device import keep_freed_memory
    from diffussm_cli.training.loop import Trainer

    keep_freed_memory()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=source.class_names))
    if resume:
        for change in refuse_drift(runs.read_config(root), config):
            say(f"changed: {change}")
    trainer = Trainer(config, source, root, share)
    if resume:
        checkpoint, damaged = runs.newest_good(root)
        for line in damaged:
            say(f"skipped: {line}")
        if checkpoint is None:
            raise RunError(f"--resume: {root} has no good checkpoint: {damaged[0] if damaged else 'there is none'}")
        trainer.resume(checkpoint)
    try:
        if share.rank == 0:
            (root / runs.CONFIG).write_text(to_yaml(config))
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


def on_cuda(config: Config) -> bool:
    """Whether tensors of several processes are on CUDA devices. Raises ConfigError."""
    from diffussm_cli.device import pick_device

    return pick_device(config.train.device).type == "cuda"


@contextlib.contextmanager
def held_alone(root: Path, share) -> Iterator[None]:
    """A run folder that no other job writes to meanwhile, made if need be. Raises RunError."""
    from diffussm_cli.files import locked

    lock, made = root / f"{LOCK}-{share.rank}", [p for p in (root, *root.parents) if not p.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(lock):
            try:
                yield
            finally:
                if made and all(p.name.startswith(LOCK) for p in root.iterdir()):  # nothing came of it
                    lock.unlink()
                    with contextlib.suppress(OSError):
                        for folder in made:
                            folder.rmdir()
    except BlockingIOError as e:
        raise RunError(f"--out: another process is training in {str(root)!r}; wait for it, or stop it first") from e
    except OSError as e:
        if str(e.filename) not in (str(root), str(lock)):
            raise
        raise RunError(f"--out: cannot write to {str(root)!r}: {e.strerror}") from e


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


def new_run_folder(config: Config, out: Path | None) -> Path:
    """Where a fresh run goes: `out`, which must hold none yet, or the first free runs/PRESET[-N]. Raises RunError."""
    if out is None:
        names = [config.preset, *(f"{config.preset}-{i}" for i in range(2, 10_000))]
        return next(RUNS / n for n in names if not (RUNS / n).exists())
    if out.exists() and not out.is_dir():
        raise RunError(f"--out: {str(out)!r} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        raise RunError(f"--out: {str(out)!r} is not empty; add --resume to go on with it, or name another folder")
    return out


def _resumed_folder(preset: str | None, out: Path | None, auto: bool) -> Path | None:
    """The run to go on with; with `auto` one that has no checkpoint yet too, or None to begin. Raises RunError."""
    from diffussm_cli import runs

    name = Path(preset or DEFAULT_PRESET).stem
    root = out or runs.newest_run(RUNS, name)
    if root is not None and root.is_dir() and runs.checkpoints(root):
        return root
    if auto:  # a run that was stopped before its first checkpoint begins again in its folder
        return root if root is not None and (root / runs.CONFIG).is_file() else None
    if root is None:
        raise RunError(f"--resume: no run of {name} in {RUNS}/; name its folder by --out")
    if not root.is_dir():
        raise RunError(f"--resume: no run folder {str(root)!r}")
    raise RunError(f"--resume: {str(root)!r} holds no complete checkpoint; start again without --resume")


def _saved_with(root: Path, overrides: list[str], fields: dict[str, Any]) -> Config:
    from diffussm_cli import runs

    return config_from_dict(to_dict(runs.read_config(root)), str(root), overrides, fields)


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


def report(console, trainer, root: Path, code: int | None) -> int:
    """What came of it and what to do next; the exit code."""
    folder, steps = shlex.quote(str(root)), trainer.config.train.steps
    if trainer.step < steps:
        console.print(f"stopped at step {trainer.step} of {steps}, checkpoint saved; go on with:")
        console.print(f"  diffussm train --resume --out {folder}", soft_wrap=True, highlight=False)
        return code or PREEMPTED  # of another process's signal
    pictures = sorted((root / "samples").glob("step-*.png"))
    console.print(f"trained {steps} steps; weights in {root / 'final'}", soft_wrap=True)
    if pictures:
        console.print(f"pictures: {pictures[-1]}", soft_wrap=True)
    console.print(f"draw more: diffussm sample {folder}", soft_wrap=True)
    return 0

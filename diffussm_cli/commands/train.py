"""`diffussm train`."""

import contextlib
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

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
INTERRUPTED = 130


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
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of --out, or of the preset's newest run.")
    ] = False,
    eval_every: Annotated[
        int | None, typer.Option(min=0, metavar="STEPS", help="Measure FID and more that often; keep the best weights.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration, parameters, tokens and memory, and stop.")
    ] = False,
) -> None:
    """Train a model. Without options: digits, on this machine, in minutes."""
    fields = {"data.path": data, "eval.every": eval_every}
    fields = {k: v for k, v in fields.items() if v is not None}
    root = _resumed_folder(preset, out) if resume else None
    if root is not None and preset is None:
        config = _saved_with(root, overrides or [], fields)
    else:
        config = load_config(preset or DEFAULT_PRESET, overrides or [], fields)
    if dry_run:
        show_plan(config)
        return
    if root is None:
        root = new_run_folder(config, out)
    if not run_training(config, root, resume):
        raise typer.Exit(INTERRUPTED)


def run_training(config: Config, root: Path, resume: bool = False) -> bool:
    """Train into a run folder with a progress bar on stderr; False if it was interrupted. Raises DiffussmError."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("loading"):
        trainer = prepare(config, root, resume)
    console.print(f"[bold]{root}[/]  {parameters(trainer.model)} parameters on {trainer.device}, {precision(trainer)}")
    if trainer.decoding and trainer.decoding.warning:
        console.print(f"warning: {trainer.decoding.warning}", style="bold", markup=False, soft_wrap=True)
    from diffussm_cli.training.record import RecordWriter

    writer = RecordWriter(root, trainer.step)
    with contextlib.closing(writer), stop_on_signal() as stop, progress(console, trainer) as show:
        for record in trainer.run(stop):
            writer.write(record)
            show(record)
    return report(console, trainer, root)


def prepare(config: Config, root: Path, resume: bool):
    """A Trainer ready to run in `root`, whose configuration is on disk. Raises DiffussmError."""
    import dataclasses

    from diffussm_cli import runs
    from diffussm_cli.data.source import open_source
    from diffussm_cli.device import keep_freed_memory
    from diffussm_cli.training.loop import Trainer

    keep_freed_memory()
    source = open_source(config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=source.class_names))
    if resume:
        refuse_drift(runs.read_config(root), config)
    trainer = Trainer(config, source, root)
    if resume:
        checkpoint = runs.newest_checkpoint(root)
        assert checkpoint is not None
        trainer.resume(checkpoint)
        if trainer.step >= config.train.steps:
            raise RunError(
                f"--resume: {root} is at step {trainer.step} and train.steps is {config.train.steps}; "
                f"nothing to do; sample it with: diffussm sample {root}"
            )
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / runs.CONFIG).write_text(to_yaml(config))
    except OSError as e:
        raise RunError(f"--out: cannot write to {str(root)!r}: {e.strerror}") from e
    return trainer


def refuse_drift(saved: Config, config: Config) -> None:
    """Resuming must not change what the run is. Raises ConfigError naming the first difference."""
    old, new = to_dict(saved), to_dict(config)
    fixed = [(s, f) for s in ("model", "data", "diffusion") for f in new[s]]
    for section, name in [*fixed, ("train", "batch_size"), ("train", "seed")]:
        was, now = old[section][name], new[section][name]
        if was != now:
            raise ConfigError(
                f"--resume: {section}.{name} was {was!r} and is now {now!r}; without --preset and --set the run's own "
                "values are taken, with another --out a new run begins"
            )


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


def _resumed_folder(preset: str | None, out: Path | None) -> Path:
    from diffussm_cli import runs

    name = Path(preset or DEFAULT_PRESET).stem
    root = out or runs.newest_run(RUNS, name)
    if root is None:
        raise RunError(f"--resume: no run of {name} in {RUNS}/; name its folder by --out")
    if not root.is_dir():
        raise RunError(f"--resume: no run folder {str(root)!r}")
    if runs.newest_checkpoint(root) is None:
        raise RunError(f"--resume: {str(root)!r} holds no complete checkpoint; start again without --resume")
    return root


def _saved_with(root: Path, overrides: list[str], fields: dict[str, Any]) -> Config:
    from diffussm_cli import runs

    return config_from_dict(to_dict(runs.read_config(root)), str(root), overrides, fields)


# ------------------------------------------------------------------------------------------------- showing
def show_plan(config: Config) -> None:
    """The resolved configuration on stdout, what it amounts to on stderr."""
    from rich.console import Console

    from diffussm_cli.commands.profile import table
    from diffussm_cli.commands.profile import to_dict as cost_dict
    from diffussm_cli.profiling.flops import cost

    typer.echo(to_yaml(config), nl=False)
    Console(stderr=True).print(table([cost_dict(cost(config))], memory=True))


def parameters(model) -> str:
    """The number of a model's parameters, for people."""
    return f"{sum(p.numel() for p in model.parameters()):,}"


def precision(trainer) -> str:
    """The arithmetic of a trainer, for people."""
    return str(trainer.dtype).removeprefix("torch.") + (", compiled" if trainer.config.train.compile else "")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the loop to finish its step; a second one interrupts at once."""
    event = threading.Event()

    def ask(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    if threading.current_thread() is not threading.main_thread():
        yield event.is_set
        return
    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield event.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


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
            bar.update(task, completed=record["step"], news=news)
            if not console.is_terminal:
                console.print(f"step {record['step']}/{trainer.config.train.steps}  {news}")

        yield show


def report(console, trainer, root: Path) -> bool:
    """What came of it and what to do next; False if training was interrupted."""
    folder, steps = shlex.quote(str(root)), trainer.config.train.steps
    if trainer.step < steps:
        console.print(f"stopped at step {trainer.step} of {steps}, checkpoint saved; go on with:")
        console.print(f"  diffussm train --resume --out {folder}", soft_wrap=True, highlight=False)
        return False
    pictures = sorted((root / "samples").glob("step-*.png"))
    console.print(f"trained {steps} steps; weights in {root / 'final'}", soft_wrap=True)
    if pictures:
        console.print(f"pictures: {pictures[-1]}", soft_wrap=True)
    console.print(f"draw more: diffussm sample {folder}", soft_wrap=True)
    return True

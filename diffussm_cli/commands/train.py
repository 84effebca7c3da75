"""`diffussm train`."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from diffussm_cli.commands import completion, options
from diffussm_cli.commands.console import duration, follow, leave, make_console, say, warn
from diffussm_cli.commands.options import others, unused
from diffussm_cli.commands.stopping import PREEMPTED, stopping
from diffussm_cli.config import (
    DEFAULT_PRESET,
    Config,
    first_reading,
    load_config,
    preset_names,
    set_fields,
    to_yaml,
)
from diffussm_cli.errors import ConfigError, DiffussmError

TRAINED = "What is trained"  # a group of options in `--help`


def train(
    ctx: typer.Context,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            rich_help_panel=TRAINED,
            autocompletion=completion.presets,
            help=f"One of {', '.join(preset_names())}, or a YAML file. Default: {DEFAULT_PRESET}.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            rich_help_panel=TRAINED,
            help="Images or latents, instead of the preset's. Without --preset, their size, "
            "channels and classes are read from them.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            rich_help_panel=TRAINED,
            autocompletion=completion.models,
            help="Begin with the weights of a run, of a model of the package, of OWNER/NAME on the "
            "hub, or of a DiT's or SiT's .pt file, as far as they fit.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=options.RUN,
            autocompletion=completion.runs,
            help="Run folder. Default: runs/PRESET, numbered if taken.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.FIELD=VALUE",
            rich_help_panel=TRAINED,
            autocompletion=completion.fields,
            help="Change a field, such as train.lr=2e-4. Repeatable.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel=options.RUN,
            help="Continue the run in --out, or the preset's newest run, "
            "from its newest good checkpoint; begin it if there is none; "
            "do nothing if it is finished.",
        ),
    ] = False,
    eval_every: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="STEPS",
            rich_help_panel=options.RUN,
            help="Evaluate every STEPS steps; keep the best weights.",
        ),
    ] = None,
    list_presets: Annotated[
        bool,
        typer.Option(
            "--list",
            rich_help_panel=options.ONLY_SHOWN,
            help="Print the presets with their parameters, and exit.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            rich_help_panel=options.ONLY_SHOWN,
            help="Check all that could stop the run before its first step, print the memory and "
            "time that it takes on this machine and its cost, and exit.",
        ),
    ] = False,
    as_yaml: Annotated[
        bool,
        typer.Option(
            "--yaml",
            rich_help_panel=options.ONLY_SHOWN,
            help="Print all fields of the configuration as YAML, and exit.",
        ),
    ] = False,
) -> None:
    """Train a model: without options, on digits, in minutes. Under torchrun, the processes share
    the work.

    Exit codes: 0 done, 1 error, 130 Ctrl-C, 75 SIGTERM or SIGHUP. After 75 a checkpoint has been
    saved, and after 130 too, unless Ctrl-C came before the first step or twice.
    """
    if preset == "":
        raise ConfigError("--preset: is empty; name a preset or a YAML file, or leave it out")
    if list_presets:
        from diffussm_cli.commands.tables import presets_table
        from diffussm_cli.profiling.report import preset_rows

        if line := unused(ctx, others(ctx, "list_presets"), "--list only prints the presets"):
            warn(make_console(), line)
        presets_table(preset_rows())
        return
    overrides = overrides or []
    named_fields = {"data.path": data, "train.init": init, "eval.every": eval_every}
    fields = {name: value for name, value in named_fields.items() if value is not None}
    if preset is not None or not resume:  # report mistakes before torch is imported
        first_reading(preset, set_fields(overrides, fields), overrides, fields)
    from diffussm_cli.machine.processes import read_world
    from diffussm_cli.profiling.flops import training_operations
    from diffussm_cli.training import checks, session
    from diffussm_cli.training.configure import configure

    # The configuration: a run that continues has its own, unless a preset is named.
    continues = resume and preset is None
    request = configure(preset, out, overrides, fields, continues=continues)
    config, out, lines, listing = request

    # The plan, or the run.
    console = make_console(quiet=read_world().rank > 0)
    for line in lines:
        console.print(line)
    if as_yaml:
        if line := unused(ctx, ("dry_run",), "--yaml only prints the configuration"):
            warn(console, line)
        typer.echo(to_yaml(config), nl=False)
        return
    if dry_run:
        if read_world().rank == 0:
            elsewhere = prediction(config, preset, overrides, fields)
            plan(console, config, checks.check(config, out, resume, listing), elsewhere)
        return
    with stopping() as stop:
        events = session.train(
            config,
            out,
            resume=resume,
            listing=listing,
            stop=stop,
            operations=training_operations,
        )
        result = follow(console, events)
    code = report(console, result, stop.code)
    if result.processes > 1:
        leave(code)
    if code:
        raise typer.Exit(code)


def prediction(
    config: Config, preset: str | None, overrides: Sequence[str], fields: Mapping[str, Any]
) -> str:
    """The command that predicts for a GPU what a run takes, or how to come to it if options of
    `profile` cannot say what the run reads from its data or continues with.

    Args:
        config: that of the run.
        preset, overrides, fields: what it was made from, as in `load_config`.
    """
    preset = preset or DEFAULT_PRESET
    try:
        is_said = load_config(preset, overrides, fields) == config
    except DiffussmError:
        is_said = False

    words = ["diffussm", "profile", "--preset", preset if is_said else "run.yaml"]
    if is_said:
        changes = [*overrides, *(f"{name}={value}" for name, value in fields.items())]
        words += [word for change in changes for word in ("--set", change)]
    command = shlex.join([*words, "--estimate", "--device", "h200"])
    return command if is_said else f"write what --yaml prints to run.yaml, then: {command}"


def plan(console, config, check, elsewhere: str) -> None:
    """Check a run; then print on stdout what it takes on this machine, and what it costs.

    Args:
        elsewhere: how to predict it for a GPU.

    Raises:
        DiffussmError: what would stop the run, after memory and cost, which need no measurement.
    """
    from diffussm_cli.commands.tables import cost_table, forecast_lines
    from diffussm_cli.profiling.plan import forecast
    from diffussm_cli.profiling.report import cost_entry

    problem = None
    try:
        follow(console, check)
    except DiffussmError as e:
        problem = e

    # What it takes, and what it costs.
    ahead = follow(console, forecast(config, stopped=problem is not None))
    for line in forecast_lines(ahead, config.train.steps, elsewhere) if ahead else []:
        say(line)
    make_console(stderr=False).print(cost_table([cost_entry(config)], memory=True))
    if problem is not None:
        raise problem
    console.print("all fields: the same command with --yaml in place of --dry-run")


def report(console, result, code: int | None) -> int:
    """Print how the training ended and what to do next; returns the exit code."""
    from diffussm_cli import runs

    folder = shlex.quote(str(result.root))
    if not result.was_finished:
        console.print(f"report: {result.root / runs.REPORT}")
    if result.seconds:
        parts = ", ".join(f"{what} {duration(s)}" for what, s in result.seconds.items())
        console.print(f"time: {duration(sum(result.seconds.values()))} ({parts})")

    # Stopped before its end.
    if not result.finished:
        console.print(
            f"stopped at step {result.step} of {result.steps}, checkpoint saved; continue with:"
        )
        console.print(f"  diffussm train --resume --out {folder}")
        return code or PREEMPTED  # another process got the signal

    if not result.was_finished:
        console.print(f"trained {result.steps} steps; weights in {result.root / runs.FINAL}")
        pictures = sorted((result.root / runs.SAMPLES).glob("step-*.png"))
        if pictures:
            console.print(f"last preview: {pictures[-1]}")
    console.print(f"draw more: diffussm sample {folder}")
    return 0

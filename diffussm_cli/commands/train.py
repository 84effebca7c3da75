"""`diffussm train`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from diffussm_cli.commands.console import follow, leave, make_console
from diffussm_cli.commands.options import Command
from diffussm_cli.config import DEFAULT_PRESET, load_config, preset_names, to_yaml
from diffussm_cli.errors import ConfigError

NEVER, AUTO = "never", "auto"


class TrainCommand(Command):
    """Allows `--resume` without a value; `--resume auto` means the same."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As in the parent class, after the missing value is filled in."""
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
    data: Annotated[str | None, typer.Option(help="A folder of images or latents, instead of the preset's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/PRESET, numbered if taken.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field, such as train.lr=2e-4. Repeatable."),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="",
            help="Continue the run in --out, or the preset's newest run, from its newest good checkpoint; "
            "begin it if there is none; do nothing if it is finished.",
            show_default=False,
        ),
    ] = NEVER,
    eval_every: Annotated[
        int | None, typer.Option(min=0, metavar="STEPS", help="Evaluate every STEPS steps; keep the best weights.")
    ] = None,
    list_presets: Annotated[
        bool, typer.Option("--list", help="Print the presets with their parameters, and exit.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration, parameters, tokens and memory, and exit.")
    ] = False,
) -> None:
    """Train a model: without options, on digits, in minutes. Under torchrun, the processes share the work.

    Exit codes: 0 done, 1 error, 130 Ctrl-C, 75 SIGTERM or SIGHUP. After 130 and 75 a checkpoint has been saved.
    """
    if list_presets:
        from diffussm_cli.commands.tables import presets_table
        from diffussm_cli.profiling.report import preset_rows

        presets_table(preset_rows())
        return
    fields = {k: v for k, v in {"data.path": data, "eval.every": eval_every}.items() if v is not None}
    if resume not in (NEVER, AUTO):
        raise ConfigError(f"--resume: {resume!r} must be {AUTO} or left out")
    if preset is not None or resume == NEVER:  # report mistakes before torch is imported
        load_config(preset or DEFAULT_PRESET, overrides or [], fields)
    from diffussm_cli.machine.processes import read_world
    from diffussm_cli.training import session
    from diffussm_cli.training.stopping import StopRequest

    request: dict[str, Any] = {"resume": resume == AUTO, "preset": preset, "overrides": overrides or []}
    request["fields"] = fields
    if dry_run:
        show_plan(session.choose(None, out, **request)[1])
        return
    world = read_world()
    console = make_console(quiet=world.rank > 0)
    stop = StopRequest()
    found = follow(console, stop.watch(session.train(out=out, stop=stop, **request)))
    code = report(console, found, stop.code)
    if found.processes > 1:
        leave(code)
    if code:
        raise typer.Exit(code)


def show_plan(config) -> None:
    """Print the resolved configuration on stdout and its cost on stderr."""
    from diffussm_cli.commands.tables import cost_table
    from diffussm_cli.profiling.report import cost_entry

    typer.echo(to_yaml(config), nl=False)
    make_console().print(cost_table([cost_entry(config)], memory=True))


def report(console, found, code: int | None) -> int:
    """Print how the training ended and what to do next; returns the exit code."""
    from diffussm_cli import runs
    from diffussm_cli.training.stopping import PREEMPTED

    folder = shlex.quote(str(found.root))
    if not found.was_finished:
        console.print(f"report: {found.root / runs.REPORT}")
    if not found.finished:
        console.print(f"stopped at step {found.step} of {found.steps}, checkpoint saved; continue with:")
        console.print(f"  diffussm train --resume --out {folder}")
        return code or PREEMPTED  # another process got the signal
    if not found.was_finished:
        console.print(f"trained {found.steps} steps; weights in {found.root / runs.FINAL}")
        pictures = sorted((found.root / runs.SAMPLES).glob("step-*.png"))
        if pictures:
            console.print(f"last preview: {pictures[-1]}")
    console.print(f"draw more: diffussm sample {folder}")
    return 0

"""`diffussm profile`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from diffussm_cli.commands import options
from diffussm_cli.commands.console import follow, make_console, warn
from diffussm_cli.errors import ConfigError

DEFAULT_MODELS = "xl,dit-xl/2,dit-xl/1"
WORK = "forward,forward+backward,guided step"


def profile(
    grid: Annotated[list[str] | None, typer.Argument(metavar="[LETTER=VALUES]...", help="More of --sweep.")] = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help=f"As {DEFAULT_MODELS} (the default), s/2, xl/1-m1, dit-xl/1-m2."),
    ] = None,
    resolution: Annotated[str, typer.Option(metavar="LIST", help="Of --models: 256,512 or HxW, in pixels.")] = "256",
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="LETTER=VALUES", help="Every combination, as --sweep M=1,2,4 P=1,2.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="A preset or YAML file in place of --models. Repeatable.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field of the presets.")
    ] = None,
    count: Annotated[bool, typer.Option("--count/--no-count", help="Count by a trace of each model too.")] = True,
    latency: Annotated[bool, typer.Option("--latency", help="Measure time and memory here.")] = False,
    work: Annotated[str, typer.Option(metavar="LIST", help="What --latency measures.")] = WORK,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure models by torch.compile.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time in --latency.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each model has its turn.")] = 5,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Measure that many blocks and scale to all; the result says so.")
    ] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Of --latency.")] = "auto",
    device: options.Device = "auto",
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Measure an optimiser step of each preset; reckon memory and days.")
    ] = False,
    paper: Annotated[bool, typer.Option("--paper", help="Published figures beside ours, and stop.")] = False,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the paper's figure 3, and --latency, as png, svg or pdf.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """What models cost: parameters, Gflops by part, training compute, time and memory, DiffuSSM beside DiT."""
    if estimate and not preset:
        raise ConfigError("--estimate: name what is to be trained by --preset")
    if models and preset:
        raise ConfigError("--models: not together with --preset")
    kinds = parse_work(work) if latency else []
    from diffussm_cli.commands.tables import paper_tables, show_costs
    from diffussm_cli.profiling import report

    everything = [*(sweep or []), *(grid or [])]
    chosen = report.choose_models(models or DEFAULT_MODELS, resolution, preset or [], overrides or [], everything)
    console = make_console()
    if figure:
        from diffussm_cli.profiling import figures

        figures.check_path(figure)
    if paper:
        paper_tables(as_json)
        return
    setting = None
    if latency:
        setting, warnings = report.make_setting(precision, device, batch_size, repeats, depth, compiled)
        for warning in warnings:
            warn(console, warning)
    events = report.profile(chosen, counting=count, work=kinds, setting=setting, estimate=estimate)
    result = follow(console, events)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        show_costs(result)
    if figure:
        figures.draw(report.panels(result, [config for _, config in chosen]), figure)
        console.print(f"figure in {figure}")


def parse_work(text: str) -> list[str]:
    """Kinds of work between commas. Raises ConfigError."""
    kinds = [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in WORK.split(","):
            raise ConfigError(f"--work: {kind!r} must be one of {WORK.replace(',', ', ')}")
    return kinds

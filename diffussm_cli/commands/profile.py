"""`diffussm profile`."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from diffussm_cli.commands import completion, options
from diffussm_cli.commands.console import follow, make_console, print_json, warn
from diffussm_cli.commands.options import others, unused
from diffussm_cli.errors import ConfigError, writing
from diffussm_cli.machine.files import check_output
from diffussm_cli.machine.gpus import GPUS

DEFAULT_MODELS = "xl,dit-xl/2,dit-xl/1"
DEVICES = r"auto|cpu|mps|cuda(:\d+)?"
WORK = "forward,forward+backward,guided step"
OF_LATENCY = ("work", "compiled", "batch_size", "repeats", "precision", "device")
OF_FILES = ("figure",)
PAGE = ".html"

# Groups of options in `--help`.
MODELS = "Which models"
MEASURED = "What is measured"


def profile(
    ctx: typer.Context,
    trained: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            autocompletion=completion.runs,
            help="Folders of runs: what they have cost and reached, side by side, also as a page.",
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=MODELS,
            help=f"Such as s/2, xl/1-m1, dit-xl/1-m2. Default: {DEFAULT_MODELS}.",
        ),
    ] = None,
    resolution: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            rich_help_panel=MODELS,
            help="For --models: 256,512 or HxW, in pixels.",
        ),
    ] = "256",
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LETTER=VALUES",
            rich_help_panel=MODELS,
            help="Every value of M, P, D, N or depth, such as M=1,2,4. Repeatable: every "
            "combination.",
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            rich_help_panel=MODELS,
            autocompletion=completion.presets,
            help="A preset or YAML file, instead of --models. Repeatable.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.FIELD=VALUE",
            rich_help_panel=MODELS,
            autocompletion=completion.fields,
            help="Change a field of the presets.",
        ),
    ] = None,
    count: Annotated[
        bool,
        typer.Option(
            "--count/--no-count",
            rich_help_panel=MEASURED,
            help="Also count by a trace of each model.",
        ),
    ] = True,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency",
            rich_help_panel=MEASURED,
            help="Measure time, and memory on CUDA, on this machine.",
        ),
    ] = False,
    work: Annotated[
        str,
        typer.Option(metavar="LIST", rich_help_panel=MEASURED, help="What --latency measures."),
    ] = WORK,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            rich_help_panel=MEASURED,
            help="Measure models compiled by torch.compile.",
        ),
    ] = False,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", rich_help_panel=MEASURED, help="Batch size for --latency."
        ),
    ] = 1,
    repeats: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=MEASURED,
            help="Number of times each model is measured.",
        ),
    ] = 5,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        typer.Option(metavar="auto|fp32|bf16", rich_help_panel=MEASURED, help="For --latency."),
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            rich_help_panel=MEASURED,
            help="auto, cpu, cuda, cuda:1, mps; with --estimate, a GPU to predict for: "
            f"{', '.join(GPUS)}.",
        ),
    ] = "auto",
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            rich_help_panel=MEASURED,
            help="Measure one step of each preset; estimate memory and days. "
            "With --device h200 and the like, predict both without a GPU.",
        ),
    ] = False,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            rich_help_panel=options.RESULT,
            help="Print published figures beside ours and exit.",
        ),
    ] = False,
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.RESULT,
            help="Draw the paper's figure 3, and what --latency measures, as png, svg or pdf.",
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.RESULT,
            help="For RUN: the page, as html. Default: report.html in the first run.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show what models cost, DiffuSSM beside DiT: parameters, Gflops by part, training compute,
    time and memory. With RUN, show what runs have cost and reached, and write a page that compares
    them.
    """
    if trained:
        _compare_runs(ctx, trained, page, as_json)
        return

    # Mistakes first, before torch is imported.
    if estimate and not preset:
        raise ConfigError("--estimate: choose what to measure with --preset")
    if models and preset:
        raise ConfigError("--models: cannot be combined with --preset")
    if paper and (line := unused(ctx, OF_FILES, "--paper only prints")):
        raise ConfigError(f"{line}; give --paper alone")
    predicted = device in GPUS
    if predicted and (latency or not estimate):
        raise ConfigError(
            f"--device: {device} is a GPU to predict for, with --estimate and without --latency"
        )
    if not predicted and not latency and not re.fullmatch(DEVICES, device):
        raise ConfigError(
            f"--device: {device!r} must be one of auto, cpu, cuda, cuda:1, mps, "
            f"or a GPU to predict for: {', '.join(GPUS)}"
        )
    kinds = parse_work(work) if latency else []
    if page:
        raise ConfigError("--page: needs the folders of runs, as: diffussm profile RUN RUN")

    from diffussm_cli.commands.tables import paper_tables, show_costs
    from diffussm_cli.profiling import figures, report

    chosen = report.choose_models(
        models or DEFAULT_MODELS, resolution, preset or [], overrides or [], sweep or []
    )
    if figure:
        figures.check_figure(figure)
    console = make_console()
    if paper:
        if line := unused(ctx, others(ctx, "paper", "as_json"), "--paper only prints"):
            warn(console, line)
        paper_tables(as_json)
        return

    setting = None
    without_latency = [name for name in OF_LATENCY if not (predicted and name == "device")]
    if not latency and (line := unused(ctx, without_latency, "there is no --latency")):
        warn(console, line)
    if preset and (line := unused(ctx, ("resolution",), "a preset has its own data.resolution")):
        warn(console, line)
    if latency:
        setting, warnings = report.make_setting(precision, device, batch_size, repeats, compiled)
        for warning in warnings:
            warn(console, warning)
    events = report.profile(
        chosen,
        counting=count,
        work=kinds,
        setting=setting,
        estimate=estimate,
        gpu=device if predicted else None,
    )
    result = follow(console, events)

    if as_json:
        print_json(result, console)
    else:
        show_costs(result)
    if figure:
        figures.draw(figures.panels(result, [config for _, config in chosen]), figure)
        console.print(f"figure written to {figure}")


def _compare_runs(ctx: typer.Context, roots: list[Path], page: Path | None, as_json: bool) -> None:
    """Print what runs have cost and reached, and write the page of the first, with the others.

    Raises:
        DiffussmError: if a folder is no run, or the page cannot be written.
    """
    from diffussm_cli import runs
    from diffussm_cli.commands.tables import runs_table
    from diffussm_cli.runs.report import compare, read_runs, write_page

    # Mistakes first.
    console = make_console()
    if line := unused(ctx, others(ctx, "trained", "page", "as_json"), "runs have been trained"):
        warn(console, line)
    for root in roots:
        if not (root / runs.CONFIG).is_file():
            remedy = "to profile a preset: diffussm profile --preset NAME"
            if "=" in root.name:
                remedy = "each LETTER=VALUES needs a --sweep of its own"
            raise ConfigError(f"RUN: {str(root)!r} is no folder of a run; {remedy}")
    page = page or roots[0] / runs.REPORT
    check_output(page, "--page", (PAGE,), roots, {runs.REPORT})

    read = read_runs(roots)
    compared = compare(read)
    with writing(f"--page: cannot write {str(page)!r}", ConfigError):
        write_page(read, page, compared)

    if as_json:
        rows = [{"run": str(r)} | values for r, values in zip(roots, compared["summaries"])]
        print_json({"runs": rows, "report": str(page)}, console)
    else:
        runs_table(compared["names"], compared["facts"])
    console.print(f"report: {page}")


def parse_work(text: str) -> list[str]:
    """Parse comma-separated kinds of work. Raises ConfigError."""
    kinds = [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in WORK.split(","):
            raise ConfigError(f"--work: {kind!r} must be one of {WORK.replace(',', ', ')}")
    return kinds

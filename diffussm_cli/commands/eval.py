"""`diffussm eval`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from diffussm_cli.commands import completion, options
from diffussm_cli.commands.console import follow, make_console, print_json, say, warn
from diffussm_cli.commands.options import unused
from diffussm_cli.commands.requests import (
    overridden_sampling,
    parse_classes,
    parse_prompts,
    parse_size,
)
from diffussm_cli.commands.tables import metrics_table
from diffussm_cli.config import METRICS, USUAL_METRICS
from diffussm_cli.errors import ConfigError

MADE = "A reference is made"  # a group of options in `--help`

# Parameters that have a meaning only for images that are drawn from a run.
OF_RUN: tuple[str, ...] = (
    "ema",
    "objective",
    "ema_width",
    "num",
    "classes",
    "balanced",
    "prompts",
    "negative",
    "overrides",
    "precision",
)
OF_SCORES = ("reference", "metrics", "out", "as_json")
OF_REFERENCE = ("ref_images",)

# Facts of meta.json that are shown with the scores.
REQUEST = (
    "sampler",
    "steps",
    "guidance",
    "guidance_channels",
    "guidance_interval",
    "guide",
    "num",
    "first_seed",
)
META_SHOWN = ("run", "step", "ema", "ema_width", *REQUEST, "label_choice")


def evaluate(
    ctx: typer.Context,
    samples: Annotated[
        str | None,
        typer.Argument(
            metavar="SAMPLES",
            autocompletion=completion.models,
            help="A folder of PNGs, an .npz (arr_0, uint8 NHWC), or a run to draw from, "
            "as in sample.",
        ),
    ] = None,
    target: Annotated[
        Path | None, typer.Argument(metavar="REF.npz", help="The file that --make-ref writes.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            rich_help_panel=options.COMPARED,
            help="An .npz from ADM or --make-ref, or images. Default: the run's.",
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            rich_help_panel=options.COMPARED,
            help=f"{', '.join(METRICS)}, or all.",
        ),
    ] = ",".join(USUAL_METRICS),
    extractor: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            rich_help_panel=options.COMPARED,
            help="inception, digits, efficientnet, dinov2, a .pt2 or .pt file, module:factory, "
            "or CLIP by folder or name.",
        ),
    ] = "auto",
    extractor_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            rich_help_panel=options.COMPARED,
            help="Weights in place of a download: the file of inception, the folder of dinov2.",
        ),
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW",
            rich_help_panel=options.COMPARED,
            help="Crop reference images to it, as in ADM. Default: the run's.",
        ),
    ] = None,
    ema: options.Average = None,
    objective: options.Objective = None,
    ema_width: options.AverageWidth = None,
    num: Annotated[
        int,
        typer.Option(
            "--num",
            "-n",
            min=2,
            max=options.MAX_IMAGES,
            metavar="N",
            rich_help_panel=options.DRAWN,
            help="Number of images to draw from a run.",
        ),
    ] = 50_000,
    classes: options.Classes = None,
    balanced: options.Balanced = False,
    prompts: options.Prompts = None,
    negative: options.Negative = None,
    seed: options.Seed = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="sample.FIELD=VALUE",
            rich_help_panel=options.HOW,
            autocompletion=completion.sampling_fields,
            help="Change how a run draws, such as sample.steps=25 or sample.guidance=2. "
            "Repeatable.",
        ),
    ] = None,
    precision: options.Precision = "auto",
    batch_size: options.BatchSize = 64,
    device: options.Device = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=options.COMPUTER,
            help="Folder for the cache. Default: that of the variable DIFFUSSM_CACHE, or "
            "~/.cache/diffussm.",
            envvar="DIFFUSSM_CACHE",
        ),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--cache-features/--no-cache",
            rich_help_panel=options.COMPUTER,
            help="Cache features for next time.",
        ),
    ] = True,
    make_ref: Annotated[
        bool,
        typer.Option(
            "--make-ref",
            rich_help_panel=MADE,
            help="Make the reference file REF.npz from the images in SAMPLES and exit.",
        ),
    ] = False,
    ref_images: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=MADE,
            help="Number of images, chosen by --seed, that --make-ref keeps for recall.",
        ),
    ] = 10_000,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.RESULT,
            help="File for the result. Default: results.json beside the samples; of NAME.npz, "
            "NAME.results.json.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure samples against a reference: FID, sFID, Inception Score, precision, recall, KID, by
    ADM's protocol.
    """
    if samples is None:
        raise ConfigError(
            "eval: give SAMPLES, for example: diffussm eval images/ --reference REF.npz"
        )
    if make_ref and target is None:
        raise ConfigError("REF.npz: --make-ref needs it: diffussm eval --make-ref IMAGES REF.npz")
    if target is not None and not make_ref:
        raise ConfigError(
            f"REF.npz: {str(target)!r} is written by --make-ref alone; to compare SAMPLES with it, "
            f"give --reference {shlex.quote(str(target))}"
        )
    from diffussm_cli.evaluation.results import UnsavedResult, find_run_at
    from diffussm_cli.evaluation.session import evaluate, make_reference
    from diffussm_cli.machine.files import default_cache
    from diffussm_cli.machine.processes import read_world

    console = make_console(quiet=read_world().rank > 0)

    def warn_unused(names: tuple[str, ...], because: str) -> None:
        if line := unused(ctx, names, because):
            warn(console, line)

    # What both uses of the command take.
    common: dict[str, Any] = {
        "extractor": extractor,
        "extractor_weights": extractor_weights,
        "resolution": None if resolution is None else parse_size(resolution),
        "seed": seed,
        "batch_size": batch_size,
        "device": device,
        "cache": (cache or default_cache()) if keep else None,
    }
    if keep and common["cache"] is None:
        warn(console, "features are not cached: there is no home folder; set --cache FOLDER")

    # A reference is made.
    if make_ref:
        warn_unused((*OF_RUN, *OF_SCORES), "--make-ref draws and compares nothing")
        assert target is not None, "checked above"
        written = follow(console, make_reference(samples, target, count=ref_images, **common))
        if written is not None:
            say(written)
        return

    # Samples are measured.
    warn_unused(OF_REFERENCE, "there is no --make-ref")
    trained = find_run_at(samples, ema, objective, ema_width)
    drawn: dict[str, Any] = {}
    if trained is None:
        warn_unused((*OF_RUN, "seed"), "SAMPLES are images, not a run")
    else:
        drawn = {
            "num": num,
            "classes": parse_classes(classes, trained.config, balanced, "--prompts"),
            "prompts": parse_prompts(None, prompts),
            "negative": negative,
            "sampling": overridden_sampling(trained.config, overrides or []),
            "precision": precision,
        }
    events = evaluate(samples, reference, metrics, out=out, run=trained, **common, **drawn)
    try:
        result = follow(console, events)
    except UnsavedResult as e:
        show(console, e.result, as_json)
        raise
    if result is not None:
        show(console, result, as_json)


def show(console, result: dict[str, Any], as_json: bool) -> None:
    """Print one JSON object, or a table on stdout and the settings of the samples on stderr."""
    if as_json:
        print_json(result, console, indent=None)
        return
    facts = {k: result["meta"][k] for k in META_SHOWN if result["meta"].get(k) is not None}
    if facts:
        console.print(", ".join(f"{k} {v}" for k, v in facts.items()))
    metrics_table(result)

"""`diffussm sample`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diffussm_cli.commands import completion, options
from diffussm_cli.commands.console import follow, make_console, say, warn
from diffussm_cli.commands.options import unused
from diffussm_cli.commands.requests import parse_classes, parse_prompts, sampling_request
from diffussm_cli.config import bundled_names

FROM_IMAGE = "From an image"  # a group of options in `--help`


def sample(
    ctx: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            autocompletion=completion.models,
            help="Run folder, its final/, a checkpoint, a published DiT .pt, "
            f"a model of the package ({', '.join(bundled_names())}), "
            "or OWNER/NAME[@REVISION] on the hub. Default: the newest run.",
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
            min=1,
            max=options.MAX_IMAGES,
            metavar="N",
            rich_help_panel=options.DRAWN,
            help="Number of images. Under torchrun, use -n.",
        ),
    ] = 40,
    classes: options.Classes = None,
    balanced: options.Balanced = False,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    negative: options.Negative = None,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    sampler: options.Sampler = None,
    guidance: options.Guidance = None,
    guidance_channels: options.GuidanceChannels = None,
    guidance_interval: options.GuidanceInterval = None,
    guide_with: options.GuideWith = None,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=FROM_IMAGE,
            help="Begin with this image of the run's size, in place of noise.",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=FROM_IMAGE,
            help="Draw --image anew only where this picture is white; keep the rest.",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            rich_help_panel=FROM_IMAGE,
            help="How much of --image is drawn again; 0: nothing. Default: 0.8; 1 with --mask.",
        ),
    ] = None,
    interpolate: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="SEED SEED",
            rich_help_panel=options.DRAWN,
            help="Draw --num images that go from that of one seed to that of another.",
        ),
    ] = None,
    batch_size: options.BatchSize = 64,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=options.RESULT,
            help="Folder for the images. Default: RUN/images, numbered if taken.",
        ),
    ] = None,
    npz: Annotated[
        bool,
        typer.Option(
            "--npz", rich_help_panel=options.RESULT, help="Also write samples.npz, arr_0 in NHWC."
        ),
    ] = False,
    grid: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.RESULT,
            help="File for the grid. Default: OUT/grid.png.",
        ),
    ] = None,
    film: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.RESULT,
            help="File (.gif, .webp) for a film of the denoising of the first ten images.",
        ),
    ] = None,
    precision: options.Precision = "auto",
    device: options.Device = "auto",
) -> None:
    """Draw images from a trained run: PNG files, a grid, and a meta.json that records how they were
    made.

    After an interruption, the same command continues the work. Under torchrun, the processes share
    it.
    """
    from diffussm_cli.machine.processes import read_world
    from diffussm_cli.runs import find_run
    from diffussm_cli.sampling import sample as draw

    console = make_console(quiet=read_world().rank > 0)
    trained = find_run(run, ema, objective, ema_width)
    if run is None:
        console.print(f"the newest run: {trained.label}")
    if interpolate and (line := unused(ctx, ("seed",), "--interpolate names the seeds")):
        warn(console, line)
    request: dict[str, Any] = {
        "seed": seed,
        "classes": parse_classes(classes, trained.config, balanced),
        "prompts": parse_prompts(prompt, prompts),
        "negative": negative,
        "sampling": sampling_request(
            trained.config,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            guidance_channels=guidance_channels,
            guidance_interval=guidance_interval,
            guide=guide_with,
        ),
        "batch_size": batch_size,
        "precision": precision,
        "device": device,
        "grid": grid,
        "npz": npz,
        "film": film,
        "image": image,
        "mask": mask,
        "strength": strength,
        "interpolate": interpolate,
    }
    try:
        path = follow(console, draw(trained, out, num, **request))
    except KeyboardInterrupt:
        console.print(
            "interrupted; finished images are kept, and the same command continues from there"
        )
        raise
    if read_world().rank == 0:
        say(path)

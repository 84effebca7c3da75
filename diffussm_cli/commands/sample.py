"""`diffussm sample`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from diffussm_cli.commands import options
from diffussm_cli.commands.options import bar, find_trained, make_console, parse_classes, sampling_request, warn
from diffussm_cli.errors import writing


def sample(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", help="Run folder, its final/, a checkpoint, or a published DiT's .pt. Default: newest run."
        ),
    ] = None,
    num: Annotated[
        int, typer.Option("--num", "-n", min=1, max=options.MAX_IMAGES, help="How many images; torchrun wants -n.")
    ] = 40,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    sampler: options.SamplerName = None,
    guidance: options.Guidance = None,
    guidance_channels: options.GuidanceChannels = None,
    guidance_interval: options.GuidanceInterval = None,
    batch_size: options.BatchSize = 64,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the images. Default: RUN/images, numbered if it holds others.")
    ] = None,
    npz: Annotated[bool, typer.Option("--npz", help="Also write samples.npz, arr_0 in NHWC.")] = False,
    grid: Annotated[Path | None, typer.Option(help="Where the grid goes. Default: OUT/grid.png.")] = None,
    precision: options.Precision = "auto",
    device: options.Device = "auto",
) -> None:
    """Draw images from a trained run: PNG files, one grid, and meta.json that says how they were made.

    The same command goes on where it was interrupted. Under torchrun the processes share the work.
    """
    from diffussm_cli.distributed import read_share
    from diffussm_cli.samples import IMAGES, SampleFolder, Sampler, free_folder

    console, trained = make_console(quiet=read_share().rank > 0), find_trained(run)
    if run is None:
        console.print(f"the newest run: {trained.label}")
    how = sampling_request(trained.config, sampler, steps, guidance, guidance_channels, guidance_interval)
    labels = parse_classes(classes, trained.config)
    seeds = range(seed, seed + num)
    with console.status("loading"):
        ready = Sampler(trained, how, labels, batch_size, precision, device)
        facts = ready.facts(seeds)
    folder = out or free_folder(trained.root, facts)
    if out is None and folder.name != IMAGES:
        console.print(f"{trained.root / IMAGES} holds images of another request; these go to {folder}")
    draw(console, SampleFolder(folder, ready, seeds, facts), grid or folder / "grid.png", npz)


def draw(console, folder, grid: Path, npz: bool = False) -> None:
    """Draw what a SampleFolder lacks, then its grid and meta.json. Raises DiffussmError."""
    from diffussm_cli.distributed import gather, meeting, read_share

    share = read_share()
    sampler, name = folder.sampler, shlex.quote(str(folder.path))
    if sampler.warning:
        warn(console, sampler.warning)
    try:
        with writing(f"--out: cannot write to {str(folder.path)!r}"), meeting(share):
            if share.rank == 0:
                folder.begin()
            gather(None, share)
            with console.status("looking for what is there"):
                batches = folder.missing(share)
            gather(None, share)  # all have looked before one draws
            with bar(console, sum(map(len, batches))) as advance:
                for n in folder.draw(batches):
                    advance(n)
            gather(None, share)
            if share.rank == 0:
                folder.finish(grid, npz)
    except KeyboardInterrupt:
        console.print(f"interrupted; the images in {name} are kept, and the same command goes on from there")
        raise
    if share.rank == 0:
        console.print(f"{len(folder.seeds)} images of {sampler.trained.label} in {name}")
        typer.echo(grid)

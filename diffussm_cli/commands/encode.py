"""`diffussm encode`."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diffussm_cli.commands import options
from diffussm_cli.commands.console import follow, make_console, say, warn
from diffussm_cli.commands.options import others, unused
from diffussm_cli.commands.requests import parse_size
from diffussm_cli.config import DEFAULT_VAE
from diffussm_cli.errors import ConfigError

MULTIPLE = 8

# Groups of options in `--help`.
IMAGES = "Which images"
NETWORKS = "What encodes them"


def encode(
    ctx: typer.Context,
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="SOURCE",
            help="One folder per class, a flat folder, tar or parquet shards, .npz, CIFAR, or "
            "hub:OWNER/NAME.",
        ),
    ] = None,
    target: Annotated[
        Path | None, typer.Argument(metavar="TARGET", help="Folder for the latents.")
    ] = None,
    resolution: Annotated[
        str,
        typer.Option(
            metavar="N|HxW",
            rich_help_panel=IMAGES,
            help=f"In pixels, a multiple of {MULTIPLE} and of the VAE's downsampling; images are "
            "cropped as in ADM.",
        ),
    ] = "256",
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER",
            rich_help_panel=NETWORKS,
            help=f"Hub name or folder. Default: {DEFAULT_VAE}.",
        ),
    ] = None,
    columns: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            rich_help_panel=IMAGES,
            help="Of parquet shards: image=NAME,label=NAME,text=NAME; of .npz files the first two. "
            "Default: found.",
        ),
    ] = "",
    text: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER",
            rich_help_panel=NETWORKS,
            help="Also store captions, by this text encoder.",
        ),
    ] = None,
    text_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            max=1024,
            metavar="N",
            rich_help_panel=NETWORKS,
            help="Number of tokens stored of each caption.",
        ),
    ] = 0,
    precision: Annotated[
        Literal["fp32", "bf16"],
        typer.Option(metavar="fp32|bf16", rich_help_panel=NETWORKS, help="Precision of the VAE."),
    ] = "fp32",
    flip: Annotated[
        bool,
        typer.Option(
            "--flip/--no-flip",
            rich_help_panel=IMAGES,
            help="Also encode each image flipped horizontally.",
        ),
    ] = True,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            max=2**16,
            metavar="N",
            rich_help_panel=options.COMPUTER,
            help="Number of images encoded at a time.",
        ),
    ] = 64,
    shard_size: Annotated[
        int,
        typer.Option(
            min=1,
            max=1 << 20,
            metavar="N",
            rich_help_panel=options.RESULT,
            help="Number of images per file.",
        ),
    ] = 4096,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1024,
            metavar="N",
            rich_help_panel=options.COMPUTER,
            help="Processes that decode images. Default: one per core, at most 16.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            rich_help_panel=IMAGES,
            help="Stop with an error instead of skipping a file.",
        ),
    ] = False,
    device: options.Device = "auto",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            rich_help_panel=options.RESULT,
            help="Only check every file of the one folder given against its hash.",
        ),
    ] = False,
) -> None:
    """Encode images as VAE latents for training. After an interruption, the same command continues
    the work.

    With one folder that holds latents of an earlier version, convert them; no image is encoded.
    """
    # Mistakes first, before torch is imported.
    if verify and (source is None or target is not None):
        raise ConfigError("encode: give --verify LATENTS, and no other folder")
    if source is None or (target is None and not (verify or (source / "manifest.json").is_file())):
        raise ConfigError(
            "encode: give SOURCE and TARGET, for example: diffussm encode images/ latents/"
        )
    size = parse_size(resolution)
    if size[0] % MULTIPLE or size[1] % MULTIPLE:
        raise ConfigError(f"--resolution: {resolution} must be a multiple of {MULTIPLE}")

    from diffussm_cli.data import latents

    # What is not used.
    console = make_console()
    if verify or target is None:
        because = "--verify encodes nothing" if verify else "a store is converted, not encoded"
        if line := unused(ctx, others(ctx, "source", "verify"), because):
            warn(console, line)
    elif text is None and (line := unused(ctx, ("text_tokens",), "there is no --text")):
        warn(console, line)

    # A store that is there: checked, or converted.
    if verify:
        files = follow(console, latents.verify_store(source))
        say(f"{files} files of {source} match their hashes")
        return
    if target is None:
        follow(console, latents.convert_store(source))
        return

    # Images.
    settings: dict[str, Any] = {
        "precision": precision,
        "flip": flip,
        "batch_size": batch_size,
        "device": device,
    }
    settings |= {
        "columns": [part for part in columns.split(",") if part],
        "text": text,
        "text_tokens": text_tokens,
    }
    settings |= {"shard_size": shard_size, "workers": workers, "strict": strict}
    try:
        done = follow(
            console, latents.encode_images(source, target, size, vae or DEFAULT_VAE, **settings)
        )
    except KeyboardInterrupt:
        console.print(
            "interrupted; finished shards are kept, and the same command continues from there"
        )
        raise

    if done:
        console.print(f"check them: diffussm encode --verify {shlex.quote(str(target))}")

"""`diffussm encode`."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from diffussm_cli.commands.options import bar, make_console
from diffussm_cli.errors import ConfigError, DataError

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
MULTIPLE = 8


def encode(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="SOURCE", help="One folder a class, a flat folder, or tar shards of WebDataset."),
    ] = None,
    target: Annotated[Path | None, typer.Argument(metavar="TARGET", help="Folder for the latents.")] = None,
    resolution: Annotated[
        str, typer.Option(metavar="N|HxW", help=f"In pixels, multiples of {MULTIPLE}; images are cropped as ADM does.")
    ] = "256",
    vae: Annotated[
        str | None, typer.Option(metavar="NAME|FOLDER", help=f"Hub name or folder. Default: {DEFAULT_VAE}.")
    ] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the VAE.")] = "fp32",
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Encode the mirrored images too.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, max=2**16, help="Images encoded at a time.")] = 64,
    shard_size: Annotated[int, typer.Option(min=1, max=1 << 20, help="Images a file.")] = 4096,
    workers: Annotated[
        int | None,
        typer.Option(min=0, max=1024, help="Processes that decode images. Default: one per core, at most 16."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Make the first skipped file an error.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    verify: Annotated[
        bool, typer.Option("--verify", help="Only check every file of the one folder given against its hash.")
    ] = False,
    repair: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="Encode the damaged shards of the one folder given again.")
    ] = None,
) -> None:
    """Turn images into VAE latents, once, for training. The same command goes on where it was interrupted."""
    if verify or repair is not None:
        if source is None or target is not None or (verify and repair is not None):
            raise ConfigError("encode: --verify LATENTS, or --repair SOURCE LATENTS, and nothing beside it")
        if repair is None:
            check(source)
        else:
            mend(source, repair, vae, processes(workers), device)
    elif source is None or target is None:
        raise ConfigError("encode: name SOURCE and TARGET, as: diffussm encode images/ latents/")
    else:
        size = parse_resolution(resolution)
        if size[0] % MULTIPLE or size[1] % MULTIPLE:
            raise ConfigError(f"--resolution: {resolution} must be a multiple of {MULTIPLE}")
        how = {"precision": precision, "flip": flip, "batch_size": batch_size, "shard_size": shard_size}
        fill(source, target, size, vae or DEFAULT_VAE, how, processes(workers), strict, device)


def fill(
    source: Path,
    target: Path,
    resolution: tuple[int, int],
    vae: str,
    how: dict,
    workers: int,
    strict: bool = False,
    device: str = "auto",
) -> None:
    """Encode a source into a store, or what is missing of it; `how` holds the fields of StoreSettings by their names.

    Raises:
        DiffussmError: before the VAE is loaded, where it can be known by then.
    """
    from diffussm_cli.data import encoding, listing
    from diffussm_cli.data.vae import read_facts
    from diffussm_cli.distributed import read_share

    console, share = make_console(), read_share()
    with console.status("listing"):
        found = listing.list_source(source)
    if strict and found.ignored:
        raise DataError(f"--strict: {found.ignored[0][0]}: {found.ignored[0][1]}")
    with encoding.open_store(target, source, share):
        with console.status("loading the VAE"):
            facts = read_facts(vae)
            encoding.check_resolution(resolution, facts)
            loaded = load(facts, how["precision"], device)
        settings = make_settings(found, resolution, loaded, how)
        manifest = encoding.begin(target, found, settings, share)
        encoder = encoding.Encoder(found, settings, target, loaded, workers, strict)
        if manifest.complete:
            console.print(f"{target} is complete already")
        else:
            todo = encoding.unfinished(target, settings, share)
            run(console, encoding.encode(encoder, share), sum(len(settings.span(i)) for i in todo))
    if share.rank == 0:
        summarise(console, target, found, settings)


def mend(store: Path, source: Path, vae: str | None, workers: int, device: str = "auto") -> None:
    """Encode the damaged shards of a store again. Raises DiffussmError."""
    from diffussm_cli.data import encoding, listing
    from diffussm_cli.data.latents import read_manifest
    from diffussm_cli.data.vae import read_facts
    from diffussm_cli.distributed import ALONE

    console, share = make_console(), ALONE
    old = read_manifest(store, "--repair").settings
    with console.status("checking"):
        shards = encoding.damaged_shards(store)
    with console.status("listing"):
        found = listing.list_source(source)
    with encoding.open_store(store, source, share):
        with console.status("loading the VAE"):
            loaded = load(read_facts(vae or old.vae), old.precision, device)
        how = {name: getattr(old, name) for name in ("precision", "flip", "batch_size", "shard_size")}
        new = make_settings(found, old.resolution, loaded, how | {"vae": old.vae})
        encoding.refuse_difference(store, old, new, found)
        encoder = encoding.Encoder(found, old, store, loaded, workers)
        run(console, encoding.repair(encoder, shards), sum(len(old.span(i)) for i in shards))
    console.print(f"{len(shards)} shards of {store} encoded again")


def check(store: Path) -> None:
    """Check every file of a store. Raises DataError naming the damaged ones."""
    from diffussm_cli.data.latents import verify

    damaged, files = [], 0
    with make_console().status("checking"):
        for name, problem in verify(store):
            files += 1
            if problem:
                damaged.append(f"{name} ({problem})")
    if damaged:
        some = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        remedy = f"diffussm encode --repair SOURCE {shlex.quote(str(store))}"
        raise DataError(f"--verify: {len(damaged)} of {files} files are damaged: {some}; repair with: {remedy}")
    typer.echo(f"{files} files of {store} are as they were written")


# ------------------------------------------------------------------------------------------------- parts
def load(facts, precision: str, device: str):
    """The VAE on the device of this process. Raises DiffussmError."""
    from diffussm_cli.data.vae import load_vae
    from diffussm_cli.device import keep_freed_memory, pick_device, pick_dtype

    keep_freed_memory()
    where = pick_device(device)
    return load_vae(facts, where, pick_dtype(precision, where))


def make_settings(found, resolution: tuple[int, int], vae, how: dict):
    """StoreSettings of a listing and a loaded VAE."""
    from diffussm_cli.data.latents import StoreSettings

    facts = vae.facts
    values = {
        "source_sha256": found.sha256(),
        "images": len(found.entries),
        "class_names": found.class_names,
        "resolution": resolution,
        "vae": facts.name,
        "vae_config_sha256": facts.config_sha256,
        "vae_weights_sha256": vae.weights_sha256,
        "channels": facts.channels,
        "downsample": facts.downsample,
        "scale": facts.scale,
        "shift": facts.shift,
    }
    return StoreSettings(**values | how)


def processes(workers: int | None) -> int:
    """The number of processes that decode, by default one per core of this process."""
    from diffussm_cli.distributed import own_cores

    return min(16, own_cores()) if workers is None else workers


def parse_resolution(text: str) -> tuple[int, int]:
    """`256` or `256x384` (height x width). Raises ConfigError."""
    found = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", text)
    if not found:
        raise ConfigError(f"--resolution: {text!r} must be a number of pixels or HxW, as 256 or 256x384, up to 9999")
    return int(found[1]), int(found[2] or found[1])


def run(console, steps: Iterator, total: int) -> None:
    """Drive the work to its end under a bar."""
    skipped = 0
    try:
        with contextlib.closing(steps), bar(console, total) as advance:
            for step in steps:
                skipped += step.skipped
                advance(step.images, f"{skipped} skipped")
    except KeyboardInterrupt:
        console.print("interrupted; finished shards are kept, and the same command goes on from there")
        raise


def summarise(console, target: Path, found, settings) -> None:
    """Counts, where the reasons are, and what to do next."""
    from diffussm_cli.data.latents import SKIPPED, read_manifest

    skipped = sum(s.skipped for s in read_manifest(target, "TARGET").shards)
    kept = f"{settings.images - skipped} images"
    classes = f" of {len(found.class_names)} classes" if found.class_names else ""
    console.print(f"{kept}{classes} in {target}")
    if skipped or found.ignored:
        reasons = f"reasons in {target / SKIPPED}"
        console.print(
            f"skipped: {skipped} unreadable images, {len(found.ignored)} other files; {reasons}", soft_wrap=True
        )
    console.print(f"check them: diffussm encode --verify {shlex.quote(str(target))}")

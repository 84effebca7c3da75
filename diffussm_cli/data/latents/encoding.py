"""Encode a source of images into a store of latents, by one or more processes.

Interruptions change no bytes.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffussm_cli.config import DEFAULT_VAE, HUB, check_whole, named_columns
from diffussm_cli.data.latents.convert import convert_if_earlier
from diffussm_cli.data.latents.encoder import Encoder, open_captions
from diffussm_cli.data.latents.manifest import StoreSettings
from diffussm_cli.data.latents.store import (
    Store,
    begin,
    check_same_request,
    locked_store,
    missing_shards,
    read_store,
    remove_if_unreadable,
)
from diffussm_cli.data.listing import LeftOut, Listing, empty_classes, left_out_line, list_source
from diffussm_cli.data.listing.hub import fetch_shards
from diffussm_cli.data.vae import VAE, load_vae
from diffussm_cli.data.vae_facts import VAEFacts, read_facts
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.events import Event, Message, Stage, Warned
from diffussm_cli.machine.device import keep_freed_memory, pick_device, pick_dtype
from diffussm_cli.machine.processes import (
    World,
    first_works,
    gather,
    own_cores,
    process_group,
    read_world,
)


def encode_images(
    source: Path | str,
    target: Path | str,
    resolution: tuple[int, int] = (256, 256),
    vae: str = DEFAULT_VAE,
    *,
    columns: Sequence[str] = (),
    text: str | None = None,
    text_tokens: int = 0,
    precision: str = "fp32",
    flip: bool = True,
    batch_size: int = 64,
    shard_size: int = 4096,
    workers: int | None = None,
    strict: bool = False,
    device: str = "auto",
) -> Generator[Event, None, Store | None]:
    """Encode a source into a store.

    The same call resumes after an interruption. The processes of torchrun share the shards.

    Args:
        source: one folder per class, a flat folder, tar or parquet shards, .npz files, CIFAR's
            batches, a pattern of names in a folder, or hub:OWNER/NAME.
        target: the folder of the store.
        resolution: (height, width) in pixels; images are cropped as ADM does.
        vae: a hub name or a folder.
        columns: of parquet shards or .npz files, such as `image=photo`; those not given are found
            by their usual names.
        text: the text encoder by which captions are stored too, with `text_tokens` tokens of each.
        precision: of the VAE, fp32 or bf16.
        flip: also encode the horizontal flip of every image.
        batch_size, shard_size: images that are encoded at a time, and those in a file.
        workers: number of processes that decode images; by default one per core of this process,
            at most 16.
        strict: raise an error for the first unusable file, instead of skipping it.
        device: of the VAE and the text encoder: auto, cpu, cuda, cuda:1, mps.

    Yields:
        events.

    Returns:
        The store; None on processes other than the first.

    Raises:
        DiffussmError: for anything that a user can fix; before the VAE is loaded where possible.
    """
    for side in resolution:
        check_whole("resolution", side, least=1)
    check_whole("batch_size", batch_size, least=1)
    check_whole("shard_size", shard_size, least=1)
    source = Path(source)
    target = Path(target)
    world = read_world()

    # The images.
    yield Stage("listing")
    if str(source).startswith(HUB):
        source, name = fetch_shards(str(source))
        yield Message(f"read from {name}")
    listing = list_source(source, columns=named_columns(columns, "--columns"))
    if strict and listing.ignored:
        raise DataError(f"--strict: {listing.ignored[0][0]}: {listing.ignored[0][1]}")
    if target.resolve().is_relative_to(source.resolve()):
        raise DataError(f"TARGET: {str(target)!r} lies inside SOURCE; choose a folder outside it")

    with process_group(world), locked_store(target, world):
        yield Stage("loading the VAE")
        facts = read_facts(vae)
        check_resolution(resolution, facts)
        loaded = load_vae_on(facts, precision, device)

        # The captions, if a text encoder is named.
        unused: list[LeftOut] = []
        captions = open_captions(listing, text, text_tokens, loaded.device, unused)

        # The store.
        options: dict[str, Any] = {"precision": precision, "flip": flip}
        options |= {"batch_size": batch_size, "shard_size": shard_size, "columns": tuple(columns)}
        options |= captions.settings if captions else {}
        settings = make_settings(listing, resolution, loaded, options)
        processes = decoding_processes(workers)
        encoder = Encoder(listing, settings, target, loaded, processes, strict, captions)
        yield from encode(encoder, world)

    # What is in it, and what is not.
    if world.rank:
        return None
    store = read_store(target, "TARGET")
    yield from _summary(store, source, [*listing.left_out(with_text=captions is not None), *unused])
    if line := empty_classes(listing.class_names, [e.label for e in listing.entries]):
        yield Warned(line)
    return store


def encode(encoder: Encoder, world: World) -> Iterator[Event]:
    """Begin or continue a store: each process encodes its share of the missing shards.

    All processes wait for one another at the end.

    Raises:
        DataError: if the store was begun with other settings or cannot be written, for the first
            skipped image if the encoder is strict, or if no image can be read; the store is then
            removed.
        RunError: if another process is lost.
    """
    root = encoder.store
    settings = encoder.settings
    listing = encoder.listing

    # The first process begins the store, and says which shards are missing.
    missing: list[int] = []
    with first_works(world):
        if world.rank == 0:
            yield from convert_if_earlier(root)
            begin(root, listing, settings)
            missing = missing_shards(root, settings)
    if world.rank:
        check_same_request(root, listing, settings)

    missing = gather(missing, world)[0]
    there = settings.shards - len(missing)
    if not missing:
        yield Message(f"{root} is complete already")
        return
    if there:
        of_all = f"{there} of {settings.shards} shards of {root}"
        yield Message(f"{of_all} are there; the others are encoded")

    # Each process writes its share.
    yield from encoder.write(missing[world.rank :: world.size])
    if world.size > 1:
        yield Stage("waiting for the other processes")
    gather(None, world)
    if world.rank == 0:
        remove_if_unreadable(read_store(root, "TARGET"))


def _summary(store: Store, source: Path, unused: Sequence[LeftOut]) -> Iterator[Event]:
    """Report what is in the store, and in one line what is not."""
    settings = store.settings
    classes = f" of {len(settings.class_names)} classes" if settings.class_names else ""
    yield Message(f"{settings.images - store.skipped} images{classes} in {store.root}")

    unread = []
    if store.skipped:
        reasons = store.root / "shard-*.json"
        unread = [LeftOut(store.skipped, "image", f"not encoded; reasons in {reasons}")]
    line = left_out_line(source, [*unread, *unused])
    if line:
        yield Message(line)


# -------------------------------------------------------------------------------------- before work
def check_resolution(resolution: tuple[int, int], facts: VAEFacts) -> None:
    """Raises ConfigError for a resolution that the VAE cannot take."""
    if any(side % facts.downsample for side in resolution):
        height, width = resolution
        multiple = f"a multiple of {facts.downsample}, the downsampling of {facts.name}"
        raise ConfigError(f"--resolution: {height}x{width} must be {multiple}")


def load_vae_on(facts: VAEFacts, precision: str, device: str) -> VAE:
    """Load the VAE on the device of this process. Raises DiffussmError."""
    keep_freed_memory()
    where = pick_device(device)
    return load_vae(facts, where, pick_dtype(precision, where))


def make_settings(
    listing: Listing, resolution: tuple[int, int], vae: VAE, options: Mapping[str, Any]
) -> StoreSettings:
    """The settings of a store for a source; `options` are the fields that the user chooses."""
    facts = vae.facts
    values: dict[str, Any] = {
        "source_sha256": listing.sha256(),
        "arrays_sha256": listing.arrays_sha256(),
        "images": len(listing.entries),
        "class_names": listing.class_names,
        "resolution": resolution,
        "vae": facts.name,
        "vae_config_sha256": facts.config_sha256,
        "vae_weights_sha256": vae.weights_sha256,
        "channels": facts.channels,
        "downsample": facts.downsample,
        "scale": facts.scale,
        "shift": facts.shift,
    }

    return StoreSettings(**{**values, **options})


def decoding_processes(workers: int | None) -> int:
    """The number of processes that decode images, by default one per core of this process."""
    return min(16, own_cores()) if workers is None else workers

"""`diffussm sample`."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diffussm_cli import __version__
from diffussm_cli.config import Config, SampleConfig, check_sampling
from diffussm_cli.errors import ConfigError, RunError


def sample(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Run folder, its final/, or a checkpoint. Default: newest run.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="How many images.")] = 40,
    classes: Annotated[
        str | None, typer.Option(help="Labels in turn, as 3,7 or 0-9. Default: random, drawn from each seed.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; image i has seed + i.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the run's.")] = None,
    sampler: Annotated[
        Literal["ddpm", "ddim", "dpmpp", "unipc"] | None, typer.Option(help="Default: the run's.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Classifier-free guidance scale; 1: none. Default: the run's.")
    ] = None,
    guidance_channels: Annotated[
        Literal["all", "3"] | None, typer.Option(help="Guide all channels, or the first three as DiT published.")
    ] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(metavar="LO,HI", help="Guide only at timesteps LO <= t <= HI.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time; does not change them.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Folder for the images. Default: RUN/images.")] = None,
    npz: Annotated[bool, typer.Option("--npz", help="Also write samples.npz, arr_0 in NHWC.")] = False,
    grid: Annotated[Path | None, typer.Option(help="Where the grid goes. Default: OUT/grid.png.")] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Of the network.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Draw images from a trained run: PNG files, one grid, and meta.json that says how they were made."""
    from diffussm_cli import runs

    root = run or runs.newest_run(Path("runs"))
    if root is None:
        raise RunError("RUN: no run in runs/; train one first: diffussm train")
    trained = runs.find_run(root)
    interval = None if guidance_interval is None else parse_numbers(guidance_interval, "guidance-interval")
    asked = {
        "sampler": sampler,
        "steps": steps,
        "guidance": guidance,
        "guidance_channels": guidance_channels,
        "guidance_interval": interval,
    }
    how = dataclasses.replace(trained.config.sample, **{k: v for k, v in asked.items() if v is not None})
    check_sampling(how, trained.config)
    labels = parse_classes(classes, trained.config) if classes is not None else ()
    folder = out or trained.root / "images"
    draw(trained, how, range(seed, seed + num), labels, batch_size, folder, npz, grid, precision, device)


def draw(
    trained,
    how: SampleConfig,
    seeds: range,
    classes: tuple[int, ...],
    batch_size: int,
    folder: Path,
    npz: bool = False,
    grid: Path | None = None,
    precision: str = "fp32",
    device: str = "auto",
) -> None:
    """Write the images of `seeds`, a grid and meta.json below `folder`. Raises DiffussmError."""
    import torch
    from rich.console import Console

    from diffussm_cli import runs
    from diffussm_cli.data.images import save_grid, save_png, to_uint8
    from diffussm_cli.data.vae import open_decoding
    from diffussm_cli.device import keep_freed_memory, pick_device, pick_dtype
    from diffussm_cli.diffusion.process import GaussianDiffusion
    from diffussm_cli.generation import generate

    keep_freed_memory()
    console, config = Console(stderr=True), trained.config
    where = pick_device(device)
    dtype = pick_dtype(precision, where)
    model = runs.load_model(trained).to(where)
    decoding = open_decoding(config, where)
    if decoding.warning:
        console.print(f"warning: {decoding.warning}", style="bold", markup=False, soft_wrap=True)
    process = GaussianDiffusion.from_config(config.diffusion, where)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pixels, labels = [], []
        with progress(console, len(seeds)) as advance:
            for drawn in generate(model, process, how, seeds, classes, batch_size, dtype):
                images = to_uint8(decoding.decode(drawn.images))
                for seed, image in zip(drawn.seeds, images):
                    save_png(image, folder / f"{seed:06d}.png")
                pixels.append(images)
                labels += drawn.labels or []
                advance(len(images))
        everything = torch.cat(pixels)
        grid = grid or folder / "grid.png"
        grid.parent.mkdir(parents=True, exist_ok=True)
        save_grid(everything[:100], grid, columns=10 if len(everything) >= 10 else math.ceil(len(everything) ** 0.5))
        if npz:
            save_npz(everything, labels, folder / "samples.npz")
        arithmetic = {"precision": str(dtype).removeprefix("torch."), "device": where.type}
        facts = describe(trained, how, seeds, labels, **decoding.record, **arithmetic)
        (folder / "meta.json").write_text(json.dumps(facts, indent=1) + "\n")
    except OSError as e:
        raise RunError(f"--out: cannot write to {str(e.filename or folder)!r}: {e.strerror}") from e
    console.print(f"{len(everything)} images of {trained.label} in {folder}", soft_wrap=True)
    typer.echo(grid)


def save_npz(pixels, labels: list[int], path: Path) -> None:
    """uint8 NHWC as `arr_0`, as the ADM evaluation reads it, and labels as `arr_1` if there are any."""
    import numpy as np

    arrays = [pixels.permute(0, 2, 3, 1).numpy(), *([np.array(labels)] if labels else [])]
    with path.open("wb") as file:
        np.savez(file, *arrays)


def describe(trained, how: SampleConfig, seeds: range, labels: list[int], **others: Any) -> dict[str, Any]:
    """What decides these images, for meta.json."""
    import diffusers
    import torch

    from diffussm_cli.files import sha256

    return {
        "run": str(trained.root),
        "weights": trained.weights.name,
        "weights_sha256": sha256(trained.weights),
        "step": trained.step if trained.step is not None else trained.config.train.steps,
        "ema": trained.config.train.ema,
        **dataclasses.asdict(how),
        "guidance_interval": list(how.guidance_interval) or None,
        "seeds": [seeds.start, seeds.stop - 1],
        "labels": labels or None,
        "class_names": list(trained.config.data.class_names) or None,
        "null_class": trained.config.model.num_classes or None,
        "pixel_rule": "floor(clamp(127.5 x + 128, 0, 255))",
        **others,
        "versions": {"diffussm": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }


@contextlib.contextmanager
def progress(console, total: int):
    """A bar on stderr, moved by the number of finished images."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("image"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)


# ------------------------------------------------------------------------------------------------- parsing
def parse_classes(text: str, config: Config) -> tuple[int, ...]:
    """`3,7` or `0-9` or both, as labels of the model. Raises ConfigError."""
    n = config.model.num_classes
    if not n:
        raise ConfigError(f"--classes: {text!r} given, but the model is unconditional")
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = parse_numbers(f"{first},{last}" if dash else first, "classes")
        labels += range(ends[0], ends[-1] + 1)
    if not labels or not all(0 <= label < n for label in labels):
        raise ConfigError(f"--classes: {text!r} must name labels from 0 to {n - 1}")
    return tuple(labels)


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers between commas. Raises ConfigError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as e:
        raise ConfigError(f"--{option}: {text!r} must be whole numbers between commas") from e

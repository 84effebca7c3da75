"""Options that several commands share, and the bar that they show."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from diffussm_cli.config import Config, SampleConfig, check_sampling
from diffussm_cli.errors import ConfigError

MAX_IMAGES = 10**6  # images in one request

Classes = Annotated[
    str | None, typer.Option(help="Labels in turn, as 3,7 or 0-9. Default: random, drawn from each seed.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the first image; image i has seed + i.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the run's.")]
SamplerName = Annotated[Literal["ddpm", "ddim", "dpmpp", "unipc"] | None, typer.Option(help="Default: the run's.")]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="Classifier-free guidance scale; 1: none. Default: the run's.")
]
GuidanceChannels = Annotated[
    Literal["all", "3"] | None, typer.Option(help="Guide all channels, or the first three as DiT published.")
]
GuidanceInterval = Annotated[str | None, typer.Option(metavar="LO,HI", help="Guide only at timesteps LO <= t <= HI.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time; changes them by float rounding at most.")]
Precision = Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Of the network.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def sampling_request(
    config: Config,
    sampler: str | None,
    steps: int | None,
    guidance: float | None,
    guidance_channels: str | None,
    guidance_interval: str | None,
) -> SampleConfig:
    """The run's own sampling settings with what was asked for in their place. Raises ConfigError."""
    interval = None if guidance_interval is None else parse_numbers(guidance_interval, "guidance-interval")
    asked = {
        "sampler": sampler,
        "steps": steps,
        "guidance": guidance,
        "guidance_channels": guidance_channels,
        "guidance_interval": interval,
    }
    how = dataclasses.replace(config.sample, **{k: v for k, v in asked.items() if v is not None})
    check_sampling(how, config)
    return how


def parse_classes(text: str | None, config: Config) -> tuple[int, ...]:
    """`3,7` or `0-9` or both, as labels of the model; none for no text. Raises ConfigError."""
    if text is None:
        return ()
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


def find_trained(run: Path | None):
    """A trained run by its folder, the newest one by default. Raises RunError."""
    from diffussm_cli import runs
    from diffussm_cli.errors import RunError

    root = run or runs.newest_run(Path("runs"))
    if root is None:
        raise RunError("RUN: no run in runs/; train one first: diffussm train")
    return runs.find_run(root)


# ------------------------------------------------------------------------------------------------- what is shown
def make_console(quiet: bool = False):
    """A console on stderr that prints text as it is: a name of a file may read as rich's markup or as an emoji."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)


def warn(console, text: str) -> None:
    """A warning, in bold."""
    console.print(f"warning: {text}", style="bold", markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def bar(console, total: int, what: str = "image") -> Iterator[Callable[..., None]]:
    """A bar on stderr with rate and remaining time, moved by numbers of images, with news at its end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    start, done = time.perf_counter(), 0
    with Progress(*columns, TextColumn("{task.fields[news]}"), console=console, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=total, news="")

        def advance(n: int, news: str = "") -> None:
            nonlocal done
            done += n
            rate = f"{done / (time.perf_counter() - start):.1f}/s"
            progress.update(task, advance=n, news=f"{rate}  {news}")

        yield advance

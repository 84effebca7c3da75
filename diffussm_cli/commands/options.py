"""Options that several commands share, how a command checks them, and what it shows on stderr."""

import contextlib
import csv
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from diffussm_cli.config import MAX_SEED, Config, SampleConfig, check_text, config_from_dict, nearest, to_dict
from diffussm_cli.errors import ConfigError

MAX_IMAGES = 10**6  # images in one request
LONG = 60  # seconds; work that takes longer says so at its beginning

Classes = Annotated[
    str | None,
    typer.Option(
        help="Labels or class names in turn, as 3,7 or 0-9 or cat,dog. A name with a comma goes in double quotes; one "
        "that reads as a number or a range is given by its label. Default: random, drawn from each seed.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the first image; image i has seed + i.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the run's.")]
SamplerName = Annotated[Literal["ddpm", "ddim", "dpmpp", "unipc"] | None, typer.Option(help="Default: the run's.")]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="Classifier-free guidance scale; 1: none. Default: the run's.")
]
GuidanceChannels = Annotated[
    Literal["all", "3"] | None, typer.Option(help="Guide all channels, or the first three as DiT published.")
]
GuidanceInterval = Annotated[str | None, typer.Option(metavar="LO,HI", help="Guide only at timesteps LO <= t <= HI.")]
BatchSize = Annotated[
    int, typer.Option(min=1, max=2**16, help="Images at a time; changes them by float rounding at most.")
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"], typer.Option(help="Of the network; auto: bf16 where the hardware has it.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


class WithExamples:
    """Ends the help of a command with its epilog, line by line; some versions of Typer join the lines."""

    def __init__(self, *args: Any, epilog: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.examples = epilog

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As its parent, with the examples below."""
        super().format_help(ctx, formatter)
        typer.echo((self.examples or "").strip("\n"))


class Command(WithExamples, TyperCommand):
    """A command that checks its texts before it runs."""

    def invoke(self, ctx: Any) -> Any:
        """As its parent. Raises ConfigError for a text that cannot name a file."""
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            option = max(parameter.opts, key=len)
            name = option if option.startswith("-") else parameter.metavar or option
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str | os.PathLike):
                    check_text(text, name)
        return super().invoke(ctx)


# ------------------------------------------------------------------------------------------------- what is asked for
def sampling_request(
    config: Config,
    sampler: str | None,
    steps: int | None,
    guidance: float | None,
    guidance_channels: str | None,
    guidance_interval: str | None,
) -> SampleConfig:
    """The run's own sampling settings with what was asked for in their place. Raises ConfigError."""
    asked = {
        "sampler": sampler,
        "steps": steps,
        "guidance": guidance,
        "guidance_channels": guidance_channels,
        "guidance_interval": guidance_interval,
    }
    fields = {f"sample.{k}": v for k, v in asked.items() if v is not None}
    return config_from_dict(to_dict(config), "RUN", fields=fields).sample


def parse_classes(text: str | None, config: Config) -> tuple[int, ...]:
    """`3,7`, `0-9`, class names of the run, or all of these, as labels of the model; none for no text.

    Raises:
        ConfigError: for a label or name that the model does not have.
    """
    if text is None:
        return ()
    n, names = config.model.num_classes, config.data.class_names
    if not n:
        raise ConfigError(f"--classes: {text!r} given, but the model is unconditional")
    try:
        parts = next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error as e:
        raise ConfigError(f"--classes: {text!r:.80} must be labels or names between commas: {e}") from e
    labels: list[int] = []
    for part in parts:
        span = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part)
        if span:
            first, last = int(span[1]), int(span[2] or span[1])
            if not first <= last < n:
                raise ConfigError(f"--classes: {text!r} must name labels from 0 to {n - 1}")
            labels += range(first, last + 1)
        elif part in names:
            labels.append(names.index(part))
        elif names:
            raise ConfigError(f"--classes: the run has no class {part!r}{nearest(part, names)}")
        else:
            raise ConfigError(f"--classes: {part!r} must be labels as 3,7 or 0-9; the run has no class names")
    if not labels:
        raise ConfigError(f"--classes: {text!r} must name labels from 0 to {n - 1}")
    return tuple(labels)


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
    """A bar on stderr with rate and remaining time, moved by numbers of images, with news at its end.

    After the first move a line says how long the rest takes, if that is long: a log shows no bar.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what, markup=False), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    news_column = TextColumn("{task.fields[news]}", markup=False)
    start, done = time.perf_counter(), 0
    with Progress(*columns, news_column, console=console, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=total, news="")

        def advance(n: int, news: str = "") -> None:
            nonlocal done
            first, done = done == 0, done + n
            elapsed = time.perf_counter() - start
            rest = elapsed / done * (total - done) if done else 0.0
            if first and rest > LONG:
                console.print(f"{what}: {total - done:,} more will take about {duration(rest)}")
            progress.update(task, advance=n, news=f"{done / elapsed:.1f}/s  {news}")

        yield advance


def duration(seconds: float) -> str:
    """A length of time for people, to two digits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.0f} s"

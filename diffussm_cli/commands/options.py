"""Options that several commands share, and how a command checks and reads them."""

import csv
import os
import re
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from diffussm_cli.config import MAX_SEED, Config, SampleConfig, check_text, config_from_dict, nearest, to_dict
from diffussm_cli.errors import ConfigError

MAX_IMAGES = 10**6  # images in one request

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


def parse_size(text: str) -> tuple[int, int]:
    """`256` or `256x384` as (height, width). Raises ConfigError."""
    found = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", text)
    if not found:
        raise ConfigError(f"--resolution: {text!r} must be a number of pixels or HxW, as 256 or 256x384, up to 9999")
    return int(found[1]), int(found[2] or found[1])

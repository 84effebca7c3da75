"""Options that several commands share, and the command that checks them."""

import os
import re
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from diffussm_cli.commands import completion
from diffussm_cli.commands.help import ReadableHelp
from diffussm_cli.config import (
    MAX_SEED,
    SamplerName,
    check_text,
)
from diffussm_cli.errors import ConfigError, DiffussmError

MAX_IMAGES = 10**6  # images in one request
# parameters of text that name files or folders, or the hub
PLACES = ("samples", "reference", "data", "vae")

# The fields of a configuration that options of commands set, by parameter.
FIELDS = {
    "sampler": "sample.sampler",
    "steps": "sample.steps",
    "guidance": "sample.guidance",
    "guidance_channels": "sample.guidance_channels",
    "guidance_interval": "sample.guidance_interval",
    "guide_with": "sample.guide",
    "resolution": "data.resolution",
}

# The groups of options in `--help`.
DRAWN = "What is drawn"
HOW = "How it is drawn"
WEIGHTS = "Which weights"
COMPARED = "What is compared"
COMPUTER = "Computer"
RESULT = "Result"
RUN = "The run"
ONLY_SHOWN = "Show, and train nothing"

Classes = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        rich_help_panel=DRAWN,
        help="Labels or class names, used in turn, such as 3,7 or 0-9 or cat,dog. "
        "Put a name with a comma in double quotes; for a name that looks like a number or a "
        "range, give its label. Default: random, from each seed.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0,
        max=MAX_SEED,
        metavar="N",
        rich_help_panel=DRAWN,
        help="Seed of the first image; image i has seed + i.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", rich_help_panel=HOW, help="Denoising steps. Default: the run's."
    ),
]
Balanced = Annotated[
    bool,
    typer.Option(
        "--balanced",
        rich_help_panel=DRAWN,
        help="All classes in turn, each equally often. Default: random, from each seed.",
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        rich_help_panel=DRAWN,
        help="What to draw, for a run with text. Repeatable; used in turn.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=DRAWN,
        help="A UTF-8 text file of prompts, one per line; used in turn.",
    ),
]
Negative = Annotated[
    str | None,
    typer.Option(metavar="TEXT", rich_help_panel=DRAWN, help="Negative prompt for guidance."),
]
Sampler = Annotated[
    SamplerName | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=HOW,
        help=f"One of {', '.join(typing.get_args(SamplerName))}. Default: the run's.",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="SCALE",
        rich_help_panel=HOW,
        help="Classifier-free guidance scale; 1: none. Default: the run's.",
    ),
]
GuidanceChannels = Annotated[
    Literal["all", "3"] | None,
    typer.Option(
        metavar="all|3",
        rich_help_panel=HOW,
        help="Guide all channels, or the first three as in DiT's samples. Default: the run's.",
    ),
]
GuidanceInterval = Annotated[
    str | None,
    typer.Option(
        metavar="LO,HI",
        rich_help_panel=HOW,
        help="Guide only at timesteps LO <= t <= HI. Default: the run's.",
    ),
]
GuideWith = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        rich_help_panel=HOW,
        autocompletion=completion.models,
        help="Guide away from a weaker model in place of the null class: an earlier checkpoint, or "
        "a smaller run of the same data.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        min=1,
        max=2**16,
        metavar="N",
        rich_help_panel=COMPUTER,
        help="Batch size; it changes images by float rounding at most.",
    ),
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option(
        metavar="auto|fp32|bf16",
        rich_help_panel=COMPUTER,
        help="Of the network; auto: bf16 where the hardware supports it.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE", rich_help_panel=COMPUTER, help="auto, cpu, cuda, cuda:1 or mps."
    ),
]
Average = Annotated[
    float | None,
    typer.Option(
        metavar="DECAY",
        rich_help_panel=WEIGHTS,
        help="Which averaged weights, by decay. Default: the run's first.",
    ),
]
Objective = Annotated[
    Literal["noise", "flow"] | None,
    typer.Option(
        metavar="noise|flow",
        rich_help_panel=WEIGHTS,
        help="What a published .pt file predicts; flow: SiT's. Default: noise, DiT's.",
    ),
]
AverageWidth = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        rich_help_panel=WEIGHTS,
        help="Averaged weights of any width, such as 0.1: the standard deviation of their profile "
        "as a share of training. Needs the snapshots of train.snapshot_every.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=RESULT, help="Print one JSON object on stdout."),
]


class Command(ReadableHelp, TyperCommand):
    """A command that checks its text arguments before it runs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As in the parent class. Raises ConfigError for an empty path, which Python takes for the
        current folder.
        """
        arguments, _, _ = self.make_parser(ctx).parse_args(list(args))
        hints = typing.get_type_hints(self.callback)
        for parameter in self.params:
            is_place = (
                Path in typing.get_args(hints.get(parameter.name)) or parameter.name in PLACES
            )
            if is_place and arguments.get(parameter.name) == "":
                raise ConfigError(
                    f"{option_name(parameter)}: is empty; name a file or folder, or leave it out"
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """As in the parent class. Raises ConfigError for text that cannot name a file.

        An error about a parameter names its option, and so does one about a field that an option
        has set.
        """
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str | os.PathLike):
                    check_text(text, option_name(parameter))

        ctx.obj = [p for p in self.params if ctx.get_parameter_source(p.name).name == "COMMANDLINE"]
        try:
            return super().invoke(ctx)
        except DiffussmError as e:
            name, colon, line = str(e).partition(":")
            options = {parameter.name: option_name(parameter) for parameter in self.params}
            if name in {FIELDS.get(parameter.name) for parameter in ctx.obj}:
                e.args = (_naming_options(str(e), options), *e.args[1:])
            else:
                e.args = (options.get(name, name) + colon + line, *e.args[1:])
            raise


def _naming_options(line: str, options: Mapping[str, str]) -> str:
    """A line with options in place of the fields that they set: `sample.sampler=euler` becomes
    `--sampler euler`.

    Args:
        options: those of the command, by parameter.
    """
    option_of = {FIELDS[name]: option for name, option in options.items() if name in FIELDS}

    def option(match: re.Match[str]) -> str:
        field, equals = match.groups()
        if field not in option_of:
            return match[0]
        return option_of[field] + (" " if equals else "")

    return re.sub(r"\b((?:sample|data)\.[a-z_]+)(=?)", option, line)


def option_name(parameter: Any) -> str:
    """What an error calls a parameter: its longest option, or the word that stands for an
    argument.
    """
    option = max(parameter.opts, key=len)
    return option if option.startswith("-") else (parameter.metavar or option).strip("[]")


def unused(ctx: Any, names: Collection[str], because: str) -> str:
    """A line about the given options, of those with these parameter names, that a command does not
    use; may be empty.

    Args:
        because: why, such as `SAMPLES is a folder of images`.
    """
    options = []
    for parameter in ctx.obj:
        if parameter.name in names:
            is_negated = parameter.secondary_opts and not ctx.params[parameter.name]
            options.append(parameter.secondary_opts[0] if is_negated else option_name(parameter))
    return f"{', '.join(options)}: not used, because {because}" if options else ""


def others(ctx: Any, *names: str) -> set[str]:
    """The names of the given parameters but for these, for `unused`."""
    return {parameter.name for parameter in ctx.obj} - set(names)

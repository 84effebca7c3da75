"""The `diffussm` program: its commands, and the one place that turns errors into a line and an exit
code. No torch.
"""

import contextlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffussm_cli import __version__
from diffussm_cli.commands.completion import as_bash_sees_words
from diffussm_cli.commands.console import printable
from diffussm_cli.commands.encode import encode
from diffussm_cli.commands.eval import evaluate
from diffussm_cli.commands.help import ReadableHelp
from diffussm_cli.commands.options import Command
from diffussm_cli.commands.profile import profile
from diffussm_cli.commands.sample import sample
from diffussm_cli.commands.train import train
from diffussm_cli.errors import DiffussmError, system_reason

UsageError: Any = typer.BadParameter.__bases__[0]  # recent versions of Typer ship their own click


class ErrorBoundary(ReadableHelp, TyperGroup):
    """Errors that a user can fix become one line on stderr and exit code 1; others keep their
    traceback.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)  # type: ignore[misc]
        # processes that are started from here import nothing from this folder
        os.environ["PYTHONSAFEPATH"] = "1"
        with contextlib.suppress(AttributeError):  # a replaced stdout may lack `reconfigure`
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for odd file names
        in_bash = os.environ.get("_DIFFUSSM_COMPLETE") == "complete_bash"
        try:
            with as_bash_sees_words() if in_bash else contextlib.nullcontext():
                code = super().main(*args, standalone_mode=False, **kwargs)  # type: ignore[misc]
        except UsageError as e:
            command = e.ctx.command_path if e.ctx else "diffussm"
            mistake = _one_line(_usage(e)).removesuffix(".")
            stop = "" if mistake.endswith("?") else "."
            code = _refuse(f"{mistake}{stop} See: {command} --help")
        except typer.Abort:
            code = 130
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DiffussmError as e:
            raise typer.Exit(_refuse(_one_line(str(e)))) from e
        except OSError as e:
            reason = system_reason(e)
            if reason is None:
                raise
            place = f"{e.filename}: " if e.filename else ""
            raise typer.Exit(_refuse(_one_line(f"{place}{reason}"))) from e


# What an option wants, by the kind of a mistake in its value.
WANTED = {
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "float_parsing": "must be a number",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
}
# Options for what people give without one, by command.
NAMED_BY = {"train": "name a run by --out, images by --data, a preset by --preset"}


def _usage(e: Any) -> str:
    """What is wrong with the command line; with the value of an option, in the words that are also
    said of fields.
    """
    message = e.format_message()
    command = e.ctx.command.name if e.ctx else None
    if "unexpected extra argument" in message and command in NAMED_BY:
        return f"{message.removesuffix('.')}: {NAMED_BY[command]}"

    mistakes: list[Any] = getattr(e.__cause__, "errors", list)()
    if not mistakes or getattr(e, "param", None) is None:
        return message

    mistake = mistakes[0]
    option = max(e.param.opts, key=len)
    if mistake["type"] in WANTED:
        wanted = WANTED[mistake["type"]].format(**mistake.get("ctx", {}))
        value = repr(mistake["input"]) if "parsing" in mistake["type"] else mistake["input"]
        return f"{option}: {value} {wanted}"
    return f"{option}: {mistake['msg'].removeprefix('Value error, ')}"


def _refuse(message: str) -> int:
    typer.echo(f"diffussm: error: {message}", err=True)
    return 1


def _one_line(message: str) -> str:
    return printable(" ".join(message.split()))


# Lines of at most 58 columns, so that a narrow terminal breaks none.
EXAMPLES = {
    "diffussm": """
  # forty digits of a model of the package
  diffussm sample mnist

  # train such a model in minutes, and draw from it
  diffussm train
  diffussm sample --num 100 --classes 0-9

  # FID and more
  diffussm eval runs/mnist --num 5000
""",
    "encode": """
  diffussm encode photos/ latents/photos --resolution 256
  diffussm encode --verify latents/photos
""",
    "train": """
  # the preset mnist, without a download
  diffussm train

  # own images: size, channels and classes are read
  diffussm train --data faces/

  # the presets, by their cost
  diffussm train --list

  # eight GPUs; the same command continues the run
  torchrun --nproc-per-node 8 -m diffussm_cli train \\
      --preset xl-256 --out runs/xl --resume
""",
    "sample": """
  # forty digits of a model of the package
  diffussm sample mnist

  diffussm sample runs/mnist --num 100 --classes 0-9
  diffussm sample runs/mnist --num 20 --classes 3 \\
      --sampler dpmpp --steps 25 --guidance 2 --out threes/
  diffussm sample DiT-XL-2-256x256.pt --guidance 1.5 \\
      --guidance-channels 3
""",
    "eval": """
  diffussm eval runs/mnist --num 5000
  diffussm eval images/ \\
      --reference VIRTUAL_imagenet256_labeled.npz
  diffussm eval --make-ref church/ church.npz \\
      --resolution 256
""",
    "profile": """
  # DiffuSSM-XL beside DiT-XL
  diffussm profile --resolution 256,512

  diffussm profile --models s/2 --sweep M=1,2,4 \\
      --sweep P=1,2

  # days on a GPU; without --device, on this machine
  diffussm profile --preset xl-256 --estimate \\
      --device h200

  # what two runs have cost and reached, also as a page
  diffussm profile runs/mnist runs/mnist-2
""",
}

app = typer.Typer(
    cls=ErrorBoundary,
    epilog=EXAMPLES["diffussm"],
    context_settings={"help_option_names": ["-h", "--help"]},  # of every command
    pretty_exceptions_enable=False,
)
for name, cls, function in (
    ("encode", Command, encode),
    ("train", Command, train),
    ("sample", Command, sample),
    ("eval", Command, evaluate),
    ("profile", Command, profile),
):
    app.command(name, cls=cls, epilog=EXAMPLES[name])(function)


@app.callback(invoke_without_command=True)
def main(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Image diffusion on state space layers, without attention (DiffuSSM, arXiv 2311.18257)."""
    if version:
        typer.echo(f"diffussm {__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())

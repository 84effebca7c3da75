"""The `diffussm` program: its commands and the one place where errors become a line and an exit code. No torch here."""

import errno
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffussm_cli import __version__
from diffussm_cli.commands.encode import encode
from diffussm_cli.commands.eval import evaluate
from diffussm_cli.commands.profile import profile
from diffussm_cli.commands.sample import sample
from diffussm_cli.commands.train import TrainCommand, train
from diffussm_cli.errors import DiffussmError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
UsageError = typer.BadParameter.__bases__[0]  # current Typer carries its own click


class ErrorBoundary(TyperGroup):
    """What a user can fix is one line on stderr and exit code 1; anything else keeps its traceback."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except UsageError as e:
            command = e.ctx.command_path if e.ctx else "diffussm"
            code = _refuse(f"{_one_line(e.format_message())} See: {command} --help")
        except typer.Abort:
            code = 130
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DiffussmError as e:
            raise typer.Exit(_refuse(_one_line(str(e)))) from e
        except OSError as e:
            if e.errno not in DISK_ERRORS:
                raise
            place = f"{e.filename}: " if e.filename else ""
            raise typer.Exit(_refuse(f"{place}{e.strerror}; what was saved before is intact")) from e


def _refuse(message: str) -> int:
    typer.echo(f"diffussm: error: {message}", err=True)
    return 1


def _one_line(message: str) -> str:
    return " ".join(message.split())


app = typer.Typer(cls=ErrorBoundary, add_completion=False, pretty_exceptions_enable=False)
app.command()(encode)
app.command(cls=TrainCommand)(train)
app.command()(sample)
app.command("eval")(evaluate)
app.command()(profile)


@app.callback(invoke_without_command=True)
def main(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Image diffusion on state space layers, without attention (DiffuSSM, arXiv 2311.18257)."""
    if version:
        typer.echo(f"diffussm {__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())

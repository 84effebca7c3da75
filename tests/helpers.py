"""How the tests run the program, and how they read what it says."""

from typer.testing import CliRunner

from diffussm_cli.cli import app
from tests.conftest import TINY

SETTINGS = [part for override in TINY for part in ("--set", override)]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


def run(*arguments):
    """A command of the program, in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def line_of(result):
    """The one line of a refusal."""
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("diffussm: error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.output
    return errors[0]

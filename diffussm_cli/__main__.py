"""`python -m diffussm_cli`, which is also what torchrun starts."""

import os
import sys

# `python -m` also looks for modules in the current folder, which may come from a stranger and hold
# a typer.py.
if sys.path[0] in ("", os.getcwd()) and not os.path.samefile(
    os.getcwd(), os.path.dirname(os.path.dirname(__file__))
):
    del sys.path[0]

from diffussm_cli.cli import app

if __name__ == "__main__":
    app(prog_name="diffussm")  # completion is installed for this name

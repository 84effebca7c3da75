"""`--help` reads well in a narrow terminal: nothing is cut, and every option is there."""

import re

import pytest
import typer

from diffussm_cli.cli import EXAMPLES, app
from diffussm_cli.commands.help import first_sentence, section
from tests.helpers import run

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_terminal_and_names_every_option(name, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = run(*filter(None, [name]), "--help").stdout
    assert max(map(len, shown.splitlines())) <= min(width, 100)
    assert "…" not in shown
    assert "[[" not in shown
    assert shown.endswith(EXAMPLES[name or "diffussm"].strip("\n") + "\n")

    # Each name as a word of its own, at the beginning of its line.
    words = set(re.split(r"[\s,]+", shown))
    for parameter in COMMANDS[name].params if name else []:
        options = [*parameter.opts, *parameter.secondary_opts]
        names = [parameter.metavar] if parameter.param_type_name == "argument" else options
        assert set(names) <= words
        assert any(line.strip().startswith(tuple(names)) for line in shown.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_belongs_to_group_and_names_what_it_takes(name):
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option" and "--help" not in parameter.opts:
            assert parameter.rich_help_panel, parameter.opts
            assert parameter.metavar or parameter.is_flag, parameter.opts
        assert parameter.help


def test_help_of_long_name_stands_below_it():
    rows = [("--a", "one two three"), ("--much-longer", "four")]
    expected = ["Title:", "  --a  one two", "       three", "  --much-longer", "       four"]
    assert section("Title", rows, names=3, width=14).splitlines() == [
        re.sub("Title:", "\x1b[1mTitle:\x1b[0m", line) for line in expected
    ]


def test_first_sentence_is_on_one_line():
    assert first_sentence("Draw images,\nas PNG. And more.") == "Draw images, as PNG."
    assert first_sentence("Draw images.") == "Draw images."

"""What `--help` prints: options in groups, and examples, laid out for the width of the terminal.

Text is broken between words only: neither the name of an option nor a command is cut.
"""

import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

import typer

WIDEST = 100  # longer lines are hard to read
NAMES = 25  # columns of names; a longer name has a line of its own
INDENT = "  "


class ReadableHelp:
    """A command or a group of commands with the help of this module."""

    def __init__(self, *args: Any, epilog: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.examples = (epilog or "").strip("\n")

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage, description, groups of options, commands and examples."""
        self_: Any = self
        width = min(shutil.get_terminal_size().columns, WIDEST)
        parts = [wrapped(self_.get_usage(ctx), width, then=INDENT)]
        parts += [wrapped(paragraph, width) for paragraph in (self_.help or "").split("\n\n")]

        # Groups of options, their names in columns of one width.
        sections = dict(groups(self_, ctx))
        names = max(len(name) for rows in sections.values() for name, _ in rows)
        parts += [section(*item, min(names, NAMES), width) for item in sections.items()]

        parts += [title("Examples") + "\n" + self.examples]
        formatter.write("\n\n".join(parts) + "\n")


def groups(command: Any, ctx: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The titles of a command's groups, with names and help: arguments, options by their
    `rich_help_panel` in the order of the signature, and commands.
    """
    arguments, others = [], []
    options: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is None:  # hidden
            continue

        row = (record[0], described(parameter))
        panel = getattr(parameter, "rich_help_panel", None)
        if parameter.param_type_name == "argument":
            arguments.append((parameter.metavar or parameter.name.upper(), row[1]))
        elif panel is None:
            others.append(row)
        else:
            options.setdefault(panel, []).append(row)

    if arguments:
        yield "Arguments", arguments
    yield from options.items()
    yield "Other options" if options else "Options", others
    if hasattr(command, "list_commands"):
        commands = [(name, command.get_command(ctx, name)) for name in command.list_commands(ctx)]
        yield "Commands", [(name, first_sentence(c.help)) for name, c in commands]


def described(parameter: Any) -> str:
    """The help of a parameter, and its default unless that is none, empty, or a switch that is
    off.
    """
    text = parameter.help or ""
    default = parameter.default
    if default is None or default is False or default == "":
        return text
    if default is True:
        default = max(parameter.opts, key=len)
    listed = str(default).replace(",", ", ")  # a list may be wrapped
    return f"{text} Default: {listed}."


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    sentence, dot, _ = " ".join(text.split()).partition(". ")
    return sentence + dot.strip()


def section(heading: str, rows: list[tuple[str, str]], names: int, width: int) -> str:
    """A title and, below it, names in so many columns with their help beside or under them."""
    lines = [title(heading)]
    for name, text in rows:
        beside = f"{INDENT}{name:{names}}{INDENT}"
        under = " " * len(f"{INDENT}{'':{names}}{INDENT}")
        if len(name) > names:
            lines.append(INDENT + name)
            beside = under
        lines.append(wrapped(text, width, first=beside, then=under))

    return "\n".join(lines)


def wrapped(text: str, width: int, first: str = "", then: str = "") -> str:
    """A text in lines of at most a width, if its words allow that, with what the lines begin
    with.
    """
    return textwrap.fill(
        " ".join(text.split()),
        width,
        initial_indent=first,
        subsequent_indent=then,
        break_long_words=False,
        break_on_hyphens=False,
    )


def title(text: str) -> str:
    """A heading: bold in a terminal."""
    return typer.style(f"{text}:", bold=True)

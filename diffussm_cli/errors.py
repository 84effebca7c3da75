"""Errors that a user can fix. Each message is one line that names the option or field, its value
and the remedy.
"""

import contextlib
import errno
import re
from collections.abc import Iterator, Mapping

# What a caller of the library gives where it has another name than the option or argument.
PARAMETERS = {
    "--no-flip": "flip=False",
    "--preset": "config",
    "--prompt": "prompts",
    "RUN": "run",
    "SAMPLES": "samples",
    "SOURCE": "source",
    "TARGET": "target",
}
# Commands to type and texts in quotes, which stay; then options with their values, and arguments.
NAMES = re.compile(
    r"""\b(?:diffussm|torchrun)[ ][^;]* | (?<!\w)'[^']*'
    | (?<!\S)--set[ ](?P<field>[a-z_]+\.[a-z_]+)=(?P<text>[^\s,;:)]+)
    | (?<![\w'"-])(?P<option>--[a-z][a-z-]*)(?:[ ](?P<value>[A-Z]{2,}|\d[\d.]*|"[^"]*"))?
    | \b(?P<argument>RUN|SAMPLES|SOURCE|TARGET)\b(?!/)""",
    re.VERBOSE,
)
# write() reports these without a file
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class DiffussmError(Exception):
    """Base class of all errors that the command line shows as one line, without a traceback."""


class ConfigError(DiffussmError):
    """A preset, an option or a combination of them that cannot be run."""


class DataError(DiffussmError):
    """A missing, empty, damaged or unsuitable data set."""


class RunError(DiffussmError):
    """A run folder, checkpoint or weights file that cannot be read, written or continued."""


class NotFiniteError(DiffussmError, ValueError):
    """An image that holds NaN or infinite values, which are no picture.

    Args:
        image: what the error calls the image.
        index: its place in its batch.
        where: the step that made it so, such as `after step 3 of 25`, if that is known.
    """

    def __init__(self, image: str, index: int, where: str = ""):
        self.index, self.where = index, where
        what = f"{image} has values that are not finite" + (f" {where}" if where else "")
        super().__init__(
            f"{what}, so it is no picture; try precision fp32, less guidance or another sampler"
        )


def reason(error: BaseException) -> str:
    """The first line of an error's message, joined with the second after a colon; the error's class
    if it is empty.
    """
    message = getattr(error, "strerror", None) or str(error).strip().replace(":\n", ":")
    return f"{' '.join((message.splitlines() or [type(error).__name__])[0].split()):.200}"


def in_python(line: str, names: Mapping[str, str] = PARAMETERS) -> str:
    """A line for a caller of the library: it names parameters where a command names options.

    `--batch-size: 0` becomes `batch_size: 0`, and `--set data.flip=false` becomes
    `set={'data.flip': False}`.

    Args:
        names: parameters by option, where they differ.
    """

    def parameter(match: re.Match[str]) -> str:
        if match["field"]:
            return f"set={{{match['field']!r}: {_literal(match['text'])}}}"
        name = match["option"] or match["argument"]
        if not name:
            return match[0]

        plain = names.get(name, name.removeprefix("--").replace("-", "_"))
        if plain == "resume" and line[match.end() :][:1] != ":":
            return "resume=True"
        if not match["value"]:
            return plain
        return f"{plain}=[{match['value']}]" if plain == "prompts" else f"{plain}={match['value']}"

    return NAMES.sub(parameter, line)


def _literal(text: str) -> str:
    """The value of a field as Python writes it; a word in capitals stands for any value."""
    if text in ("true", "false"):
        return text.capitalize()
    is_plain = text.isupper() or re.fullmatch(r"-?\d[\d.e+-]*", text)
    return text if is_plain else repr(text.strip("'\""))


@contextlib.contextmanager
def naming_parameters(names: Mapping[str, str] = PARAMETERS) -> Iterator[None]:
    """Let errors in the block, or in a function that this decorates, name parameters in place of
    options. `names` is that of `in_python`.
    """
    try:
        yield
    except DiffussmError as e:
        e.args = (in_python(str(e), names), *e.args[1:])
        raise


def install(extra: str) -> str:
    """How to install an extra such as `text`: from a clone, or by the names of its packages, which
    a wheel needs.

    This package is on no index, from which pip could take it by its name.
    """
    from importlib.metadata import PackageNotFoundError, requires

    clone = f"pip install '.[{extra}]' in a clone"
    try:
        requirements = requires("diffussm") or []
    except PackageNotFoundError:  # a checkout that nobody has installed
        return clone
    of_extra = re.compile(rf"""([\w.-]+).*\bextra == ["']{extra}["']""")
    packages = [match[1] for match in map(of_extra.match, requirements) if match]
    return " ".join([clone + ", or pip install", *packages]) if packages else clone


def system_reason(error: OSError) -> str | None:
    """The operating system's message for an error of a file or disk; None for any other error."""
    # raised by a library, or by a mistake of ours
    if error.errno is None or error.strerror is None:
        return None
    if error.errno in DISK_ERRORS:
        return f"{error.strerror}; what was saved before is intact"
    return error.strerror if error.filename is not None else None


@contextlib.contextmanager
def writing(line: str, error: type[DiffussmError] = RunError) -> Iterator[None]:
    """Turn an OSError in the block into `error`: the line, the file if the line does not name it,
    and the reason.

    Any other error passes through, so the block may do more than write.
    """
    try:
        yield
    except OSError as e:
        why = system_reason(e)
        if why is None:
            raise
        file = "" if e.filename is None or str(e.filename) in line else f"{e.filename}: "
        raise error(f"{line}: {file}{why}") from e


@contextlib.contextmanager
def reading(line: str, error: type[DiffussmError] = RunError, remedy: str = "") -> Iterator[None]:
    """Turn any failure to read a file in the block into `error`: the line, the reason and the
    remedy.

    Covers errors of the operating system, text that is not UTF-8, and errors of parsers. The block
    must only read and parse the file, because any other ValueError would be blamed on the file too.
    """
    try:
        yield
    except UnicodeDecodeError as e:
        raise error(f"{line}: it is not UTF-8 text{remedy}") from e
    except RecursionError as e:
        raise error(f"{line}: it is nested too deeply{remedy}") from e
    except (OSError, ValueError) as e:
        raise error(f"{line}: {reason(e)}{remedy}") from e

"""What a user can fix. Each message is one line that names the option or field, its value and the remedy."""


class DiffussmError(Exception):
    """Base of all errors that the command line shows as one line, without a traceback."""


class ConfigError(DiffussmError):
    """A preset, an option or a combination of them that cannot be run."""


class DataError(DiffussmError):
    """A missing, empty, damaged or unsuitable data set."""


class RunError(DiffussmError):
    """A run folder, checkpoint or weights file that cannot be read, written or continued."""


def reason(error: BaseException) -> str:
    """The first line of what an error says, and the second after a colon; its name if it says nothing."""
    said = getattr(error, "strerror", None) or str(error).strip().replace(":\n", ":")
    return f"{' '.join((said.splitlines() or [type(error).__name__])[0].split()):.200}"

"""Events that a session yields as it works. It returns its value: `finish(session)` gives only
that.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """Base class of everything that a session yields."""


@dataclass(frozen=True)
class Stage(Event):
    """The start of a stage of the work, which may take a while without another event."""

    text: str


@dataclass(frozen=True)
class Progress(Event):
    """Progress of a piece of work: `done` of `total`, counted in `unit`s."""

    done: int
    total: int
    unit: str = "image"
    news: str = ""


@dataclass(frozen=True)
class Message(Event):
    """A line that is printed as it is."""

    text: str


@dataclass(frozen=True)
class Warned(Event):
    """A line that is printed in bold, as a warning."""

    text: str


@dataclass(frozen=True)
class TrainingRecord(Event):
    """Measurements of training since the last record; `steps` is the total number of training
    steps, and `begun` the one that this session began after.
    """

    record: dict[str, Any]
    steps: int
    begun: int = 0


@dataclass(frozen=True)
class FirstStep(Event):
    """The first step of a session of training is done; `steps` and `begun` are as in a
    TrainingRecord, which follows after more steps.
    """

    steps: int
    begun: int


def finish(session: Generator[Event, None, T]) -> T:
    """Run a session to its end and return its value; its events are not shown."""
    while True:
        try:
            next(session)
        except StopIteration as e:
            return e.value

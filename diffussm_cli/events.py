"""What a session tells while it works. A command shows it; a notebook may print it or read the last event alone."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """Base of everything that a session yields."""


@dataclass(frozen=True)
class Stage(Event):
    """What begins now. It may take a while without another event."""

    text: str


@dataclass(frozen=True)
class Progress(Event):
    """How much of a piece of work is done: `done` of `total`, counted in `unit`s."""

    done: int
    total: int
    unit: str = "image"
    news: str = ""


@dataclass(frozen=True)
class Message(Event):
    """A line for the user."""

    text: str


@dataclass(frozen=True)
class Warned(Event):
    """A line that the user should not miss."""

    text: str


@dataclass(frozen=True)
class TrainingRecord(Event):
    """What training measured since the last record; `steps` is the number of steps of the whole training."""

    record: dict[str, Any]
    steps: int


@dataclass(frozen=True)
class Result(Event):
    """What came of it; the last event of a session."""

    value: Any


def finish(session: Generator[Event, None, T]) -> T:
    """Run a session to its end without looking at its events; gives what it returns."""
    while True:
        try:
            next(session)
        except StopIteration as e:
            return e.value

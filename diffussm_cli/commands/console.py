"""What the commands show on stderr: plain lines, and the events of a session as they arrive."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, TypeVar
from unicodedata import category

from diffussm_cli.events import (
    Event,
    FirstStep,
    Message,
    Progress,
    Stage,
    TrainingRecord,
    Warned,
)

T = TypeVar("T")
LONG = 60  # seconds; longer work announces its duration at the start


def printable(text: str) -> str:
    """A text with control characters escaped, but for line breaks and tabs: names and facts may
    come from strangers.

    An escape sequence in a file name, or a mark that turns the direction of writing, would change
    the terminal.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" or category(c) == "Zs" else repr(c)[1:-1] for c in text
    )


def say(text: Any) -> None:
    """Print a line on stdout; control characters are escaped."""
    import typer

    typer.echo(printable(str(text)))


def print_json(value: Any, console, indent: int | None = 1) -> None:
    """Print one JSON object on stdout; numbers that JSON does not have become null, and a warning
    counts them.
    """
    import typer

    lost: list[float] = []
    text = json.dumps(_without_nan(value, lost), indent=indent, allow_nan=False)
    if lost:
        warn(console, f"{len(lost)} numbers are not finite; they are null in the JSON")
    typer.echo(text)


def _without_nan(value: Any, lost: list[float]) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nan(v, lost) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v, lost) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(value)
        return None
    return value


def make_console(quiet: bool = False, stderr: bool = True):
    """A console that prints text verbatim, as a file name may look like rich's markup, and escapes
    like `printable`.
    """
    from rich.console import Console
    from rich.segment import Segment

    class PlainConsole(Console):
        """Everything that is shown passes through `render`: lines, tables, bars and spinners."""

        def render(self, renderable, options=None):
            for segment in super().render(renderable, options):
                plain = segment.control or segment.text.isprintable()
                yield segment if plain else Segment(printable(segment.text), segment.style)

    # tables on stdout fit the terminal
    more: dict[str, Any] = {"soft_wrap": True} if stderr else {}
    return PlainConsole(
        stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, **more
    )


def warn(console, text: str) -> None:
    """Print a warning, in bold."""
    console.print(f"warning: {text}", style="bold")


def follow(console, session: Generator[Event, None, T]) -> T:
    """Show the events of a session, and return its value.

    A stage is a spinner, progress a bar; messages and warnings are lines.
    """
    with contextlib.closing(_Shown(console)) as shown:
        while True:
            try:
                event = next(session)
            except StopIteration as end:
                return end.value

            if isinstance(event, Progress):
                shown.progress(event)
                continue
            if isinstance(event, Stage):
                shown.stage(event.text)
                continue
            if isinstance(event, TrainingRecord):
                shown.record(event)
                continue
            if isinstance(event, FirstStep):
                shown.first_step(event)
                continue

            shown.close()
            if isinstance(event, Message):
                console.print(event.text)
            elif isinstance(event, Warned):
                warn(console, event.text)


class _Shown:
    """The live display on the console: nothing, a spinner or a bar."""

    def __init__(self, console):
        self.console, self._open = console, contextlib.ExitStack()
        self._status = self._advance = self._steps = None
        self._unit, self._done = "", 0
        self._since = time.perf_counter()  # of the last stage

    def stage(self, text: str) -> None:
        self._since = time.perf_counter()
        if self._status is None:
            self.close()
            self._status = self._open.enter_context(self.console.status(""))
        from rich.text import Text

        self._status.update(Text(text))

    def progress(self, event: Progress) -> None:
        if self._advance is None or event.unit != self._unit or event.done < self._done:
            self.close()
            self._unit, self._done = event.unit, 0
            self._advance = self._open.enter_context(bar(self.console, event.total, event.unit))
        self._advance(event.done - self._done, event.news)
        self._done = event.done

    def record(self, event: TrainingRecord) -> None:
        record, step = event.record, event.record["step"]
        news = f"loss {record['loss']:.4f}  {record['images_per_second']:.1f} images/s"
        news += f"  held-out {record['held_out']:.4f}" if "held_out" in record else ""
        news += f"  FID {record['eval/fid']:.4g}" if "eval/fid" in record else ""

        self._open_steps(event)
        if "left_out" in record:
            self.console.print(
                f"warning: step {step}: non-finite steps, left out: {record['left_out']}"
            )
        self._steps(step, news)

    def first_step(self, event: FirstStep) -> None:
        """Show how long training will take, on a terminal: the next record corrects it there."""
        if self.console.is_terminal:
            self._open_steps(event)
            self._steps(event.begun + 1, "")

    def _open_steps(self, event: FirstStep | TrainingRecord) -> None:
        if self._steps is None:
            self.close()
            bar_of_steps = _step_bar(self.console, event, self._since)
            self._steps = self._open.enter_context(bar_of_steps)

    def close(self) -> None:
        self._open.close()
        self._status = self._advance = self._steps = None


def _progress_bar(console, unit: str):
    """A progress bar: how many units are done, the elapsed and the remaining time, and the `news`
    of its task.

    Fields of its task: `done` units took `after` seconds, and the work began `before` seconds
    before the bar.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class Times(ProgressColumn):
        """The time since the work began and the time that is left, from the first advance on."""

        def render(self, task):
            done, after, before = (task.fields[name] for name in ("done", "after", "before"))
            spent = before + (task.elapsed or 0.0)
            words = clock(spent)
            if done:
                left = after / done * (task.total - task.completed) - (spent - after)
                words += f", {clock(max(0.0, left))} left"
            return Text(words, style="progress.remaining")

    class News(ProgressColumn):
        """What does not fit into the line is cut off."""

        def render(self, task):
            return Text(task.fields["news"], no_wrap=True, overflow="ellipsis")

    columns = (
        TextColumn(unit, markup=False, table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        BarColumn(min(40, max(10, console.width - 70))),
        Times(table_column=Column(no_wrap=True)),
        News(),
    )
    return Progress(*columns, console=console)


def clock(seconds: float) -> str:
    """A time as h:mm:ss or m:ss."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}" if minutes >= 60 else f"{minutes}:{s:02}"


@contextlib.contextmanager
def bar(console, total: int, what: str = "image") -> Iterator[Callable[..., None]]:
    """A bar on stderr with rate and remaining time; yields a function that advances it and shows
    `news` at its end.

    After the first advance, a line announces the remaining time if it is long, because a log file
    shows no bar.
    """
    start, done = time.perf_counter(), 0
    with _progress_bar(console, what) as progress:
        task = progress.add_task("", total=total, news="", before=0.0, after=0.0, done=0)

        def advance(n: int, news: str = "") -> None:
            nonlocal start, done
            if n == 0 and done == 0:  # the work begins now
                start = time.perf_counter()
                progress.reset(task)
                return

            first = done == 0
            done += n
            elapsed = time.perf_counter() - start
            rest = elapsed / done * (total - done) if done else 0.0
            if first and rest > LONG:
                console.print(f"{what}: {total - done:,} more will take about {duration(rest)}")

            news = f"{done / elapsed:.1f}/s  {news}"
            progress.update(task, advance=n, news=news, after=elapsed, done=done)

        yield advance


@contextlib.contextmanager
def _step_bar(
    console, first: FirstStep | TrainingRecord, start: float
) -> Iterator[Callable[[int, str], None]]:
    """A bar on stderr with the loss, rate and remaining time of training, which began at `start`;
    without a terminal, one line per record.
    """
    with _progress_bar(console, "step") as progress:
        begun, announced = first.begun, False
        times = {"before": time.perf_counter() - start, "after": 0.0, "done": 0}
        task = progress.add_task("", total=first.steps, completed=begun, news="", **times)

        def show(step: int, news: str) -> None:
            nonlocal announced
            spent, done = time.perf_counter() - start, step - begun
            progress.update(task, completed=step, news=news, after=spent, done=done)
            if console.is_terminal:
                return
            console.print(f"step {step}/{first.steps}  {clock(spent)}  {news}")

            if not announced and done:
                announced = True
                rest = spent / done * (first.steps - step)
                if rest > LONG:
                    console.print(
                        f"{first.steps - step:,} more steps will take about {duration(rest)}"
                    )

        yield show


def duration(seconds: float) -> str:
    """A duration for people to read, with two digits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.0f} s"


def leave(code: int) -> None:
    """Exit one process of a job when all of its work is on disk.

    The interpreter is not shut down: gloo's threads, which DDP keeps, sometimes abort the process
    during shutdown (pytorch/pytorch#179291), and torchrun would then report a failed job.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

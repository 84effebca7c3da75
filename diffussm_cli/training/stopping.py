"""Stop training on a signal."""

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from diffussm_cli.events import Event, Stage

T = TypeVar("T")
INTERRUPTED, PREEMPTED = 130, 75  # exit codes of Ctrl-C and SIGTERM (EX_TEMPFAIL: saved, run the same command again)
TRAINING = Stage("training")  # what a session yields before its first step


class StopRequest:
    """Whether a signal has requested a stop; `code` is the exit code for that signal."""

    code: int | None = None

    def __call__(self) -> bool:
        return self.code is not None

    def watch(self, session: Generator[Event, None, T]) -> Generator[Event, None, T]:
        """Pass on a session's events and value.

        From the first step on, signals request a stop instead of ending the process. Ctrl-C, SIGTERM
        and SIGHUP (a lost terminal) let the loop finish its step and save a checkpoint; a second
        Ctrl-C interrupts at once.
        """
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    event = next(session)
                except StopIteration as end:
                    return end.value
                if event == TRAINING:
                    stack.enter_context(self._handlers())
                yield event

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        codes: dict[int, int] = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED}
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # ignored under nohup
            codes[hangup] = PREEMPTED

        def ask(number: int, _: Any) -> None:
            self.code = codes[number]
            if number == hangup:
                _leave_terminal()
            signal.signal(signal.SIGINT, previous[signal.SIGINT])

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, ask) for number in codes}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _leave_terminal() -> None:
    """Discard what is still printed to a terminal that is gone: writing to it would fail before the checkpoint."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            with contextlib.suppress(OSError):
                if stat.S_ISCHR(os.fstat(stream).st_mode):
                    os.dup2(nowhere, stream)
        os.close(nowhere)

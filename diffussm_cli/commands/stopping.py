"""Stop training on a signal."""

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Iterator
from typing import Any

INTERRUPTED = 130  # exit code of Ctrl-C
PREEMPTED = 75  # exit code of SIGTERM and SIGHUP (EX_TEMPFAIL: saved, run the same command again)


class StopRequest:
    """Whether a signal has asked for a stop; `code` is the exit code for that signal.

    The first call, which `train` makes before its first step, begins to listen. Until then a signal
    ends the process, as there is nothing to save. From then on Ctrl-C, SIGTERM and SIGHUP (a lost
    terminal) let the loop finish its step and save a checkpoint; a second Ctrl-C interrupts at
    once.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self._before: dict[int, Any] | None = None  # handlers by signal; None before the first call

    def __call__(self) -> bool:
        if self._before is None:
            self._listen()
        return self.code is not None

    def _listen(self) -> None:
        self._before = {}
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread can have handlers
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        codes: dict[int, int] = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED}
        if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # ignored under nohup
            codes[hangup] = PREEMPTED

        def ask(number: int, _: Any) -> None:
            self.code = codes[number]
            if number == hangup:
                _leave_terminal()
            signal.signal(signal.SIGINT, before[signal.SIGINT])

        before = {number: signal.getsignal(number) for number in codes}
        self._before = before
        for number in codes:
            signal.signal(number, ask)

    def close(self) -> None:
        """Restore the handlers."""
        for number, handler in (self._before or {}).items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stopping() -> Iterator[StopRequest]:
    """A StopRequest for `train(..., stop=stop)`; afterwards signals do what they did before."""
    stop = StopRequest()
    try:
        yield stop
    finally:
        stop.close()


def _leave_terminal() -> None:
    """Discard what is still printed to a terminal that is gone: writing to it would fail before the
    checkpoint.
    """
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            with contextlib.suppress(OSError):
                if stat.S_ISCHR(os.fstat(stream).st_mode):
                    os.dup2(nowhere, stream)
        os.close(nowhere)

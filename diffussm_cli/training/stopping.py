"""A training that is asked to stop by a signal."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

INTERRUPTED, PREEMPTED = 130, 75  # exit codes: Ctrl-C; SIGTERM, as EX_TEMPFAIL: saved, run the same command again


class StopRequest:
    """Whether a signal has asked for an end, as the exit code that it will have."""

    code: int | None = None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Ctrl-C and SIGTERM ask the loop to finish its step; a second Ctrl-C interrupts at once."""
    request = StopRequest()
    codes = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED}

    def ask(number: int, _: Any) -> None:
        request.code = codes[number]
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, ask) for number in codes}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

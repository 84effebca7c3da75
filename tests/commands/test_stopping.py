"""Signals: from the first step on they ask for an end, before it and afterwards they are as they
were.
"""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffussm_cli.commands.stopping import stopping

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def before():
    """Python's own handlers, whatever started the tests; gives them."""
    found = handlers()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield handlers()
    for number, handler in zip(SIGNALS, found):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)]
)
def test_signal_stops_training_with_its_own_exit_code(before, number, code):
    with stopping() as stop:
        assert handlers() == before  # nothing is lost yet: a signal may end the process
        assert not stop()  # before the first step
        signal.raise_signal(number)
        assert (stop(), stop.code) == (True, code)
    assert handlers() == before


def test_lost_terminal_is_ignored_under_nohup(before):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopping() as stop:
        stop()
        signal.raise_signal(signal.SIGHUP)
        assert not stop()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_second_ctrl_c_interrupts_at_once(before):
    with stopping() as stop:
        stop()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert handlers() == before


def test_run_that_never_began_leaves_signals_alone(before):
    with stopping() as stop:
        assert handlers() == before
    assert handlers() == before
    assert stop.code is None


def test_other_threads_leave_signals_alone(before):
    def asked():
        with stopping() as stop:
            return stop(), handlers()

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(asked).result() == (False, before)

"""Signals: from the first step on they ask for an end, before it and afterwards they are as they were."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffussm_cli.events import Message, Stage
from diffussm_cli.training.stopping import TRAINING, StopRequest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EVENTS = [Stage("loading"), TRAINING, Message("a step")]


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)])
def test_a_signal_asks_for_the_end_with_its_own_code(before, number, code):
    stop = StopRequest()
    events = stop.watch(iter(EVENTS))
    assert next(events) == Stage("loading")
    assert handlers() == before  # nothing is lost yet: a signal may end the process
    assert next(events) == TRAINING
    assert (stop(), stop.code) == (False, None)
    signal.raise_signal(number)
    assert (stop(), stop.code) == (True, code)
    assert list(events) == EVENTS[2:]
    assert handlers() == before


def test_a_lost_terminal_is_left_alone_under_nohup(before):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    events = stop.watch(iter(EVENTS))
    assert [next(events), next(events)] == EVENTS[:2]
    signal.raise_signal(signal.SIGHUP)
    assert not stop()
    events.close()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_second_ctrl_c_interrupts_at_once(before):
    stop = StopRequest()
    events = stop.watch(iter(EVENTS))
    assert [next(events), next(events)] == EVENTS[:2]
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    events.close()
    assert handlers() == before


def test_in_another_thread_signals_are_left_alone(before):
    with ThreadPoolExecutor(1) as thread:
        seen = thread.submit(lambda: [(event, handlers()) for event in StopRequest().watch(iter(EVENTS))]).result()
    assert seen == [(event, before) for event in EVENTS]

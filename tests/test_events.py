"""What a session tells, read to its end."""

import pytest

from diffussm_cli.events import Message, Stage, finish


def test_finish_returns_value_of_session_and_passes_its_errors():
    told = []

    def session(fail):
        for event in (Stage("a"), Message("b")):
            told.append(event)
            yield event
        if fail:
            raise KeyError("c")
        return 7

    assert finish(session(False)) == 7
    with pytest.raises(KeyError, match="c"):
        finish(session(True))
    assert told == [Stage("a"), Message("b")] * 2

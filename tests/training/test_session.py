"""A training as a notebook runs it: what it tells, where it stops, and which batches processes can
share.
"""

import itertools
from pathlib import Path

import pytest

from diffussm_cli import runs
from diffussm_cli.errors import ConfigError, NotFiniteError
from diffussm_cli.events import Message, Stage, TrainingRecord, Warned, finish
from diffussm_cli.machine.processes import World
from diffussm_cli.training.session import TrainingResult, check_batch, train


def told(session):
    """The events of a session, and its value."""
    events = []
    while True:
        try:
            events.append(next(session))
        except StopIteration as end:
            return events, end.value


def test_training_yields_records_and_returns_its_outcome(tiny, tmp_path):
    events, result = told(train(tiny(), tmp_path / "run"))
    begun = events.index(Stage("training"))
    assert [(e.record["step"], e.steps) for e in events[begun + 1 :]] == [(2, 4), (4, 4)]
    assert not any(isinstance(e, TrainingRecord) for e in events[:begun])
    assert result == TrainingResult(tmp_path / "run", 4, 4)
    assert result.finished
    again, result = told(train(tiny(), tmp_path / "run", resume=True))
    assert Stage("training") not in again
    assert result == TrainingResult(tmp_path / "run", 4, 4, was_finished=True)


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_training_asked_to_stop_ends_before_the_next_step(tiny, tmp_path, asked):
    """The question is put before the first step, and after each one."""
    answers = itertools.count(1)
    result = finish(train(tiny(), tmp_path / "run", stop=lambda: next(answers) == asked))
    assert result == TrainingResult(tmp_path / "run", asked - 1, 4)
    assert not result.finished
    assert len(runs.list_checkpoints(tmp_path / "run")) == (asked > 1)


def test_simultaneous_trainings_take_two_folders(tiny, tmp_path, monkeypatch):
    """Neither of them has written anything when the other chooses its folder."""
    monkeypatch.chdir(tmp_path)
    first, second = train(tiny()), train(tiny())
    assert next(first) == next(second) == Stage("listing")
    folders = finish(first).root, finish(second).root
    assert folders == (Path("runs/digits"), Path("runs/digits-2"))


@pytest.mark.parametrize(
    ("size", "accumulate", "fits"), [(1, 2, 1), (2, 4, 1), (4, 2, 1), (3, 1, 0), (4, 4, 0)]
)
def test_processes_share_batch_in_equal_parts(tiny, size, accumulate, fits):
    config = tiny("train.batch_size=8", f"train.accumulate={accumulate}")
    if fits:
        check_batch(config, World(0, size))
    else:
        with pytest.raises(ConfigError, match=f"^train.batch_size: 8 .* {size * accumulate}$"):
            check_batch(config, World(0, size))


def test_average_added_on_resume_is_announced(tiny, tmp_path):
    list(train(tiny("train.ema=0.9"), tmp_path / "run"))
    changed = tiny("train.ema=0.9,0.1", "train.steps=6")
    said = [e.text for e in train(changed, tmp_path / "run", resume=True) if isinstance(e, Message)]
    assert "changed: train.ema was 0.9 and is now [0.9, 0.1]" in said
    assert "changed: the average of 0.1 begins as a copy of that of 0.9" in said


def test_preview_that_is_not_finite_is_a_warning_and_loses_no_step(tiny, tmp_path, monkeypatch):
    def draw(self, model, last):
        raise NotFiniteError("the image of seed 3", 3, "after step 2 of 4")

    monkeypatch.setattr("diffussm_cli.training.preview.Previews.draw", draw)
    events, result = told(train(tiny("train.sample_every=2"), tmp_path / "run"))
    warnings = [event.text for event in events if isinstance(event, Warned)]
    assert [text.partition(":")[0] for text in warnings] == [
        "no preview of step 2",
        "no preview of step 4",
    ]
    assert "the image of seed 3 has values that are not finite after step 2 of 4" in warnings[0]
    assert result.finished
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()

"""A training as a notebook runs it: what it tells, where it stops, and which batches processes can share."""

import os

import pytest
import torch

from diffussm_cli.errors import ConfigError
from diffussm_cli.events import Message, TrainingRecord, finish
from diffussm_cli.machine.processes import World
from diffussm_cli.training.session import TrainingResult, check_batch, processes_of, train
from diffussm_cli.training.stopping import TRAINING


def told(session):
    """The events of a session, and its value."""
    events = []
    while True:
        try:
            events.append(next(session))
        except StopIteration as end:
            return events, end.value


def test_a_training_tells_its_records_and_then_where_it_ended(tiny, tmp_path):
    events, result = told(train(tiny(), tmp_path / "run"))
    begun = events.index(TRAINING)
    assert [(e.record["step"], e.steps) for e in events[begun + 1 :]] == [(2, 4), (4, 4)]
    assert not any(isinstance(e, TrainingRecord) for e in events[:begun])
    assert result == TrainingResult(tmp_path / "run", 4, 4)
    assert result.finished
    again, result = told(train(tiny(), tmp_path / "run", resume=True))
    assert TRAINING not in again
    assert result == TrainingResult(tmp_path / "run", 4, 4, was_finished=True)


def test_a_training_that_is_asked_to_stop_ends_after_the_step_in_hand(tiny, tmp_path):
    result = finish(train(tiny(), tmp_path / "run", stop=lambda: True))
    assert result == TrainingResult(tmp_path / "run", 1, 4)
    assert not result.finished


@pytest.mark.parametrize(("size", "accumulate", "fits"), [(1, 2, 1), (2, 4, 1), (4, 2, 1), (3, 1, 0), (4, 4, 0)])
def test_processes_share_a_batch_in_equal_whole_parts(tiny, size, accumulate, fits):
    config = tiny("train.batch_size=8", f"train.accumulate={accumulate}")
    if fits:
        check_batch(config, World(0, size))
    else:
        with pytest.raises(ConfigError, match=f"^train.batch_size: 8 .* {size * accumulate}$"):
            check_batch(config, World(0, size))


@pytest.mark.parametrize(
    ("cores", "batch", "accumulate", "processes", "expected"),
    [
        (8, 16, 1, 0, 4),
        (2, 16, 1, 0, 2),
        (8, 16, 2, 0, 2),
        (8, 24, 1, 0, 6),
        (8, 3, 1, 0, 1),
        (8, 10, 1, 0, 2),
        (1, 16, 1, 4, 4),
    ],
)
def test_as_many_processes_as_cores_but_with_four_images_each(
    tiny, monkeypatch, cores, batch, accumulate, processes, expected
):
    monkeypatch.setattr("diffussm_cli.training.session.own_cores", lambda: cores)
    settings = {"batch_size": batch, "accumulate": accumulate, "processes": processes, "device": "cpu"}
    assert processes_of(tiny(*(f"train.{k}={v}" for k, v in settings.items()))) == expected


def test_processes_are_for_a_cpu(tiny, monkeypatch):
    monkeypatch.setattr("diffussm_cli.training.session.pick_device", lambda name: torch.device("meta"))
    assert processes_of(tiny("train.processes=0")) == 1
    with pytest.raises(ConfigError, match="train.processes: 2 processes need train.device=cpu"):
        processes_of(tiny("train.processes=2"))


@pytest.mark.slow
def test_processes_of_a_notebook_train_as_one(tiny, tmp_path):
    losses = {}
    for n in (1, 2):
        before = torch.get_num_threads(), os.environ.get("WORLD_SIZE"), os.environ.get("OMP_NUM_THREADS")
        events, result = told(train(tiny(f"train.processes={n}", "train.device=cpu"), tmp_path / str(n)))
        assert result == TrainingResult(tmp_path / str(n), 4, 4, processes=n)
        assert before == (torch.get_num_threads(), os.environ.get("WORLD_SIZE"), os.environ.get("OMP_NUM_THREADS"))
        losses[n] = [e.record["loss"] for e in events if isinstance(e, TrainingRecord)]
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)


def test_an_average_that_is_added_on_resume_is_announced(tiny, tmp_path):
    list(train(tiny("train.ema=0.9"), tmp_path / "run"))
    changed = tiny("train.ema=0.9,0.1", "train.steps=6")
    said = [e.text for e in train(changed, tmp_path / "run", resume=True) if isinstance(e, Message)]
    assert "changed: train.ema was 0.9 and is now [0.9, 0.1]" in said
    assert "changed: the average of 0.1 begins as a copy of that of 0.9" in said

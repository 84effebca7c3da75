"""A training as a notebook runs it: what it tells, where it stops, and which batches processes can
share.
"""

import itertools
import json
import subprocess
from pathlib import Path

import pytest

from diffussm_cli import runs
from diffussm_cli.errors import ConfigError, NotFiniteError, RunError
from diffussm_cli.events import FirstStep, Message, Stage, TrainingRecord, Warned, finish
from diffussm_cli.machine.gpus import gpu_named
from diffussm_cli.machine.processes import World
from diffussm_cli.profiling.flops import cost, training_operations
from diffussm_cli.training import loop
from diffussm_cli.training.checks import check_job
from diffussm_cli.training.session import TrainingResult, train
from tests.helpers import Killed


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
    begun = events.index(Stage("training")) + 1
    assert events[begun] == FirstStep(4, 0)  # a record comes at step 2
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
        check_job(config, World(0, size))
    else:
        with pytest.raises(ConfigError, match=f"^train.batch_size: 8 .* {size * accumulate}$"):
            check_job(config, World(0, size))


def test_built_in_data_of_a_run_without_a_hash_are_taken_for_the_same(tiny, tmp_path):
    root = tmp_path / "run"
    list(train(tiny(), root))
    data = runs.read_data(root)
    assert data["first"]["sha256"] == data["sha256"]
    for name, said in (("", False), ("ab" * 32, True)):  # an earlier version, and other digits
        runs.write_data(root, data | {"sha256": name, "first": data["first"] | {"sha256": name}})
        more = tiny(f"train.steps={8 if said else 6}")
        warned = [e.text for e in train(more, root, resume=True) if isinstance(e, Warned)]
        assert any("are not those that" in text for text in warned) == said


@pytest.mark.parametrize("place", ["first", "last"])
def test_average_added_on_resume_is_announced(tiny, tmp_path, place):
    list(train(tiny("train.ema=0.9"), tmp_path / "run"))
    decays = "0.1,0.9" if place == "first" else "0.9,0.1"
    changed = tiny(f"train.ema={decays}", "train.steps=6")
    said = [e.text for e in train(changed, tmp_path / "run", resume=True) if isinstance(e, Message)]
    assert f"changed: train.ema was 0.9 and is now [{decays.replace(',', ', ')}]" in said
    assert "changed: the average of 0.1 begins as a copy of that of 0.9" in said


def test_preview_that_is_not_finite_is_a_warning_and_loses_no_step(tiny, tmp_path, monkeypatch):
    def draw(self, step, model, last):
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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RunError("damaged")])
def test_report_that_cannot_be_written_is_a_warning(tiny, tmp_path, monkeypatch, error):
    def fail(root):
        raise error

    monkeypatch.setattr("diffussm_cli.training.session.write_report", fail)
    events, result = told(train(tiny("train.sample_every=2"), tmp_path / "run"))
    warnings = {event.text for event in events if isinstance(event, Warned)}
    words = "No space left on device" if isinstance(error, OSError) else "damaged"
    assert warnings == {f"{tmp_path / 'run' / 'report.html'} cannot be written: {words}"}
    assert result.finished


def test_checkpoint_of_a_step_precedes_its_preview(tiny, tmp_path, monkeypatch):
    def draw(self, step, model, last):
        raise Killed

    monkeypatch.setattr("diffussm_cli.training.preview.Previews.draw", draw)
    with pytest.raises(Killed):
        list(train(tiny("train.sample_every=2", "train.async_checkpoint=false"), tmp_path / "run"))
    assert [runs.step_of(path) for path in runs.list_checkpoints(tmp_path / "run")] == [2]


def test_log_tells_command_data_commit_memory_and_where_the_time_went(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/diffussm", "train", "--out", "a b"])
    events, result = told(train(tiny("train.sample_every=4"), tmp_path / "run"))
    lines = (tmp_path / "run" / runs.LOG).read_text().splitlines()
    records = [json.loads(line) for line in lines]

    # How the run began.
    session = records[0]["session"]
    assert session["command"] == "diffussm train --out 'a b'"
    data = runs.read_data(tmp_path / "run")
    assert session["data_sha256"] == data["sha256"]
    assert len(data["sha256"]) == 64
    code = Path(__file__).parents[2]
    if (code / ".git").exists():
        git = ["git", "-C", str(code), "rev-parse", "HEAD"]
        head = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        assert session["commit"].removesuffix("-dirty") == head

    # What it took.
    assert set(result.seconds) == {"steps", "previews", "checkpoints"}
    assert min(result.seconds.values()) > 0
    assert all(result.seconds[k] >= v for k, v in records[-1]["seconds"].items())
    assert "previews" not in records[-1]["seconds"]  # the last preview came later
    at_end = records[-1]["seconds_at_end"]
    assert {k: v for k, v in at_end.items() if k != "steps"} == {
        k: v for k, v in result.seconds.items() if k != "steps"
    }
    assert all("seconds_at_end" not in record for record in records[:-1])
    assert 0.05 < records[0]["peak_memory_gib"] <= records[-1]["peak_memory_gib"] < 1000
    assert all("mfu" not in record for record in records)  # a CPU has no data sheet here
    printed = [e.record for e in events if isinstance(e, TrainingRecord)]
    assert [record["step"] for record in printed] == [record["step"] for record in records]


def test_share_of_the_peak_is_that_of_the_data_sheet(tiny, tmp_path, monkeypatch):
    """Three times the multiply-adds of a forward pass, two operations each, on an H100."""
    monkeypatch.setattr(loop, "processor_name", lambda device: "NVIDIA H100 80GB HBM3")
    config = tiny("train.precision=fp32", "train.steps=2")
    events, _ = told(train(config, tmp_path / "run", operations=training_operations))
    record, model = events[-1].record, cost(config)
    operations = 6e9 * (8 * model.gflops + model.kernel_gflops) / 8
    assert record["mfu"] == pytest.approx(operations * record["images_per_second"] / 67e12)
    assert gpu_named("NVIDIA H100 PCIe") is None

"""Means between two records, and where records go."""

import importlib.util
import json
import math
import os
import sqlite3
import subprocess
import sys
import types

import pytest
import torch

from diffussm_cli.errors import ConfigError
from diffussm_cli.training import record
from diffussm_cli.training.record import Meter, RecordWriter, open_tracker


def test_meter_averages_losses_and_quarters():
    meter = Meter(1000, torch.device("cpu"))
    mse = torch.tensor([1.0, 3.0, 5.0, 9.0])
    meter.add({"mse": mse, "loss": 2 * mse}, torch.tensor([0, 249, 250, 999]))
    meter.end_step(torch.tensor(7.0), torch.tensor(0.0))
    meter.add({"mse": mse * math.nan, "loss": mse * math.inf}, torch.tensor([0, 249, 250, 999]))
    meter.end_step(torch.tensor(math.nan), torch.tensor(1.0))  # left out: no trace
    means = meter.flush()
    assert means.pop("images_per_second") > 0
    assert means == {"mse": 4.5, "loss": 9, "mse_q1": 2, "mse_q2": 5, "mse_q4": 9, "grad_norm": 7}


def test_fractional_timesteps_fall_into_their_quarter():
    meter = Meter(1000, torch.device("cpu"))
    mse = torch.tensor([1.0, 3.0, 5.0, 9.0])
    meter.add({"mse": mse}, torch.tensor([0.01, 249.9, 250.1, 999.9]))
    meter.end_step(torch.tensor(7.0), torch.tensor(0.0))
    means = meter.flush()
    assert (means["mse_q1"], means["mse_q2"], means["mse_q4"]) == (2, 5, 9)


def test_records_beyond_checkpoint_are_dropped_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"st')
    writer = RecordWriter(tmp_path, step=2)
    writer.write({"step": 3, "loss": 1.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2}, {"step": 3, "loss": 1.0}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_pauses_do_not_lower_the_rate(monkeypatch):
    """40 images in 24 seconds, 4 of which went to a preview."""
    clock = iter([0.0, 10.0, 14.0, 24.0, 24.0])
    monkeypatch.setattr(record, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    meter = Meter(1000, torch.device("cpu"))
    with meter.paused():
        pass
    meter.add({"mse": torch.ones(40), "loss": torch.ones(40)}, torch.zeros(40, dtype=torch.long))
    meter.end_step(torch.tensor(1.0), torch.tensor(0.0))
    assert meter.flush()["images_per_second"] == pytest.approx(2.0)


def test_numbers_that_are_not_finite_are_null_in_the_log(tmp_path):
    writer = RecordWriter(tmp_path, step=0)
    writer.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 1e-3})
    writer.close()
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.001}\n'


class Recorded:
    """Stands for the module and the run of a tracker."""

    def __init__(self):
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.begun.append(options)
        return self

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1
        print("Run finished.")  # noqa: T201


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_tracker_gets_records_and_continues_on_resume(tiny, tmp_path, monkeypatch, capsys, name):
    tracker = Recorded()
    monkeypatch.setitem(sys.modules, name, tracker)
    for step in (1, 2):
        writer = RecordWriter(
            tmp_path, step - 1, open_tracker(tiny(f"train.logger={name}"), tmp_path)
        )
        writer.write(
            {
                "step": step,
                "loss": 0.5,
                "grad_norm": math.nan,
                "left_out": [1],
                "session": {"time": ""},
            }
        )
        writer.close()
    assert tracker.logged == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert tracker.finished == 2
    assert tracker.begun[0] == tracker.begun[1]
    assert tracker.begun[0]["resume"] == "allow"
    assert tracker.begun[0]["config"]["train"]["logger"] == name
    assert capsys.readouterr().out == ""  # stdout is for results


def test_tensorboard_needs_no_tracker(tiny, tmp_path):
    assert open_tracker(tiny(), tmp_path) is None


def test_missing_tracker_names_its_extra(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"^train.logger: wandb is not installed: pip install '\.\[wandb\]' "
    ):
        open_tracker(tiny("train.logger=wandb"), tmp_path)


def test_refusing_tracker_is_one_line_error(tiny, tmp_path, monkeypatch):
    def refuse(**options):
        raise RuntimeError("api_key not configured\nmore")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    line = (
        "^train.logger: wandb cannot begin: api_key not configured; log in, or set "
        "WANDB_MODE=offline$"
    )
    with pytest.raises(ConfigError, match=line):
        open_tracker(tiny("train.logger=wandb"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_offline_tracker_writes_its_own_files(tiny, tmp_path, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the extra {name}")
    root = tmp_path / "run"
    settings = [
        f"train.logger={name}",
        "train.steps=2",
        "train.log_every=1",
        "train.sample_every=0",
    ]
    command = ["train", "--preset", "digits", "--out", str(root), "--resume"]
    command += [part for setting in settings for part in ("--set", setting)]

    # both parts of the run in one process, which imports the tracker once
    code = (
        "from diffussm_cli.cli import app\n"
        "for steps in (2, 3):\n"
        f"    last = ['--set', f'train.steps={{steps}}']\n"
        f"    assert not app({command!r} + last, standalone_mode=False)\n"
    )
    offline = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | offline, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" or name == "trackio"  # it says goodbye when the process ends

    if name == "wandb":
        assert len(list((root / "wandb").glob("offline-run-*/*.wandb"))) == 2
        return
    with sqlite3.connect(tmp_path / "trackio" / "diffussm.db") as board:
        found = board.execute("select step, metrics from metrics order by step").fetchall()
    board.close()
    assert [step for step, _ in found] == [1, 2, 3]
    assert all(json.loads(numbers)["loss"] > 0 for _, numbers in found)

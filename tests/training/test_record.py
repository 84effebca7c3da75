"""Means between two records, and where records go."""

import json
import math
import types

import pytest
import torch

from diffussm_cli.training import record
from diffussm_cli.training.record import Meter, RecordWriter


def test_meter_means_and_quarters():
    meter = Meter(1000, torch.device("cpu"))
    mse = torch.tensor([1.0, 3.0, 5.0, 9.0])
    meter.add({"mse": mse, "loss": 2 * mse}, torch.tensor([0, 249, 250, 999]))
    meter.end_step(torch.tensor(7.0), torch.tensor(0.0))
    meter.add({"mse": mse * math.nan, "loss": mse * math.inf}, torch.tensor([0, 249, 250, 999]))
    meter.end_step(torch.tensor(math.nan), torch.tensor(1.0))  # left out: no trace
    means = meter.flush()
    assert means.pop("images_per_second") > 0
    assert means == {"mse": 4.5, "loss": 9, "mse_q1": 2, "mse_q2": 5, "mse_q4": 9, "grad_norm": 7}


def test_fractional_timesteps_have_their_quarter():
    meter = Meter(1000, torch.device("cpu"))
    mse = torch.tensor([1.0, 3.0, 5.0, 9.0])
    meter.add({"mse": mse}, torch.tensor([0.01, 249.9, 250.1, 999.9]))
    meter.end_step(torch.tensor(7.0), torch.tensor(0.0))
    means = meter.flush()
    assert (means["mse_q1"], means["mse_q2"], means["mse_q4"]) == (2, 5, 9)


def test_records_beyond_a_checkpoint_are_dropped_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"st')
    writer = RecordWriter(tmp_path, step=2)
    writer.write({"step": 3, "loss": 1.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2}, {"step": 3, "loss": 1.0}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_pauses_do_not_count_against_the_rate(monkeypatch):
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
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.001}\n'

"""Names in a run folder, and which run and which checkpoint is the newest."""

import os
from pathlib import Path

from diffussm_cli import runs


def test_checkpoint_is_named_by_its_step():
    steps = [0, 7, 99_999_999, 100_000_000]
    assert [runs.step_of(Path(runs.checkpoint_name(step))) for step in steps] == steps
    assert runs.checkpoint_name(7) == "step-00000007"


def test_checkpoints_are_listed_by_step_once_they_are_complete(tmp_path):
    for name in (
        "step-100000000",
        "step-00000007",
        "step-99999999",
        "step-7",
        "step-00000008-copy",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-00000009").mkdir()  # without its state
    assert [runs.step_of(p) for p in runs.list_checkpoints(tmp_path)] == [
        7,
        99_999_999,
        100_000_000,
    ]
    assert runs.list_checkpoints(tmp_path / "none") == []


def test_newest_run_is_that_with_the_latest_configuration(tmp_path):
    for age, name in enumerate(("mnist-dit", "mnist-2", "other", "mnist-10", "mnist")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
        os.utime(tmp_path / name / "config.yaml", (1e9 - age, 1e9 - age))
    (tmp_path / "mnist-3").mkdir()  # holds no run
    assert runs.newest_run(tmp_path) == tmp_path / "mnist-dit"
    assert runs.newest_run(tmp_path, "mnist") == tmp_path / "mnist-2"
    assert runs.newest_run(tmp_path, "mnis") is None
    assert runs.newest_run(tmp_path / "none") is None

"""The folder of a run: the configuration of a run that continues."""

import pytest

from diffussm_cli import runs
from diffussm_cli.errors import ConfigError, RunError


def test_resumed_config_is_the_saved_one_with_changes(tiny, tmp_path):
    saved = tiny("train.lr=0.003")
    runs.write_config(tmp_path, saved)
    assert runs.resumed_config(tmp_path) == saved
    assert runs.resumed_config(tmp_path, ["train.steps=9"]) == tiny(
        "train.lr=0.003", "train.steps=9"
    )
    assert runs.resumed_config(tmp_path, fields={"train.steps": 9}) == tiny(
        "train.lr=0.003", "train.steps=9"
    )
    with pytest.raises(ConfigError, match="train.steps: 'many'"):
        runs.resumed_config(tmp_path, ["train.steps=many"])


def test_resumed_config_is_none_where_no_run_has_begun(tmp_path):
    assert runs.resumed_config(tmp_path / "nowhere") is None
    assert runs.resumed_config(tmp_path) is None


def test_checkpoints_without_configuration_are_an_error(tmp_path):
    checkpoint = tmp_path / runs.CHECKPOINTS / runs.checkpoint_name(2)
    checkpoint.mkdir(parents=True)
    runs.write_state(checkpoint, {"step": 2})
    with pytest.raises(
        RunError, match="^--out: .* has checkpoints but no config.yaml; give the --preset"
    ):
        runs.resumed_config(tmp_path)

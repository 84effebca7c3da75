"""What `train` says at its end, and its exit code."""

import shlex

import pytest

from diffussm_cli.commands.console import make_console
from diffussm_cli.commands.train import report
from diffussm_cli.training.session import TrainingResult


@pytest.mark.parametrize(
    ("step", "code", "expected"),
    # at last by the signal of another process
    [(4, None, 0), (4, 130, 0), (2, 130, 130), (2, 75, 75), (2, None, 75)],
)
def test_exit_code_says_how_a_training_ended(tmp_path, capsys, step, code, expected):
    root = tmp_path / "a run"
    assert report(make_console(), TrainingResult(root, step, 4), code) == expected
    said = capsys.readouterr().err
    command = (
        f"sample {shlex.quote(str(root))}"
        if step == 4
        else f"train --resume --out {shlex.quote(str(root))}"
    )
    assert f"diffussm {command}" in said
    assert f"report: {root / 'report.html'}\n" in said

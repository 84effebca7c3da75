"""The tools run to their end at toy sizes."""

import subprocess
import sys
from pathlib import Path

import pytest

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
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run([sys.executable, ROOT / "tools" / "gpu_check.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device is available here; --toy runs at toy sizes on the CPU" in done.stderr

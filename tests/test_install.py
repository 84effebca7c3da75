"""Presets travel with the wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_holds_code_and_presets(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", tmp_path, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("diffussm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for preset in (ROOT / "presets").glob("*.yaml"):
        assert f"diffussm_cli/presets/{preset.name}" in names
    for module in (ROOT / "diffussm_cli").rglob("*.py"):
        assert module.relative_to(ROOT).as_posix() in names
    assert not any(n.startswith("tests/") for n in names)


def test_presets_are_found_from_any_folder(tmp_path):
    code = "from diffussm_cli.config import load_config; print(load_config('xl-256').model.hidden_size)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "1152", done.stderr

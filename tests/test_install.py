"""Presets travel with the wheel, and its dependencies are declared."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_holds_code_and_presets(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        tmp_path,
        ROOT,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("diffussm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for preset in (ROOT / "presets").glob("*.yaml"):
        assert f"diffussm_cli/presets/{preset.name}" in names
    for module in [
        p for p in (ROOT / "diffussm_cli").rglob("*") if p.suffix in (".py", ".html", ".js")
    ]:
        assert module.relative_to(ROOT).as_posix() in names
    for file in (ROOT / "diffussm_cli" / "bundled").glob("*/*"):
        assert file.relative_to(ROOT).as_posix() in names
    assert wheel.stat().st_size < 15e6
    assert not any(n.startswith("tests/") for n in names)


def hidden_size(folder):
    """What a preset says to a program that is started in a folder, and whose package reads it."""
    code = (
        "import diffussm_cli; from diffussm_cli.config import load_config; "
        "print(load_config('xl-256').model.hidden_size, diffussm_cli.__file__)"
    )
    command = [sys.executable, "-c", code]
    # the program sets this for its own children, and a test may have run it in this process
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    size, package = done.stdout.strip().split(" ", 1)
    return int(size), Path(package).parents[1]


def test_presets_are_found_from_any_folder(tmp_path):
    assert hidden_size(tmp_path)[0] == 1152


def test_presets_are_found_in_checkout_that_hides_the_installed_package(tmp_path):
    shutil.copytree(
        ROOT / "diffussm_cli",
        tmp_path / "diffussm_cli",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    assert hidden_size(tmp_path) == (1152, tmp_path)


def test_imported_packages_are_declared():
    """As a dependency, or in an extra, whose packages are imported where they are used."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        r
        for name, extra in project["optional-dependencies"].items()
        if name != "test"
        for r in extra
    ]
    declared = {
        re.match(r"[\w-]+", r)[0].replace("_", "-") for r in project["dependencies"] + extras
    }
    providers = importlib.metadata.packages_distributions()
    for path in (ROOT / "diffussm_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in (
                {n.partition(".")[0] for n in names}
                - set(sys.stdlib_module_names)
                - {"diffussm_cli"}
            ):
                found = {d.lower().replace("_", "-") for d in providers.get(name, [])}
                assert found & declared, (
                    f"{path} imports {name}, which pyproject.toml does not declare"
                )

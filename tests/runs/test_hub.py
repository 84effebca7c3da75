"""Models of the package and of the hub: which names mean them, and what is fetched. Nothing here
needs a network.
"""

import shutil
from pathlib import Path

import pytest
import torch

from diffussm_cli import runs
from diffussm_cli.config import load_config, presets
from diffussm_cli.errors import RunError
from diffussm_cli.evaluation.results import find_run_at
from diffussm_cli.runs import hub
from tests.helpers import line_of, only_cached, run

HASH, NEWER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
WEIGHTS = {"a": torch.zeros(2, 3)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache with two revisions of owner/digits, of 4 and 6 steps, and no network."""
    home = tmp_path / "cache" / "models--owner--digits"
    for revision, steps in {HASH: 4, NEWER: 6}.items():
        config = load_config("digits", [f"train.steps={steps}"])
        runs.write_weights(home / "snapshots" / revision, config, WEIGHTS, steps)
    only_cached(home, {"main": NEWER, "v1": HASH}, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return home


@pytest.mark.parametrize(("revision", "steps"), [("", 6), ("@v1", 4), (f"@{HASH}", 4)])
def test_model_is_found_in_cache_at_its_revision(cache, revision, steps):
    found = runs.find_run(Path(f"owner/digits{revision}"))
    assert found.config.train.steps == steps
    assert (found.root, found.step) == (Path("runs") / f"owner--digits{revision}", None)
    assert find_run_at(f"owner/digits{revision}") == found


def test_folder_wins_over_hub_name(cache):
    runs.write_weights(Path("owner/digits"), load_config("digits", ["train.steps=8"]), WEIGHTS, 8)
    assert runs.find_run(Path("owner/digits")).config.train.steps == 8
    # OWNER is a folder: mistyped
    with pytest.raises(RunError, match="RUN: no folder 'owner/other'; train one with"):
        runs.find_run(Path("owner/other"))


@pytest.mark.parametrize("name", ["owner/nothing", "owner/digits@v2", f"owner/digits@{'e' * 40}"])
def test_failed_fetch_is_one_line_error(cache, name):
    said = (
        f"RUN: there is no folder {name!r}, and it cannot be fetched from the hub: check its "
        "name and the network"
    )
    assert said in line_of(run("sample", name))
    assert said in line_of(run("eval", name))


def test_changed_weights_are_rejected(cache):
    (cache / "snapshots" / NEWER / runs.MODEL).write_bytes(b"half")
    with pytest.raises(RunError, match="model.safetensors has changed since it was written"):
        runs.find_run(Path("owner/digits"))


@pytest.mark.parametrize(
    "name", ["nowhere", "runs/mnist", "a/b/c", "/a/b", "a/b.npz", "a/b.pt", "x" * 300, "a/b@"]
)
def test_path_is_not_taken_for_a_hub_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not hub.is_elsewhere(name)


def test_model_of_the_package_is_found_by_name(tmp_path, monkeypatch):
    for module in (hub, presets):
        monkeypatch.setattr(module, "BUNDLED", tmp_path / "bundled")
    monkeypatch.chdir(tmp_path)
    assert hub.bundled_names() == []
    runs.write_weights(tmp_path / "bundled" / "tiny", load_config("digits"), WEIGHTS, 4)
    assert hub.bundled_names() == ["tiny"]
    found = runs.find_run(Path("tiny"))
    assert (found.root, found.weights) == (
        Path("runs/tiny-bundled"),
        tmp_path / "bundled" / "tiny" / runs.MODEL,
    )
    shutil.copytree(tmp_path / "bundled" / "tiny", "tiny")
    assert runs.find_run(Path("tiny")).weights == Path("tiny") / runs.MODEL

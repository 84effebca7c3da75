"""Folders that appear whole or not at all, and the newest that is as it was written."""

from pathlib import Path

import pytest
import torch

from diffussm_cli import runs
from diffussm_cli.config import load_config
from diffussm_cli.errors import RunError
from tests.helpers import Killed


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()
    }


def write(path, error=None, **files):
    with runs.whole_folder(path) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)
        if error:
            raise error


def test_folder_takes_its_name_when_complete(tmp_path):
    path = tmp_path / "below" / "a"
    with runs.whole_folder(path) as folder:
        (folder / "x").write_text("1")
        assert not path.exists()
        assert folder.parent == path.parent  # one file system, so that a rename is all
    assert content(tmp_path) == {"below/a/x": "1"}


def test_folder_replaces_the_former_one_as_a_whole(tmp_path):
    write(tmp_path / "a", x="1", y="2")
    write(tmp_path / "a", x="3")
    assert content(tmp_path) == {"a/x": "3"}


def test_debris_of_killed_process_stays_out_of_the_folder(tmp_path):
    with pytest.raises(Killed):
        write(tmp_path / "a", Killed(), half="1")
    assert not (tmp_path / "a").exists()
    write(tmp_path / "a", x="2")
    assert content(tmp_path) == {"a/x": "2"}


def test_full_disk_leaves_the_former_folder(tmp_path):
    write(tmp_path / "a", x="1")
    with pytest.raises(RunError, match="No space left"):
        write(tmp_path / "a", OSError(28, "No space left on device"), x="2")
    assert content(tmp_path) == {"a/x": "1"}


def test_failed_rename_restores_the_former_folder(tmp_path, monkeypatch):
    write(tmp_path / "a", x="1")
    rename = Path.rename

    def fail(self, target):
        if (self / "x").read_text() == "2":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(RunError, match="Input/output error"):
        write(tmp_path / "a", x="2")
    assert content(tmp_path) == {"a/x": "1"}


def checkpoint(root, step):
    path = root / "checkpoints" / runs.checkpoint_name(step)
    with runs.whole_folder(path) as folder:
        hashes = {
            runs.EMA: runs.write_tensors({"a": torch.tensor([float(step)])}, folder / runs.EMA)
        }
        runs.write_state(folder, {"step": step, "sha256": hashes})
    return path


def test_newest_good_checkpoint_is_found_with_faults_of_newer_ones(tmp_path):
    paths = [checkpoint(tmp_path, step) for step in (2, 4, 6, 8)]
    assert runs.newest_good(tmp_path, [runs.EMA]) == (paths[3], [])
    (paths[3] / runs.EMA).unlink()
    (paths[2] / runs.EMA).write_bytes((paths[1] / runs.EMA).read_bytes())
    newest, wrong = runs.newest_good(tmp_path, [runs.EMA])
    assert newest == paths[1]
    assert [
        line.startswith(str(path / runs.EMA)) for line, path in zip(wrong, (paths[3], paths[2]))
    ] == [True] * 2
    assert runs.newest_good(tmp_path)[0] is None  # they have no hashes of other files
    assert runs.newest_good(tmp_path / "none") == (None, [])


def test_final_weights_are_checked_against_step_and_hash(tmp_path):
    assert not runs.has_final(tmp_path, 4)
    runs.write_weights(tmp_path / "final", load_config("digits"), {"a": torch.zeros(1)}, 4)
    assert runs.has_final(tmp_path, 4)
    assert not runs.has_final(tmp_path, 6)
    (tmp_path / "final" / runs.MODEL).write_bytes(b"half")
    assert not runs.has_final(tmp_path, 4)

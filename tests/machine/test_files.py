"""Files that appear whole, locks, and file systems without them."""

import errno
import os
from pathlib import Path

import pytest

from diffussm_cli.machine.files import content, default_cache, locked, whole_file, write_text
from tests.helpers import line_of, run


def test_a_lock_is_held_once(tmp_path):
    with locked(tmp_path / ".lock"), pytest.raises(BlockingIOError), locked(tmp_path / ".lock"):
        pass
    with locked(tmp_path / ".lock"):
        pass
    assert content(tmp_path) == set()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch, code):
    pytest.importorskip("sklearn")
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    line = line_of(run("train", "--preset", "digits", "--out", tmp_path / "run"))
    assert f"--out: cannot write to '{tmp_path / 'run'}': this file system has no file locks (flock)" in line
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old\u00e9")
    assert path.read_bytes() == b"old\xc3\xa9"

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught, whole_file(path) as file:
        file.write(b"new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old\xc3\xa9"
    assert content(tmp_path) == {"a.txt"}


def test_the_cache_is_below_the_users(monkeypatch):
    monkeypatch.setenv("DIFFUSSM_CACHE", "here")
    assert default_cache() == Path("here")
    monkeypatch.delenv("DIFFUSSM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    assert default_cache() == Path("elsewhere") / "diffussm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert default_cache() == Path("home") / ".cache" / "diffussm"

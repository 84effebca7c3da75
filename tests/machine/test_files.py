"""Files that appear whole, locks, and file systems without them."""

import errno
import os
import sys
from pathlib import Path

import pytest

from diffussm_cli.errors import ConfigError
from diffussm_cli.machine.files import (
    check_output,
    content,
    default_cache,
    held_folder,
    locked,
    open_regular,
    read_regular,
    sha256,
    whole_file,
    write_text,
)
from diffussm_cli.runs.checkpoints import whole_folder
from tests.helpers import line_of, run


def test_lock_is_held_once(tmp_path):
    with locked(tmp_path / ".lock"), pytest.raises(BlockingIOError), locked(tmp_path / ".lock"):
        pass
    with locked(tmp_path / ".lock"):
        pass
    assert content(tmp_path) == set()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_one_line_error(tmp_path, monkeypatch, code):
    pytest.importorskip("sklearn")
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    line = line_of(run("train", "--preset", "digits", "--out", tmp_path / "run"))
    assert (
        f"--out: cannot write to '{tmp_path / 'run'}': this file system has no file locks (flock)"
        in line
    )
    assert not (tmp_path / "run").exists()


def test_full_disk_is_named_and_leaves_old_file(tmp_path, monkeypatch):
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


OUTPUTS = {  # a path to write, and what the refusal says; None: it may be written
    "new.json": None,
    "old.json": None,
    "folder": "it is a folder; name a file",
    "pipe": "it is a device or pipe; name a file",
    "link.json": "is a link to 'old.json' and would be replaced",
    "dangling.json": "is a link to 'nothing' and would be replaced",
    "none/new.json": "there is no folder",
    "new.txt": "must end in .json or .npz",
    "read.npz": "is read by this command",
    "folder/../read.npz": "is read by this command",
    "images/meta.json": "is read by this command",
    "images/results.json": None,
    "images/new.json": None,
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_never_replaces_input_link_or_device(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "folder").mkdir()
    for file in ("old.json", "read.npz", "images/meta.json", "images/results.json"):
        (tmp_path / file).write_text("old")
    (tmp_path / "link.json").symlink_to("old.json")
    (tmp_path / "dangling.json").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    reads, suffixes = (
        [tmp_path / "read.npz", tmp_path / "images", tmp_path / "none", None],
        [".json", ".npz"],
    )

    def check():
        path = tmp_path / name
        check_output(
            path, "--out", suffixes if path.suffix else (), reads, replaces=["results.json"]
        )

    if OUTPUTS[name] is None:
        check()
    else:
        with pytest.raises(ConfigError, match=r"^--out: ") as caught:
            check()
        assert OUTPUTS[name] in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_device_is_not_replaced_by_file(monkeypatch):
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("the device is replaced"))
    with pytest.raises(OSError, match="it is a device, not a file") as caught:
        write_text(Path("/dev/null"), "a")
    assert caught.value.filename == "/dev/null"


def test_link_with_the_name_of_partial_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("old")
    for durable in (True, False):
        (tmp_path / f".partial-a.txt.{os.getpid()}").symlink_to("precious")
        with whole_file(tmp_path / "a.txt", durable) as file:
            file.write(b"new")
        assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "precious").read_text() == "old"


def test_write_leaves_partial_files_of_others(tmp_path):
    others = [tmp_path / f".partial-{name}.{os.getpid()}" for name in ("a.txt.gz", "b.txt")]
    for other in others:
        other.touch()
    (tmp_path / ".partial-a.txt.1").touch()
    write_text(tmp_path / "a.txt", "a")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a.txt", *others])


def test_file_that_two_processes_write_is_complete_and_of_the_last(tmp_path, monkeypatch):
    """Both may have the same number, as in two containers, or be seen by different machines."""
    path = tmp_path / "report.html"
    for numbers in ([1, 1], [1, 2]):
        monkeypatch.setattr(os, "getpid", lambda numbers=numbers: numbers[-1])
        with whole_file(path) as file:
            file.write(b"the first ")
            write_text(path, "of the second")
            assert path.read_text() == "of the second"
            numbers.pop()
            file.write(b"is complete")
        assert path.read_text() == "the first is complete"
        assert list(tmp_path.iterdir()) == [path]


def test_files_are_written_without_opening_folders_on_windows(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", refuse)
    write_text(tmp_path / "a.txt", "a")
    with whole_folder(tmp_path / "folder") as folder:
        write_text(folder / "b.txt", "b")
    assert (tmp_path / "folder" / "b.txt").read_text() == "b"


def test_empty_new_folder_is_removed(tmp_path):
    folder = tmp_path / "made" / "too"
    with held_folder(folder, 1):
        assert (folder / ".lock-1").exists()
        with pytest.raises(BlockingIOError), held_folder(folder, 1):
            pass
    assert list(tmp_path.iterdir()) == []
    with held_folder(folder, 1):
        write_text(folder / "a.txt", "a")
    with held_folder(folder):
        pass
    assert content(folder) == {"a.txt"}


def test_folder_of_two_processes_is_not_removed_by_the_later_one(tmp_path, monkeypatch):
    """Both have seen that it does not exist; one of them has locked it since."""
    folder = tmp_path / "made"
    with held_folder(folder):
        monkeypatch.setattr(Path, "exists", lambda self: False)
        with pytest.raises(BlockingIOError), held_folder(folder):
            pass
        monkeypatch.undo()
        assert (folder / ".lock-0").exists()


def test_cache_lies_below_the_cache_of_the_user(monkeypatch):
    monkeypatch.setenv("DIFFUSSM_CACHE", "here")
    assert default_cache() == Path("here")
    monkeypatch.delenv("DIFFUSSM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    assert default_cache() == Path("elsewhere") / "diffussm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert default_cache() == Path("home") / ".cache" / "diffussm"


@pytest.mark.parametrize("read", [open_regular, sha256, lambda path: read_regular(path, 10)])
def test_pipe_is_rejected_without_waiting(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"it is a folder; name a file"):
        read(tmp_path)


def test_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="it has more than 4 bytes"):
        read_regular(tmp_path / "file", 4)

"""Checkpoints: whole after a kill, hashed as they are written, and the same for every process."""

import errno
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from diffussm_cli import runs
from diffussm_cli.data.opening import open_source
from diffussm_cli.errors import RunError
from diffussm_cli.machine.files import sha256
from diffussm_cli.machine.processes import World
from diffussm_cli.training import checkpoint
from diffussm_cli.training.loop import Trainer
from tests.helpers import Killed


def trainer(config, root):
    return Trainer(config, open_source(config), root)


def test_old_checkpoints_and_debris_are_removed(tiny, tmp_path):
    (tmp_path / "checkpoints" / ".partial-step-00000001").mkdir(parents=True)
    list(trainer(tiny("train.checkpoint_every=1", "train.keep_checkpoints=2"), tmp_path).run())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]


def test_links_in_checkpoints_are_removed_and_their_targets_kept(tiny, tmp_path):
    list(trainer(tiny("train.checkpoint_every=2"), tmp_path / "other").run())
    kept = tmp_path / "other" / "checkpoints" / "step-00000002"
    files = sorted(kept.iterdir())
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("step-00000001", ".partial-step-00000003", ".partial-step-00000004.old"):
        (checkpoints / name).symlink_to(kept)
    list(
        trainer(
            tiny("train.checkpoint_every=1", "train.keep_checkpoints=2"), tmp_path / "run"
        ).run()
    )
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000003", "step-00000004"]
    assert sorted(kept.iterdir()) == files


def test_other_files_in_linked_folder_of_checkpoints_are_kept(tiny, tmp_path):
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "run"
    (elsewhere / ".partial-of-another-program").mkdir(parents=True)
    (elsewhere / ".partial-notes.txt.7").write_text("a")
    root.mkdir()
    (root / "checkpoints").symlink_to(elsewhere)
    before = set(elsewhere.iterdir())
    list(trainer(tiny("train.checkpoint_every=1", "train.keep_checkpoints=1"), root).run())
    assert set(elsewhere.iterdir()) == before | {elsewhere / "step-00000004"}


def test_weight_that_is_not_finite_is_named_and_enters_no_checkpoint(tiny, tmp_path):
    t = trainer(tiny("train.steps=2"), tmp_path)
    list(t.run())
    parameter = (
        t.step.model.blocks[1].s4d.log_dt
        if hasattr(t.step.model.blocks[1], "s4d")
        else next(t.step.model.parameters())
    )
    name = next(name for name, p in t.step.model.named_parameters() if p is parameter)
    before = sorted(tmp_path.rglob("*"))
    with torch.no_grad():
        parameter.view(-1)[-1] = torch.inf
    t.step.number = 3
    t.save()
    with pytest.raises(RunError, match=f"step-00000003: {name} holds numbers that are not finite"):
        t.writer.finish()
    assert sorted(tmp_path.rglob("*")) == before


def test_kill_while_writing_leaves_the_old_checkpoint(tiny, tmp_path, monkeypatch):
    t = trainer(tiny(), tmp_path)
    stop = iter([False, True])
    list(t.run(lambda: next(stop)))
    write = runs.write_tensors

    def die(tensors, path):
        write(tensors, path)
        path.write_bytes(path.read_bytes()[:100])
        raise Killed

    monkeypatch.setattr(runs, "write_tensors", die)
    t.step.number = 3
    t.save()
    with pytest.raises(Killed):
        t.writer.finish()
    assert runs.newest_good(tmp_path)[0].name == "step-00000002"
    again = trainer(tiny(), tmp_path)
    again.step.load(runs.newest_good(tmp_path)[0])
    assert again.step.number == 2


def test_hashes_are_taken_while_files_are_written(tiny, tmp_path, monkeypatch):
    """Not by reading gigabytes back: after SIGTERM seconds count. And the files are safetensors to
    everyone.
    """
    monkeypatch.setattr("diffussm_cli.runs.checkpoints.sha256", lambda _: 1 / 0)
    t = trainer(tiny("train.steps=2"), tmp_path)
    list(t.run())
    monkeypatch.undo()
    newest, damaged = runs.newest_good(tmp_path)
    assert (newest.name, damaged) == ("step-00000002", [])
    saved = load_file(newest / runs.MODEL)
    assert saved.keys() == t.step.model.state_dict().keys()
    assert all(torch.equal(v.cpu(), saved[k]) for k, v in t.step.model.state_dict().items())
    mixed = {
        "a": torch.arange(3.0),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "c": torch.tensor(2.0).double(),
    }
    digest = runs.write_tensors(mixed, tmp_path / "mixed.safetensors")
    assert digest == sha256(tmp_path / "mixed.safetensors")
    read = load_file(tmp_path / "mixed.safetensors")
    assert all(torch.equal(v, read[k]) and v.dtype == read[k].dtype for k, v in mixed.items())


@pytest.mark.parametrize("other", ["the same", "another step", "a stale file", "nothing"])
def test_processes_agree_on_the_checkpoint_of_the_first(tiny, tmp_path, monkeypatch, other):
    """The second process looks at another root, as on a shared file system that shows it an old
    state.
    """
    roots = [tmp_path / "0", tmp_path / "1"]
    list(trainer(tiny(), roots[0]).run())
    shutil.copytree(roots[0], roots[1])
    newest = runs.list_checkpoints(roots[1])[-1]
    if other == "another step":
        (newest / runs.STATE).write_text(
            (newest / runs.STATE).read_text().replace('"step": 4', '"step": 2')
        )
    elif other == "a stale file":
        shutil.copy(runs.list_checkpoints(roots[1])[0] / runs.EMA, newest / runs.EMA)
    elif other == "nothing":
        shutil.rmtree(roots[1])
    first, said = trained_by(2, roots, monkeypatch)
    if other == "the same":
        assert [path.name for path, _ in first] == ["step-00000004"] * 2
    else:
        assert len(said) == 2
        assert all(
            re.search("process 1 does not see the checkpoint of process 0 in .*step-00000004", s)
            for s in said
        )


def test_process_that_sees_no_run_begins_with_the_first(tiny, tmp_path, monkeypatch):
    """And not from a checkpoint that it alone sees."""
    roots = [tmp_path / "0", tmp_path / "1"]
    roots[0].mkdir()
    list(trainer(tiny(), roots[1]).run())
    first, _ = trained_by(2, roots, monkeypatch)
    assert first == [(None, [])] * 2


def trained_by(n, roots, monkeypatch):
    """What `agree_on_checkpoint` gives to each of n processes, here threads,
    and what they raise.
    """
    barrier, board = threading.Barrier(n, timeout=60), [None] * n

    def gather(value, world):
        board[world.rank] = value
        barrier.wait()
        found = list(board)
        barrier.wait()
        return found

    monkeypatch.setattr(checkpoint, "gather", gather)
    with ThreadPoolExecutor(n) as pool:
        futures = [
            pool.submit(checkpoint.agree_on_checkpoint, roots[i], World(i, n)) for i in range(n)
        ]
    errors = [f.exception() for f in futures]
    assert all(e is None or isinstance(e, RunError) for e in errors), errors
    return [f.result() for f in futures if f.exception() is None], [str(e) for e in errors if e]


@pytest.mark.parametrize("background", ["true", "false"])
def test_full_disk_is_one_line_error_and_leaves_the_old_checkpoint(
    tiny, tmp_path, monkeypatch, background
):
    t = trainer(tiny(f"train.async_checkpoint={background}"), tmp_path)
    t.step.number = 1
    t.step.optimizer.step()
    t.save()
    t.writer.finish()

    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "write_tensors", full)
    t.step.number = 2
    with pytest.raises(RunError, match="No space left on device; what was saved before is intact"):  # noqa: PT012
        t.save()
        t.writer.finish()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("harm", ["flipped", "missing"])
def test_damaged_further_average_is_detected(tiny, tmp_path, harm):
    t = trainer(tiny("train.ema=0.9,0.1"), tmp_path)
    list(t.run())
    assert runs.has_final(tmp_path, 4)
    for folder in (runs.list_checkpoints(tmp_path)[-1], tmp_path / "final"):
        path = folder / "ema-0.1.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x") if harm == "flipped" else path.unlink()
    newest, damaged = runs.newest_good(tmp_path)
    assert newest.name == "step-00000002"
    assert "ema-0.1.safetensors" in damaged[0]
    assert checkpoint.agree_on_checkpoint(tmp_path, World())[0] == newest
    assert not runs.has_final(tmp_path, 4)


def test_tensors_are_released_once_copied_for_the_writer(tiny, tmp_path):
    """What was gathered from several processes is as large as the model, its averages and its
    optimiser.
    """
    t = trainer(tiny("train.async_checkpoint=true"), tmp_path)
    t.step.optimizer.step()
    tensors = t.step.state()
    wanted = {name: value.clone() for name, value in tensors[runs.MODEL].items()}
    t.writer.write(tensors, {"step": 1})
    t.writer.finish()
    assert not any(tensors.values())
    saved = runs.read_tensors(tmp_path / "checkpoints" / "step-00000001" / runs.MODEL)
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(value.cpu(), saved[name]) for name, value in wanted.items())

"""The loop: accumulation, resume, EMA, records, checkpoints that survive, errors."""

import dataclasses
import errno
import json
import math
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffussm_cli import runs
from diffussm_cli.config import load_config
from diffussm_cli.data.source import open_source
from diffussm_cli.errors import DataError, RunError
from diffussm_cli.machine.files import sha256
from diffussm_cli.machine.processes import World
from diffussm_cli.training import checkpoint
from diffussm_cli.training.batches import make_batch
from diffussm_cli.training.ema import EMA
from diffussm_cli.training.optimizer import lr_factor
from diffussm_cli.training.record import Meter, RecordWriter
from diffussm_cli.training.trainer import Trainer


def trainer(config, root):
    return Trainer(config, open_source(config), root)


def weights(t):
    return {"model." + k: v.clone() for k, v in t.model.state_dict().items()} | {
        "ema." + k: v.clone() for k, v in t.ema.model.state_dict().items()
    }


def test_two_steps_resume_two_steps_equal_four_bitwise(tiny, tmp_path):
    whole = trainer(tiny(), tmp_path / "whole")
    records = list(whole.run())
    first = trainer(tiny(), tmp_path / "parts")
    stop = iter([False, True])
    list(first.run(lambda: next(stop)))
    assert first.step == 2
    second = trainer(tiny("train.seed=0"), tmp_path / "parts")
    second.resume(runs.newest_good(tmp_path / "parts")[0])
    resumed = list(second.run())
    assert all(torch.equal(v, weights(whole)[k]) for k, v in weights(second).items())
    assert resumed[-1]["loss"] == records[-1]["loss"]
    assert [r["step"] for r in records] == [2, 4]


def test_accumulation_equals_one_large_batch(tiny, tmp_path):
    results = []
    for parts in (1, 4):
        t = trainer(tiny(f"train.accumulate={parts}", "train.grad_clip=0.1"), tmp_path / str(parts))
        records = list(t.run())
        results.append((records[-1], weights(t)))
    (a, wa), (b, wb) = results
    for name in ("loss", "mse", "vb", "grad_norm"):
        assert a[name] == pytest.approx(b[name], rel=1e-4)
    for k in wa:
        torch.testing.assert_close(wa[k], wb[k], rtol=1e-3, atol=1e-4)


def test_training_lowers_the_loss(tiny, tmp_path):
    config = tiny("train.steps=120", "train.log_every=20", "train.lr=3e-3", "train.checkpoint_every=1000")
    records = list(trainer(config, tmp_path).run())
    assert records[0]["loss"] > 0.5
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    assert {f"mse_q{i}" for i in range(1, 5)} <= records[-1].keys()


def test_run_folder_describes_itself(tiny, tmp_path):
    config = tiny("train.sample_every=2", "train.sample_images=4")
    t = trainer(config, tmp_path)
    list(t.run())
    assert [p.name for p in runs.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    trained = runs.find_run(tmp_path)
    model = runs.load_model(trained)
    assert trained.config == config
    assert all(torch.equal(v, t.ema.model.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.position, t.model.position)
    assert not model.training


def test_old_checkpoints_go_and_debris_with_them(tiny, tmp_path):
    (tmp_path / "checkpoints" / ".partial-step-00000001").mkdir(parents=True)
    list(trainer(tiny("train.checkpoint_every=1", "train.keep_checkpoints=2"), tmp_path).run())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


def test_kill_while_writing_leaves_the_old_checkpoint(tiny, tmp_path, monkeypatch):
    t = trainer(tiny(), tmp_path)
    stop = iter([False, True])
    list(t.run(lambda: next(stop)))
    write = checkpoint.write_tensors

    def die(tensors, path):
        write(tensors, path)
        path.write_bytes(path.read_bytes()[:100])
        raise Killed

    monkeypatch.setattr(checkpoint, "write_tensors", die)
    t.step = 3
    t.save()
    with pytest.raises(Killed):
        t.writer.finish()
    assert runs.newest_good(tmp_path)[0].name == "step-00000002"
    again = trainer(tiny(), tmp_path)
    again.resume(runs.newest_good(tmp_path)[0])
    assert again.step == 2


def test_hashes_are_taken_while_files_are_written(tiny, tmp_path, monkeypatch):
    """Not by reading gigabytes back: after SIGTERM seconds count. And the files are safetensors to everyone."""
    monkeypatch.setattr("diffussm_cli.runs.checkpoints.sha256", lambda _: 1 / 0)
    t = trainer(tiny("train.steps=2"), tmp_path)
    list(t.run())
    monkeypatch.undo()
    newest, damaged = runs.newest_good(tmp_path)
    assert (newest.name, damaged) == ("step-00000002", [])
    saved = load_file(newest / runs.MODEL)
    assert saved.keys() == t.model.state_dict().keys()
    assert all(torch.equal(v, saved[k]) for k, v in t.model.state_dict().items())
    mixed = {"a": torch.arange(3.0), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(2.0).double()}
    digest = runs.write_tensors(mixed, tmp_path / "mixed.safetensors")
    assert digest == sha256(tmp_path / "mixed.safetensors")
    read = load_file(tmp_path / "mixed.safetensors")
    assert all(torch.equal(v, read[k]) and v.dtype == read[k].dtype for k, v in mixed.items())


@pytest.mark.parametrize("other", ["the same", "another step", "a stale file", "nothing"])
def test_processes_agree_on_the_checkpoint_of_the_first(tiny, tmp_path, monkeypatch, other):
    """The second process looks at another root, as on a shared file system that shows it an old state."""
    roots = [tmp_path / "0", tmp_path / "1"]
    list(trainer(tiny(), roots[0]).run())
    shutil.copytree(roots[0], roots[1])
    newest = runs.list_checkpoints(roots[1])[-1]
    if other == "another step":
        (newest / runs.STATE).write_text((newest / runs.STATE).read_text().replace('"step": 4', '"step": 2'))
    elif other == "a stale file":
        shutil.copy(runs.list_checkpoints(roots[1])[0] / runs.EMA, newest / runs.EMA)
    elif other == "nothing":
        shutil.rmtree(roots[1])
    first, said = trained_by(2, roots, monkeypatch)
    if other == "the same":
        assert [path.name for path, _ in first] == ["step-00000004"] * 2
    else:
        assert all(re.search("process 1 does not see the checkpoint of process 0 in .*step-00000004", s) for s in said)


def test_a_process_that_sees_no_run_begins_when_the_first_does(tiny, tmp_path, monkeypatch):
    """And not from a checkpoint that it alone sees."""
    roots = [tmp_path / "0", tmp_path / "1"]
    roots[0].mkdir()
    list(trainer(tiny(), roots[1]).run())
    first, _ = trained_by(2, roots, monkeypatch)
    assert first == [(None, [])] * 2


def trained_by(n, roots, monkeypatch):
    """What `agree_on_checkpoint` gives to each of n processes, here threads, and what they raise."""
    barrier, board = threading.Barrier(n, timeout=60), [None] * n

    def gather(value, world):
        board[world.rank] = value
        barrier.wait()
        found = list(board)
        barrier.wait()
        return found

    monkeypatch.setattr(checkpoint, "gather", gather)
    with ThreadPoolExecutor(n) as pool:
        futures = [pool.submit(checkpoint.agree_on_checkpoint, roots[i], World(i, n)) for i in range(n)]
    errors = [f.exception() for f in futures]
    assert all(e is None or isinstance(e, RunError) for e in errors), errors
    return [f.result() for f in futures if f.exception() is None], [str(e) for e in errors if e]


@pytest.mark.parametrize("background", ["true", "false"])
def test_full_disk_is_one_line_and_leaves_the_old_checkpoint(tiny, tmp_path, monkeypatch, background):
    t = trainer(tiny(f"train.async_checkpoint={background}"), tmp_path)
    t.step = 1
    t.optimizer.step()
    t.save()
    t.writer.finish()

    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    t.step = 2
    with pytest.raises(RunError, match="No space left on device; what was saved before is intact"):  # noqa: PT012
        t.save()
        t.writer.finish()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_write_that_fails_beside_training_ends_it_at_the_next_step(tiny, tmp_path, monkeypatch):
    t = trainer(tiny("train.steps=1000", "train.checkpoint_every=1000"), tmp_path)
    stop = iter([True])
    list(t.run(lambda: next(stop)))
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *_: 1 / 0)
    t.save()
    with pytest.raises(ZeroDivisionError):
        list(t.run())
    assert t.step < 100


def test_damaged_and_foreign_weights_are_named(tiny, tmp_path):
    list(trainer(tiny(), tmp_path).run())
    trained = runs.find_run(tmp_path)
    wider = dataclasses.replace(trained, config=tiny("model.hidden_size=32"))
    with pytest.raises(RunError, match=r"weights of another model: .* is \(.*\), not \("):
        runs.load_model(wider)
    deeper = dataclasses.replace(trained, config=tiny("model.depth=3"))
    with pytest.raises(RunError, match="weights of another model: blocks.2"):
        runs.load_model(deeper)
    trained.weights.write_bytes(trained.weights.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"model.safetensors: cannot be read"):
        runs.load_model(trained)
    state = runs.newest_good(tmp_path)[0] / runs.STATE
    state.write_text("{")
    with pytest.raises(RunError, match="state.json: damaged"):
        trainer(tiny(), tmp_path).resume(state.parent)


def test_loss_that_is_no_number_stops_with_advice(tiny, tmp_path):
    t = trainer(tiny("train.max_bad_steps=2", "train.checkpoint_every=1"), tmp_path)
    t.step, before = 1, weights(t)
    t.losses = lambda part: {k: x * math.nan for k, x in Trainer.losses(t, part).items()}
    with pytest.raises(RunError, match=r"3 steps in a row before step 4 had no finite.* try a smaller train.lr"):
        list(t.run())
    for k, v in weights(t).items():
        assert torch.equal(v, before[k]), k


def test_a_step_does_not_wait_for_the_device(tiny, tmp_path, monkeypatch):
    """torch.tensor of a Python number, and `item`, copy between host and device and wait for it."""
    t = trainer(tiny("train.accumulate=2", "train.grad_clip=1"), tmp_path)
    meter, batch = Meter(1000, t.device), make_batch(t.source, t.config, 0)
    t.update(batch, meter)  # the optimiser makes its state

    def wait(*_, **__):
        raise AssertionError("waits for the device")

    for owner, name in ((torch, "tensor"), (torch.Tensor, "item"), (torch.Tensor, "tolist"), (torch.Tensor, "cpu")):
        monkeypatch.setattr(owner, name, wait)
    t.update(batch, meter)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_batches_for_cuda_are_page_locked(tiny, tmp_path, monkeypatch, kind):
    t, pinned = trainer(tiny(), tmp_path), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    t.device = torch.device(kind)
    next(t._batches())
    assert pinned[:4] == ([(8, 1, 8, 8), (8,), (8, 1, 8, 8), (8,)] if kind == "cuda" else [])


def test_a_kill_while_a_preview_is_written_leaves_none(tiny, tmp_path, monkeypatch):
    t = trainer(tiny("train.sample_every=2", "train.sample_images=2"), tmp_path)

    def die(image, file, *_, **__):
        file.write(b"half") if hasattr(file, "write") else Path(file).write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(Image.Image, "save", die)
    with pytest.raises(Killed):
        list(t.run())
    assert not list((tmp_path / "samples").glob("step-*"))


def test_too_large_a_batch_is_one_line(tiny, tmp_path):
    t = trainer(tiny(), tmp_path)
    t.model.forward = lambda *_: torch.empty(1 << 60)
    with pytest.raises(RunError, match="train.batch_size: 8 in 1 part.* raise train.accumulate"):
        list(t.run())


def test_unreadable_image_ends_the_run_with_a_checkpoint(tiny, tmp_path):
    t = trainer(tiny("train.checkpoint_every=1000"), tmp_path)
    read, calls = t.source.read, []

    def fail_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise DataError("3.png: broken")
        return read(*arguments)

    t.source.read = fail_at_the_third
    with pytest.raises(DataError, match="3.png"):
        list(t.run())
    assert [p.name for p in runs.list_checkpoints(tmp_path)] == ["step-00000002"]


def test_ema_decay_warms_up_and_averages():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(1.0)
    expected = 0.0
    for step in (1, 2, 3):
        d = (1 + step) / (10 + step)
        expected = d * expected + (1 - d)
        ema.update(model, step)
        assert float(ema.model.weight) == pytest.approx(expected)
    assert ema.decay_at(10**6) == 0.9
    assert not ema.model.weight.requires_grad


def test_learning_rate_courses():
    def course(**changes):
        t = load_config("digits", [f"train.{k}={v}" for k, v in {"steps": 100, **changes}.items()]).train
        return [lr_factor(t, s) for s in (0, 4, 9, 10, 55, 99)]

    assert course() == [1] * 6
    assert course(warmup_steps=10) == [0.1, 0.5, 1, 1, 1, 1]
    assert course(lr_decay="linear", warmup_steps=10) == pytest.approx([0.1, 0.5, 1, 1, 0.5, 1 / 90])
    assert course(lr_decay="cosine", warmup_steps=10)[3:5] == pytest.approx([1, 0.5])


def test_meter_means_and_quarters():
    meter = Meter(1000, torch.device("cpu"))
    mse = torch.tensor([1.0, 3.0, 5.0, 9.0])
    meter.add({"mse": mse, "loss": 2 * mse}, torch.tensor([0, 249, 250, 999]))
    meter.end_step(torch.tensor(7.0), torch.tensor(0.0))
    meter.add({"mse": mse * math.nan, "loss": mse * math.inf}, torch.tensor([0, 249, 250, 999]))
    meter.end_step(torch.tensor(math.nan), torch.tensor(1.0))  # left out: no trace
    means = meter.flush()
    assert means.pop("images_per_second") > 0
    assert means == {"mse": 4.5, "loss": 9, "mse_q1": 2, "mse_q2": 5, "mse_q4": 9, "grad_norm": 7}


def test_records_beyond_a_checkpoint_are_dropped_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"st')
    writer = RecordWriter(tmp_path, step=2)
    writer.write({"step": 3, "loss": 1.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2}, {"step": 3, "loss": 1.0}]
    assert list((tmp_path / "tensorboard").iterdir())

"""The loop: accumulation, resume, EMA, records, checkpoints that survive, errors."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.data.opening import open_source
from diffussm_cli.errors import DataError, RunError
from diffussm_cli.training.loop import Trainer
from diffussm_cli.training.step import Step
from tests.helpers import Killed


def trainer(config, root):
    return Trainer(config, open_source(config), root)


def weights(t):
    return {"model." + k: v.clone() for k, v in t.step.model.state_dict().items()} | {
        "ema." + k: v.clone() for k, v in t.step.ema.model.state_dict().items()
    }


RESUMED = {  # beyond the plain run, which tests/test_survival.py kills and resumes by the command
    "averages": ("tiny", ["train.ema=0.9,0.1"]),
    "captions": ("captioned", []),
    "muon": ("tiny", ["train.optimizer=muon"]),
}


@pytest.mark.parametrize("case", RESUMED)
def test_two_steps_resumed_for_two_equal_four_bitwise(case, request, tmp_path):
    kind, settings = RESUMED[case]
    fixture = request.getfixturevalue(kind)

    def tiny(*overrides):
        return fixture(*settings, *overrides)

    whole = trainer(tiny(), tmp_path / "whole")
    records = list(whole.run())
    first = trainer(tiny(), tmp_path / "parts")
    stop = iter([False, True])
    list(first.run(lambda: next(stop)))
    assert first.step.number == 2
    second = trainer(tiny("train.seed=0"), tmp_path / "parts")
    second.step.load(runs.newest_good(tmp_path / "parts")[0])
    resumed = list(second.run())
    assert same(weights(second), weights(whole))
    assert all(same(v, by_average(whole)[k]) for k, v in by_average(second).items())
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
    config = tiny(
        "train.steps=120", "train.log_every=20", "train.lr=3e-3", "train.checkpoint_every=1000"
    )
    records = list(trainer(config, tmp_path).run())
    assert records[0]["loss"] > 0.5
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    assert {f"mse_q{i}" for i in range(1, 5)} <= records[-1].keys()


FLOW = ("diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=sde")
ZERO_SNR = (
    "diffusion.objective=velocity",
    "diffusion.zero_terminal_snr=true",
    "sample.sampler=ddpm",
)


@pytest.mark.parametrize(
    "objective", [FLOW, ZERO_SNR, ("train.loss_weight=min_snr", "sample.sampler=heun")]
)
def test_every_objective_trains_and_draws(tiny, tmp_path, objective):
    short = (
        "train.steps=120",
        "train.log_every=20",
        "train.lr=3e-3",
        "train.checkpoint_every=1000",
    )
    config = tiny(
        *short, *objective, "train.sample_every=60", "train.sample_images=4", "train.sample_steps=3"
    )
    records = list(trainer(config, tmp_path).run())
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_run_folder_describes_itself(tiny, tmp_path):
    config = tiny("train.sample_every=2", "train.sample_images=4")
    t = trainer(config, tmp_path)
    list(t.run())
    assert [p.name for p in runs.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    assert {"README.md", "model_index.json", "pipeline.py"} <= {
        p.name for p in (tmp_path / runs.FINAL).iterdir()
    }
    trained = runs.find_run(tmp_path)
    model = runs.load_model(trained)
    assert trained.config == config
    average = t.step.ema.model.cpu().state_dict()
    assert all(torch.equal(v, average[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.position, t.step.model.position.cpu())
    assert not model.training


def test_failed_write_ends_training_at_the_next_step(tiny, tmp_path, monkeypatch):
    t = trainer(tiny("train.steps=1000", "train.checkpoint_every=1000"), tmp_path)
    stop = iter([True])
    list(t.run(lambda: next(stop)))
    monkeypatch.setattr(runs, "write_tensors", lambda *_: 1 / 0)
    t.save()
    with pytest.raises(ZeroDivisionError):
        list(t.run())
    assert t.step.number < 100


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
        trainer(tiny(), tmp_path).step.load(state.parent)


def test_loss_that_is_not_finite_stops_with_advice(tiny, tmp_path):
    t = trainer(tiny("train.max_bad_steps=2", "train.checkpoint_every=1"), tmp_path)
    t.step.number, before = 1, weights(t)
    t.step.losses = lambda part: {k: x * math.nan for k, x in Step.losses(t.step, part).items()}
    with pytest.raises(
        RunError, match=r"3 steps in a row before step 4 had no finite.* try a smaller train.lr"
    ):
        list(t.run())
    for k, v in weights(t).items():
        assert torch.equal(v, before[k]), k


def test_run_without_a_finite_loss_fails(tiny, tmp_path):
    """Four bad steps are less than `train.max_bad_steps`, but all there are."""
    t = trainer(tiny(), tmp_path)
    t.step.losses = lambda part: {k: x * math.nan for k, x in Step.losses(t.step, part).items()}
    with pytest.raises(RunError, match="before step 4 had no finite loss"):
        list(t.run())
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_batches_for_cuda_are_page_locked(tiny, tmp_path, monkeypatch, kind):
    t, pinned = trainer(tiny(), tmp_path), []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor
    )
    t.step.device = torch.device(kind)
    next(t._batches())
    assert pinned[:4] == ([(8, 1, 8, 8), (8,), (8, 1, 8, 8), (8,)] if kind == "cuda" else [])


def test_kill_while_preview_is_written_leaves_none(tiny, tmp_path, monkeypatch):
    t = trainer(tiny("train.sample_every=2", "train.sample_images=2"), tmp_path)

    def die(image, file, *_, **__):
        file.write(b"half") if hasattr(file, "write") else Path(file).write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(Image.Image, "save", die)
    with pytest.raises(Killed):
        list(t.run())
    assert not list((tmp_path / "samples").glob("step-*"))


def test_too_large_batch_is_one_line_error(tiny, tmp_path):
    t = trainer(tiny(), tmp_path)
    t.step.model.forward = lambda *_: torch.empty(1 << 60)
    with pytest.raises(RunError, match="train.batch_size: 8 in 1 part.* raise train.accumulate"):
        list(t.run())


def test_unreadable_image_ends_the_run_with_checkpoint(tiny, tmp_path):
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


# --------------------------------------------------------------------------------- several averages
def by_average(t):
    return {
        e.decay: {k: v.clone() for k, v in e.model.state_dict().items()} for e in t.step.averages
    }


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_each_average_follows_its_own_recursion(tiny, tmp_path):
    """Exactly, from the weights after every step; the third decay is below that of the warm-up from
    the start.
    """
    t = trainer(tiny("train.ema=0.9,0.25,0.1", "train.log_every=1"), tmp_path)
    expected = by_average(t)
    for record in t.run():
        for decay, weights in expected.items():
            d = min(decay, (1 + record["step"]) / (10 + record["step"]))
            for name, current in t.step.model.state_dict().items():
                weights[name] = torch.lerp(weights[name], current, 1 - d)
    for decay, found in by_average(t).items():
        assert same(found, expected[decay]), decay
    assert not same(expected[0.9], expected[0.25])
    assert not same(expected[0.25], expected[0.1])


def test_first_average_and_its_files_equal_those_of_a_run_with_it_alone(tiny, tmp_path):
    one, two = (
        trainer(tiny(f"train.ema={e}"), tmp_path / n)
        for n, e in {"one": "0.9", "two": "0.9,0.1"}.items()
    )
    for t in (one, two):
        list(t.run())
    assert same(by_average(one)[0.9], by_average(two)[0.9])
    for folder, more in {
        "final": ["config.yaml", "state.json"],
        "checkpoints/step-00000004": ["state.json"],
    }.items():
        files = {
            t.root: {p.name: p.read_bytes() for p in (t.root / folder).iterdir() if p.is_file()}
            for t in (one, two)
        }
        assert files[two.root].keys() - files[one.root].keys() == {"ema-0.1.safetensors"}
        assert [
            n for n, b in files[one.root].items() if files[two.root][n] != b and n not in more
        ] == []
        held = runs.read_tensors(two.root / folder / "ema-0.1.safetensors")
        assert same(held, by_average(two)[0.1])
    config = (one.root / "final" / "config.yaml").read_text()
    assert "  ema: 0.9\n" in config  # as before there could be several


@pytest.mark.parametrize("now", ["0.9,0.1,0.5", "0.1,0.9", "0.1", "0.2"])
def test_averages_of_other_list_resume_by_decay_or_begin_as_the_first(tiny, tmp_path, now):
    before = trainer(tiny("train.ema=0.9,0.1"), tmp_path)
    list(before.run())
    after = trainer(tiny(f"train.ema={now}"), tmp_path)
    after.step.load(runs.newest_good(tmp_path)[0])
    held = by_average(before)
    assert [e.decay for e in after.step.averages] == [float(d) for d in now.split(",")]
    assert all(same(v, held.get(decay, held[0.9])) for decay, v in by_average(after).items())

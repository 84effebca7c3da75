"""Snapshots of averages: what training keeps of them, and what `--ema-width` makes of it."""

import json

import pytest
import torch

import diffussm as ds
from diffussm_cli import runs
from diffussm_cli.config import WIDTHS
from diffussm_cli.data.opening import open_source
from diffussm_cli.errors import DiffussmError
from diffussm_cli.events import finish
from diffussm_cli.training.ema import PowerEMA
from diffussm_cli.training.loop import Trainer
from diffussm_cli.training.session import train
from tests.helpers import line_of, run

FREQUENT = (
    "train.snapshot_every=4",
    "train.steps=24",
    "train.checkpoint_every=12",
    "train.lr=0.01",
)


def files_of(root):
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in (root / runs.SNAPSHOTS).glob("*/*")
    }


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A finished run, and the average of width 0.15 that was tracked beside it."""
    pytest.importorskip("sklearn")
    from diffussm_cli.config import load_config
    from tests.conftest import TINY

    root = tmp_path_factory.mktemp("tracked")
    config = load_config("digits", [*TINY, *FREQUENT])
    trainer = Trainer(config, open_source(config), root)
    trainer.step.averages.append(PowerEMA(trainer.step.model, 0.15))
    for _ in trainer.run():
        pass
    runs.write_config(root, config)
    return root, trainer


def distance(ours, theirs):
    return sum(
        (ours[name].cpu() - theirs[name].cpu()).double().square().sum() for name in ours
    ).sqrt()


def test_snapshots_are_kept_at_their_steps_and_not_deleted(tracked):
    root, _ = tracked
    assert [runs.step_of(path) for path in runs.list_snapshots(root)] == [4, 8, 12, 16, 20, 24]
    assert {name for path in runs.list_snapshots(root) for name in map(str, path.iterdir())} >= {
        str(path / runs.width_file(width)) for path in runs.list_snapshots(root) for width in WIDTHS
    }


def test_a_width_from_snapshots_is_the_average_that_was_tracked(tracked):
    root, trainer = tracked
    tracked_average = trainer.step.averages[-1].model.state_dict()
    made = runs.load_model(runs.find_run(root, ema_width=0.15)).state_dict()
    spread = distance(trainer.step.model.state_dict(), tracked_average)
    assert distance(made, tracked_average) < 0.02 * spread


def test_a_width_that_was_tracked_comes_back(tracked):
    root, trainer = tracked
    made = runs.load_model(runs.find_run(root, ema_width=0.1)).state_dict()
    for name, tensor in trainer.step.power_averages[1].model.state_dict().items():
        torch.testing.assert_close(made[name], tensor.cpu(), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_has_the_widths_of_its_own_step(tracked):
    root, _ = tracked
    trained = runs.find_run(root / "checkpoints/step-00000012", ema_width=0.1)
    assert trained.step == 12
    made = runs.load_model(trained).state_dict()
    saved = runs.read_tensors(root / "snapshots/step-00000012" / runs.width_file(0.1))
    for name, tensor in saved.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-4, atol=1e-5)


def test_resumed_training_makes_the_same_snapshots(tiny, tmp_path):
    overrides = ("train.snapshot_every=2", "train.steps=6", "train.checkpoint_every=3")
    finish(train(tiny(*overrides), tmp_path / "whole"))
    asked = iter(range(100))
    finish(train(tiny(*overrides), tmp_path / "parts", stop=lambda: next(asked) == 5))
    stale = tmp_path / "parts/checkpoints/step-00000005"
    runs.remove(stale)  # as a crash before the checkpoint: the snapshot of step 4 is newer
    assert [runs.step_of(path) for path in runs.list_snapshots(tmp_path / "parts")] == [2, 4]
    finish(train(tiny(*overrides), tmp_path / "parts", resume=True))
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert len(files_of(tmp_path / "whole")) == 9


def test_the_main_average_does_not_depend_on_snapshots(tiny, tmp_path):
    for name, every in (("with", 2), ("without", 0)):
        finish(train(tiny(f"train.snapshot_every={every}"), tmp_path / name))
    weights = [
        (tmp_path / name / "final" / runs.MODEL).read_bytes() for name in ("with", "without")
    ]
    assert weights[0] == weights[1]
    assert not (tmp_path / "without" / runs.SNAPSHOTS).exists()


def test_snapshots_cannot_begin_in_the_middle_of_a_run(tiny, tmp_path):
    finish(train(tiny(), tmp_path))
    longer = tiny("train.snapshot_every=2", "train.steps=6")
    with pytest.raises(DiffussmError, match="train.snapshot_every was 0 and is now 2"):
        finish(train(longer, tmp_path, resume=True))


def test_a_damaged_snapshot_is_named(tiny, tmp_path):
    finish(train(tiny("train.snapshot_every=2"), tmp_path))
    file = tmp_path / "snapshots/step-00000002" / runs.width_file(0.05)
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DiffussmError, match="width-0.05.safetensors has changed since"):
        runs.find_run(tmp_path, ema_width=0.1)


def test_sample_and_eval_draw_from_a_width(tracked, tmp_path):
    root, _ = tracked
    arguments = ["sample", root, "-n", 2, "--out", tmp_path / "out"]
    assert run(*arguments, "--ema-width", 0.08).exit_code == 0
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["ema"], meta["ema_width"], meta["step"]) == (None, 0.08, 24)
    assert "weights_sha256 was" in line_of(run(*arguments, "--ema-width", 0.09))
    images = [ds.load(root, ema_width=width).sample(2) for width in (0.05, 0.15)]
    assert not torch.equal(*images)


def test_a_width_without_snapshots_or_beside_a_decay_is_one_line(tiny, tmp_path, tracked):
    finish(train(tiny(), tmp_path))
    line = line_of(run("sample", tmp_path, "--ema-width", 0.1))
    assert "holds no snapshots of averages" in line
    assert "train.snapshot_every" in line
    line = line_of(run("eval", tracked[0], "--ema-width", 0.1, "--ema", 0.99))
    assert "--ema-width: cannot be given with --ema" in line

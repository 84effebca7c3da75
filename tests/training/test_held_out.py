"""The held-out loss: by hand, the same at every evaluation, and on images that are never trained
on.
"""

import functools
import json
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.config import MANY, load_config, unused_fields
from diffussm_cli.data.opening import open_held_out, open_source
from diffussm_cli.diffusion.losses import training_losses
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.events import TrainingRecord, Warned
from diffussm_cli.machine.processes import ALONE, World
from diffussm_cli.training import measure as module
from diffussm_cli.training.batches import image_seeds
from diffussm_cli.training.loop import Trainer
from diffussm_cli.training.measure import HeldOut
from diffussm_cli.training.session import train
from tests.conftest import TINY, device, fill
from tests.helpers import SETTINGS, line_of, run

QUARTERS = [f"held_out/q{i}" for i in range(1, 5)]


def held_out(config, world=ALONE):
    return HeldOut(open_held_out(config, open_source(config)), config, device(), world)


@pytest.fixture
def losses(tiny, tmp_path):
    """The losses of a tiny model without zeros."""
    config = tiny()
    t = Trainer(config, open_source(config), tmp_path)
    return functools.partial(t.step.losses, model=fill(t.step.averaged()))


def test_held_out_loss_equals_direct_computation(tiny, tmp_path):
    """Image by image and timestep by timestep, on 5 of the 176 held-out digits."""
    config = tiny("eval.held_out_images=5")
    t = Trainer(config, open_source(config), tmp_path)
    model, source = fill(t.step.averaged()), open_held_out(config, t.source)
    assert len(source) == 176
    seeds, expected = image_seeds(config.train.seed, MANY, 5), np.zeros((5, 4))
    for k, index in enumerate([0, 35, 70, 105, 140]):
        g = torch.Generator().manual_seed(seeds[k])
        x_0, y = (v.to(device()) for v in source.read([index], [g]))
        noise = torch.randn(4, 1, 8, 8, generator=g).to(device())
        for q in range(4):
            step = torch.tensor(
                [int(250 * (q + (seeds[0] / 2**63 + k * (5**0.5 - 1) / 2) % 1))], device=device()
            )
            x_t = t.step.objective.q_sample(x_0, step, noise[q : q + 1])
            output = model(x_t, step, y)
            losses = training_losses(
                t.step.objective, output, x_0, x_t, step, noise[q : q + 1], 1.0
            )
            expected[k, q] = losses["loss"].item()
    found = held_out(config).measure(functools.partial(t.step.losses, model=model))
    assert found["held_out"] == pytest.approx(expected.mean(), rel=1e-5)
    assert [found[q] for q in QUARTERS] == pytest.approx(expected.mean(0).tolist(), rel=1e-5)


def test_held_out_loss_is_reproducible_and_independent_of_training_seed(tiny, losses):
    """Bitwise: nothing in it depends on the step, on the batch of training or on how the noise was
    drawn before.
    """
    first = held_out(tiny())
    found = first.measure(losses)
    torch.randn(3)
    assert first.measure(losses) == found
    assert (
        held_out(tiny("train.batch_size=4", "train.steps=9", "train.label_dropout=0.5")).measure(
            losses
        )
        == found
    )
    assert held_out(tiny("train.seed=1")).measure(losses) != found


def test_quarters_average_to_the_loss_and_hold_their_timesteps(tiny):
    """The loss is the timestep itself: every quarter has its mean, within what 20 evenly spread
    images leave open.
    """
    found = held_out(tiny("eval.held_out_images=20")).measure(
        lambda batch: {"loss": batch.t.float()}
    )
    assert np.mean([found[q] for q in QUARTERS]) == pytest.approx(found["held_out"], rel=1e-12)
    assert [found[q] for q in QUARTERS] == pytest.approx([124.5, 374.5, 624.5, 874.5], abs=250 / 20)


@pytest.mark.parametrize("timesteps", [2, 7, 1000])
def test_timesteps_are_spread_over_their_whole_range(tiny, timesteps):
    config = tiny(f"diffusion.timesteps={timesteps}", "sample.steps=1", "train.sample_steps=1")
    t = held_out(config).batch(range(176)).t
    assert (
        (t.min(), t.max()) == (0, timesteps - 1)
        if timesteps < 100
        else (t.min() < 5 and t.max() > timesteps - 5)
    )
    assert len(t.unique()) > 0.7 * min(timesteps, len(t))


def test_model_that_predicts_the_noise_has_zero_loss(tiny, tmp_path):
    config = tiny("model.learn_sigma=false")
    t, source = Trainer(config, open_source(config), tmp_path), held_out(config)
    noise = []

    def losses(batch):
        noise.append(batch.noise)
        return t.step.losses(batch, model=lambda x_t, t, y, text: noise[-1])

    assert source.measure(losses) == dict.fromkeys(["held_out", *QUARTERS], 0.0)
    assert sum(len(n) for n in noise) == 4 * 176
    assert len(torch.cat(noise).unique(dim=0)) == 4 * 176


def test_processes_share_images_and_each_has_the_result(tiny, losses, monkeypatch):
    """Three processes one after another: what each gathers is put together from what all of them
    found.
    """
    alone, parts = held_out(tiny()).measure(losses), []
    for rank in range(3):
        monkeypatch.setattr(module, "gather", lambda value, world: parts.append(value) or [value])
        held_out(tiny(), World(rank, 3)).measure(losses)
    assert [int((p[:, 0] != 0).sum()) for p in parts] == [64, 64, 48]
    monkeypatch.setattr(module, "gather", lambda value, world: parts)
    assert held_out(tiny(), World(1, 3)).measure(losses) == alone


# ------------------------------------------------------------------------------------- which images
@pytest.fixture
def folder(tmp_path):
    """Forty grey images of 8 x 8 in two classes, each with a number in its pixels."""
    for i in range(40):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 6 * i).save(path)
    return tmp_path / "images"


def settings(folder, *more):
    return load_config("digits", [*TINY, f"data.path={folder}", "model.num_classes=2", *more])


def pixels(source):
    """The first pixel of each image of a source, as the number of the image."""
    x, _ = source.read(range(len(source)), [torch.Generator()] * len(source))
    return ((x[:, 0, 0, 0] + 1) * 127.5 / 6).round().int().tolist()


@pytest.mark.parametrize(("share", "count"), [(0.05, 2), (0.25, 10), (0.001, 1), (0.999, 39)])
def test_share_of_folder_is_never_trained_on(folder, share, count):
    config = settings(folder, f"data.held_out={share}")
    source = open_source(config)
    trained, kept = pixels(source), pixels(open_held_out(config, source))
    assert (len(source), len(kept)) == (40 - count, count)
    assert sorted(trained + kept) == list(range(40))
    assert not set(trained) & set(kept)
    other = settings(folder, f"data.held_out={share}", "train.seed=7")
    assert pixels(open_held_out(other, open_source(other))) == kept


def test_larger_share_is_drawn_from_the_whole_folder(folder):
    config = settings(folder, "data.held_out=0.5")
    kept = pixels(open_held_out(config, open_source(config)))
    assert 5 <= sum(i < 20 for i in kept) <= 15
    assert 5 <= sum(i % 2 for i in kept) <= 15


def test_builtin_sets_hold_out_their_own_part(tiny):
    """Their tenth by default, a share of the rest on request, and nothing with 0."""
    config, source = tiny(), open_source(tiny())
    assert len(source) == 1621
    assert len(open_held_out(config, source)) == 176
    config = tiny("data.held_out=0.1")
    source = open_source(config)
    assert (len(source), len(open_held_out(config, source))) == (1459, 162)
    assert open_held_out(tiny("data.held_out=0"), open_source(tiny("data.held_out=0"))) is None


def test_held_out_folder_that_does_not_fit_is_rejected(folder, tmp_path):
    other = tmp_path / "other"
    config = settings(folder, f"data.held_out={other}")
    source = open_source(config)
    assert pixels(source) == [*range(0, 40, 2), *range(1, 40, 2)]
    with pytest.raises(DataError, match=r"^data.held_out: (?!data.path).*other"):
        open_held_out(config, source)
    for name in ("a", "b"):
        (other / name).mkdir(parents=True)
        Image.new("L", (8, 8), 60).save(other / name / "x.png")
    assert pixels(open_held_out(config, source)) == [10, 10]
    (other / "b" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    line = rf"^data.held_out: b/x.png: .*; restore the image in '{other}', or remove it from there$"
    with pytest.raises(DataError, match=line):
        HeldOut(open_held_out(config, source), config, device())
    (other / "b").rename(other / "c")
    with pytest.raises(
        ConfigError, match="data.held_out: .* must hold the same classes as data.path"
    ):
        open_held_out(config, source)


SHARED = {  # data.path; data.held_out; how many of its images are shared
    "a slash at the end": ("images", "images/", "40 of 40"),
    "a longer path": ("images", "a/../images", "40 of 40"),
    "a pattern": ("images/a", "images/a/*0.png", "4 of 4"),
    "a link to the folder": ("images", "link", "40 of 40"),
    "links to images": ("images", "links", "2 of 3"),
    "a shard": ("x.tar", "./x.tar", "40 of 40"),
}


@pytest.mark.parametrize("case", SHARED)
def test_held_out_images_that_are_trained_on_are_refused(folder, case, monkeypatch):
    """Under whatever name, and before a run folder is made."""
    here = folder.parent
    monkeypatch.chdir(here)
    for name, target in {"a/x": "a/00", "a/y": "a/02", "b/x": None}.items():
        path = here / "links" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(folder / f"{target}.png")
        else:
            Image.new("L", (8, 8)).save(path)
    (here / "link").symlink_to(folder)
    (here / "a").mkdir()
    with tarfile.open("x.tar", "w") as tar:
        tar.add(folder, ".")

    path, name, shared = SHARED[case]
    classes = 0 if case == "a pattern" else 2
    config = settings(path, f"data.held_out={name}", f"model.num_classes={classes}")
    line = rf"^data.held_out: {shared} images in '{re.escape(name)}' are also in data.path '{path}'"
    with pytest.raises(ConfigError, match=line):
        list(train(config, here / "run"))
    assert not (here / "run").exists()


def test_run_that_has_begun_with_its_held_out_images_is_warned(folder, tmp_path):
    """It cannot change data.held_out any more."""
    other = folder.parent / "other"
    (other / "a").mkdir(parents=True)
    (other / "b").mkdir()
    for name in ("a/00.png", "b/01.png"):
        (other / name).write_bytes((folder / name).read_bytes())
    config = settings(folder, f"data.held_out={other}")
    list(train(config, tmp_path / "run"))
    (other / "a" / "00.png").unlink()
    (other / "a" / "00.png").symlink_to(folder / "a" / "00.png")
    more = settings(folder, f"data.held_out={other}", "train.steps=5")
    said = [e.text for e in train(more, tmp_path / "run", resume=True) if isinstance(e, Warned)]
    line = next(text for text in said if text.startswith("data.held_out: "))
    assert line.startswith("data.held_out: 1 of 2 images in ")
    assert line.endswith("so the held-out loss of this run is not of unseen images")


@pytest.mark.parametrize(("share", "warns"), [(0, False), (0.25, True)])
def test_new_share_of_changed_images_is_warned_of(folder, tmp_path, share, warns):
    """One image more, and others are held out, some of which were trained on."""
    fields = f"data.held_out={share}"
    list(train(settings(folder, fields), tmp_path / "run"))
    Image.new("L", (8, 8), 1).save(folder / "a" / "99.png")
    more = settings(folder, fields, "train.steps=5")
    said = [e.text for e in train(more, tmp_path / "run", resume=True) if isinstance(e, Warned)]
    assert len(said) == 1
    assert "(40 then, 41 now)" in said[0]
    line = "data.held_out=0.25 may now hold out images that it was trained on"
    assert (line in said[0]) == warns


def test_new_share_without_an_image_that_became_unreadable_is_warned_of(folder, tmp_path):
    """Its size is the same, so the list of images says nothing."""
    fields = "data.held_out=0.25"
    list(train(settings(folder, fields), tmp_path / "run"))
    path = folder / "a" / "00.png"
    path.write_bytes(bytes(path.stat().st_size))
    for steps, count in ((5, 1), (6, 0)):
        more = settings(folder, fields, "data.skip_unreadable=true", f"train.steps={steps}")
        said = [e.text for e in train(more, tmp_path / "run", resume=True) if isinstance(e, Warned)]
        line = "data.skip_unreadable: other images are left out than before, and data.held_out=0.25"
        assert sum(text.startswith(line) for text in said) == count


def test_dataset_of_another_length_is_warned_of_on_resume(tiny, tmp_path):
    def dataset(n):
        return torch.utils.data.TensorDataset(torch.zeros(n, 1, 8, 8), torch.arange(n) % 10)

    for n, steps, count in ((20, 4, 0), (20, 5, 0), (21, 6, 1)):
        config = tiny(f"train.steps={steps}", "data.held_out=0.25")
        events = train(config, tmp_path / "run", resume=steps > 4, dataset=dataset(n))
        said = [e.text for e in events if isinstance(e, Warned)]
        assert sum("(20 then, 21 now)" in line for line in said) == count


# --------------------------------------------------------------------------------------- whole runs
def test_run_without_reference_logs_its_held_out_loss(folder, tmp_path, monkeypatch):
    from diffussm_cli.evaluation.evaluator import Evaluator

    monkeypatch.setattr(Evaluator, "__init__", lambda *_: 1 / 0)
    given = {"data.path": folder, "model.num_classes": 2, "eval.every": 2, "train.ema": "0.9,0.1"}
    arguments = [part for k, v in given.items() for part in ("--set", f"{k}={v}")]
    start = ("train", "--preset", "digits", "--out", tmp_path / "run", *SETTINGS, *arguments)
    assert "eval.every: needs eval.reference" in line_of(run(*start))
    done = run(*start, "--set", "data.held_out=0.1")
    assert done.exit_code == 0, done.output
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in records] == [2, 4]
    for name in ("held_out", *QUARTERS):
        assert 0 < records[0][name] < 3
        assert records[0][name] != records[0][f"{name}@0.1"]
    assert f"held-out {records[1]['held_out']:.4f}" in done.stderr
    assert not (tmp_path / "run" / "best").exists()
    assert run(*start, "--set", "data.held_out=0.2", "--resume").exit_code == 1


def test_held_out_folder_is_checked_although_nothing_is_measured(tiny, tmp_path):
    config = tiny(f"data.held_out={tmp_path / 'nope'}")
    with pytest.raises(DataError, match=r"^data.held_out: cannot read the folder .*nope"):
        list(train(config, tmp_path / "run"))
    assert not runs.list_checkpoints(tmp_path / "run")


def test_held_out_image_damaged_during_a_run_is_named_as_one_of_them(folder, tmp_path):
    """The remedies for images that are trained on would not help."""
    other = tmp_path / "other"
    for name in "ab":
        (other / name).mkdir(parents=True)
        Image.new("L", (8, 8), 60).save(other / name / "x.png")
    given = ("eval.every=2", "train.log_every=1", "train.sample_every=0", f"data.held_out={other}")
    config = settings(folder, *given, "eval.images=0")

    def damage():
        (other / "b" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        return False

    with pytest.raises(DataError, match=r"^data.held_out: b/x.png: .*; restore the image in"):
        list(train(config, tmp_path / "run", stop=damage))


def test_unreadable_images_are_left_out_before_share_is_held_out(folder, tmp_path):
    (folder / "a" / "04.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    given = {"data.path": folder, "model.num_classes": 2, "data.held_out": 0.1, "eval.every": 2}
    given["data.skip_unreadable"] = "true"
    arguments = [part for k, v in given.items() for part in ("--set", f"{k}={v}")]
    start = ("train", "--preset", "digits", "--out", tmp_path / "run", *SETTINGS, *arguments)
    done = run(*start)
    assert done.exit_code == 0, done.output
    assert "skipped: 1 images" in done.stderr
    state = runs.read_state(runs.list_checkpoints(tmp_path / "run")[-1])
    assert state["position"] == 32  # of 35 images that are trained on
    assert run(*start, "--set", "train.steps=6", "--resume").exit_code == 0
    assert runs.read_state(runs.list_checkpoints(tmp_path / "run")[-1])["position"] == 48 - 35


def test_held_out_loss_can_be_the_only_measure(tiny, tmp_path):
    config = tiny("eval.every=2", "eval.images=0", "eval.held_out_images=8")
    records = [e.record for e in train(config, tmp_path / "run") if isinstance(e, TrainingRecord)]
    assert ["held_out" in r for r in records] == [True, True]
    assert not any(name.startswith("eval/") for r in records for name in r)
    with pytest.raises(ConfigError, match="eval.images: 15 must be 0 or at least 16"):
        tiny("eval.images=15")


def test_held_out_loss_is_measured_without_and_beside_scores(tiny, tmp_path):
    """Of two trainings that differ by it, the losses are the same."""
    fields = ["eval.held_out_images=4", "train.steps=5", "train.log_every=1"]
    alone = tiny(*fields, "eval.held_out_every=2")
    both = tiny(*fields, "eval.held_out_every=2", "eval.every=3", "eval.images=0")
    logs = []
    for i, config in enumerate([tiny(*fields), alone, both]):
        records = [e.record for e in train(config, tmp_path / str(i)) if hasattr(e, "record")]
        logs.append({record["step"]: record for record in records})
    measured = [[n for n, record in log.items() if "held_out" in record] for log in logs]
    assert measured == [[], [2, 4, 5], [2, 3, 4, 5]]
    assert len({tuple(record["loss"] for record in log.values()) for log in logs}) == 1
    assert logs[1][4]["held_out"] == logs[2][4]["held_out"]


def test_default_preset_measures_all_digits_that_it_holds_out():
    """And nothing is said where data have none to measure."""
    config = load_config("mnist")
    source = open_source(config)
    assert (len(source), len(open_held_out(config, source))) == (4500, 500)
    assert config.eval.held_out_images >= 500
    assert config.train.steps // config.eval.held_out_every == 4
    assert unused_fields(load_config("mnist", ["data.path=faces"])) == ""
    line = unused_fields(load_config("mnist", ["data.path=faces", "eval.held_out_every=9"]))
    assert line == "not used: eval.held_out_every=9 (there are no held-out images)"

"""Training that begins with the weights of another model: what is taken, and what starts anew."""

import json
import re
import shutil

import pytest
import torch

import diffussm
from diffussm_cli import runs
from diffussm_cli.config import load_config
from diffussm_cli.data.opening import open_held_out, open_source
from diffussm_cli.errors import ConfigError
from diffussm_cli.events import Message, finish
from diffussm_cli.machine.processes import ALONE
from diffussm_cli.model import DiT, build_model
from diffussm_cli.training.loop import Trainer
from diffussm_cli.training.measure import HeldOut
from diffussm_cli.training.session import train
from tests.conftest import device, fill
from tests.helpers import SETTINGS, line_of, run
from tests.runs.test_dit_checkpoint import official

A_STEP = {"train.lr": 1e-9, "train.steps": 1}  # which changes a number by 1e-9 at most


def publish(folder, config):
    """A finished run whose averaged weights hold no zeros; gives them."""
    weights = fill(build_model(config)).cpu().state_dict()
    runs.write_weights(folder / runs.FINAL, config, weights, config.train.steps)
    runs.write_config(folder, config)
    return weights


def final_weights(root):
    return runs.load_model(runs.find_run(root)).state_dict()


def same(a, b):
    return torch.equal(a, b) and a.dtype == b.dtype


def nearly(a, b):
    return torch.allclose(a, b, rtol=0, atol=2e-9)


def test_held_out_loss_of_first_weights_is_that_of_the_initial_model(tiny, tmp_path):
    config = tiny("eval.held_out_images=5")
    publish(tmp_path / "a", config)
    begun = tiny("eval.held_out_images=5", f"train.init={tmp_path / 'a'}", "train.seed=7")
    source = open_source(begun)
    trainer = Trainer(begun, source, tmp_path, initial=runs.initial_weights(begun))
    held_out = HeldOut(open_held_out(config, source), config, device(), ALONE)

    def loss_of(model):
        return held_out.measure(lambda batch: trainer.step.losses(batch, model))

    initial = runs.load_model(runs.find_run(tmp_path / "a")).to(device())
    expected = loss_of(initial)
    assert loss_of(trainer.step.model.eval()) == expected
    assert loss_of(trainer.step.averaged()) == expected
    assert loss_of(Trainer(begun, source, tmp_path).step.averaged()) != expected


def test_other_number_of_classes_starts_only_the_label_table_anew(tiny, tmp_path):
    """It is the table that the same run would begin with without initial weights."""
    weights = publish(tmp_path / "a", tiny("model.num_classes=12"))
    step = [f"{name}={value}" for name, value in A_STEP.items()]
    config = tiny(*step, f"train.init={tmp_path / 'a'}")
    session, lines = train(config, tmp_path / "b"), []
    for event in session:
        lines += [event.text] if isinstance(event, Message) else []
    n = len(weights)
    label = f"{tmp_path / 'a'} (finished)"
    shapes = "y_embed.weight (11, 16), there (13, 16)"
    line = f"train.init: {n - 1} of {n} tensors are those of {label}; 1 start anew: {shapes}"
    assert [text for text in lines if "init" in text] == [line]

    random = finish(train(tiny(*step), tmp_path / "random")).root
    for name, tensor in final_weights(tmp_path / "b").items():
        origin = final_weights(random) if name == "y_embed.weight" else weights
        assert nearly(tensor, origin[name]), name

    # The run says where its weights come from.
    first = json.loads((tmp_path / "b" / runs.LOG).read_text().splitlines()[0])
    assert first["session"]["init"] == {
        "model": label,
        "sha256": runs.find_run(tmp_path / "a").weights_sha256,
        "taken": n - 1,
        "anew": ["y_embed.weight"],
        "unused": ["y_embed.weight"],
    }
    assert runs.read_config(tmp_path / "b").train.init == str(tmp_path / "a")


@pytest.mark.parametrize(
    "other",
    [
        ["data.resolution=16"],
        ["model.mixer=axial", "data.resolution=16x8"],
        ["data.channels=3"],
        ["model.depth=1"],
        ["model.mixer=conv"],
        ["model.learn_sigma=false"],
    ],
    ids=lambda fields: fields[0],
)
def test_all_that_has_the_same_name_and_shape_is_taken(tiny, tmp_path, other):
    """Also from a model of another resolution: positions are computed for any."""
    same_mixer = [field for field in other if "axial" in field]
    weights = publish(tmp_path / "a", tiny(*other))
    config = tiny(f"train.init={tmp_path / 'a'}", *same_mixer)
    initial = runs.initial_weights(config)
    ours = build_model(config).state_dict()
    fits = [k for k in ours if k in weights and weights[k].shape == ours[k].shape]
    assert 0 < len(fits) == len(initial.tensors)
    assert all(same(initial.tensors[k], weights[k]) for k in fits)
    assert set(initial.anew) == ours.keys() - set(fits)
    assert set(initial.unused) == weights.keys() - set(fits)
    assert (len(fits) == len(ours)) == any(field.startswith("data.res") for field in other)
    assert f"{len(fits)} of {len(ours)} tensors" in initial.line


def test_blocks_are_one_kind_in_the_line(tiny, tmp_path):
    publish(tmp_path / "a", tiny("model.mixer=conv"))
    line = runs.initial_weights(tiny(f"train.init={tmp_path / 'a'}")).line
    assert "; 12 start anew: blocks.*.s4d." in line
    assert line.count("(2 times)") <= 8


def test_published_dit_begins_a_training(tmp_path):
    model = fill(DiT(8, 4, 2, 384, depth=2, heads=6, num_classes=7)).cpu()
    torch.save(official(model), tmp_path / "DiT-S-2.pt")
    fields = ["model.hidden_size=384", "model.depth=2", "data.channels=4", "data.downsample=8"]
    fields += ["data.resolution=64", "model.num_classes=7", "data.vae=x", "data.path=latents"]
    config = load_config("dit-s-256", [*fields, f"train.init={tmp_path / 'DiT-S-2.pt'}"])
    initial = runs.initial_weights(config)
    expected = model.state_dict()
    assert initial.tensors.keys() == expected.keys()
    assert all(same(initial.tensors[k], v) for k, v in expected.items())
    assert f"{tmp_path / 'DiT-S-2.pt'}, read as a DiT" in initial.line


@pytest.mark.parametrize("has_sigma", [True, False])
def test_published_sit_begins_the_training_of_a_flow(tmp_path, has_sigma):
    """SiT predicts x_0 - noise, with a covariance that nothing uses, at times from 0 to 1; a flow
    of ours predicts noise - x_0 at timesteps.
    """
    sit = fill(DiT(8, 4, 2, 384, depth=2, heads=6, num_classes=7, learn_sigma=has_sigma)).cpu()
    file = tmp_path / "SiT-S-2.pt"
    torch.save(official(sit), file)
    fields = ["model.hidden_size=384", "model.depth=2", "data.channels=4", "data.downsample=8"]
    fields += ["data.resolution=64", "model.num_classes=7", "data.vae=x", "data.path=latents"]
    fields += ["diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=heun"]
    initial = runs.initial_weights(load_config("dit-s-256", [*fields, f"train.init={file}"]))

    assert f"{file}, read as a SiT, because diffusion.objective is flow" in initial.line
    assert "; 4 start anew: t_embed." in initial.line
    expected = {k: v for k, v in sit.state_dict().items() if not k.startswith("t_embed.")}
    for name in ("patch_out.weight", "patch_out.bias"):  # rows: 4 pixels of 4 or 8 channels
        rows = expected[name].unflatten(0, (4, -1))[:, :4]
        expected[name] = -rows.reshape(16, *rows.shape[2:])
    assert initial.tensors.keys() == expected.keys()
    assert all(same(initial.tensors[k], v) for k, v in expected.items())


def test_resume_does_not_need_the_initial_model(tiny, tmp_path):
    """And it goes on bit by bit."""
    publish(tmp_path / "a", tiny())
    config = tiny(f"train.init={tmp_path / 'a'}")
    finish(train(config, tmp_path / "b"))
    finish(train(config, tmp_path / "c", stop=iter([False, False, True]).__next__))
    shutil.rmtree(tmp_path / "a")
    assert finish(train(config, tmp_path / "c", resume=True)).finished
    expected = final_weights(tmp_path / "b")
    assert all(same(v, expected[k]) for k, v in final_weights(tmp_path / "c").items())

    other = tiny(f"train.init={tmp_path / 'other'}", "train.steps=5")
    with pytest.raises(ConfigError, match="--resume: train.init was .*omit --init"):
        finish(train(other, tmp_path / "c", resume=True))


def test_library_begins_with_other_weights(tiny, tmp_path):
    weights = publish(tmp_path / "a", tiny())
    begun = diffussm.train(tiny(), tmp_path / "b", init=tmp_path / "a", set=A_STEP, show=False)
    assert all(nearly(v, weights[k]) for k, v in final_weights(begun.folder).items())


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            None,
            "no folder 'a'; name a run, a model of the package .*mnist.*, OWNER/NAME .* .pt file",
        ),
        ("dit", "1 of 51 tensors in all; take its model.backbone, dit, .*hidden_size, 24,"),
        ("damaged", "has changed since it was written"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["train", "dry-run"])
def test_weights_that_cannot_begin_a_training_are_refused_in_one_line(
    tiny, tmp_path, monkeypatch, made, words, dry
):
    monkeypatch.chdir(tmp_path)
    if made == "dit":
        config = tiny("model.backbone=dit", "model.hidden_size=24", "model.heads=2")
        publish(tmp_path / "a", config)
    if made == "damaged":
        publish(tmp_path / "a", tiny())
        file = tmp_path / "a" / runs.FINAL / runs.MODEL
        content = bytearray(file.read_bytes())
        content[-3] ^= 64
        file.write_bytes(content)
    result = run("train", "--preset", "digits", *SETTINGS, "--init", "a", "--out", "b", *dry)
    line = line_of(result)
    assert line.startswith("diffussm: error: train.init: ")
    assert re.search(words, line), line
    assert not (tmp_path / "b" / runs.LOG).exists()

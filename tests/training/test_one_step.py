"""A model of the mean velocity, from its teacher to its images."""

import numpy as np
import pytest
import torch

import diffussm as ds
from diffussm_cli import runs
from diffussm_cli.config import load_config
from diffussm_cli.data.opening import open_source
from diffussm_cli.errors import ConfigError, RunError
from diffussm_cli.model import build_model
from diffussm_cli.sampling.generate import begin
from diffussm_cli.training.batches import make_batch
from diffussm_cli.training.checkpoint import write_tensor_folder
from diffussm_cli.training.step import Step
from tests.conftest import TINY, device, fill
from tests.helpers import line_of, run

FLOW = ["diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=euler"]
ONE_STEP = [*FLOW, "diffusion.predicts=mean_velocity", "diffusion.teacher_guidance=2"]
ONE_STEP += ["sample.steps=1", "sample.guidance=1"]


def settings(overrides):
    return [part for override in [*TINY, *overrides] for part in ("--set", override)]


@pytest.fixture
def teacher(tmp_path):
    """A run of a flow, with random weights."""
    pytest.importorskip("sklearn")
    config = load_config("digits", [*TINY, *FLOW])
    weights = fill(build_model(config)).cpu().state_dict()
    runs.write_weights(tmp_path / "teacher" / runs.FINAL, config, weights, 4)
    runs.write_config(tmp_path / "teacher", config)
    return tmp_path / "teacher"


def config_of(teacher, *more):
    return load_config("digits", [*TINY, *ONE_STEP, f"train.init={teacher}", *more])


def step_of(config):
    return Step(config, device(), initial=runs.initial_weights(config).tensors)


def test_losses_are_those_of_the_guided_teacher(teacher):
    config = config_of(teacher)
    step = step_of(config)
    batch = make_batch(open_source(config), config, 0).part(0, 8, device())
    x_t = step.objective.q_sample(batch.x_0, batch.t, batch.noise)
    original = runs.load_model(runs.find_run(teacher)).to(device())

    def guided(x, t):
        away = original(x, t, torch.full_like(batch.y, 10))
        return away + 2 * (original(x, t, batch.y) - away)

    def model(x, t):
        return step.model(x, t, batch.y)

    expected = step.objective.losses(model, guided, x_t, batch.t, 0.5)
    step.number = config.train.steps // 2
    for name, loss in step.losses(batch).items():
        torch.testing.assert_close(loss, expected[name])


def test_guidance_without_classes_is_the_teacher_alone(tmp_path):
    """And the model without classes costs no second pass of the teacher."""
    pytest.importorskip("sklearn")
    config = load_config(
        "digits", [*TINY, *ONE_STEP, "model.num_classes=0", f"train.init={tmp_path}"]
    )
    step = Step(config, device())
    fill(step.teacher)
    batch = make_batch(open_source(config), config, 0).part(0, 8, device())
    x_t = step.objective.q_sample(batch.x_0, batch.t, batch.noise)
    passes = []
    step.teacher.register_forward_hook(lambda *_: passes.append(1))

    loss = step.losses(batch)["loss"]
    assert len(passes) == 1
    expected = step.objective.losses(step.model, step.teacher, x_t, batch.t, 0.0)["loss"]
    torch.testing.assert_close(loss, expected)


def test_teacher_stays_as_it_was_and_is_in_the_checkpoint(teacher, tmp_path):
    """So that a run continues exactly even where its teacher is gone."""
    config = config_of(teacher)
    step = step_of(config)
    before = {name: tensor.clone() for name, tensor in step.teacher.state_dict().items()}
    source = open_source(config)
    step.update(make_batch(source, config, 0))
    after = step.teacher.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not torch.equal(step.model.patch_out.weight, after["patch_out.weight"])

    # Another process goes on from the checkpoint alone.
    write_tensor_folder(tmp_path / "checkpoints", step.state(), {"step": 1})
    again = Step(config, device())
    again.load(tmp_path / "checkpoints" / runs.checkpoint_name(1))
    for each in (step, again):
        each.update(make_batch(source, config, 1))
    ours, theirs = step.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    # A flipped bit in it would teach something else.
    checkpoint = tmp_path / "checkpoints" / runs.checkpoint_name(1)
    assert runs.newest_good(tmp_path) == (checkpoint, [])
    content = bytearray((checkpoint / runs.TEACHER).read_bytes())
    content[-2] ^= 1
    (checkpoint / runs.TEACHER).write_bytes(content)
    wrong = f"{checkpoint / runs.TEACHER} has changed since it was written"
    assert runs.newest_good(tmp_path) == (None, [wrong])


def test_commands_train_resume_and_draw_in_one_step(teacher, tmp_path):
    root = tmp_path / "run"
    arguments = ["train", "--preset", "digits", "--init", teacher, "--out", root]
    arguments += settings([*ONE_STEP, "train.sample_every=2", "train.sample_images=10"])
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    resumed = run("train", "--out", root, "--resume", "--set", "train.steps=6")
    assert resumed.exit_code == 0, resumed.output

    result = run("sample", root, "--num", 3, "--out", tmp_path / "images")
    assert result.exit_code == 0, result.output
    trained = ds.load(root)
    pictures = trained.sample(3)
    assert pictures.shape == (3, 1, 8, 8)

    # One Euler step by hand.
    model = runs.load_model(runs.find_run(root))
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    label, noise = begin(model, torch.device("cpu"), generators, [4, 4, 4])
    noise = noise.float()
    with torch.no_grad():
        u = model(noise, torch.full((3,), 1000.0), label)
    by_hand = ((noise - u).clamp(-1, 1) + 1) * 127.5
    ours = trained.sample(3, classes=[4]).numpy().astype(np.float32)
    assert np.abs(ours - by_hand.numpy()).max() <= 1

    refused = run("sample", root, "--steps", 4, "--out", tmp_path / "more")
    assert refused.exit_code == 1
    line = line_of(refused)
    assert "--steps: 4 does not fit a model of the mean velocity" in line
    assert line.endswith("choose --sampler euler, --steps 1 and --guidance 1")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("sample.steps=2", "sample.steps: 2 does not fit"),
        ("sample.guidance=2", "sample.guidance: 2.0 does not fit"),
        ("sample.sampler=heun", "sample.sampler: heun does not fit"),
        ("train.init=", "mean_velocity is learned from a trained flow; name it by --init"),
        ("diffusion.objective=velocity", "mean_velocity needs diffusion.objective=flow"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, field, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, field)


def test_teacher_must_be_a_flow_of_its_velocity(teacher):
    image = load_config("digits", [*TINY, *FLOW, "diffusion.predicts=image"])
    runs.write_config(teacher, image)
    runs.write_weights(teacher / runs.FINAL, image, build_model(image).state_dict(), 4)
    with pytest.raises(RunError, match="predicts the image of a flow; diffusion.predicts=mean"):
        runs.initial_weights(config_of(teacher))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("model.depth=1", "model.depth of .* is 2, and this run has 1"),
        ("model.depth=3", "model.depth of .* is 2, and this run has 3"),
        ("model.scan=alternate", "model.scan of .* is 'raster', and this run has 'alternate'"),
        ("diffusion.timesteps=500", "diffusion.timesteps of .* is 1000, and this run has 500"),
    ],
)
def test_teacher_must_have_the_whole_network(teacher, field, message):
    with pytest.raises(RunError, match=f"{message}; a model of the mean velocity has"):
        runs.initial_weights(config_of(teacher, field))

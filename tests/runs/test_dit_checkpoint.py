"""DiT's published files: a .pt of the official names and shapes becomes a model that samples."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch

from diffussm_cli import runs
from diffussm_cli.diffusion.objectives import make_objective
from diffussm_cli.diffusion.samplers import sample_by_name
from diffussm_cli.errors import ConfigError, RunError
from diffussm_cli.evaluation.session import evaluate
from diffussm_cli.events import Message, Stage
from diffussm_cli.model import DiT
from diffussm_cli.sampling.pipeline_denoiser import Denoiser
from diffussm_cli.sampling.session import sample
from tests.conftest import fill, randn


@pytest.fixture
def model():
    return fill(DiT(8, 4, 2, 384, depth=2, heads=6, num_classes=7)).cpu()  # as files are read


def official(model: DiT) -> dict:
    """A state dict by the names and shapes of the published files."""
    state = {
        "pos_embed": model.position[None].clone(),
        "x_embedder.proj.weight": model.patch_in.weight.view(384, 4, 2, 2),
        "x_embedder.proj.bias": model.patch_in.bias,
        "y_embedder.embedding_table.weight": model.y_embed.weight,
    }
    pairs = {
        "final_layer.linear": model.patch_out,
        "final_layer.adaLN_modulation.1": model.norm_out.adaLN,
    }
    pairs |= {f"t_embedder.mlp.{i}": model.t_embed.mlp[i] for i in (0, 2)}
    for i, block in enumerate(model.blocks):
        pairs |= {
            f"blocks.{i}.attn.qkv": block.attention.qkv,
            f"blocks.{i}.mlp.fc1": block.mlp[0],
            f"blocks.{i}.mlp.fc2": block.mlp[2],
            f"blocks.{i}.adaLN_modulation.1": block.adaLN,
        }
        state[f"blocks.{i}.attn.proj.weight"] = block.attention.proj.weight[0]
        state[f"blocks.{i}.attn.proj.bias"] = block.attention.proj.bias[0]
    state |= {
        f"{name}.{k}": v for name, layer in pairs.items() for k, v in layer.state_dict().items()
    }
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def training_checkpoint(model: DiT) -> dict:
    """What DiT's own training writes: averaged weights, weights, optimiser and the options of its
    command line.
    """
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=1e-4)
    sum(p.sum() for group in optimizer.param_groups for p in group["params"]).backward()
    optimizer.step()
    options = argparse.Namespace(
        data_path="/data", model="DiT-S/2", image_size=256, global_seed=0, vae="ema"
    )
    weights = {k: v + 1 for k, v in official(model).items()}
    return {
        "model": weights,
        "ema": official(model),
        "opt": optimizer.state_dict(),
        "args": options,
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("made", [official, training_checkpoint])
def test_published_dit_file_is_opened_as_a_run(tmp_path, model, made, zipped):
    path = tmp_path / "DiT-S-2.pt"
    torch.save(made(model), path, _use_new_zipfile_serialization=zipped)
    trained = runs.find_run(path)
    m, d = trained.config.model, trained.config.data
    assert (m.backbone, m.depth, m.heads, m.patch_size, m.num_classes, m.learn_sigma) == (
        "dit",
        2,
        6,
        2,
        7,
        True,
    )
    assert (d.resolution, d.channels, d.vae) == (64, 4, "stabilityai/sd-vae-ft-ema")
    ours = runs.load_model(trained)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 700]), torch.tensor([3, 7])
    assert model(x, t, y).any()
    torch.testing.assert_close(ours(x, t, y), model(x, t, y))


def test_sample_and_eval_state_assumptions_about_dit_file_first(tmp_path, model):
    """A file of SiT has the same names and shapes, so that nothing tells it from a DiT."""
    path = tmp_path / "SiT-S-2.pt"
    torch.save(official(model), path)
    line = (
        f"{path} does not say how it was trained: it is read as a DiT, which predicts noise; the "
        "files of SiT have the same names, and would give images of noise: read them with "
        "--objective flow"
    )
    for events in (
        sample(path, tmp_path / "out", 1),
        evaluate(path, "builtin:digits", extractor="digits", num=2),
    ):
        first = next(event for event in events if not isinstance(event, Stage))
        assert isinstance(first, Message)
        assert first.text.startswith(line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_sit_file_is_read_as_the_flow_that_it_is(tmp_path, learn_sigma):
    """SiT's network gives v(x, s) = x_0 - noise at times s from 0 for noise to 1 for the image, in
    the first C of its channels; its images are Euler's steps from s = 0 to 1.
    """
    sit = fill(DiT(8, 4, 2, 384, depth=2, heads=6, num_classes=7, learn_sigma=learn_sigma)).cpu()
    path = tmp_path / "SiT-S-2.pt"
    torch.save(official(sit), path)
    trained = runs.find_run(path, objective="flow")
    assert "it is read as a SiT" in trained.assumption
    ours = runs.load_model(trained)
    assert ours.learn_sigma is False

    # A folder would not tell that it counts time from 0 to 1.
    for network in (ours, Denoiser(trained)):
        with pytest.raises(ValueError, match="^save_pretrained: this SiT counts time from 0 to 1"):
            network.save_pretrained(tmp_path / "saved")

    # The network, in float64: float32 alone rounds these outputs, of the order of 10, by 2e-5.
    x = randn(3, 4, 8, 8, dtype=torch.float64).cpu()
    y = torch.tensor([3, 7, 0])
    s = torch.tensor([0.0, 0.3, 0.999], dtype=torch.float64)
    velocity = sit.double()(x, s, y)[:, :4]
    torch.testing.assert_close(ours.double()(x, 1000 * (1 - s), y), -velocity, rtol=1e-6, atol=1e-6)

    # Five steps of Euler.
    expected = x
    for i in range(5):
        s = torch.full((3,), i / 5)
        expected = expected + sit(expected, s, y)[:, :4] / 5
    flow = make_objective(trained.config.diffusion)
    images = sample_by_name("euler", lambda x, t: predict(ours, x, t, y), flow, x, 5)
    torch.testing.assert_close(images, expected, rtol=1e-6, atol=1e-6)


def predict(model, x, t, y):
    return model(x, torch.full((len(x),), t), y)


def test_an_objective_is_for_published_files_alone(tmp_path, model):
    path = tmp_path / "DiT-S-2.pt"
    torch.save(official(model), path)
    assert runs.find_run(path, objective="noise").config == runs.find_run(path).config
    with pytest.raises(ConfigError, match="--objective: 'flow' is for a published .pt file; "):
        runs.find_run(Path("mnist"), objective="flow")
    with pytest.raises(ConfigError, match="--objective: 'image' must be one of noise, flow"):
        runs.find_run(path, objective="image")


def broken(state, how):
    if how == "a layer is missing":
        del state["final_layer.linear.bias"]
    if how == "an unknown layer":
        state["blocks.0.attn.rope"] = torch.zeros(1)
    if how == "other positions":
        state["pos_embed"] += 0.1
    if how == "odd width":
        state["x_embedder.proj.weight"] = torch.zeros(100, 4, 2, 2)
    if how == "more than tensors":
        state["arguments"] = {"lr": 1}
    if how == "a number for weights":
        state["ema"] = 3
    if how == "numbers for names":
        state = {1: torch.zeros(1)}
    if how == "a tensor":
        state = torch.zeros(3)
    if how == "no images":
        state["pos_embed"] = torch.zeros(())
    if how == "no classes":
        state["y_embedder.embedding_table.weight"] = torch.zeros(0, 384)
    if how == "more than is stored":
        state["y_embedder.embedding_table.weight"] = torch.zeros(1, 384).expand(1 << 40, 384)
    if how == "a billion blocks":
        state["blocks.1000000000.attn.qkv.weight"] = torch.zeros(1)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a layer is missing", "not a DiT checkpoint"),
        ("an unknown layer", "blocks.0.attn.rope is not part of a DiT"),
        ("other positions", "position embedding"),
        ("odd width", "not a DiT checkpoint"),
        ("more than tensors", "more than tensors"),
        ("a number for weights", "more than tensors"),
        ("numbers for names", "not a DiT checkpoint"),
        ("a tensor", "not a DiT checkpoint"),
        ("no images", "not a DiT checkpoint"),
        ("no classes", "not a DiT checkpoint"),
        ("a billion blocks", "is in only one of the two"),
        ("more than is stored", "more than tensors"),
    ],
)
def test_other_files_are_rejected_by_name(tmp_path, model, how, message):
    path = tmp_path / "model.pt"
    torch.save(broken(official(model), how), path)
    with pytest.raises(RunError, match=message):
        runs.load_model(runs.find_run(path))


class Attack:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


@pytest.mark.parametrize(
    "content", [pickle.dumps(Attack()), b"no pickle", b""], ids=["attack", "text", "empty"]
)
def test_hostile_file_is_rejected_unread(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"model\.pt"):
        runs.find_run(path)


def test_code_inside_a_state_dict_is_not_run(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"ema": Attack()}, path)
    with pytest.raises(RunError, match="cannot be read"):
        runs.find_run(path)

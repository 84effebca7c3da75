"""Guidance away from a weaker model: an earlier checkpoint, or a smaller run."""

import json

import pytest
import torch

import diffussm as ds
from diffussm_cli import runs
from diffussm_cli.config import SampleConfig, config_from_dict, load_config, to_dict
from diffussm_cli.errors import DiffussmError
from diffussm_cli.events import finish
from diffussm_cli.model import build_model
from diffussm_cli.sampling.generate import make_denoiser
from diffussm_cli.training.session import train
from tests.conftest import TINY, device, fill
from tests.helpers import line_of, run

FREE = ("model.num_classes=0", "sample.guidance=1")
FLOW = ("diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=heun")


def write_run(root, *overrides, std=0.1):
    """A finished run of random weights."""
    config = load_config("digits", [*TINY, "sample.clip=false", *overrides])
    torch.manual_seed(0)
    weights = fill(build_model(config), std).state_dict()
    runs.write_weights(root / "final", config, weights, 0)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "run")
    write_run(root / "smaller", "model.hidden_size=8", "model.learn_sigma=false", std=0.07)
    write_run(root / "free", *FREE)
    write_run(root / "free-smaller", *FREE, "model.hidden_size=8", std=0.07)
    return root


@pytest.mark.parametrize("kind", ["", "free"])
def test_the_run_itself_as_its_guide_changes_nothing_at_any_scale(folder, kind):
    """With random weights, guidance by the null class does change the images."""
    name = folder / (kind or "run")
    run = ds.load(name)
    plain = run.sample(3, guidance=1)
    for scale in (0.5, 3.0):
        assert torch.equal(run.sample(3, guidance=scale, guide=str(name)), plain)
    if not kind:
        assert not torch.equal(run.sample(3, guidance=3), plain)


@pytest.mark.parametrize("kind", ["", "free-"])
def test_a_smaller_run_guides_more_the_larger_the_scale(folder, kind):
    run = ds.load(folder / (kind.strip("-") or "run"))
    guide = str(folder / f"{kind}smaller")
    plain = run.sample(4, guidance=1, steps=2).float()
    away = [
        (run.sample(4, guidance=w, guide=guide, steps=2) - plain).abs().mean() for w in (1.1, 2, 3)
    ]
    assert 0 < away[0] < away[1] < away[2]


def test_the_guide_sees_the_label_of_each_image(folder):
    seen = []
    sampler = ds.load(folder / "run", precision="fp32")._sampler()

    def record(x, t, y, text):
        seen.append(y.tolist())
        return torch.zeros_like(x)

    request = SampleConfig(guidance=2.0)
    labels = torch.tensor([3, 7], device=device())
    denoise = make_denoiser(sampler.model, sampler.objective, request, labels, None, record)
    denoise(torch.zeros(2, 1, 8, 8, device=device()), 10)
    assert seen == [[3, 7]]


def test_sample_records_the_guide_and_takes_its_checkpoint(folder, tmp_path):
    arguments = ["sample", folder / "run", "-n", 2, "--out", tmp_path / "out", "--guidance", 2]
    guide = str(folder / "smaller")
    assert run(*arguments, "--guide-with", guide).exit_code == 0
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["guide"] == guide
    assert len(meta["guide_sha256"]) == 64
    assert "guide was" in line_of(run(*arguments))


MISTAKES = {
    "size": (["data.resolution=16"], "data.size of 'other' is (16, 16), but the run has (8, 8)"),
    "classes": (["model.num_classes=5"], "model.num_classes of 'other' is 5, but the run has 10"),
    "objective": (FLOW, "diffusion.objective of 'other' is 'flow', but the run has 'noise'"),
    "schedule": (["diffusion.beta_end=0.01"], "diffusion.beta_end of 'other' is 0.01"),
    "names of classes": (
        ["data.class_names=a,b,c,d,e,f,g,h,i,j"],
        "data.class_names of 'other' is ('a'",
    ),
}


@pytest.mark.parametrize(("overrides", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_guide_that_draws_something_else_is_one_line(
    folder, tmp_path, monkeypatch, overrides, words
):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "other", *overrides)
    source = write_run(tmp_path / "run", "data.class_names=0,1,2,3,4,5,6,7,8,9")
    arguments = ["sample", source, "--guidance", 2, "--guide-with", "other", "--out", "out"]
    assert f"--guide-with: {words}" in line_of(run(*arguments))
    assert not (tmp_path / "out").exists()


def test_a_guide_that_is_not_there_is_one_line_and_one_that_is_not_used_is_named(folder, tmp_path):
    arguments = ["sample", folder / "free", "--guide-with", "nobody", "--out", tmp_path / "out"]
    assert "--guide-with: no folder 'nobody'; name a run" in line_of(
        run(*arguments, "--guidance", 2)
    )
    unguided = run(*arguments, "-n", 1)
    assert unguided.exit_code == 0
    assert "not used: sample.guide=nobody (guidance is 1)" in unguided.stderr
    assert json.loads((tmp_path / "out/meta.json").read_text())["guide"] is None


def test_no_run_names_its_guide(tiny, folder, tmp_path):
    """A configuration may come from a stranger, and others do not have the guide."""
    config = tiny("sample.guide=other", "sample.guidance=2")
    with pytest.raises(DiffussmError, match="sample.guide: 'other' is no part of a run"):
        finish(train(config, tmp_path / "run"))

    written = to_dict(load_config("digits", TINY))
    written["sample"] |= {"guide": "other", "guidance": 2.0}
    runs.write_weights(tmp_path / "final", config_from_dict(written, ""), {}, 0)
    with pytest.raises(DiffussmError, match="config.yaml: sample.guide: 'other' is no part"):
        runs.find_run(tmp_path / "final")

"""`final/` in diffusers: the images of `diffussm sample`, other schedulers, and what a folder from the hub lacks."""

import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.diffusion.process import make_objective
from diffussm_cli.model import build_model
from diffussm_cli.sampling import generate
from diffussm_cli.sampling import pipeline as module
from tests.conftest import fill, save_vae
from tests.helpers import run


@pytest.fixture(autouse=True)
def modules_of_diffusers(tmp_path, monkeypatch):
    """diffusers copies the code of a folder into its cache before it imports it."""
    import diffusers.utils.dynamic_modules_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def final_of(root, config):
    model = fill(build_model(config))
    runs.write_weights(root / "final", config, model.state_dict(), 4, None, None, runs.pipeline_files(config))
    return root / "final"


def load(folder, **options):
    return diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    "overrides",
    [
        ["sample.sampler=ddpm", "sample.guidance=2", "sample.clip=true"],
        ["sample.sampler=dpmpp"],
        ["diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=unipc"],
    ],
)
def test_the_images_are_those_of_sample(tiny, tmp_path, overrides):
    folder, images = final_of(tmp_path, tiny(*overrides)), tmp_path / "images"
    assert run("sample", folder, "-n", 3, "--out", images, "--precision", "fp32", "--batch-size", 3).exit_code == 0
    pipe = load(folder)
    drawn = pipe(generator=seeded(0, 1, 2)).images
    for seed, image in enumerate(drawn):
        own = np.asarray(Image.open(images / f"{seed:06d}.png")).astype(int)
        assert own.std() > 10
        assert np.abs(own - np.asarray(image)).max() <= 1
    alone = np.asarray(pipe(generator=seeded(2)[0]).images[0]).astype(int)
    assert np.abs(alone - np.asarray(drawn[2])).max() <= 1


def test_prompts_draw_what_sample_draws(tiny, tmp_path):
    pytest.importorskip("wordllama")
    folder = final_of(
        tmp_path, tiny("data.text=wordllama", "model.text_width=256", "model.num_classes=0", "sample.guidance=3")
    )
    said = ["--prompt", "red heart", "--prompt", "sun", "--negative", "face"]
    assert run("sample", folder, "-n", 2, "--precision", "fp32", "--out", tmp_path / "images", *said).exit_code == 0
    pipe = load(folder)
    found = pipe(["red heart", "sun"], "face", generator=seeded(0, 1)).images
    for seed, image in enumerate(found):
        drawn = np.array(Image.open(tmp_path / "images" / f"{seed:06d}.png"), np.int16)
        assert abs(np.array(image, np.int16) - drawn).max() <= 1
    other = pipe("sun", generator=seeded(0)).images[0]
    assert not np.array_equal(np.array(other), np.array(found[0]))
    with pytest.raises(ValueError, match="prompt: this model draws what a text says; give one"):
        pipe()


@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")  # earlier versions know no other name
def test_bfloat16_is_that_of_sample(tiny, tmp_path):
    folder = final_of(tmp_path, tiny("sample.sampler=ddim"))
    assert run("sample", folder, "-n", 1, "--out", tmp_path / "images", "--precision", "bf16").exit_code == 0
    pipe = load(folder, torch_dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    own = np.asarray(Image.open(tmp_path / "images" / "000000.png")).astype(int)
    assert np.abs(own - np.asarray(pipe(generator=seeded(0)).images[0])).max() <= 1


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"])
def test_a_scheduler_can_be_swapped(tiny, tmp_path, kind):
    """From that of ddpm, whose output has a covariance; the same images as by the sampler's own scheduler."""
    name = {"DPMSolverMultistepScheduler": "dpmpp", "UniPCMultistepScheduler": "unipc", "DDIMScheduler": "ddim"}[kind]
    config = tiny("sample.sampler=ddpm")
    pipe = load(final_of(tmp_path, config))
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    images = pipe(class_labels=[3, 4], generator=seeded(5, 6), num_inference_steps=7, output_type="pt").images
    sampling = module.dataclasses.replace(config.sample, sampler=name, steps=7)
    model, objective = pipe.denoiser.model, make_objective(config.diffusion)
    (own,) = generate.generate(model, objective, sampling, [5, 6], [3, 4])
    torch.testing.assert_close(images, (own.images / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert images.std() > 0.1


def test_labels_batches_and_kinds_of_output(tiny, tmp_path):
    pipe = load(final_of(tmp_path, tiny()))
    assert pipe(batch_size=3, output_type="np").images.shape == (3, 8, 8, 1)
    assert pipe(class_labels=3, output_type="pt", return_dict=False)[0].shape == (1, 1, 8, 8)
    first, second = (pipe(class_labels=[3], generator=seeded(0), output_type="np", guidance_scale=g) for g in (1, 4))
    assert np.abs(first.images - second.images).max() > 0.01
    torch.manual_seed(0)
    repeated = pipe(output_type="np").images
    torch.manual_seed(0)
    assert np.array_equal(repeated, pipe(output_type="np").images)


def test_what_cannot_be_drawn_is_said(tiny, tmp_path):
    pipe = load(final_of(tmp_path, tiny()))
    with pytest.raises(ValueError, match=r"class_labels: \[10\] must lie in 0..9"):
        pipe(class_labels=10)
    with pytest.raises(ValueError, match="2 prompts or class_labels and 1 generators"):
        pipe(class_labels=[1, 2], generator=seeded(0))
    with pytest.raises(ValueError, match="prompt: this model was trained without text"):
        pipe("red heart")
    with pytest.raises(NotImplementedError, match="copy the folder .*final"):
        pipe.save_pretrained(tmp_path / "copy")
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler needs scaled inputs"):
        pipe()


def test_latents_are_decoded_by_the_vae_of_the_run(tiny, tmp_path):
    vae = str(save_vae(tmp_path / "vae"))
    names = {"data.resolution": 32, "data.channels": 4, "data.downsample": 4, "data.vae": vae, "data.path": "latents"}
    config = tiny("sample.sampler=ddpm", "sample.clip=false", *(f"{k}={v}" for k, v in names.items()))
    pipe = load(final_of(tmp_path, config))
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe().images[0].size == (32, 32)
    shutil.rmtree(vae)
    with pytest.warns(UserWarning, match="only previews of the latents"):
        load(tmp_path / "final")()


def test_what_diffusers_does_not_fetch_from_the_hub_is_fetched(tiny, tmp_path, monkeypatch):
    """diffusers fetches neither config.yaml nor, without transformers, model.safetensors."""
    final, snapshot = final_of(tmp_path, tiny()), tmp_path / "models--owner--my-digits" / "snapshots" / ("a" * 40)
    shutil.copytree(final, snapshot)
    for name in ("config.yaml", "model.safetensors"):
        (snapshot / name).unlink()
    asked = []
    monkeypatch.setattr(module, "fetch", lambda *arguments: asked.append(arguments) or final)
    assert load(snapshot)(output_type="np").images.shape == (1, 8, 8, 1)
    assert asked == [(f"owner/my-digits@{'a' * 40}", "RUN", runs.FILES_TO_SAMPLE, tmp_path)]


def test_without_the_package_one_line_says_what_to_install(tiny, tmp_path):
    folder = final_of(tmp_path, tiny())
    code = (
        f"import sys; sys.modules['diffussm_cli'] = None; import runpy; runpy.run_path({str(folder / 'pipeline.py')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ImportError: this model needs the package diffussm: pip install diffussm"

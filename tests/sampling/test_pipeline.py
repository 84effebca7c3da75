"""`final/` in diffusers: the images of `diffussm sample`, other schedulers, and what a folder from
the hub lacks.
"""

import math
import pickle
import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import diffussm as ds
from diffussm_cli import runs
from diffussm_cli.diffusion.objectives import make_objective
from diffussm_cli.model import build_model
from diffussm_cli.sampling import generate, pipeline_denoiser
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
    runs.write_weights(
        root / "final", config, model.state_dict(), 4, None, None, runs.pipeline_files(config)
    )
    return root / "final"


def load(folder, **options):
    return diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def pipeline(tiny, tmp_path):
    """Of a model with classes, in a folder of this process."""
    folder = final_of(tmp_path, tiny())
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    return module.DiffuSSMPipeline(module.Denoiser.from_pretrained(folder), scheduler)


@pytest.mark.parametrize(
    "overrides",
    [
        ["sample.sampler=ddpm", "sample.guidance=2", "sample.clip=true"],
        ["sample.sampler=dpmpp"],
        ["diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=unipc"],
    ],
)
def test_pipeline_draws_the_images_of_sample(tiny, tmp_path, overrides):
    folder, images = final_of(tmp_path, tiny(*overrides)), tmp_path / "images"
    assert (
        run(
            "sample", folder, "-n", 3, "--out", images, "--precision", "fp32", "--batch-size", 3
        ).exit_code
        == 0
    )
    pipe = load(folder)
    drawn = pipe(generator=seeded(0, 1, 2)).images
    for seed, image in enumerate(drawn):
        own = np.asarray(Image.open(images / f"{seed:06d}.png")).astype(int)
        assert own.std() > 10
        assert np.abs(own - np.asarray(image)).max() <= 1
    alone = np.asarray(pipe(generator=seeded(2)[0]).images[0]).astype(int)
    assert np.abs(alone - np.asarray(drawn[2])).max() <= 1


RAMP = torch.arange(64, dtype=torch.uint8).view(1, 8, 8) * 4
RIGHT = (torch.arange(8) >= 4).expand(8, 8)


@pytest.mark.parametrize(
    "overrides",
    [
        ["sample.sampler=ddim"],
        ["sample.sampler=ddpm", "sample.guidance=2"],
        ["diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=unipc"],
    ],
    ids=["ddim", "ddpm", "flow"],
)
@pytest.mark.parametrize(
    ("mask", "strength"), [(None, 0.5), (None, None), (RIGHT, None), (RIGHT, 0.6)]
)
def test_pipeline_draws_from_image_as_library_does(tiny, tmp_path, overrides, mask, strength):
    """The same pixels as `run.sample`, and other than without the image."""
    folder = final_of(tmp_path, tiny(*overrides, "sample.steps=10"))
    expected = ds.load(folder, precision="fp32").sample(2, image=RAMP, mask=mask, strength=strength)

    scheduler = load(folder).scheduler
    pipe = module.DiffuSSMPipeline(module.Denoiser.from_pretrained(folder), scheduler)
    request = {"image": RAMP, "mask_image": mask, "strength": strength, "generator": seeded(0, 1)}
    drawn = pipe(**request, output_type="pt").images
    assert torch.equal((255 * drawn + 0.5).floor().byte(), expected)
    assert pipe.num_timesteps == round(10 * (strength or (0.8 if mask is None else 1)))
    assert not torch.equal(drawn, pipe(generator=seeded(0, 1), output_type="pt").images)


def test_pipeline_returns_image_at_strength_zero_and_says_so(pipeline):
    with pytest.warns(UserWarning, match="not used: the seeds and how to draw .strength is 0"):
        drawn = pipeline(image=RAMP, strength=0, output_type="pt").images
    assert torch.equal((255 * drawn[0]).round().byte(), RAMP)


def test_latents_are_the_noise_that_an_image_is_mixed_with(pipeline):
    request = {"image": RAMP, "strength": 0.5, "class_labels": 3, "output_type": "np"}
    zero, noise = torch.zeros(1, 1, 8, 8), torch.linspace(-2, 2, 64).view(1, 1, 8, 8)
    drawn = [
        pipeline(**request, latents=latents, generator=seeded(4)).images
        for latents in (zero, noise, noise)
    ]
    assert np.array_equal(drawn[1], drawn[2])
    assert not np.array_equal(drawn[0], drawn[1])


def test_image_may_be_of_pillow_array_or_tensor_as_pipelines_return_them(pipeline):
    (drawn,) = pipeline(generator=seeded(3)).images
    forms = {kind: pipeline(generator=seeded(3), output_type=kind).images for kind in ("np", "pt")}
    pixels = np.asarray(drawn)
    forms |= {"pil": drawn, "bytes": torch.tensor(pixels)[None], "array": pixels}
    again = [
        pipeline(image=form, strength=0.5, generator=seeded(4), output_type="np").images
        for form in forms.values()
    ]
    for images in again[1:]:
        np.testing.assert_allclose(images, again[0], atol=2 / 255)


def test_image_is_encoded_by_vae_of_pipeline(tiny, tmp_path):
    vae = str(save_vae(tmp_path / "vae"))
    pipe = load(final_of(tmp_path, tiny("sample.clip=false", *latents_of(vae))))
    picture = (torch.arange(3 * 1024) % 256).byte().view(3, 32, 32)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[5, 6] = True
    expected = ds.load(tmp_path / "final", precision="fp32").sample(
        2, image=picture, mask=mask, strength=0.5
    )
    request = {"image": picture, "mask_image": mask, "strength": 0.5, "generator": seeded(0, 1)}
    drawn = pipe(**request, output_type="pt").images
    assert ((255 * drawn).round() - expected).abs().max() <= 1
    assert torch.equal((255 * drawn).round().byte()[:, :, ~mask], expected[:, :, ~mask])
    shutil.rmtree(vae)
    with pytest.raises(ValueError, match="^image: needs the VAE of the run; the images are only"):
        load(tmp_path / "final")(image=picture)


def test_pipeline_draws_prompts_as_sample(tiny, tmp_path):
    pytest.importorskip("wordllama")
    folder = final_of(
        tmp_path,
        tiny(
            "data.text=wordllama",
            "model.text_width=256",
            "model.num_classes=0",
            "sample.guidance=3",
        ),
    )
    said = ["--prompt", "red heart", "--prompt", "sun", "--negative", "face"]
    assert (
        run(
            "sample", folder, "-n", 2, "--precision", "fp32", "--out", tmp_path / "images", *said
        ).exit_code
        == 0
    )
    pipe = load(folder)
    found = pipe(["red heart", "sun"], "face", generator=seeded(0, 1)).images
    for seed, image in enumerate(found):
        drawn = np.array(Image.open(tmp_path / "images" / f"{seed:06d}.png"), np.int16)
        assert abs(np.array(image, np.int16) - drawn).max() <= 1
    other = pipe("sun", generator=seeded(0)).images[0]
    assert not np.array_equal(np.array(other), np.array(found[0]))
    with pytest.raises(ValueError, match="prompt: this model draws what a text says; give one"):
        pipe()


# earlier versions know no other name
@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")
def test_pipeline_in_bfloat16_draws_as_sample(tiny, tmp_path):
    folder = final_of(tmp_path, tiny("sample.sampler=ddim"))
    assert (
        run(
            "sample", folder, "-n", 1, "--out", tmp_path / "images", "--precision", "bf16"
        ).exit_code
        == 0
    )
    pipe = load(folder, torch_dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    own = np.asarray(Image.open(tmp_path / "images" / "000000.png")).astype(int)
    assert np.abs(own - np.asarray(pipe(generator=seeded(0)).images[0])).max() <= 1


@pytest.mark.parametrize(
    "kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"]
)
def test_scheduler_can_be_swapped(tiny, tmp_path, kind):
    """From that of ddpm, whose output has a covariance; the same images as by the sampler's own
    scheduler.
    """
    name = {
        "DPMSolverMultistepScheduler": "dpmpp",
        "UniPCMultistepScheduler": "unipc",
        "DDIMScheduler": "ddim",
    }[kind]
    config = tiny("sample.sampler=ddpm")
    pipe = load(final_of(tmp_path, config))
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    images = pipe(
        class_labels=[3, 4], generator=seeded(5, 6), num_inference_steps=7, output_type="pt"
    ).images
    sampling = module.dataclasses.replace(config.sample, sampler=name, steps=7)
    model, objective = pipe.denoiser.model, make_objective(config.diffusion)
    ((_, own),) = generate.generate(model, objective, sampling, [5, 6], [3, 4])
    torch.testing.assert_close(images, (own / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert images.std() > 0.1


def test_labels_batches_and_kinds_of_output_are_returned(tiny, tmp_path):
    pipe = load(final_of(tmp_path, tiny()))
    assert pipe(batch_size=3, output_type="np").images.shape == (3, 8, 8, 1)
    assert pipe(class_labels=3, output_type="pt", return_dict=False)[0].shape == (1, 1, 8, 8)
    first, second = (
        pipe(class_labels=[3], generator=seeded(0), output_type="np", guidance_scale=g)
        for g in (1, 4)
    )
    assert np.abs(first.images - second.images).max() > 0.01
    torch.manual_seed(0)
    repeated = pipe(output_type="np").images
    torch.manual_seed(0)
    assert np.array_equal(repeated, pipe(output_type="np").images)


def test_impossible_request_is_rejected(tiny, tmp_path):
    pipe = load(final_of(tmp_path, tiny()))
    with pytest.raises(ValueError, match=r"class_labels: \[10\] must lie in 0..9"):
        pipe(class_labels=10)
    with pytest.raises(ValueError, match="2 prompts or class_labels and 1 generators"):
        pipe(class_labels=[1, 2], generator=seeded(0))
    with pytest.raises(ValueError, match="prompt: this model was trained without text"):
        pipe("red heart")
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler needs scaled inputs"):
        pipe()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"output_type": "jpeg"}, "output_type: 'jpeg' must be one of pil, np, pt, latent"),
        ({"output_type": None}, "output_type: None must be one of"),
        (
            {"num_inference_steps": 0},
            "num_inference_steps: 0 must be a whole number from 1 to 1000",
        ),
        ({"num_inference_steps": -1}, "num_inference_steps: -1 must be"),
        ({"num_inference_steps": 10.0}, "num_inference_steps: 10.0 must be"),
        ({"num_inference_steps": 1001}, "num_inference_steps: 1001 must be"),
        ({"guidance_scale": math.nan}, "guidance_scale: nan must be a number of at least 0"),
        ({"guidance_scale": math.inf}, "guidance_scale: inf must be"),
        ({"guidance_scale": -1}, "guidance_scale: -1 must be"),
        ({"class_labels": [True]}, r"class_labels: \[True\] must be whole numbers in 0..9"),
        ({"class_labels": 1.5}, "class_labels: 1.5 must be whole numbers"),
        ({"class_labels": "cat"}, "class_labels: 'cat' must be whole numbers"),
        (
            {"class_labels": [1, 2], "batch_size": 3},
            "2 prompts or class_labels and 3 of batch_size do not match",
        ),
        ({"batch_size": 0}, "batch_size: 0 must be a whole number of at least 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: 0 must be"),
        ({"latents": torch.zeros(2, 1, 8, 4)}, r"latents: \(2, 1, 8, 4\) must be \(2, 1, 8, 8\)"),
        ({"latents": torch.full((1, 1, 8, 8), math.nan)}, "image 0 has values that are not finite"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            "tensor_inputs: 'noise' must be latents",
        ),
        ({"negative_prompt": ["a"]}, "prompt: this model was trained without text"),
        ({"prompt": 3}, "prompt: 3 must be a text or a list of texts"),
        ({"strength": 0.5}, "^strength: needs image, the image to begin with"),
        ({"mask_image": torch.ones(8, 8)}, "^mask_image: needs image"),
        ({"image": torch.zeros(1, 4, 4)}, "^image: has 4x4 pixels .* but the run draws 8x8"),
        ({"image": torch.zeros(1, 8, 8), "strength": 2}, "^strength: 2 must be a number from 0 to"),
        ({"image": torch.full((1, 8, 8), math.nan)}, r"^image: floats must lie in \[0, 1\]"),
        ({"image": np.full((8, 8, 1), 3.0)}, r"^image: floats must lie in \[0, 1\]"),
        ({"image": [torch.zeros(1, 8, 8)]}, "^image: one image for all of a call, not a list$"),
        ({"image": torch.zeros(2, 1, 8, 8)}, "^image: one image for all of a call, not 2$"),
        (
            {"image": np.zeros((8, 8, 2))},
            r"^image: float64 \(8, 8, 2\) must be a file, an image of Pillow, an array \(H, W, C\) "
            r"or a tensor \(C, H, W\), with 1 or 3 channels, of uint8 or of floats in \[0, 1\]$",
        ),
        ({"image": np.array(["a"])}, r"^image: <U1 \(1,\) must be a file"),
        ({"image": 3}, "^image: a value of type int must be a file"),
        (
            {"image": torch.zeros(1, 8, 8), "mask_image": torch.zeros(8, 8)},
            "^mask_image: is black everywhere",
        ),
    ],
)
def test_bad_argument_is_rejected_by_name(pipeline, arguments, line):
    with pytest.raises(ValueError, match=line):
        pipeline(**arguments)


def test_labels_may_be_numbers_arrays_tensors_and_nested_lists(pipeline):
    def images(labels, **how):
        return pipeline(class_labels=labels, generator=seeded(1, 2), output_type="np", **how).images

    expected = images([3, 4])
    for labels in (
        (3, 4),
        range(3, 5),
        np.array([3, 4]),
        torch.tensor([3, 4]),
        [[3], [4]],
        [np.int64(3), 4],
    ):
        assert np.array_equal(images(labels), expected), labels
    same = images([3, 3])
    for label in (3, np.int64(3), np.array(3), torch.tensor(3)):
        assert np.array_equal(images(label), same), label


def test_single_label_applies_to_all_images(pipeline):
    four = pipeline(
        class_labels=3, batch_size=4, generator=seeded(0, 1, 2, 3), output_type="np"
    ).images
    assert four.shape == (4, 8, 8, 1)
    assert np.array_equal(
        pipeline(class_labels=[3] * 4, generator=seeded(0, 1, 2, 3), output_type="np").images, four
    )
    assert len(pipeline(class_labels=3, batch_size=4).images) == 4


def test_several_images_of_each_label_lie_side_by_side(pipeline):
    drawn = pipeline(
        class_labels=[3, 4], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), output_type="np"
    ).images
    listed = pipeline(
        class_labels=[3, 3, 4, 4], generator=seeded(0, 1, 2, 3), output_type="np"
    ).images
    assert np.array_equal(drawn, listed)
    assert len(pipeline(num_images_per_prompt=3, batch_size=2).images) == 6


def test_latents_are_taken_as_noise_and_returned_as_image_in_model_space(pipeline):
    generator = torch.Generator().manual_seed(5)
    torch.randint(10, (), generator=generator)
    noise = torch.randn(1, 1, 8, 8, generator=generator)
    how = {"class_labels": 3, "output_type": "latent"}
    drawn = pipeline(generator=seeded(5), **how).images
    assert torch.equal(pipeline(latents=noise, **how).images, drawn)
    assert (drawn.shape, drawn.dtype) == ((1, 1, 8, 8), torch.float32)
    shown = pipeline(class_labels=3, generator=seeded(5), output_type="pt").images
    assert torch.equal(shown, (drawn / 2 + 0.5).clamp(0, 1))


def test_callback_sees_every_step_and_may_change_it(pipeline, capsys):
    seen = []

    def watch(pipe, i, t, tensors):
        seen.append((i, int(t), *tensors))
        pipe._guidance_scale += 1
        return (
            {"latents": torch.zeros_like(tensors["latents"])} if i == pipe.num_timesteps - 1 else {}
        )

    how = {
        "class_labels": 3,
        "num_inference_steps": 10,
        "guidance_scale": 2.0,
        "output_type": "latent",
    }
    last = pipeline(callback_on_step_end=watch, **how).images
    assert seen == [(i, 900 - 100 * i, "latents") for i in range(10)]
    assert last.abs().sum() == 0
    assert pipeline.guidance_scale == 12
    assert "10/10" in capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**how)
    assert capsys.readouterr().err == ""


def test_guidance_that_a_callback_changes_holds_from_the_next_step_on(tiny, tmp_path):
    """The right answer is guidance in an interval that leaves out the first step,
    at timestep 900.
    """

    def to_three(pipe, i, t, tensors):
        pipe._guidance_scale = 3.0

    def draw(overrides, scale, callback=None):
        torch.manual_seed(0)  # the same network
        folder = final_of(tmp_path / str(len(overrides)), tiny("sample.clip=false", *overrides))
        scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
        pipe = module.DiffuSSMPipeline(module.Denoiser.from_pretrained(folder), scheduler)
        how = {"class_labels": 3, "num_inference_steps": 10, "output_type": "latent"}
        return pipe(
            generator=seeded(0), guidance_scale=scale, callback_on_step_end=callback, **how
        ).images

    changed = draw([], 1.0, to_three)
    assert torch.equal(changed, draw(["sample.guidance_interval=[0,899]"], 3.0))
    assert not torch.equal(changed, draw([], 3.0))


def test_callback_may_end_the_call(pipeline):
    seen = []

    def stop(pipe, i, t, tensors):
        seen.append(i)
        pipe._interrupt = i == 2

    pipeline(num_inference_steps=10, callback_on_step_end=stop)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("when", [1, 3])
def test_image_that_is_not_finite_is_rejected_in_every_form(pipeline, when):
    def spoil(pipe, i, t, tensors):
        return {"latents": torch.full_like(tensors["latents"], math.nan)} if i == when else {}

    for kind in module.OUTPUTS:
        with pytest.raises(ValueError, match="image 0 has values that are not finite"):
            pipeline(output_type=kind, num_inference_steps=4, callback_on_step_end=spoil)


@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_pipeline_draws_the_same_images(tiny, tmp_path, dtype):
    pipe = load(final_of(tmp_path, tiny()), **({} if dtype is None else {"torch_dtype": dtype}))
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, solver_order=1
    )
    with torch.no_grad():
        next(pipe.denoiser.model.parameters()).mul_(1.5)  # what is saved is what the pipeline holds
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    pipe.save_pretrained(tmp_path / "copy")
    again = load(tmp_path / "copy", **({} if dtype is None else {"torch_dtype": dtype}))
    assert (tmp_path / "copy" / "notes.txt").read_text() == "mine"
    assert type(again.scheduler) is diffusers.UniPCMultistepScheduler
    how = {"num_inference_steps": 10, "output_type": "np"}
    drawn, repeated = (p(generator=seeded(0, 1), **how).images for p in (pipe, again))
    assert np.array_equal(drawn, repeated)
    assert run("sample", tmp_path / "copy", "-n", 1, "--out", tmp_path / "images").exit_code == 0
    with pytest.raises(ValueError, match="variant: 'fp16' is not written"):
        pipe.save_pretrained(tmp_path / "other", variant="fp16")
    with pytest.raises(ValueError, match="^push_to_hub: save_pretrained has no such option here$"):
        pipe.save_pretrained(tmp_path / "other", push_to_hub=True)
    assert not (tmp_path / "other").exists()


def test_denoiser_is_a_model_of_diffusers(pipeline, tmp_path):
    denoiser, t = pipeline.denoiser, torch.tensor([7, 500])
    assert isinstance(denoiser, diffusers.ModelMixin)
    assert denoiser.config.hidden_size == 16
    assert denoiser.num_parameters() == sum(p.numel() for p in denoiser.model.parameters())
    x, y = torch.randn(2, 1, 8, 8, generator=seeded(0)[0]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = denoiser.model(x, t, y)
        assert torch.equal(denoiser(x, t, y).sample, expected)
        assert torch.equal(denoiser(x, t, y, return_dict=False)[0], expected)
    denoiser.save_pretrained(tmp_path / "alone")
    alone = module.Denoiser.from_pretrained(tmp_path / "alone")
    for name, tensor in denoiser.state_dict().items():
        assert torch.equal(alone.state_dict()[name], tensor)
    pipeline.to(torch.bfloat16)
    cast = module.Denoiser.from_pretrained(tmp_path / "alone", torch_dtype=torch.bfloat16)
    assert {n: v.dtype for n, v in denoiser.state_dict().items()} == {
        n: v.dtype for n, v in cast.state_dict().items()
    }
    pipeline.to(torch.float32)
    assert {v.dtype for v in denoiser.state_dict().values()} == {torch.float32}
    with pytest.raises(ValueError, match=r"dtype: torch.float64 must be one of torch.float32"):
        pipeline.to(torch.float64)


def test_pipeline_calls_the_denoiser_as_a_module(pipeline):
    """So that `denoiser.compile()` and hooks have an effect."""
    calls = []
    pipeline.denoiser.register_forward_hook(lambda *_: calls.append(1))
    pipeline(num_inference_steps=4)
    assert len(calls) == 4


def test_used_pipeline_can_be_pickled(pipeline):
    drawn = pipeline(generator=seeded(0), output_type="np").images
    again = pickle.loads(pickle.dumps(pipeline))  # noqa: S301 (our own)
    assert np.array_equal(again(generator=seeded(0), output_type="np").images, drawn)


NOISE, FLOW = (), ("diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=euler")


@pytest.mark.parametrize(
    ("objective", "kind", "settings", "line"),
    [
        (
            FLOW,
            "DDIMScheduler",
            {},
            "DDIMScheduler cannot step along a flow, .* use DPMSolverMultistepScheduler",
        ),
        (FLOW, "DDPMScheduler", {}, "DDPMScheduler cannot step along a flow"),
        (FLOW, "PNDMScheduler", {}, "PNDMScheduler cannot step along a flow"),
        (
            FLOW,
            "DPMSolverMultistepScheduler",
            {"use_karras_sigmas": True},
            "use_karras_sigmas of .* do not fit a flow",
        ),
        (
            FLOW,
            "DPMSolverMultistepScheduler",
            {"prediction_type": "epsilon"},
            "prediction_type of .* is 'epsilon'",
        ),
        (
            NOISE,
            "FlowMatchEulerDiscreteScheduler",
            {},
            "FlowMatchEulerDiscreteScheduler is for models that predict",
        ),
        (
            NOISE,
            "FlowMatchHeunDiscreteScheduler",
            {},
            "FlowMatchHeunDiscreteScheduler is for models that predict",
        ),
        (
            NOISE,
            "DDIMScheduler",
            {"prediction_type": "v_prediction"},
            "is 'v_prediction', but this model needs 'epsilon'",
        ),
        (
            NOISE,
            "UniPCMultistepScheduler",
            {"beta_end": 0.012},
            "beta_end of .* is 0.012, but this model needs 0.02",
        ),
        (NOISE, "PNDMScheduler", {}, "PNDMScheduler begins at timestep 500 of 1000 in 501 steps"),
    ],
)
def test_unfitting_scheduler_is_one_line_error(tiny, tmp_path, objective, kind, settings, line):
    pipe = load(final_of(tmp_path, tiny(*objective)))
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **settings)
    with pytest.raises(ValueError, match=line):
        pipe(num_inference_steps=501)


# DEIS, numpy 2
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        (FLOW, "FlowMatchEulerDiscreteScheduler"),
        (FLOW, "FlowMatchHeunDiscreteScheduler"),
        (FLOW, "UniPCMultistepScheduler"),
        (NOISE, "DPMSolverSinglestepScheduler"),
        (NOISE, "DEISMultistepScheduler"),
        (NOISE, "PNDMScheduler"),
    ],
)
def test_fitting_foreign_schedulers_draw(tiny, tmp_path, objective, kind):
    pipe = load(final_of(tmp_path, tiny(*objective)))
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    image = pipe(num_inference_steps=20, output_type="np").images
    assert image.std() > 0.05


def latents_of(vae):
    """The overrides of a run on the latents of a VAE."""
    sizes = ["data.resolution=32", "data.channels=4", "data.downsample=4"]
    return [*sizes, f"data.vae={vae}", "data.path=latents"]


def test_vae_of_run_is_a_component(tiny, tmp_path):
    vae = str(save_vae(tmp_path / "vae"))
    pipe = load(final_of(tmp_path, tiny("sample.clip=false", *latents_of(vae))))
    assert isinstance(pipe.vae, diffusers.AutoencoderKL)
    own = pipe(generator=seeded(0), output_type="np").images
    pipe.save_pretrained(tmp_path / "copy")
    shutil.rmtree(vae)
    again = load(tmp_path / "copy")
    assert np.array_equal(again(generator=seeded(0), output_type="np").images, own)
    again.vae = diffusers.AutoencoderKL.from_pretrained(
        save_vae(tmp_path / "other", seed=1, shift_factor=0.5)
    )
    swapped = again(generator=seeded(0), output_type="np").images
    latents = again(generator=seeded(0), output_type="latent").images
    by_hand = again.vae.decode(latents / 0.3 + 0.5).sample / 2 + 0.5
    np.testing.assert_allclose(swapped, by_hand.detach().clamp(0, 1).permute(0, 2, 3, 1), atol=1e-5)
    again.vae = diffusers.AutoencoderKL.from_pretrained(
        save_vae(tmp_path / "third", block_out_channels=(8, 8))
    )
    with pytest.raises(
        ValueError, match="vae: it has 4 channels and downsampling 2, but the run has 4 and 4"
    ):
        again()


def test_vae_of_normalised_run_gets_latents_in_its_units(tiny, tmp_path):
    vae = str(save_vae(tmp_path / "vae"))
    statistics = ["data.latents_mean=[1,2,3,4]", "data.latents_std=[2,2,4,4]"]
    measured = ["data.normalize=measured", *statistics, "sample.clip=false"]
    pipe = load(final_of(tmp_path, tiny(*latents_of(vae), *measured)))
    shown = pipe(generator=seeded(0), output_type="np").images
    latents = pipe(generator=seeded(0), output_type="latent").images
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ([1.0, 2, 3, 4], [2.0, 2, 4, 4]))
    by_hand = pipe.vae.decode((latents * std + mean) / 0.3 + 0.1).sample / 2 + 0.5
    np.testing.assert_allclose(shown, by_hand.detach().clamp(0, 1).permute(0, 2, 3, 1), atol=1e-5)


def test_prompts_may_be_empty_and_negative_prompts_a_list(captioned, tmp_path):
    pipe = load(final_of(tmp_path, captioned("sample.guidance=3")))

    def images(prompt, negative=None, **how):
        return pipe(prompt, negative, generator=seeded(0, 1), output_type="np", **how).images

    plain = images(["cat", "cat"])
    assert not np.allclose(images(["", "cat"])[0], plain[0], atol=1e-3)
    np.testing.assert_allclose(images(["", "cat"])[1], plain[1], atol=1e-5)
    # guidance leads away from no caption
    np.testing.assert_allclose(images(["cat", "cat"], ""), plain, atol=1e-5)
    mixed = images("cat", ["dog", ""])
    np.testing.assert_allclose(mixed[0], images("cat", "dog")[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], plain[1], atol=1e-5)
    np.testing.assert_allclose(
        images(["cat"], ["dog"], num_images_per_prompt=2), images("cat", "dog"), atol=1e-5
    )
    with pytest.raises(ValueError, match="class_labels: 3 given, but this model has no classes"):
        pipe("cat", class_labels=3)
    with pytest.warns(UserWarning, match="^negative_prompt: not used, because guidance_scale is 1"):
        pipe("cat", "dog", guidance_scale=1)


def test_latents_are_decoded_by_the_vae_of_the_run(tiny, tmp_path):
    vae = str(save_vae(tmp_path / "vae"))
    overrides = ["sample.sampler=ddpm", "sample.clip=false", *latents_of(vae)]
    pipe = load(final_of(tmp_path, tiny(*overrides)))
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe().images[0].size == (32, 32)
    another = final_of(tmp_path / "another", tiny(*overrides, f"data.vae_sha256={'ab' * 32}"))
    with pytest.warns(UserWarning, match="is not the VAE that made the latents of this run"):
        load(another)
    shutil.rmtree(vae)
    with pytest.warns(UserWarning, match="only previews of the latents"):
        load(tmp_path / "final")()


def test_files_that_diffusers_does_not_fetch_are_fetched(tiny, tmp_path, monkeypatch):
    """diffusers fetches neither config.yaml nor, without transformers, model.safetensors."""
    final, snapshot = (
        final_of(tmp_path, tiny()),
        tmp_path / "models--owner--my-digits" / "snapshots" / ("a" * 40),
    )
    shutil.copytree(final, snapshot)
    for name in ("config.yaml", "model.safetensors"):
        (snapshot / name).unlink()
    asked = []
    monkeypatch.setattr(
        pipeline_denoiser, "fetch", lambda *arguments: asked.append(arguments) or final
    )
    assert load(snapshot)(output_type="np").images.shape == (1, 8, 8, 1)
    assert asked == [(f"owner/my-digits@{'a' * 40}", "RUN", runs.FILES_TO_SAMPLE, tmp_path)]


def test_missing_package_says_what_to_install(tiny, tmp_path):
    folder = final_of(tmp_path, tiny())
    code = (
        "import sys; sys.modules['diffussm_cli'] = None; import runpy; "
        f"runpy.run_path({str(folder / 'pipeline.py')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    line = "ImportError: this model needs the package diffussm: pip install . in a clone of it"
    assert done.stderr.splitlines()[-1] == line


def test_model_of_the_mean_velocity_draws_in_one_step(tiny, tmp_path):
    flow = ["diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=euler"]
    flow += ["diffusion.predicts=mean_velocity", "train.init=mnist", "sample.steps=1"]
    root = tmp_path / "run"
    config = tiny(*flow, "sample.guidance=1")
    pipe = load(final_of(root, config))
    ours = ds.load(root / "final", precision="fp32").sample(2, classes=[3, 4])
    images = pipe(class_labels=[3, 4], generator=seeded(0, 1), output_type="pt").images
    assert (images.mul(255).round() - ours).abs().max() <= 1

    for option in ({"num_inference_steps": 2}, {"guidance_scale": 2.0}):
        (name,) = option
        with pytest.raises(ValueError, match=f"{name}: 2.* one step"):
            pipe(class_labels=[3], **option)

"""Images that begin with an image of the user, or with noise between two seeds."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import diffussm as ds
from diffussm_cli import runs
from diffussm_cli.config import SAMPLERS, config_from_dict, load_config, to_dict
from diffussm_cli.data.opening import open_source
from diffussm_cli.errors import DiffussmError
from diffussm_cli.model import build_model
from diffussm_cli.sampling.beginning import Beginning, read_beginning
from diffussm_cli.training.loop import Trainer
from tests.conftest import TINY, fill, save_vae
from tests.helpers import line_of, run

FLOW = ["diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=heun"]


def write_run(root, overrides, **changes):
    """A finished run of random weights, which draws something else from each seed and label."""
    config = load_config("digits", [*TINY, *overrides])
    trainer = Trainer(config, open_source(config), root)
    if changes:
        config = config_from_dict(to_dict(config), "", fields=changes)
    runs.write_weights(root / "final", config, fill(trainer.step.ema.model).state_dict(), 0)
    return root


@pytest.fixture(scope="module", params=[(), FLOW], ids=["noise", "flow"])
def trained(request, tmp_path_factory):
    pytest.importorskip("sklearn")
    return ds.load(write_run(tmp_path_factory.mktemp("run"), request.param))


@pytest.fixture(scope="module")
def picture():
    return torch.arange(64, dtype=torch.uint8).view(1, 8, 8) * 4


@pytest.fixture(scope="module")
def of_noise(tmp_path_factory):
    pytest.importorskip("sklearn")
    return write_run(tmp_path_factory.mktemp("noise"), ())


def half():
    """A mask that is white on the right."""
    return (torch.arange(8) >= 4).expand(8, 8)


GREY = torch.full((1, 8, 8), 99, dtype=torch.uint8)


# ---------------------------------------------------------------------------------- from an image
UNUSED = pytest.mark.filterwarnings("ignore:not used")  # the image, or the seeds


@UNUSED
def test_strength_one_draws_what_no_image_draws_and_strength_zero_the_image(trained, picture):
    plain = trained.sample(4, seed=5)
    assert torch.equal(trained.sample(4, seed=5, image=picture, strength=1), plain)
    same = trained.sample(4, seed=5, image=picture, strength=0)
    assert torch.equal(same, picture.expand_as(same))


@UNUSED
def test_the_less_strength_the_nearer_the_image(trained, picture):
    far = [
        (trained.sample(8, image=picture, strength=s, steps=20).float() - picture).abs().mean()
        for s in (0.1, 0.5, 1)
    ]
    assert far == sorted(far)
    assert far[0] < 0.7 * far[2]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp", "unipc", "euler", "heun", "sde"])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_known_pixels_are_kept_exactly_by_every_sampler(trained, picture, sampler, strength):
    if sampler not in SAMPLERS[trained.config.diffusion.objective]:
        pytest.skip("is for another objective")
    drawn = trained.sample(3, image=picture, mask=half(), strength=strength, sampler=sampler)
    assert torch.equal(drawn[..., :4], picture.expand_as(drawn)[..., :4])
    assert not torch.equal(drawn[0, ..., 4:], drawn[1, ..., 4:])


@UNUSED
def test_a_white_mask_draws_what_no_image_draws(trained, picture):
    plain = trained.sample(3)
    white = torch.ones(8, 8, dtype=torch.bool)
    assert torch.equal(trained.sample(3, image=picture, mask=white), plain)


def test_what_is_drawn_anew_depends_on_what_is_known():
    """The network sees the known pixels: a digit goes on in another way than an empty half."""
    run = ds.load("mnist")
    digit = run.sample(1, classes=[8], steps=8)[0]
    right = (torch.arange(28) >= 14).expand(28, 28)
    on_a_digit, on_nothing = (
        run.sample(6, classes=[8], steps=8, image=image, mask=right)[..., 14:].float()
        for image in (digit, torch.zeros_like(digit))
    )
    # every one of them; if the network saw noise in place of the known pixels, they were the same
    assert (on_a_digit - on_nothing).abs().mean((1, 2, 3)).min() > 2


def test_a_picture_may_be_a_file_an_image_or_a_tensor(trained, picture, tmp_path):
    image = Image.fromarray(picture[0].numpy())
    image.convert("RGB").save(tmp_path / "picture.png")
    Image.fromarray(half().numpy()).save(tmp_path / "mask.png")
    drawn = trained.sample(2, image=picture, mask=half())
    files = trained.sample(2, image=tmp_path / "picture.png", mask=str(tmp_path / "mask.png"))
    assert torch.equal(files, drawn)
    assert torch.equal(trained.sample(2, image=image, mask=half().byte() * 255), drawn)


def test_a_callback_sees_x_after_every_step(trained):
    seen = []
    drawn = trained.sample(3, batch_size=2, callback=lambda step, x: seen.append((step, x.shape)))
    assert [step for step, _ in seen] == [0, 1, 2, 3] * 2
    assert {tuple(shape) for _, shape in seen} == {(2, 1, 8, 8), (1, 1, 8, 8)}
    assert torch.equal(drawn, trained.sample(3, batch_size=2))


# -------------------------------------------------------------------------------------- of latents
@pytest.fixture(scope="module")
def of_latents(tmp_path_factory):
    """A run on a 4x4 grid of the latents of a VAE that halves twice."""
    pytest.importorskip("sklearn")
    root = tmp_path_factory.mktemp("latents")
    vae = save_vae(root / "vae")
    config = load_config("digits", [*TINY, "data.channels=4", "data.resolution=8"])
    fields = {"data.resolution": 16, "data.downsample": 4, "data.vae": str(vae), "data.path": "x"}
    fields |= {"model.patch_size": 1, "sample.clip": False, "sample.guidance": 1}
    config = config_from_dict(to_dict(config), "", fields=fields)
    torch.manual_seed(0)
    runs.write_weights(root / "run/final", config, fill(build_model(config)).state_dict(), 0)
    return ds.load(root / "run")


@UNUSED
def test_the_vae_encodes_the_image_and_known_pixels_are_kept(of_latents):
    """Strength 0 gives what the VAE makes of the image; a mask that takes one pixel of a place of
    the grid takes the place, and pixels beyond it are as they were.
    """
    picture = (torch.arange(3 * 256) % 256).byte().view(3, 16, 16)
    vae = of_latents._sampler().decoding.vae
    mean, _ = vae.encode(picture[None] / 127.5 - 1)
    there_and_back = vae.decode((mean.cpu() - vae.shift) * vae.scale)
    expected = (127.5 * there_and_back + 128).clamp(0, 255).byte()
    assert torch.equal(of_latents.sample(1, image=picture, strength=0), expected)

    plain = of_latents.sample(2)
    assert torch.equal(of_latents.sample(2, image=picture, strength=1), plain)

    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[5, 6] = True
    drawn = of_latents.sample(2, image=picture, mask=mask)
    assert not (drawn != picture).any(1)[:, ~mask].any()


def test_a_mask_shrinks_to_the_places_of_the_grid_that_it_touches(of_latents):
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[5, 6] = mask[15, 0] = True
    picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
    config = of_latents.config
    beginning = read_beginning(config, config.sample, 1, picture, mask)
    redrawn = beginning.encoded(of_latents._sampler().decoding, 4).redrawn
    assert redrawn[0, 0].nonzero().tolist() == [[1, 1], [3, 0]]


# ------------------------------------------------------------------------------- between two seeds
def test_the_ends_of_an_interpolation_are_the_images_of_the_seeds(trained):
    how = {"classes": [3], "sampler": "dpmpp"}
    ends = trained.sample(2, seed=11, **how)
    assert torch.equal(trained.sample(2, interpolate=(11, 12), **how), ends)
    assert torch.equal(trained.sample(2, interpolate=(12, 11), **how), ends.flip(0))

    way = trained.sample(5, interpolate=(11, 12), **how)
    torch.testing.assert_close(way[[0, 4]].int(), ends.int(), rtol=0, atol=1)
    assert len(way.flatten(1).unique(dim=0)) == 5


def test_noise_between_two_seeds_lies_on_the_arc():
    ends = torch.eye(2).view(2, 2, 1, 1)
    noise = Beginning(ends=(0, 1), images=4).noise(ends, range(4))
    angles = torch.arange(4) * torch.pi / 6
    torch.testing.assert_close(
        noise.view(4, 2), torch.stack([angles.cos(), angles.sin()], 1).double()
    )


def test_images_between_two_seeds_have_the_label_of_the_first(trained):
    label = trained._sampler().labels(range(11, 12))
    without = trained.sample(2, interpolate=(11, 12), sampler="dpmpp")
    assert torch.equal(
        without, trained.sample(2, interpolate=(11, 12), sampler="dpmpp", classes=label)
    )


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (
            {"interpolate": (1, 2), "sampler": "dpmpp", "seed": 9},
            r"^not used: seed=9 \(interpolate names the seeds\)$",
        ),
        (
            {"guidance": 2.0, "guidance_interval": (2000, 3000)},
            r"^not used: sample.guidance_interval=2000,3000 \(the last timestep is",
        ),
        (
            {"guidance": 1.0, "guidance_interval": (2, 3)},
            r"^not used: sample.guidance_interval=2,3 \(guidance is 1\)$",
        ),
        ({"classes": [1, 2, 3]}, r"^not used: 1 of 3 classes \(num is 2\)$"),
        (
            {"image": GREY, "strength": 0},
            r"^not used: the seeds and how to draw \(strength is 0, so that nothing of",
        ),
        (
            {"image": GREY, "strength": 0, "mask": half()},
            r"^not used: the mask, the seeds and how to draw \(strength is 0",
        ),
        (
            {"image": GREY, "strength": 1, "interpolate": (1, 2), "sampler": "dpmpp"},
            r"^not used: the image \(strength 1 is all of 4 steps, so that nothing of it",
        ),
        (
            {"image": GREY, "steps": 2},
            r"^not used: the image \(strength 0.8 is all of 2 steps, so that nothing of it is kept",
        ),
        (
            {"image": GREY, "mask": torch.ones(8, 8, dtype=torch.bool)},
            r"^not used: the image \(strength 1 is all of 4 steps",
        ),
    ],
)
def test_what_a_request_in_python_does_not_use_is_a_warning(trained, request_, line):
    with pytest.warns(UserWarning, match=line) as warnings:
        trained.sample(2, **request_)
    ours = [warning for warning in warnings if "not used" in str(warning.message)]
    assert [warning.filename for warning in ours] == [__file__]


# ------------------------------------------------------------------------------------- the command
@pytest.fixture
def files(tmp_path, picture):
    Image.fromarray(picture[0].numpy()).save(tmp_path / "image.png")
    Image.fromarray(half().numpy()).save(tmp_path / "mask.png")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    Image.new("L", (7, 9)).save(tmp_path / "other.png")
    frames = [Image.new("L", (8, 8), value) for value in (0, 99)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(40))
    return tmp_path


def test_sample_writes_what_it_began_with_and_draws_on(trained, files):
    arguments = ["sample", trained.folder, "--out", files / "out", "--precision", "fp32"]
    begin = ["--image", files / "image.png", "--mask", files / "mask.png", "--strength", 0.5]
    assert run(*arguments, "-n", 2, *begin, "--film", files / "film.webp").exit_code == 0
    meta = json.loads((files / "out/meta.json").read_text())
    assert (meta["image"], meta["mask"]) == (str(files / "image.png"), str(files / "mask.png"))
    assert (meta["strength"], meta["interpolate"]) == (0.5, None)
    assert len(meta["image_sha256"]) == len(meta["mask_sha256"]) == 64
    drawn = np.asarray(Image.open(files / "out/000001.png"))
    assert (drawn[:, :4] == np.asarray(Image.open(files / "image.png"))[:, :4]).all()

    assert run(*arguments, "-n", 3, *begin).exit_code == 0, "the same request, continued"
    line = line_of(run(*arguments, "-n", 3, *begin[:-1], 0.6))
    assert "strength was 0.5 and is now 0.6" in line


def test_sample_names_what_a_strength_leaves_unused(trained, files):
    begin = ["--image", files / "image.png", "--strength", 0]
    drawn = run("sample", trained.folder, "--out", files / "out", "-n", 1, *begin)
    assert drawn.exit_code == 0, drawn.output
    assert drawn.stderr.count("not used: the seeds and how to draw (strength is 0") == 1


def test_sample_draws_between_two_seeds(trained, files):
    arguments = ["sample", trained.folder, "--sampler", "dpmpp", "--classes", 3]
    between = run(*arguments, "--out", files / "way", "-n", 3, "--interpolate", 7, 8, "--seed", 5)
    assert between.exit_code == 0, between.output
    assert "--seed: not used, because --interpolate names the seeds" in between.stderr
    assert run(*arguments, "--out", files / "ends", "-n", 2, "--seed", 7).exit_code == 0
    meta = json.loads((files / "way/meta.json").read_text())
    assert meta["interpolate"] == {"seeds": [7, 8], "images": 3}
    for ours, theirs in (("way/000000", "ends/000007"), ("way/000002", "ends/000008")):
        pixels = [
            np.asarray(Image.open(files / f"{name}.png")).astype(int) for name in (ours, theirs)
        ]
        np.testing.assert_allclose(*pixels, atol=1)


MISTAKES = {
    "mask alone": (["--mask", "mask.png"], "--mask: needs --image"),
    "strength alone": (["--strength", "0.5"], "--strength: needs --image"),
    "strength": (
        ["--image", "image.png", "--strength", "1.5"],
        "--strength: 1.5 must be a number from 0 to 1",
    ),
    "strength that is none": (
        ["--image", "image.png", "--strength", "nan"],
        "--strength: nan must be a number from 0 to 1",
    ),
    "size": (
        ["--image", "other.png"],
        "--image: has 9x7 pixels (height x width), but the run draws 8x8; crop or resize it",
    ),
    "size of a mask": (
        ["--image", "image.png", "--mask", "other.png"],
        "--mask: has 9x7 pixels (height x width), but the run draws 8x8",
    ),
    "black mask": (
        ["--image", "image.png", "--mask", "black.png"],
        "--mask: is black everywhere, and only white pixels are drawn anew",
    ),
    "no file": (["--image", "none.png"], "--image: none.png: cannot be decoded: No such file"),
    "folder": (["--image", "."], "--image: .: cannot be decoded: it is a folder; name a file"),
    "film": (["--image", "film.gif"], "--image: film.gif: is a film of 2 frames, not an image"),
    "video": (["--image", "film.mp4"], "--image: film.mp4: not a PNG, JPEG"),
    "one seed twice": (["--interpolate", "3", "3"], "--interpolate: 3 3 must be two different"),
    "negative seed": (["--interpolate", "-1", "3"], "--interpolate: -1 must be a whole number"),
    "one image": (
        ["--interpolate", "3", "4", "--num", "1"],
        "--interpolate: needs at least 2 images, not --num 1",
    ),
    "sampler with noise": (
        ["--interpolate", "3", "4", "--sampler", "ddpm"],
        "--interpolate: the sampler ddpm adds noise at every step",
    ),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_beginning_that_cannot_be_is_one_line_before_anything_is_drawn(
    of_noise, files, monkeypatch, arguments, words
):
    monkeypatch.chdir(files)
    monkeypatch.setattr(torch.nn.Module, "__call__", None)  # no network computes anything
    assert words in line_of(run("sample", of_noise, "--out", "out", *arguments))
    assert not (files / "out").exists()


@pytest.mark.parametrize("image", [3, torch.zeros(1, 8, 8), torch.zeros(2, 8, 8).byte()])
def test_what_is_no_picture_is_one_line(trained, image):
    with pytest.raises(DiffussmError, match="^image: .* must be a file, an image of Pillow, or a"):
        trained.sample(1, image=image)


def test_an_image_needs_the_vae_of_the_run(of_latents, tmp_path):
    config = config_from_dict(
        to_dict(of_latents.config), "", fields={"data.vae": str(tmp_path / "gone")}
    )
    runs.write_weights(tmp_path / "final", config, of_latents.model.state_dict(), 0)
    with pytest.raises(DiffussmError, match="^image: needs the VAE of the run"):
        ds.load(tmp_path / "final").sample(1, image=torch.zeros(3, 16, 16, dtype=torch.uint8))

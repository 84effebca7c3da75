"""VAEs of every class from images to latents and back, with their own scale and with measured
statistics.
"""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.config import load_config
from diffussm_cli.data.decoding import open_decoding
from diffussm_cli.data.fitting import fit_to_data
from diffussm_cli.data.latents import LatentStore, encode_images
from diffussm_cli.data.opening import open_source
from diffussm_cli.data.vae import load_vae
from diffussm_cli.data.vae_facts import read_facts
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.events import finish
from diffussm_cli.training import train
from diffussm_cli.training.configure import configure
from tests.conftest import TINY, save_vae, save_vae_of

CPU = torch.device("cpu")
MEASURED = "data.normalize=measured"
KINDS = {
    "AutoencoderKL": (lambda folder: save_vae(folder, latent_channels=16), (16, 4)),
    "AutoencoderDC": (lambda folder: save_vae_of("AutoencoderDC", folder), (4, 4)),
    "AutoencoderKLFlux2": (lambda folder: save_vae_of("AutoencoderKLFlux2", folder), (16, 4)),
}


@pytest.fixture
def images(tmp_path):
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def encoded(images, vae):
    """A store of the images in two shards."""
    target = images.parent / "store"
    finish(encode_images(images, target, (16, 16), str(vae), shard_size=4, workers=0))
    return target


def config_of(store, vae, sizes=(4, 4), *overrides):
    channels, downsample = sizes
    fields = [f"data.path={store}", f"data.vae={vae}", "model.num_classes=2"]
    fields += ["data.resolution=16", f"data.channels={channels}", f"data.downsample={downsample}"]
    return load_config("digits", [*TINY, *fields, "sample.clip=false", *overrides])


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


@pytest.mark.parametrize("overrides", [(), (MEASURED,)], ids=["vae", "measured"])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_every_vae_come_back_as_its_images(kind, overrides, images):
    """The decoder gets the latents that were encoded, whatever model space lies between."""
    save, sizes = KINDS[kind]
    vae = save(images.parent / "vae")
    store = encoded(images, vae)
    config = config_of(store, vae, sizes, *overrides)
    source = open_source(config)
    x, _ = source.read(range(6), generators(6))
    config = config_of(store, vae, sizes, *overrides, *fields_of(source))
    shown = open_decoding(config, CPU).decode(x)

    # By hand: the stored moments, with the same noise.
    mean, std = (moments.float() for moments in source.moments(range(6)))
    z = mean + std * torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators(6)])
    plain = load_vae(read_facts(str(vae)), CPU)
    with torch.no_grad():
        expected = plain.model.decode(torch.pixel_shuffle(z, plain.facts.folded)).sample
    torch.testing.assert_close(shown, expected, rtol=1e-3, atol=1e-4)
    if overrides:
        many = torch.cat([source.read(range(6), generators(6, 10 * k))[0] for k in range(20)])
        torch.testing.assert_close(many.mean((0, 2, 3)), torch.zeros(sizes[0]), rtol=0, atol=0.15)
        torch.testing.assert_close(many.std((0, 2, 3)), torch.ones(sizes[0]), rtol=0.15, atol=0)


def fields_of(source):
    return [f"data.{name}=[{','.join(map(str, v))}]" for name, v in source.statistics.items()]


def test_run_keeps_the_statistics_and_samples_with_them(images):
    """In its configuration, which a resume takes as it is, though the store would say another."""
    vae = save_vae(images.parent / "vae", scaling_factor=30.0)
    store = encoded(images, vae)
    root = images.parent / "run"
    events = list(train(config_of(store, vae, (4, 4), MEASURED), root))
    assert not [event for event in events if "training assumes" in getattr(event, "text", "")]
    data = yaml.safe_load((root / "final" / "config.yaml").read_text())["data"]
    shard = LatentStore(store, flip=False)
    shard.normalize(config_of(store, vae, (4, 4), MEASURED).data)
    assert data["latents_mean"] == list(shard.statistics["latents_mean"])
    assert len(data["latents_std"]) == 4
    assert min(data["latents_std"]) > 3  # of a scale that is far too large

    for path in store.glob("shard-*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"mean": [9.0] * 4, "std": [9.0] * 4}))
    list(train(runs.resumed_config(root, ["train.steps=6"]), root, resume=True))
    again = yaml.safe_load((root / "final" / "config.yaml").read_text())["data"]
    assert again["latents_std"] == data["latents_std"]


def test_store_that_names_the_vae_may_be_normalised_on_request(images):
    """Also by statistics of another number of channels than the default preset has."""
    vae = save_vae(images.parent / "vae")
    store = str(encoded(images, vae))
    config = configure(None, overrides=[MEASURED], fields={"data.path": store}).config
    assert (config.data.vae, config.data.normalize) == (str(vae), "measured")

    given = {"data.latents_mean": (0.0,) * 4, "data.latents_std": (2.0,) * 4}
    config = configure(None, overrides=[MEASURED], fields={"data.path": store, **given}).config
    assert config.data.latents_std == (2.0,) * 4
    with pytest.raises(ConfigError, match="these are pixels"):
        configure(None, overrides=[MEASURED], fields={"data.path": str(images)})


def test_given_statistics_take_the_place_of_measured_ones(images):
    vae = save_vae(images.parent / "vae")
    store = encoded(images, vae)
    given = (MEASURED, "data.latents_mean=[1,2,3,4]", "data.latents_std=[2,2,4,4]")
    plain, own = (open_source(config_of(store, vae, (4, 4), *o)) for o in ((), given))
    x, y = (source.read(range(6), generators(6))[0] for source in (plain, own))
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ([1.0, 2, 3, 4], [2.0, 2, 4, 4]))
    torch.testing.assert_close(y, (x - mean) / std)


def change_records(store, **values):
    for path in store.glob("shard-*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_store_that_cannot_be_normalised_is_one_line_error(images):
    vae = save_vae(images.parent / "vae")
    store = encoded(images, vae)
    config = config_of(store, vae, (4, 4), MEASURED)
    change_records(store, mean=[0.0] * 4, std=[1.0, 1.0, 0.0, 1.0])
    with pytest.raises(DataError, match=r"data.normalize: .* a channel that does not vary, 2"):
        open_source(config)
    change_records(store, mean=[], std=[])
    with pytest.raises(DataError, match=r"data.normalize: .* made by an earlier version"):
        open_source(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    {
        ("data.latents_std=[1,1,1,1]",): "data.latents_std: needs data.normalize=measured",
        (MEASURED, "data.latents_std=[1,1,1,1]"): "data.latents_std: 4 numbers given",
        (MEASURED, "data.latents_mean=[1]"): "data.latents_mean: 1 numbers given",
        (MEASURED, "data.latents_std=[1,1,1,0]"): "data.latents_std: 0.0 must be at least 1e-06",
    }.items(),
    ids=str,
)
def test_statistics_that_do_not_fit_are_rejected(overrides, message):
    with pytest.raises(ConfigError) as error:
        config_of("store", "vae", (4, 4), *overrides)
    assert message in str(error.value)


def test_pixels_are_not_normalised():
    with pytest.raises(ConfigError, match="data.normalize: measured needs latents"):
        load_config("digits", [MEASURED])


def test_dataset_of_latents_is_normalised_by_given_statistics_only():
    config = config_of("python:TensorDataset", "vae", (4, 4), MEASURED)
    dataset = torch.utils.data.TensorDataset(torch.zeros(4, 4, 4, 4), torch.arange(4) % 2)
    with pytest.raises(ConfigError, match=r"data.normalize: measured needs a store .*latents_std"):
        open_source(config, dataset)


def test_dataset_of_latents_is_read_in_the_space_that_decoding_leaves(tmp_path):
    """Means and deviations that the images have come out as 0 and 1, and the VAE gets its own."""
    vae = save_vae(tmp_path / "vae", scaling_factor=3.0, shift_factor=0.5)
    given = (MEASURED, "data.latents_mean=[1,2,3,4]", "data.latents_std=[2,2,4,4]")
    config = config_of("python:TensorDataset", vae, (4, 4), *given)
    mean, std = (torch.tensor(v).view(4, 1, 1) for v in ([1.0, 2, 3, 4], [2.0, 2, 4, 4]))
    signs = torch.tensor([-1.0, 1, 1, -1]).view(4, 1, 1, 1).expand(4, 4, 4, 4)
    latents = mean + std * signs
    dataset = torch.utils.data.TensorDataset(latents, torch.arange(4) % 2)
    x, _ = open_source(config, dataset).read(range(4), generators(4))
    torch.testing.assert_close(x, signs)

    plain = load_vae(read_facts(str(vae)), CPU)
    torch.testing.assert_close(open_decoding(config, CPU).decode(x), plain.decode(latents))


@pytest.mark.parametrize(
    ("changes", "normalize"),
    {
        ("far", "none"): "measured",
        ("near", "none"): None,
        ("far", "own"): None,  # warned of, as before
    }.items(),
    ids=str,
)
def test_latents_of_a_vae_without_scale_are_normalised_if_they_are_far_from_one(
    changes, normalize, images
):
    """And the run says so, in the line of what it takes from its store."""
    spread, scale = changes
    numbers = {"none": (1.0, None), "own": (0.3, 0.1)}[scale]
    fields = dict(zip(("scaling_factor", "shift_factor"), numbers))
    vae = save_vae(images.parent / "vae", **fields)
    store = encoded(images, vae)
    change_records(store, mean=[0.0] * 4, std=[7.0 if spread == "far" else 1.1] * 4)
    fitted = fit_to_data(config_of(store, vae), {"data.path"}, is_own=False)
    assert fitted.fields.get("data.normalize") == normalize
    told = "data.normalize=measured instead of vae" in " ".join(fitted.lines)
    assert told == (normalize is not None)
    kept = fit_to_data(config_of(store, vae), {"data.path", "data.normalize"}, is_own=False)
    assert "data.normalize" not in kept.fields

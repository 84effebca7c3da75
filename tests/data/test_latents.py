"""The store: its bytes, what training reads from it, and how damage is found."""

import dataclasses
import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffussm_cli.config import ModelConfig, load_config
from diffussm_cli.data.images import read_image, to_model_space
from diffussm_cli.data.latents import encoder as encoders
from diffussm_cli.data.latents import encoding, shard
from diffussm_cli.data.latents.encoder import Encoder
from diffussm_cli.data.latents.manifest import StoreSettings, read_settings
from diffussm_cli.data.latents.reading import LatentStore
from diffussm_cli.data.latents.store import read_store, verify
from diffussm_cli.data.listing import list_source
from diffussm_cli.data.opening import content_hashes, count_shared, open_source, text_hash
from diffussm_cli.data.text import Texts
from diffussm_cli.data.vae import load_vae
from diffussm_cli.data.vae_facts import read_facts
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.machine.files import sha256
from diffussm_cli.machine.processes import World
from diffussm_cli.machine.tensors import ARRAYS, header
from tests.conftest import Letters, save_vae

SIZE = (16, 24)
BROKEN = 5  # place of the unreadable image
N = 11


def make_source(root):
    """Two classes of 6 and 5 pictures; the sixth is broken."""
    for i in range(N):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        path = root / ("cat" if i < 6 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (root / "cat" / "05.png").write_bytes(b"text")
    (root / "dog" / "notes.txt").write_text("text")
    return root


def make_encoder(folder, flip=True, workers=0, target=None):
    """An Encoder from folder/images to folder/store, or `target`, with shards of 4 and batches of
    3.
    """
    listing = list_source(folder / "images")
    vae = load_vae(read_facts(str(folder / "vae")), torch.device("cpu"))
    f = vae.facts
    settings = StoreSettings(
        *(
            listing.sha256(),
            N,
            listing.class_names,
            SIZE,
            f.name,
            f.config_sha256,
            vae.weights_sha256,
        ),
        *(f.channels, f.downsample, f.scale, f.shift, flip, "fp32", 3, 4),
    )
    return Encoder(listing, settings, target or folder / "store", vae, workers)


def write_store(encoder):
    encoder.store.mkdir(exist_ok=True)
    list(encoding.encode(encoder, World()))
    return encoder.store


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with images/, vae/ and store/, and the encoder that made it."""
    folder = tmp_path_factory.mktemp("whole")
    save_vae(folder / "vae")
    make_source(folder / "images")
    encoder = make_encoder(folder)
    write_store(encoder)
    return encoder


@pytest.fixture
def copy(whole, tmp_path):
    """The store again, to be damaged."""
    for path in whole.store.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def damage(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def change_record(store, k, **values):
    path = store / f"shard-{k:05d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def generators(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


# -------------------------------------------------------------------------------------------- bytes
def test_store_holds_the_posterior_of_every_image(whole):
    tensors = [load_file(whole.store / f"shard-{i:05d}.safetensors") for i in range(3)]
    joined = {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}
    assert joined["index"].tolist() == list(range(N))
    assert joined["label"].tolist() == [0] * 6 + [1] * 5
    assert joined["readable"].tolist() == [int(i != BROKEN) for i in range(N)]
    for i, entry in enumerate(whole.listing.entries):
        stored = {
            name: joined[name][i].float() for name in joined if name.startswith(("mean", "std"))
        }
        if i == BROKEN:
            assert not any(t.any() for t in stored.values())
            continue
        pixels = read_image(whole.listing.root / entry.name, SIZE, 3)
        x = to_model_space(torch.tensor(pixels).permute(2, 0, 1)[None])
        mean, std = whole.vae.encode(x)
        mean_mirrored, std_mirrored = whole.vae.encode(x.flip(-1))
        for name, expected in (("mean", mean), ("std", std)):
            torch.testing.assert_close(stored[name], expected[0], rtol=2e-3, atol=1e-3)
        for name, expected in (("mean_mirrored", mean_mirrored), ("std_mirrored", std_mirrored)):
            torch.testing.assert_close(stored[name], expected[0], rtol=2e-3, atol=1e-3)
    assert not torch.allclose(joined["mean"].flip(-1), joined["mean_mirrored"], atol=1e-2)


def test_manifest_and_records_describe_the_store(whole):
    manifest = json.loads((whole.store / "manifest.json").read_text())
    assert manifest["settings"]["class_names"] == ["cat", "dog"]
    assert manifest["settings"]["vae_weights_sha256"] == whole.vae.identity["weights_sha256"]
    assert read_settings(whole.store, "x") == whole.settings
    records = [json.loads((whole.store / f"shard-{i:05d}.json").read_text()) for i in range(3)]
    reason = "not a PNG, JPEG, WEBP, BMP, GIF, TIFF image"
    broken = {"index": 5, "file": "cat/05.png", "reason": reason}
    assert [r["skipped"] for r in records] == [[], [broken], []]
    shards = [whole.store / f"shard-{i:05d}.safetensors" for i in range(3)]
    assert [r["sha256"] for r in records] == [
        hashlib.sha256(p.read_bytes()).hexdigest() for p in shards
    ]
    ignored = json.loads((whole.store / "ignored.jsonl").read_text())
    assert ignored == {
        "index": None,
        "file": "dog/notes.txt",
        "reason": "not an image by its name or first bytes",
    }


def test_store_without_flips_takes_half_the_bytes(whole, tmp_path):
    encoder = dataclasses.replace(
        whole, settings=dataclasses.replace(whole.settings, flip=False), store=tmp_path / "plain"
    )
    write_store(encoder)
    names = set(load_file(encoder.store / "shard-00000.safetensors"))
    assert names == {"index", "label", "mean", "std", "readable"}
    with pytest.raises(
        DataError, match="data.flip: true, but .* was made with --no-flip; --set data.flip=false"
    ):
        LatentStore(encoder.store, flip=True)
    assert len(LatentStore(encoder.store, flip=False)) == N - 1


def test_latents_that_are_not_finite_are_skipped(whole, tmp_path, monkeypatch):
    encode = whole.vae.encode

    def broken(images):
        mean, std = encode(images)
        mean[0, 0, 0, 0] = 1e6
        return mean, std

    monkeypatch.setattr(whole.vae, "encode", broken)
    encoder = dataclasses.replace(whole, store=tmp_path / "store")
    write_store(encoder)
    skipped = [
        image for record in read_store(encoder.store, "x").records for image in record.skipped
    ]
    # the first of each batch, and the broken one
    assert [s.index for s in skipped] == [0, 3, 4, 5, 7, 8]
    assert skipped[0].reason == "its latents are not finite in float16"
    assert not load_file(encoder.store / "shard-00000.safetensors")["mean"][0].any()


# ------------------------------------------------------------------------------------------ reading
def test_read_samples_the_posterior_in_model_space(whole):
    store = LatentStore(whole.store, flip=False)
    assert (len(store), store.class_names) == (N - 1, ("cat", "dog"))
    indices = [9, 0, 5, 0]
    x, labels = store.read(indices, generators(4))
    assert labels.tolist() == [1, 0, 1, 0]
    assert (x.shape, x.dtype) == ((4, 4, 4, 6), torch.float32)
    mean, std = (m.float() for m in store.moments(indices))
    noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators(4)])
    torch.testing.assert_close(x, (mean + std * noise - 0.1) * 0.3)
    assert not torch.equal(x[1], x[3])
    assert torch.equal(store.read(indices, generators(4))[0], x)
    last = load_file(whole.store / "shard-00002.safetensors")
    assert torch.equal(store.moments([9])[0][0], last["mean"][2])
    assert torch.equal(
        store.moments([5])[1][0], load_file(whole.store / "shard-00001.safetensors")["std"][2]
    )


def test_read_mirrors_half_by_the_generator(whole):
    store = LatentStore(whole.store, flip=True)
    indices = [3] * 64
    mirrored = torch.cat([torch.rand(1, generator=g) for g in generators(64)]) < 0.5
    first = load_file(whole.store / "shard-00000.safetensors")
    mean, _ = store.moments(indices, mirrored.numpy())
    expected = torch.where(
        mirrored[:, None, None, None], first["mean_mirrored"][3], first["mean"][3]
    )
    assert torch.equal(mean, expected)
    x, _ = store.read(indices, generators(64))
    deviation = (x / 0.3 + 0.1 - mean.float()).abs().mean((1, 2, 3))
    assert deviation.max() < 3 * first["std"].float().max()
    assert 16 < mirrored.sum() < 48


def test_store_reads_the_same_in_another_process(whole):
    store = LatentStore(whole.store, flip=True)
    x, _ = store.read([1, 2], generators(2))
    message = pickle.dumps(store)
    # maps do not travel
    assert len(message) < sum(p.stat().st_size for p in whole.store.glob("shard-*"))
    assert torch.equal(pickle.loads(message).read([1, 2], generators(2))[0], x)  # noqa: S301


def config_for(store, vae, *overrides):
    values = [f"data.path={store}", f"data.vae={vae}", "data.resolution=16x24", "data.downsample=4"]
    return load_config("s-256", [*values, "model.num_classes=2", *overrides])


def test_open_source_checks_store_and_configuration(whole):
    vae = whole.settings.vae
    assert open_source(config_for(whole.store, vae)).class_names == ("cat", "dog")
    for changes, words in {
        (
            "data.resolution=32",
        ): r"data.resolution: 32, but the latents in .* have '16x24'; --set .*=16x24",
        (
            "data.channels=16",
        ): "data.channels: 16, but the latents in .* have 4; --set data.channels=4",
        ("data.downsample=2",): "data.downsample: 2, but",
        (
            "data.vae=stabilityai/x",
        ): "data.vae: 'stabilityai/x', but the latents in .* have .*; --set data.vae=",
        ("model.num_classes=10",): "model.num_classes: 10, but .* has 2 class",
    }.items():
        with pytest.raises(ConfigError, match=words):
            open_source(config_for(whole.store, vae, *changes))
    with pytest.raises(DataError, match="diffussm encode IMAGES"):
        open_source(config_for(whole.store.parent, vae))


# ------------------------------------------------------------------------------------------- damage
def test_store_shares_its_images_with_itself_by_another_path(whole, copy):
    link = copy.parent / f"{copy.name}-link"
    link.symlink_to(whole.store)
    stores = [LatentStore(path, flip=False) for path in (whole.store, link, copy)]
    assert [count_shared(store, stores[0]) for store in stores] == [N - 1, N - 1, 0]


def test_hash_of_shards_follows_their_records(whole, copy):
    stores = [LatentStore(whole.store, flip=False), LatentStore(copy, flip=False)]
    change_record(copy, 1, sha256="ab" * 32)
    stores.append(LatentStore(copy, flip=False))
    assert stores[0].shards_sha256 == stores[1].shards_sha256 != stores[2].shards_sha256
    hashes = [content_hashes(load_config("digits"), store) for store in stores]
    assert hashes == [{"latents": store.shards_sha256} for store in stores]


def test_verify_names_a_damaged_shard(copy):
    assert [problem for _, problem in verify(copy)] == [None] * 4
    damage(copy / "shard-00001.safetensors", -9)
    assert {name: p for name, p in verify(copy) if p} == {
        "shard-00001.safetensors": "its sha256 differs from its record"
    }
    (copy / "shard-00002.safetensors").unlink()
    damage(copy / "listing.jsonl", 5)
    damage(copy / "shard-00000.json", 0)
    assert {name: p for name, p in verify(copy) if p} == {
        "listing.jsonl": "its sha256 differs from the manifest",
        "shard-00000.json": "it is no record of this shard",
        "shard-00001.safetensors": "its sha256 differs from its record",
        "shard-00002.safetensors": "cannot be read: No such file or directory",
    }


def test_verify_compares_the_skipped_images_of_record_with_its_shard(copy):
    change_record(copy, 1, skipped=[])
    line = "it names other images as unreadable than its shard"
    assert {name: p for name, p in verify(copy) if p} == {"shard-00001.json": line}


def test_verify_checks_shapes_too(copy):
    values = json.loads((copy / "manifest.json").read_text())
    values["settings"]["channels"], values["settings"]["scale"] = 8, [1.0] * 8
    values["settings"]["shift"] = [0.0] * 8
    (copy / "manifest.json").write_text(json.dumps(values))
    for i in range(3):
        change_record(copy, i, mean=[0.0] * 8, std=[1.0] * 8)
    problems = [problem for name, problem in verify(copy) if name.startswith("shard")]
    assert ["header differs" in p for p in problems] == [True] * 3


def test_training_rejects_damaged_shards(copy):
    shard = copy / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        DataError,
        match="shard-00001.safetensors: .* bytes are not the size of its layout; run diffussm",
    ):
        LatentStore(copy, flip=True)
    damage(shard, 20)
    with pytest.raises(DataError, match="shard-00001.safetensors: its header differs"):
        LatentStore(copy, flip=True)
    shard.unlink()
    with pytest.raises(
        DataError,
        match="shard-00001.safetensors: cannot be read: No such .* run the same diffussm encode",
    ):
        LatentStore(copy, flip=True)


def test_label_without_class_is_rejected(copy, whole):
    label = len(header(shard.layout(whole.settings, 0))) + 4 * 8  # after the header and the indices
    damage(copy / "shard-00000.safetensors", label + 1)
    with pytest.raises(
        DataError, match="holds labels without a class; run diffussm encode --verify"
    ):
        LatentStore(copy, flip=True)


def test_store_without_readable_image_is_not_left_behind(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(
        whole.vae, "encode", lambda x: [torch.full((len(x), 4, 4, 6), torch.nan)] * 2
    )
    line = (
        "SOURCE: none of the 11 images can be read, such as cat/00.png: its latents are not "
        "finite in float16"
    )
    with pytest.raises(DataError, match=f"^{line}$"):
        write_store(dataclasses.replace(whole, store=tmp_path / "store"))
    assert list((tmp_path / "store").iterdir()) == []


def overwrite(path, settings, name, row, value, k=0):
    """Change one number of a shard, and the hash in its record with it."""
    view = np.memmap(path, mode="r+")
    start = len(header(shard.layout(settings, k)))
    for other, (kind, shape) in shard.layout(settings, k).items():
        size = ARRAYS[kind].itemsize * int(np.prod(shape))
        if other == name:
            numbers = view[start : start + size].view(ARRAYS[kind]).reshape(shape)
            numbers[row : row + 1].flat[-1] = value
        start += size
    view.flush()
    change_record(path.parent, k, sha256=sha256(path))


@pytest.mark.parametrize("name", ["mean", "std", "mean_mirrored"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_are_named_by_verify_and_training(whole, copy, name, value):
    """Row 2 of the second shard is image 6, and the fifth readable one,
    though its hash is right.
    """
    path = copy / "shard-00001.safetensors"
    overwrite(path, whole.settings, name, 2, value, k=1)
    assert {n: p for n, p in verify(copy) if p} == {
        path.name: "row 2 holds numbers that are not finite"
    }
    store = LatentStore(copy, flip=True)
    line = (
        f"row 2 of shard-00001.safetensors in '{copy}' holds numbers that are not finite; run "
        "diffussm encode --ver"
    )
    # some of them read the mirrored latents
    both = [torch.Generator().manual_seed(seed) for seed in range(22)]
    with pytest.raises(DataError, match=line):
        store.read([0, 9, *[5] * 20], both)
    store.read([0, 4, 9], generators(3))


# --------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize(
    "changes", [{}, {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}]
)
def test_statistics_are_those_of_all_latents_in_model_space(tmp_path, changes):
    """Of samples of the posterior, and the same after a resume; with four and with sixteen
    channels.
    """
    save_vae(tmp_path / "vae", **changes)
    make_source(tmp_path / "images")
    encoder = make_encoder(tmp_path)
    statistics = read_store(write_store(encoder), "x").statistics
    tensors = [load_file(tmp_path / "store" / f"shard-{i:05d}.safetensors") for i in range(3)]
    mean, std = (
        torch.cat([t[name][t["readable"] == 1] for t in tensors])
        .double()
        .transpose(0, 1)
        .flatten(1)
        for name in ("mean", "std")
    )
    scale, shift = (
        torch.tensor(v, dtype=torch.float64)
        for v in (encoder.vae.facts.scale, encoder.vae.facts.shift)
    )
    found = [torch.from_numpy(v) for v in statistics]
    torch.testing.assert_close(found[0], (mean.mean(1) - shift) * scale, rtol=1e-5, atol=1e-5)
    expected = scale * (mean.var(1, correction=0) + (std**2).mean(1)).sqrt()
    torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=1e-6)
    x = torch.cat(
        [
            LatentStore(tmp_path / "store", flip=False).read(range(10), generators(10))[0]
            for _ in range(2)
        ]
    )
    torch.testing.assert_close(found[0], x.double().mean((0, 2, 3)), rtol=0, atol=0.3)


def with_statistics(store, mean, std):
    for i in range(3):
        change_record(store, i, mean=mean, std=std)
    return LatentStore(store, flip=True).warning


def test_latents_of_another_scale_are_reported(copy, whole):
    """Those of Stable Diffusion's VAE are as far from 0 and 1 as is usual."""
    assert with_statistics(copy, [1.06, 0.59, 0.02, -0.39], [0.76, 0.84, 0.68, 0.6]) == ""
    assert with_statistics(copy, [], []) == ""  # a store of an earlier version
    for mean, std in (
        ([0.0, 0, 0, 0], [1.0, 1, 1, 0.18]),
        ([0.0, 0, 0, 0], [5.5, 1, 1, 1]),
        ([-3.0, 0, 0, 0], [1.0] * 4),
    ):
        warning = with_statistics(copy, mean, std)
        has = (
            f"means from {min(mean):.3g} to {max(mean):.3g} and deviations from {min(std):.3g} "
            f"to {max(std):.3g}"
        )
        assert (
            f"have channels with {has}, but training assumes about 0 and 1: check scaling_factor"
            in warning
        )
        assert f"in the config of {whole.settings.vae}; or --set data.normalize=" in warning


@pytest.mark.parametrize("numbers", [[1.0], [float("nan")] * 4, "abcd", [None] * 4])
def test_bad_statistics_are_damage(copy, numbers):
    with pytest.raises(
        DataError, match=r"shard-00000.json: damaged; delete it and run the same diffussm encode"
    ):
        with_statistics(copy, numbers, numbers)


def test_pipes_in_store_are_not_opened(whole, copy):
    for name in ("shard-00001.safetensors", "manifest.json"):
        (copy / name).unlink()
        os.mkfifo(copy / name)
        with pytest.raises(DataError, match=f"{name}.*not a regular file"):
            LatentStore(copy, flip=True)
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").write_bytes((whole.store / "manifest.json").read_bytes())
    (copy / "shard-00000.json").unlink()
    os.mkfifo(copy / "shard-00000.json")
    with pytest.raises(DataError, match="shard-00000.json: damaged"):
        LatentStore(copy, flip=True)


def test_images_without_captions_are_rejected(captioned, tmp_path):
    captioned()
    store = tmp_path / "store"
    overwrite(store / "shard-00000.safetensors", read_settings(store, "x"), "captions", 1, 0)
    with pytest.raises(
        DataError, match="holds images without captions; run diffussm encode --verify"
    ):
        open_source(text_config(tmp_path))


BAD_MANIFESTS = {
    "no JSON": lambda v: "{",
    "no mapping": lambda v: "[]",
    "deep": lambda v: "[" * 100_000,
    "missing field": lambda v: json.dumps({k: x for k, x in v.items() if k != "settings"}),
    "missing setting": lambda v: json.dumps(v | {"settings": {}}),
    "fraction": lambda v: json.dumps(v | {"settings": v["settings"] | {"shard_size": 1.5}}),
    "no size": lambda v: json.dumps(v | {"settings": v["settings"] | {"downsample": 0}}),
    "infinite scale": lambda v: json.dumps(
        v | {"settings": v["settings"] | {"scale": [float("inf")] * 4}}
    ),
    "a number for a name": lambda v: json.dumps(v | {"settings": v["settings"] | {"vae": 5}}),
    "a list for a hash": lambda v: json.dumps(
        v | {"settings": v["settings"] | {"source_sha256": []}}
    ),
    "numbers for classes": lambda v: json.dumps(
        v | {"settings": v["settings"] | {"class_names": [1, 2]}}
    ),
    "text for yes": lambda v: json.dumps(v | {"settings": v["settings"] | {"flip": "no"}}),
    "another precision": lambda v: json.dumps(
        v | {"settings": v["settings"] | {"precision": "fp8"}}
    ),
}


@pytest.mark.parametrize("change", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_bad_manifest_is_one_line_error(copy, change):
    path = copy / "manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(DataError, match=r"data.path: .*manifest.json is damaged"):
        LatentStore(copy, flip=True)


def test_manifest_of_other_format_or_unfinished_store_is_rejected(copy):
    path = copy / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"format": 3}))
    with pytest.raises(DataError, match="has format 3, but this version reads 2"):
        LatentStore(copy, flip=True)
    path.write_text(json.dumps(values))
    (copy / "shard-00001.json").unlink()
    with pytest.raises(
        DataError, match="is not finished; run the same diffussm encode command again"
    ):
        LatentStore(copy, flip=True)
    with pytest.raises(DataError, match="--verify: .* is not finished"):
        list(verify(copy))


BAD_RECORDS = {
    "no JSON": "{",
    "no mapping": "[]",
    "deep": "[" * 100_000,
    "no hash": {"sha256": 5},
    "number of skipped": {"skipped": 1},
    "text for skipped": {"skipped": "text"},
    "image of another shard": {"skipped": [{"index": 3, "file": "a", "reason": "b"}]},
    "fraction": {"skipped": [{"index": 4.0, "file": "a", "reason": "b"}]},
    "no reason": {"skipped": [{"index": 4, "file": "a"}]},
    "number for a name": {"skipped": [{"index": 4, "file": 1, "reason": "b"}]},
}


@pytest.mark.parametrize("change", BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_bad_record_is_one_line_and_its_shard_is_encoded_again(whole, copy, change):
    path = copy / "shard-00001.json"
    if isinstance(change, str):
        path.write_text(change)
    else:
        change_record(copy, 1, **change)
    with pytest.raises(
        DataError, match=r"shard-00001.json: damaged; delete it and run the same diffussm encode"
    ):
        LatentStore(copy, flip=True)
    path.unlink()
    write_store(dataclasses.replace(whole, store=copy))
    assert path.read_bytes() == (whole.store / path.name).read_bytes()


def test_deleted_files_are_rewritten_bitwise_and_others_left_alone(whole, copy):
    lost = ["shard-00001.safetensors", "shard-00002.json", "listing.jsonl"]
    for name in lost:
        (copy / name).unlink()
    before = {p.name: p.stat().st_mtime_ns for p in copy.iterdir()}
    write_store(dataclasses.replace(whole, store=copy))
    for path in whole.store.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes(), path.name
    changed = {p.name for p in copy.iterdir() if before.get(p.name) != p.stat().st_mtime_ns}
    assert changed == {*lost, "shard-00001.json", "shard-00002.safetensors"}


def test_parts_of_read_equal_the_whole_read(whole):
    """Flip and posterior sample of an image come from its own generator, whoever else is read
    beside it.
    """
    store, indices = LatentStore(whole.store, flip=True), [3, 1, 4, 0, 2]
    x, labels = store.read(indices, generators(5))
    parts = [store.read(indices[part], generators(5)[part]) for part in (slice(0, 2), slice(2, 5))]
    assert torch.equal(torch.cat([p[0] for p in parts]), x)
    assert torch.equal(torch.cat([p[1] for p in parts]), labels)


# ----------------------------------------------------------------------------------------- captions
@pytest.fixture
def captioned(tmp_path, monkeypatch):
    """An encoder of twelve images with one or two captions each, and what `encode_images` is asked
    for.
    """
    monkeypatch.setattr(encoders, "open_encoder", lambda name, device: Letters())
    save_vae(tmp_path / "vae")
    for i in range(6):
        path = make_source(tmp_path / "images") / "cat" / f"{i:02d}.txt"
        path.write_text(f"cat {i}\nanimal of number {i}\n")
    for i in range(6, N):
        (tmp_path / "images" / "dog" / f"{i:02d}.txt").write_text(f"dog {i}\n")
    options = {
        "text": "letters",
        "text_tokens": 3,
        "batch_size": 3,
        "shard_size": 4,
        "workers": 0,
        "device": "cpu",
    }
    vae = str(tmp_path / "vae")
    return lambda: list(
        encoding.encode_images(tmp_path / "images", tmp_path / "store", SIZE, vae, **options)
    )


def text_config(folder, *overrides):
    given = [
        f"data.path={folder / 'store'}",
        f"data.vae={folder / 'vae'}",
        "data.resolution=16x24",
        "data.channels=4",
    ]
    given += [
        "data.downsample=4",
        "data.text=letters",
        "model.text_width=4",
        "model.num_classes=0",
        "data.flip=true",
    ]
    given += ["sample.clip=false"]
    return load_config("digits", [*given, *overrides])


def test_captions_are_stored_beside_latents_and_drawn_from_them(captioned, tmp_path):
    captioned()
    texts = Texts(Letters(), ModelConfig(text_width=4, text_tokens=3))
    source = open_source(text_config(tmp_path, "model.text_tokens=2"))
    assert text_hash(text_config(tmp_path), source) == Letters.sha256
    wanted = texts(["cat 1", "animal of number 1", "dog 7"])[:, :3]
    found = torch.cat(
        [source.text([1, 6], [torch.Generator().manual_seed(s)] * 2) for s in range(20)]
    )
    assert {tuple(t.flatten().tolist()) for t in found} == {
        tuple(t.flatten().tolist()) for t in wanted
    }
    assert all(problem is None for _, problem in verify(tmp_path / "store"))


def test_captions_of_deleted_shard_are_encoded_again_bitwise(captioned, tmp_path):
    captioned()
    path = tmp_path / "store" / "shard-00001.safetensors"
    before = path.read_bytes()
    path.unlink()
    captioned()
    assert path.read_bytes() == before


def test_changed_or_missing_captions_are_rejected(captioned, tmp_path):
    captioned()
    path = tmp_path / "images" / "dog" / "07.txt"
    path.write_text("a puppy")
    with pytest.raises(DataError, match="begun with other settings: captions_sha256 was"):
        captioned()
    path.unlink()
    with pytest.raises(
        DataError, match="--text: .*images' has no caption for 1 of 11 images, such as 'dog/07.png'"
    ):
        captioned()


def test_run_that_does_not_fit_stored_captions_is_rejected(captioned, tmp_path, whole):
    captioned()
    for overrides, problem in {
        "data.text=wordllama": "data.text: 'wordllama', but the captions in .* are of letters",
        "data.text_sha256=xyz": "data.text: 'letters', but the captions in .* are of letters",
        "model.text_width=8": (
            "model.text_tokens: 0 of width 8, but the captions in .* are 3 tokens of width 4"
        ),
        "model.text_tokens=4": (
            "model.text_tokens: 4 of width 4, but the captions in .* are 3 tokens"
        ),
        f"data.path={whole.store}": "are missing; encode the images with --text",
    }.items():
        given = (
            [overrides, f"data.vae={whole.settings.vae}"] if "path" in overrides else [overrides]
        )
        with pytest.raises(ConfigError, match=problem):
            open_source(text_config(tmp_path, *given))

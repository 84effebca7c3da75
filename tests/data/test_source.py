"""Built-in sets, and how a configuration is matched with its data."""

import io
import multiprocessing
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli.config import load_config
from diffussm_cli.data.folder import ImageFolder
from diffussm_cli.data.listing import list_source
from diffussm_cli.data.opening import doubts, open_source
from diffussm_cli.errors import ConfigError, DataError


def folder_config(path, classes, *overrides):
    return load_config("digits", [f"data.path={path}", f"model.num_classes={classes}", *overrides])


def test_wrong_number_of_classes_is_rejected(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name / "1.png")
    assert open_source(folder_config(tmp_path, 2)).class_names == ("cat", "dog")
    assert len(open_source(folder_config(tmp_path, 0))) == 2
    with pytest.raises(
        ConfigError, match="num_classes: 10, but .* has 2 class folders; --set model.num_classes=2"
    ):
        open_source(folder_config(tmp_path, 10))
    with pytest.raises(ConfigError, match="has no class folders; --set model.num_classes=0"):
        open_source(folder_config(tmp_path / "cat", 10))


EMPTY = {  # labels; the line about classes without an image
    "gaps": ((0, 10, 20), "18 of 21 classes have no image: 1, 2, 3, "),
    "one": ((0, 2), "1 of 3 classes has no image: 1"),
    "many": (
        (0, 30),
        f"29 of 31 classes have no image: {', '.join(map(str, range(1, 21)))} and 9 more",
    ),
    "none": ((2, 0, 1), ""),
}


@pytest.mark.parametrize("case", EMPTY)
def test_classes_without_an_image_are_named(case, tmp_path):
    labels, line = EMPTY[case]
    write_tar(tmp_path / "0.tar", {f"{i}.cls": str(n).encode() for i, n in enumerate(labels)})
    config = folder_config(tmp_path, max(labels) + 1)
    told = doubts(open_source(config), config)
    assert [text[: len(line)] for text in told] == ([line] if line else [])
    without = folder_config(tmp_path, 0)
    assert doubts(open_source(without), without) == []


@pytest.mark.parametrize(
    ("colours", "channels", "loses"),
    [
        ("grey grey red", 1, True),
        ("red", 1, True),
        ("red grey", 3, False),
        ("grey stored_in_colour grey", 1, False),
    ],
)
def test_colours_that_become_grey_are_told(colours, channels, loses, tmp_path):
    pixels = {"grey": 7, "red": [9, 7, 7], "stored_in_colour": [7, 7, 7]}
    for i, name in enumerate(colours.split()):
        image = np.full((8, 8, 3)[: 3 if name != "grey" else 2], pixels[name], np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "9.png").write_text("no image")
    config = folder_config(tmp_path, 0, f"data.channels={channels}", "sample.guidance=1")
    line = "colour images become grey: data.channels=1"
    assert doubts(open_source(config), config) == ([line] if loses else [])


def test_class_that_is_held_out_entirely_is_named(tmp_path):
    """All other classes have an image that is trained on."""
    names = [f"{i:02}" for i in range(20)]
    for i, name in enumerate(names):
        for k in range(1 if i % 2 else 5):
            write(tmp_path / name / f"{k}.png")
    config = folder_config(tmp_path, 20, "data.held_out=0.25", "data.channels=3")
    source = open_source(config)
    _, trained = source.read(range(len(source)), generators(len(source)))
    lost = [name for i, name in enumerate(names) if i not in trained.tolist()]
    assert 1 < len(lost) < 10
    line = f"{len(lost)} of 20 classes have no image: {', '.join(lost)}"
    assert doubts(source, config) == [f"data.held_out: without a share of 0.25, {line}"]


def write_tar(path, members):
    """A shard of these members, with a picture for each."""
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            for leaf, content in ((name, data), (f"{name[:-4]}.png", picture.getvalue())):
                member = tarfile.TarInfo(leaf)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_line_about_missing_classes_names_labels_that_are_not_read(tmp_path):
    write(tmp_path / "1.png")
    (tmp_path / "labels.csv").write_text("1.png,0\n")
    with pytest.raises(
        ConfigError, match=r"has no class folders; .*; left out of .*'labels.csv'\)$"
    ):
        open_source(folder_config(tmp_path, 2))


def test_missing_data_error_says_the_remedy():
    with pytest.raises(
        DataError, match="diffussm encode IMAGES latents/imagenet-256 --resolution 256"
    ):
        open_source(load_config("xl-256"))
    with pytest.raises(ConfigError, match="no data set given; pass --data FOLDER"):
        open_source(load_config("digits", ["data.path=''"]))
    with pytest.raises(DataError, match="data.channels: 4 must be 1 or 3"):
        open_source(load_config("digits", ["data.path=x", "data.channels=4"]))


# -------------------------------------------------------------------------------- folders of images
def generators(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def write(path, pixels=0, size=(9, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (pixels,) * 3).save(path)


def test_folder_reads_images_in_any_order(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.png", 100 * i)
    source = ImageFolder(tmp_path, (4, 6), 3)
    x, labels = source.read([2, 0], generators(2))
    assert x.shape == (2, 3, 4, 6)
    torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor([200 / 127.5 - 1, -1.0]))
    assert labels.tolist() == [0, 0]


def test_class_folders_are_sorted_and_numbered(tmp_path):
    for name in ("b/2.png", "a/1.png", "b/sub/1.jpg", ".hidden/3.png"):
        write(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    source = ImageFolder(tmp_path, (4, 6), 3)
    assert [e.name for e in source.entries] == ["a/1.png", "b/2.png", "b/sub/1.jpg"]
    assert source.class_names == ("a", "b")
    assert source.read(range(3), generators(3))[1].tolist() == [0, 1, 1]


def test_bad_folder_is_named(tmp_path):
    def refused(path, words):
        with pytest.raises(DataError, match=words):
            ImageFolder(path, (4, 6), 3)

    refused(tmp_path / "none", "data.path: cannot read .*No such file")
    refused(tmp_path, "data.path: no images in")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "file' is a file; give a folder, or a .tar, .parquet or .npz file")
    (tmp_path / "class").mkdir()
    refused(tmp_path, "class folder .* holds no image")


def test_training_and_encoding_list_the_same_files(tmp_path):
    """Images by their first bytes, in tar shards, and nothing but regular files: a named pipe would
    be waited for.
    """
    write(tmp_path / "data" / "1.png")
    (tmp_path / "data" / "photo").write_bytes((tmp_path / "data" / "1.png").read_bytes())
    os.mkfifo(tmp_path / "data" / "z.png")
    source = ImageFolder(tmp_path / "data", (4, 6), 3)
    assert source.entries == list_source(tmp_path / "data").entries
    assert [e.name for e in source.entries] == ["1.png", "photo"]
    assert source.read([0, 1], generators(2))[0].shape == (2, 3, 4, 6)
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        tar.add(tmp_path / "data" / "1.png", "x.png")
    assert ImageFolder(tmp_path / "shards", (4, 6), 3).read([0], generators(1))[0].shape == (
        1,
        3,
        4,
        6,
    )


def test_unreadable_images_are_found_and_left_out(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        write(tmp_path / name)
    (tmp_path / "a" / "2.png").write_bytes(b"text")
    source = ImageFolder(tmp_path, (4, 6), 3)
    found = list(source.check(range(3)))
    assert sum(n for n, _ in found) == 3
    assert found[0][1] == {1: "not a PNG, JPEG, WEBP, BMP, GIF, TIFF image"}
    with pytest.raises(DataError, match=r"image 1 of .* is no longer 'a/3.png'"):
        source.leave_out({1: "a/3.png"})
    source.leave_out({1: "a/2.png"})
    assert [e.name for e in source.entries] == ["a/1.png", "b/1.png"]
    with pytest.raises(DataError, match=r"data.path: '.*b' holds no readable images"):
        source.leave_out({2: "b/1.png"})


def test_builtin_set_has_classes_and_no_folders():
    pytest.importorskip("sklearn")
    with pytest.raises(
        ConfigError, match="num_classes: 11, but builtin:digits has 10 classes; --set"
    ):
        open_source(load_config("digits", ["model.num_classes=11"]))


# -------------------------------------------------------------------------- processes, and the rest
def read_in_child(source, answers):
    answers.put(source.read([0, 1], generators(2))[0].shape)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_folder_that_was_read_is_also_read_in_forked_process(tmp_path):
    """As by a DataLoader; threads of the parent do not live on in the child, which would wait for
    them for ever.
    """
    for i in range(2):
        write(tmp_path / f"{i}.png")
    source = ImageFolder(tmp_path, (4, 6), 3)
    assert source.read([0, 1], generators(2))[0].shape == (2, 3, 4, 6)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=read_in_child, args=(source, answers), daemon=True)
    child.start()
    child.join(30)
    alive = child.is_alive()
    child.kill()
    assert not alive
    assert answers.get() == (2, 3, 4, 6)


def test_folder_may_be_pickled_before_and_after_it_is_read(tmp_path):
    for i in range(2):
        write(tmp_path / f"{i}.png", 100 * i)
    source = pickle.loads(pickle.dumps(ImageFolder(tmp_path, (4, 6), 3)))  # noqa: S301
    first = source.read([1], generators(1))[0]
    again = pickle.loads(pickle.dumps(source))  # noqa: S301
    torch.testing.assert_close(again.read([1], generators(1))[0], first)


def test_source_reports_unused_files(tmp_path):
    for name in ("a/1.png", "2.png", "3.png"):
        write(tmp_path / name)
    line = f"left out of {str(tmp_path)!r}: 2 images (not in a class folder, such as '2.png')"
    whole = open_source(folder_config(tmp_path, 0, "data.channels=3"))
    assert whole.left_out == line
    for name in ("a/2.png", "a/3.png"):
        write(tmp_path / name)
    assert (
        open_source(folder_config(tmp_path, 0, "data.channels=3", "data.held_out=0.5")).left_out
        == line
    )


def test_shards_without_labels_report_no_classes(tmp_path):
    write(tmp_path / "1.png")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "1.png", "1.png")
    with pytest.raises(ConfigError, match="0.tar has no classes; --set model.num_classes=0"):
        open_source(folder_config(tmp_path / "0.tar", 10))

"""How images that cannot be read are named, and whether those of a run that continues are still the
same.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from diffussm_cli.config import load_config
from diffussm_cli.data.opening import open_source
from diffussm_cli.training.data import compare_data, reasons_in_words

EMBED = "embed the files"
WORDS = {  # reasons, and the line about them
    "one image": ([("a", "is a path; embed the files")], "a: is a path; embed the files"),
    "one remedy": (
        [("a", f"is a path, 'x'; {EMBED}"), ("b", f"is a path, 'y'; {EMBED}")],
        "a: is a path, 'x'; b: is a path, 'y'; embed the files",
    ),
    "two remedies": (
        [("a", f"is a path; {EMBED}"), ("b", "is too large; make it smaller")],
        "a: is a path; embed the files; b: is too large; make it smaller",
    ),
    "a remedy of one": (
        [("a", f"is a path; {EMBED}"), ("b", "not a PNG")],
        "a: is a path; embed the files; b: not a PNG",
    ),
    "no remedy": ([("a", "not a PNG"), ("b", "not a JPEG")], "a: not a PNG; b: not a JPEG"),
}


@pytest.mark.parametrize("case", WORDS)
def test_a_remedy_of_all_images_stands_once(case):
    reasons, line = WORDS[case]
    assert reasons_in_words(reasons) == line


# ---------------------------------------------------------------------------------- a run continues
ROOT = Path("run")


def compared(config, before=None):
    """The facts for data.json, as they are read again, and the warnings."""
    steps = compare_data(open_source(config), config, ROOT, before)
    warned = []
    while True:
        try:
            warned.append(next(steps).text)
        except StopIteration as end:
            return json.loads(json.dumps(end.value)), warned


def write_npz(folder, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 8, 8, 3), np.uint8)
    np.savez(folder / "x.npz", images=pixels, labels=np.arange(20) % 2)
    return "x.npz"


def write_cifar(folder, seed):
    records = np.random.default_rng(seed).integers(0, 256, (20, 3073), np.uint8)
    records[:, 0] = np.arange(20) % 10
    records.tofile(folder / "data_batch_1.bin")
    return "data_batch_1.bin"


@pytest.mark.parametrize(("write", "classes"), [(write_npz, 2), (write_cifar, 10)])
def test_other_pixels_in_arrays_of_the_same_size_are_warned_of(tmp_path, write, classes):
    path = tmp_path / write(tmp_path, seed=0)
    fields = [f"data.path={path}", "data.channels=3", f"model.num_classes={classes}"]
    config = load_config("digits", fields)
    facts, _ = compared(config)
    assert compared(config, facts) == (facts, [])

    write(tmp_path, seed=1)
    others, warned = compared(config, facts)
    assert warned == [
        f"data.path: the pixels in '{path}' are not those that run was trained on last"
    ]
    assert others == facts | {"content": others["content"], "checked": False}
    assert compared(config, others) == (others, [])
    part = load_config("digits", [*fields, "data.held_out=0.2"])
    assert compared(part, facts)[1] == [
        f"{warned[0]}, and data.held_out=0.2 may now hold out images that it was trained on, so "
        "the held-out loss is not of unseen images any more"
    ]


def test_other_captions_are_warned_of_by_a_run_with_text(captioned, tiny, tmp_path):
    config, folder = captioned(), tmp_path / "images"
    without = tiny("model.num_classes=0", f"data.path={folder}")
    facts, plain = compared(config)[0], compared(without)[0]
    (folder / "03.txt").write_text("red 3\n")
    others, warned = compared(config, facts)
    assert warned == [
        f"data.path: the captions in '{folder}' are not those that run was trained on last"
    ]
    assert others["checked"]  # the images are the same
    assert compared(without, plain) == (plain, [])


def test_run_of_an_earlier_version_recorded_no_content(captioned):
    config = captioned()
    facts, _ = compared(config)
    for earlier in ({}, {"content": 3}):
        before = {name: value for name, value in facts.items() if name != "content"} | earlier
        assert compared(config, before) == (facts, [])

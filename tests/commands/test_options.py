"""Texts of the command line become what the library takes."""

import dataclasses

import pytest

from diffussm_cli.commands.requests import (
    overridden_sampling,
    parse_classes,
    parse_prompts,
    parse_size,
    sampling_request,
)
from diffussm_cli.config import config_from_dict, load_config
from diffussm_cli.errors import ConfigError
from tests.helpers import run


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("owl", [1]),
        ("owl,cat,owl", [1, 0, 1]),
        ("t-shirt, 0-1", [2, 0, 1]),
        ('"cats, dogs",owl', [3, 1]),
        ("3-4", [3, 4]),  # a range, although a class has this name
        ("4", [4]),
    ],
)
def test_classes_are_parsed_by_name_label_and_range(text, labels):
    names = ["cat", "owl", "t-shirt", "cats, dogs", "3-4"]
    config = config_from_dict(
        {}, "", fields={"model.num_classes": 5, "data.class_names": names, "data.vae": "v"}
    )
    assert parse_classes(text, config) == tuple(labels)


def test_number_names_the_class_of_this_name_not_its_place():
    """Folders 1, 10, 2 in the order of a listing: the label of 10 is 1."""
    fields = {"model.num_classes": 3, "data.class_names": ["1", "10", "2"], "data.vae": "v"}
    config = config_from_dict({}, "", fields=fields)
    assert parse_classes("10, 2,1", config) == (1, 2, 0)
    for text, part in (("0", "0"), ("1-2", "1-2"), ("2,3", "3")):
        with pytest.raises(ConfigError, match=f"^--classes: the run has no class '{part}'; its"):
            parse_classes(text, config)


@pytest.mark.parametrize(
    ("text", "size"), [("256", (256, 256)), ("256x384", (256, 384)), ("9999", (9999, 9999))]
)
def test_size_is_height_and_width(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "x", "8x", "8x0", "10000", "8X8", "-8", "8.0", " 8", "8x8x8", "\u0668"]
)
def test_bad_size_is_rejected(text):
    with pytest.raises(ConfigError, match="^--resolution: "):
        parse_size(text)


def test_sampling_request_changes_only_given_options():
    config = load_config("mnist-noise")
    assert sampling_request(config, steps=None, sampler=None) == config.sample
    changes = {"sampler": "ddim", "steps": 7, "guidance": 0.0, "guidance_channels": "3"}
    asked = sampling_request(config, **changes, guidance_interval="100,900")
    assert asked == dataclasses.replace(config.sample, **changes, guidance_interval=(100, 900))
    assert asked.clip == config.sample.clip


def test_overrides_of_sampling_work_as_those_of_train():
    config = load_config("mnist-noise")
    overrides = ["sample.steps=7", "sample.guidance_interval=100,900", "sample.sampler=ddim"]
    assert overridden_sampling(config, overrides) == load_config("mnist-noise", overrides).sample
    assert overridden_sampling(config, []) == config.sample


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "train.lr=1",
            "--set: 'train.lr' does not change how a run draws; fields such as sample.steps do",
        ),
        (
            "sample.prompts=a",
            (
                "--set: sample.prompts are those of a run's grids; name a file of prompts with "
                "--prompts"
            ),
        ),
        ("sample.stepps=3", "unknown field sample.stepps; did you mean 'sample.steps'?"),
        ("sample.steps=0", "sample.steps: 0 must be at least 1"),
    ],
)
def test_override_without_effect_on_sampling_is_rejected(override, words):
    with pytest.raises(ConfigError) as error:
        overridden_sampling(load_config("mnist-noise"), [override])
    assert words in str(error.value)


def test_balanced_is_every_class_once_and_excludes_other_classes():
    config = load_config("digits")
    assert parse_classes(None, config, balanced=True) == tuple(range(10))
    unconditional = load_config("digits", ["model.num_classes=0", "sample.guidance=1"])
    for text, wrong in (("3", config), (None, unconditional)):
        with pytest.raises(
            ConfigError, match="^--balanced: needs a class-conditional model, and no --classes"
        ):
            parse_classes(text, wrong, balanced=True)


def test_classes_for_unconditional_model_are_rejected():
    config = load_config("digits", ["model.num_classes=0", "sample.guidance=1"])
    assert parse_classes(None, config) == ()
    with pytest.raises(ConfigError, match="^--classes: .*unconditional"):
        parse_classes("3", config)


def test_classes_for_a_model_of_text_name_the_option_of_prompts():
    config = load_config(
        "digits", ["model.num_classes=0", "model.text_width=8", "data.text=wordllama"]
    )
    for option in ("--prompt", "--prompts"):
        with pytest.raises(
            ConfigError, match=f"^--classes: '3' given, but the run .* use {option}$"
        ):
            parse_classes("3", config, prompts=option)


def test_byte_order_mark_is_no_part_of_prompt(tmp_path):
    """Notepad writes one; a prompt with it draws another image from the same seed."""
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfred heart\r\nsun\r\n")
    assert parse_prompts(None, tmp_path / "prompts.txt") == ("red heart", "sun")


# A command, and the warning about what it does not use.
UNUSED = {
    "a check": (
        "encode --verify store --batch-size 3 --no-flip --vae nope",
        "--vae, --no-flip, --batch-size: not used, because --verify encodes nothing",
    ),
    "a conversion": (
        "encode store --text wordllama --strict",
        "--text, --strict: not used, because a store is converted, not encoded",
    ),
    "tokens without a text encoder": (
        "encode pictures new --text-tokens 8 --vae nope",
        "--text-tokens: not used, because there is no --text",
    ),
    "the list of presets": (
        "train --list --preset mnist --out run --set train.lr=1 --dry-run",
        "--preset, --out, --set, --dry-run: not used, because --list only prints the presets",
    ),
    "the published figures": (
        "profile --paper --json --preset mnist --no-count --latency",
        "--preset, --no-count, --latency: not used, because --paper only prints",
    ),
    "an estimate": (
        "profile --preset digits --estimate --device 4090 --no-count --repeats 3 --resolution 512",
        "--repeats: not used, because there is no --latency\n"
        "warning: --resolution: not used, because a preset has its own data.resolution",
    ),
}


@pytest.mark.parametrize("case", UNUSED)
def test_options_that_a_command_does_not_use_are_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    (tmp_path / "pictures").mkdir()
    command, line = UNUSED[case]
    assert f"warning: {line}\n" in run(*command.split()).stderr

"""Small text files of a run: what is written is read again, and what is damaged is named."""

import dataclasses

import pytest

from diffussm_cli import runs
from diffussm_cli.config import load_config, to_yaml
from diffussm_cli.errors import ConfigError, RunError

SKIPPED = [(3, "cat/sk\u00f6ld\n.png", "no bytes"), (None, "notes.txt", 'a "text"')]


def test_configuration_state_and_skipped_images_are_read_as_they_were_written(tmp_path):
    config = load_config("digits", ["data.class_names=[katt, sk\u00f6ldpadda]", "train.lr=1e-7"])
    (tmp_path / runs.CONFIG).write_text(to_yaml(config), encoding="utf-8")
    assert runs.read_config(tmp_path) == config
    runs.write_state(tmp_path, {"step": 4, "sha256": {"a": "0"}})
    assert runs.read_state(tmp_path) == {"step": 4, "sha256": {"a": "0"}}
    (tmp_path / runs.STATE).write_text('{"step": 4}')  # as earlier versions did
    assert runs.read_state(tmp_path) == {"step": 4}
    runs.write_skipped(tmp_path, SKIPPED)
    assert runs.read_skipped(tmp_path) == SKIPPED


def test_rejected_field_of_old_run_names_the_file_to_change(tmp_path):
    """A run of an earlier version may clamp latents; with the field changed in its file, it is
    read.
    """
    latents = [
        "data.vae=vae",
        "data.downsample=8",
        "data.channels=4",
        "data.resolution=64",
        "data.path=latents",
    ]
    text = to_yaml(load_config("digits", [*latents, "sample.clip=false"]))
    path = tmp_path / runs.CONFIG
    path.write_text(text.replace("clip: false", "clip: true"), encoding="utf-8")
    with pytest.raises(
        RunError, match=f"^{path}: sample.clip: true clamps pixels .*; leave it at false"
    ):
        runs.read_config(tmp_path)
    path.write_text(text, encoding="utf-8")
    assert not runs.read_config(tmp_path).sample.clip


def test_run_without_metrics_has_none(tmp_path):
    assert runs.read_metrics(tmp_path) == {}
    (tmp_path / runs.METRICS).write_text('{"step": 4, "eval/fid": 3.5}')
    assert runs.read_metrics(tmp_path) == {"step": 4, "eval/fid": 3.5}


NAMES = {
    "not UTF-8": (("caf\udce9",), "data.class_names: 'caf\\udce9' is not UTF-8 text; rename it"),
    "too long together": (
        tuple(f"{i:04d}" + "a" * 240 for i in range(5000)),
        "data.class_names: the names of 5,000 classes make config.yaml larger than 1048576 bytes",
    ),
}


@pytest.mark.parametrize(("names", "line"), NAMES.values(), ids=NAMES)
def test_unreadable_configuration_is_rejected_before_writing(names, line):
    config = load_config("digits")
    with pytest.raises(ConfigError) as caught:
        runs.check_config(
            dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=names))
        )
    assert line in str(caught.value)


def test_odd_class_names_are_read_as_they_were_written(tmp_path):
    config = load_config("digits")
    names = (
        "no",
        "01",
        "1",
        "1.0",
        "1e5",
        "null",
        "~",
        "",
        " a",
        "a: b",
        "#",
        "\x85",
        "\u2028",
        "2024-01-01",
        "'",
        "[",
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=names))
    runs.check_config(config)
    runs.write_config(tmp_path, config)
    assert runs.read_config(tmp_path) == config


DAMAGED = {
    "a step that is true": (runs.STATE, '{"step": true}', runs.read_state),
    "a step below 0": (runs.STATE, '{"step": -1}', runs.read_state),
    "no step": (runs.STATE, "{}", runs.read_state),
    "another hash": (runs.STATE, '{"step": 4, "state_sha256": "00"}', runs.read_state),
    "text for a metric": (runs.METRICS, '{"eval/fid": "low"}', runs.read_metrics),
    "an index that is true": (
        runs.SKIPPED,
        '{"index": true, "file": "a", "reason": "b"}',
        runs.read_skipped,
    ),
    "no reason": (runs.SKIPPED, '{"index": 1, "file": "a"}', runs.read_skipped),
    "no file at all": (runs.SKIPPED, None, runs.read_skipped),
}


@pytest.mark.parametrize(("name", "text", "read"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_metadata_is_named(tmp_path, name, text, read):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=f"{name}: damaged"):
        read(tmp_path)

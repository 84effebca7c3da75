"""Files from strangers: nothing in them runs, leads out of their folder,
or unpacks without limit.
"""

import dataclasses
import multiprocessing
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from diffussm_cli import runs
from diffussm_cli.config import load_config, parse_yaml, to_yaml
from diffussm_cli.data.latents.manifest import read_settings
from diffussm_cli.data.latents.shard import ShardRecord
from diffussm_cli.data.listing import list_source
from diffussm_cli.errors import ConfigError, DataError, RunError
from diffussm_cli.model import build_model
from diffussm_cli.runs import checkpoints
from tests.helpers import SETTINGS, line_of, run

pytest.importorskip("sklearn")


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def trained(tmp_path):
    assert run("train", "--preset", "digits", "--out", tmp_path / "run", *SETTINGS).exit_code == 0
    return tmp_path / "run"


def test_pickle_named_as_weights_is_not_unpickled(trained, tmp_path):
    for path in (
        trained / "final" / runs.MODEL,
        trained / "checkpoints" / "step-00000004" / runs.EMA,
    ):
        path.write_bytes(pickle.dumps(Attack(tmp_path / "owned")))
        with pytest.raises(RunError, match="cannot be read"):
            runs.read_tensors(path)
    (trained / "final" / runs.STATE).unlink()  # an attacker leaves no hashes
    assert "model.safetensors: cannot be read" in line_of(run("sample", trained, "-n", 1))
    assert not (tmp_path / "owned").exists()


def test_published_checkpoint_with_code_is_rejected(tmp_path):
    torch.save({"pos_embed": Attack(tmp_path / "owned")}, tmp_path / "evil.pt")
    assert "evil.pt" in line_of(run("sample", tmp_path / "evil.pt", "-n", 1))
    assert not (tmp_path / "owned").exists()


def test_yaml_neither_runs_code_nor_unfolds(tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml(f"a: !!python/object/apply:builtins.open ['{tmp_path / 'owned'}', 'w']", "x")
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join(['*a' + str(i - 1)] * 10)}]" for i in range(1, 10)]
    with pytest.raises(ConfigError, match="aliases .* are not allowed"):
        parse_yaml("\n".join(lines), "x")
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("[" * 100_000, "x")
    assert not (tmp_path / "owned").exists()


def test_huge_configuration_is_not_read(trained):
    (trained / "final" / "config.yaml").write_text("a: " + "x" * (2 << 20))
    assert "too large for a configuration" in line_of(run("sample", trained, "-n", 1))


def test_configuration_of_absurd_memory_is_rejected(trained):
    """Absurd sizes are out of bounds; others are compared with the weights before memory is taken
    for them.
    """
    path = trained / "final" / "config.yaml"
    text = path.read_text()
    for was, now, words in (
        ("hidden_size: 16", "hidden_size: 16000", "weights of another model"),
        ("hidden_size: 16", "hidden_size: 16000000", "model.hidden_size: 16000000 must be at most"),
        ("depth: 2", "depth: 1000000000", "model.depth: 1000000000 must be at most"),
    ):
        path.write_text(text.replace(was, now))
        assert words in line_of(run("sample", trained, "-n", 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.index_fill_(0, torch.tensor([0]), torch.nan), "numbers that are not finite"),
        (lambda w: w.index_fill_(0, torch.tensor([0]), -torch.inf), "numbers that are not finite"),
        (lambda w: w.int(), "torch.int32, not floating-point numbers"),
        (lambda w: w.bool(), "torch.bool, not floating-point numbers"),
        (lambda w: w.to(torch.complex64), "torch.complex64, not floating-point numbers"),
    ],
    ids=["nan", "inf", "int", "bool", "complex"],
)
def test_weights_that_are_not_finite_are_rejected(tiny, tmp_path, change, words):
    """In a folder without hashes, as a stranger would make it."""
    config = tiny()
    weights = build_model(config).state_dict()
    name = next(n for n, w in weights.items() if w.ndim == 2)
    weights[name] = change(weights[name])
    (tmp_path / runs.CONFIG).write_text(to_yaml(config))
    save_file(weights, tmp_path / runs.MODEL)
    with pytest.raises(RunError, match=f"{runs.MODEL}: damaged: {name} holds {words}"):
        runs.load_model(runs.find_run(tmp_path))


@pytest.mark.parametrize("where", ["run folder", "preset", "option"])
def test_extractor_field_takes_a_name_and_no_code(trained, tmp_path, monkeypatch, where):
    (tmp_path / "foreign.py").write_text(f"open({str(tmp_path / 'reached')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = trained / runs.CONFIG
    foreign = path.read_text().replace("extractor: auto", "extractor: foreign:factory")
    (tmp_path / "preset.yaml").write_text(foreign)
    commands = {
        "run folder": ["--resume", "--out", trained],
        "preset": ["--preset", tmp_path / "preset.yaml"],
        "option": ["--preset", "digits", "--set", "eval.extractor=foreign:factory"],
    }
    if where == "run folder":
        path.write_text(foreign)
    line = line_of(run("train", *commands[where], "--eval-every", 1, "--set", "train.steps=6"))
    assert (
        "eval.extractor: 'foreign:factory' is not a choice; valid: auto, inception, digits, "
        "efficientnet"
    ) in line
    assert not (tmp_path / "reached").exists()


def test_hashes_in_state_reach_no_other_file(trained, tmp_path, monkeypatch):
    """A name in state.json is one of a file beside it: nothing else is opened."""
    (tmp_path / "secret").write_text("x")
    hashed, sha256 = [], checkpoints.sha256
    monkeypatch.setattr(checkpoints, "sha256", lambda path: hashed.append(path) or sha256(path))
    former, newest = runs.list_checkpoints(trained)
    state = runs.read_state(newest)
    files = (runs.MODEL, runs.EMA, runs.OPTIMIZER)
    for name in ("../../../secret", str(tmp_path / "secret"), "..", "secret\0"):
        runs.write_state(newest, {**state, "sha256": {**state["sha256"], name: "0"}})
        found, wrong = runs.newest_good(trained)
        assert (found, len(wrong)) == (former, 1)
        assert str(newest) in wrong[0]
    tried = [path / name for path in (former, newest) for name in (*files, "..", "secret\0")]
    assert set(hashed) <= set(tried)


def test_record_of_shard_names_no_file_to_open():
    """Shards are named by their number; the names of skipped images are shown and never opened."""
    assert {f.name for f in dataclasses.fields(ShardRecord)} == {"sha256", "skipped", "mean", "std"}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"format": 1, "settings": {}}',
        '{"format": 2, "settings": {}}',
        "[" * 100_000,
        '{"format": 1e999}',
    ],
)
def test_damaged_manifest_is_one_line_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"^--verify: .*manifest\.json") as refused:
        read_settings(tmp_path, "--verify")
    assert "\n" not in str(refused.value)


def test_class_names_are_text_and_no_paths(tmp_path):
    """Control characters and dots in names of class folders end in JSON and YAML, never in a file
    name.
    """
    from PIL import Image

    names = ["x..", "a\nb", "\x1b[31mred"]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), i).save(tmp_path / "data" / name / f"{i}.png")
    assert list(list_source(tmp_path / "data").class_names) == sorted(names)
    more = ("--set", "model.num_classes=3", "--set", "train.sample_every=2")
    result = run(
        "train",
        "--preset",
        "digits",
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "run",
        *SETTINGS,
        *more,
    )
    assert result.exit_code == 0, result.output
    assert "\x1b[31m" not in result.output
    assert run("sample", tmp_path / "run", "-n", 3).exit_code == 0
    written = {p.name for p in tmp_path.rglob("*") if tmp_path / "data" not in p.parents}
    assert not written & set(names)
    assert load_config(str(tmp_path / "run" / "config.yaml")).data.class_names == tuple(
        sorted(names)
    )


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """The current folder, with modules that a data set from a stranger may hold; each writes a file
    when imported.
    """
    folder = tmp_path / "strange"
    folder.mkdir()
    for name in ("typer", "multiprocessing", "torch", "yaml"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return folder


def test_program_imports_nothing_from_current_folder(strange, tmp_path):
    command = [sys.executable, "-m", "diffussm_cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=strange)
    assert not (tmp_path / "owned").exists()
    assert done.stdout.startswith("diffussm ")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no safe path")
def test_child_processes_import_nothing_from_current_folder(strange, tmp_path):
    assert run("--version").exit_code == 0
    child = multiprocessing.get_context("spawn").Process(target=os.getpid)
    child.start()
    child.join()
    assert not (tmp_path / "owned").exists()
    assert child.exitcode == 0

"""Weights of a run: found in the right folder, written as safetensors writes them, refused if they
do not fit.
"""

import pytest
import torch
from safetensors.torch import load_file, save

from diffussm_cli import runs
from diffussm_cli.config import load_config, to_yaml
from diffussm_cli.errors import RunError
from diffussm_cli.machine.files import sha256

OWN = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


def test_weight_files_equal_those_of_safetensors(tmp_path):
    tensors = {
        "x": torch.arange(3.0),
        "h": torch.ones(5).bfloat16(),
        "a": torch.tensor(2.0).double(),
    }
    tensors["t"] = torch.arange(6.0).view(2, 3).T  # not in order in memory
    digest = runs.write_tensors(tensors, tmp_path / "ours")
    assert digest == sha256(tmp_path / "ours")
    plain = {k: v.contiguous() for k, v in tensors.items()}
    assert (tmp_path / "ours").read_bytes() == save(plain, {"format": "pt"})
    assert all(torch.equal(v, tensors[k]) for k, v in load_file(tmp_path / "ours").items())


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": OWN["a"]}, "b is in only one"),
        (OWN | {"c": OWN["a"]}, "c is in only one"),
        (OWN | {"a": torch.zeros(3, 2)}, r"a is \(3, 2\), not \(2, 3\)"),
        (OWN | {"b": torch.zeros(4, dtype=torch.int32)}, "b holds torch.int32"),
        (OWN | {"b": torch.tensor([0, 0, 0, torch.inf])}, "b holds numbers that are not finite"),
        (OWN | {"b": torch.tensor([0, torch.nan, 0, 9])}, "b holds numbers that are not finite"),
        (
            OWN | {"b": torch.tensor([0, 0, -torch.inf, 0]).bfloat16()},
            "b holds .* not finite; take",
        ),
    ],
)
def test_weights_that_do_not_fit_are_rejected_by_name(tmp_path, weights, words):
    with pytest.raises(RunError, match=words):
        runs.check_weights_match(OWN, weights, tmp_path)


def test_weights_load_in_any_order_and_precision(tmp_path):
    runs.check_weights_match(OWN, {"b": OWN["b"].half(), "a": OWN["a"].double()}, tmp_path)


def test_final_weights_precede_checkpoints_and_best_ones_have_their_step(tmp_path):
    config = load_config("digits")
    with pytest.raises(RunError, match="no finished training"):
        runs.find_run(tmp_path)
    (tmp_path / runs.CONFIG).write_text(to_yaml(config))
    checkpoint = tmp_path / "checkpoints" / runs.checkpoint_name(2)
    with runs.whole_folder(checkpoint) as folder:
        runs.write_state(
            folder, {"step": 2, "sha256": {runs.EMA: runs.write_tensors(OWN, folder / runs.EMA)}}
        )
    runs.write_weights(tmp_path / "best", config, OWN, 1, {"step": 1, "eval/fid": 2.0})
    found = runs.find_run(tmp_path)
    assert (found.weights, found.step, found.config) == (checkpoint / runs.EMA, 2, config)
    assert runs.find_run(checkpoint) == found
    assert found.label == f"{tmp_path} (step 2)"
    runs.write_weights(tmp_path / "final", config, OWN, 4)
    found = runs.find_run(tmp_path)
    assert (found.weights, found.step) == (tmp_path / "final" / runs.MODEL, None)
    assert runs.find_run(tmp_path / "final") == found
    assert found.label == f"{tmp_path} (finished)"
    best = runs.find_run(tmp_path / "best")
    assert (best.root, best.weights, best.step) == (tmp_path, tmp_path / "best" / runs.MODEL, 1)


@pytest.mark.parametrize("version", ["now", "without a state"])
def test_newer_checkpoint_precedes_final_weights_of_extended_run(tmp_path, version):
    """A run of 4 steps that is continued; its checkpoint of step 4 is no newer than final/."""
    (tmp_path / runs.CONFIG).write_text(to_yaml(load_config("digits", ["train.steps=20"])))
    runs.write_weights(tmp_path / "final", load_config("digits", ["train.steps=4"]), OWN, 4)
    if version == "without a state":
        (tmp_path / "final" / runs.STATE).unlink()
    for step, weights, label in (
        (2, "final/model", "(finished)"),
        (4, "final/model", "(finished)"),
        (6, "checkpoints/step-00000006/ema", "(step 6, newer than final/)"),
    ):
        checkpoint = tmp_path / "checkpoints" / runs.checkpoint_name(step)
        with runs.whole_folder(checkpoint) as folder:
            hashes = {runs.EMA: runs.write_tensors(OWN, folder / runs.EMA)}
            runs.write_state(folder, {"step": step, "sha256": hashes})
        found = runs.find_run(tmp_path)
        assert found.weights == tmp_path / f"{weights}.safetensors"
        assert found.label == f"{tmp_path} {label}"
        assert found.config.train.steps == (20 if step == 6 else 4)

    (checkpoint / runs.EMA).write_bytes(b"half")
    found = runs.find_run(tmp_path)
    assert (found.weights, found.step) == (tmp_path / "final" / runs.MODEL, 4)
    assert f"step 4, final/, because {checkpoint / runs.EMA} has changed" in found.label


def test_average_is_found_by_its_decay(tmp_path):
    """In a checkpoint, in `final/` and in `best/`, which holds only the first; a run of one average
    has one.
    """
    config = load_config("digits", ["train.ema=0.99,0.9"])
    (tmp_path / runs.CONFIG).write_text(to_yaml(config))
    checkpoint = tmp_path / "checkpoints" / runs.checkpoint_name(2)
    with runs.whole_folder(checkpoint) as folder:
        hashes = {
            name: runs.write_tensors(OWN, folder / name) for name in (runs.EMA, runs.ema_file(0.9))
        }
        runs.write_state(folder, {"step": 2, "sha256": hashes})
    runs.write_weights(tmp_path / "best", config, OWN, 1, {"step": 1, "eval/fid": 2.0})
    for decay, name in {None: "ema", 0.99: "ema", 0.9: "ema-0.9"}.items():
        found = runs.find_run(tmp_path, decay)
        assert (found.weights, found.ema) == (checkpoint / f"{name}.safetensors", decay or 0.99)
        assert runs.find_run(checkpoint, decay) == found
    with pytest.raises(
        RunError,
        match=r"--ema: .*step-00000002' holds no average with decay 0.5; it holds 0.99, 0.9$",
    ):
        runs.find_run(tmp_path, 0.5)
    with pytest.raises(
        RunError, match=r"--ema: .*best' holds no average with decay 0.9; it holds 0.99$"
    ):
        runs.find_run(tmp_path / "best", 0.9)
    runs.write_weights(tmp_path / "final", config, OWN, 4, further={runs.ema_file(0.9): OWN})
    for path in (tmp_path, tmp_path / "final"):
        found = runs.find_run(path, 0.9)
        assert (found.weights, found.ema) == (tmp_path / "final" / "ema-0.9.safetensors", 0.9)
    (tmp_path / "final" / "ema-0.9.safetensors").write_bytes(b"half")
    with pytest.raises(RunError, match="ema-0.9.safetensors has changed since it was written"):
        runs.find_run(tmp_path, 0.9)
    assert runs.find_run(tmp_path).ema == 0.99

"""An evaluation session: which extractor it takes, and where its files lie."""

import json
import types
from pathlib import Path

import pytest
import torch

from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation import evaluator, results, session
from diffussm_cli.evaluation.evaluator import Evaluator
from diffussm_cli.evaluation.reference import Reference
from tests.evaluation.conftest import folder


@pytest.mark.parametrize(
    ("asked", "size", "grey", "name"),
    [
        ("auto", (28, 28), True, "digits"),
        ("auto", (28, 28), False, "inception"),
        ("auto", (32, 32), True, "inception"),
        ("inception", (28, 28), True, "inception"),
    ],
)
def test_auto_extractor_follows_the_first_images(asked, size, grey, name):
    chosen = Evaluator(asked, device="cpu")
    chosen.choose(size, grey)
    assert (chosen.requested, chosen.name) == (asked, name)
    chosen.choose((28, 28), True)
    assert chosen.name == name


def test_images_are_opened_in_the_channels_of_the_extractor(tmp_path, monkeypatch):
    seen = {
        "digits": types.SimpleNamespace(channels=1),
        "inception": types.SimpleNamespace(channels=3),
    }
    monkeypatch.setattr(evaluator, "load_extractor", lambda name, weights, device: seen[name])
    chosen = Evaluator(device="cpu")
    colour = chosen.open(str(folder(tmp_path / "a", 2, side=40, mode="RGB")), (28, 28))
    assert (chosen.name, colour.size, colour.channels) == ("inception", (28, 28), 3)
    grey = Evaluator(device="cpu").open(str(folder(tmp_path / "b", 2)))
    assert (grey.size, grey.channels) == ((28, 28), 1)


def test_results_are_written_beside_samples(tmp_path):
    (tmp_path / "s.npz").touch()
    assert results.results_path(tmp_path) == tmp_path / "results.json"
    assert results.results_path(tmp_path / "s.npz") == tmp_path / "s.results.json"
    assert results.results_path(tmp_path / "none") == Path("results.json")


def test_facts_of_samples_come_from_their_folder(tmp_path):
    assert results.read_facts(tmp_path) == {}
    (tmp_path / "meta.json").write_text(json.dumps({"steps": 7}))
    assert (
        results.read_facts(tmp_path) == results.read_facts(tmp_path / "samples.npz") == {"steps": 7}
    )


def test_folder_of_images_is_not_taken_for_a_run(tmp_path):
    assert results.find_run_at(folder(tmp_path / "a", 2)) is None
    assert results.find_run_at("samples.npz") is None


def test_metrics_without_reference_images_are_rejected_before_features_are_computed(tmp_path):
    """All of them in one line, at the first step of the comparison."""
    evaluation = Evaluator("digits", device="cpu")
    images = evaluation.open(str(folder(tmp_path / "a", 5)))
    statistics = torch.zeros(64), torch.eye(64)
    comparison = evaluation.compare(
        images, Reference("r.npz", None, pool=statistics), ["fid", "recall", "kid"]
    )
    with pytest.raises(
        DataError, match=r"^reference: r.npz holds no images \(arr_0\) for recall, kid; give one"
    ):
        next(comparison)


def test_unknown_metric_is_rejected_by_the_library(tmp_path):
    with pytest.raises(ConfigError, match="^metrics: 'fdi' is not one of fid"):
        next(session.evaluate(tmp_path, "builtin:mnist", ["fid", "fdi"]))

"""The race of recipes: what the rules admit, and that the first records are those of studies."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import yaml

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS / "speedrun"))
import race  # noqa: E402

RECORD = [{"seconds": 100.0, "held_out": 0.19, "fid": 0.7}] * 3


def runs(seconds=(90, 80, 70), held_out=(0.199, 0.2, 0.201), fid=(0.9, 1.0, 1.1)):
    return [dict(zip(RECORD[0], values)) for values in zip(seconds, held_out, fid)]


@pytest.mark.parametrize(
    ("new", "admitted"),
    [
        (runs(), True),
        (runs(seconds=(99, 10, 101)), False),  # one seed is slower than the record
        (runs(held_out=(0.2, 0.2, 0.203)), False),
        (runs(fid=(1.0, 1.0, 1.3)), False),
    ],
)
def test_a_recipe_must_reach_both_targets_and_be_faster_with_every_seed(new, admitted):
    assert race.verdict(RECORD, new)["admitted"] is admitted


def test_ratio_is_of_the_seconds_of_all_seeds():
    result = race.verdict(RECORD, runs())
    assert result["ratio"] == pytest.approx(0.8)
    assert result["means"] == pytest.approx({"seconds": 80, "held_out": 0.2, "fid": 1.0})
    assert (
        race.row("new", result | {"commit": "abc"}) == "| new | 80 | 0.80 | 0.2000 | 1.00 | abc |"
    )


@pytest.mark.parametrize("name", [p.stem for p in (BENCHMARKS / "speedrun/recipes").glob("*.yaml")])
def test_every_recipe_obeys_the_rules(name):
    assert race.recipe(name, 2).train.seed == 2


def test_an_unknown_recipe_is_one_line_with_those_that_there_are():
    with pytest.raises(
        SystemExit, match="^none: no such recipe; there are conv, mnist, mnist-s4d; "
    ):
        race.recipe("none", 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("train.init", "mnist"), ("data.held_out", 0.5), ("diffusion.predicts", "image")],
)
def test_a_recipe_against_the_rules_is_refused(field, value, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "HERE", tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/new.yaml").write_text(yaml.safe_dump({"preset": "mnist", field: value}))
    with pytest.raises(SystemExit, match=f"new: {field} is .*, and the rules want"):
        race.recipe("new", 0)


STUDIES = {
    "mnist-s4d": ("mnist-muon/s4d", (3, 4, 5)),
    "mnist": ("mnist-axial/axial-muon", (0, 1, 2)),
}


@pytest.mark.parametrize("name", STUDIES)
def test_first_records_are_those_of_the_studies(name):
    """The recipe is what the study trained, and the row is its mean."""
    run, seeds = STUDIES[name]
    files = [BENCHMARKS / "studies/results" / f"{run}-s{seed}.json" for seed in seeds]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    config = race.recipe(name, seeds[0])
    stored = results[0]["configuration"]
    for field in ("steps", "batch_size", "lr", "optimizer", "warmup_steps", "lr_decay", "ssm_lr"):
        assert getattr(config.train, field) == stored["train"][field]
    for field in ("mixer", "hidden_size", "depth", "patch_size", "compression", "d_state"):
        assert getattr(config.model, field) == stored["model"][field]

    seconds, loss = (statistics.mean(r[k] for r in results) for k in ("cpu_seconds", "held_out"))
    fid = statistics.mean(r["metrics"]["fid"] for r in results)
    page = (BENCHMARKS / "speedrun/README.md").read_text(encoding="utf-8")
    [line] = [line for line in page.splitlines() if line.startswith(f"| `{name}`,")]
    numbers = [f"| {seconds:.0f} |", f"| {loss:.4f} | {fid:.2f} | {results[0]['commit']} |"]
    assert all(text in line for text in numbers)


@pytest.mark.parametrize(
    "file", sorted((BENCHMARKS / "speedrun/results").glob("*.json")), ids=lambda file: file.stem
)
def test_row_of_a_race_is_that_of_its_result(file):
    result = json.loads(file.read_text(encoding="utf-8"))
    page = (BENCHMARKS / "speedrun/README.md").read_text(encoding="utf-8")
    [line] = [line for line in page.splitlines() if line.startswith(f"| `{file.stem}`,")]
    numbers = race.row(file.stem, result).split("|")[2:-1]
    assert [cell.strip() for cell in line.split("|")[2:7]] == [cell.strip() for cell in numbers]
    assert result["admitted"]

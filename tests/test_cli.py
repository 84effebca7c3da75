"""The program as a user meets it: both commands from beginning to end, and one line for each
mistake.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from diffussm_cli import runs
from diffussm_cli.cli import app
from diffussm_cli.config import preset_names
from diffussm_cli.machine import device
from diffussm_cli.machine.files import PARTIAL, sha256
from diffussm_cli.profiling import plan
from diffussm_cli.training.record import RecordWriter
from diffussm_cli.training.session import train
from tests import conftest
from tests.helpers import SETTINGS, Background, line_of, run

pytest.importorskip("sklearn")


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "tiny"
    result = run(
        "train", "--preset", "digits", "--out", root, *SETTINGS, "--set", "train.sample_every=4"
    )
    assert result.exit_code == 0, result.output
    return root


def test_train_leaves_self_describing_run(trained):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["preset"] == "digits"
    assert config["data"]["class_names"] == list("0123456789")
    assert [
        json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()
    ] == [2, 4]
    assert list((trained / "tensorboard").glob("events.*"))
    assert pixels(trained / "samples" / "step-00000004.png").shape == (2 * 58 + 2, 10 * 58 + 2)


def test_train_ends_with_what_to_do_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run("train", "--preset", "digits", *SETTINGS)
    assert "draw more: diffussm sample runs/digits" in first.stderr
    assert first.stdout == ""
    again = run("train", "--preset", "digits", *SETTINGS)
    assert "diffussm sample runs/digits-2" in again.stderr
    newest = run("sample", "--num", 2, "--steps", 2)
    assert newest.stdout.strip() == os.path.join("runs", "digits-2", "images", "grid.png")


def test_sample_writes_pictures_and_their_settings(trained, tmp_path):
    out = tmp_path / "a b"
    result = run(
        *(
            "sample",
            trained,
            "--num",
            5,
            "--classes",
            "3,7-8",
            "--seed",
            10,
            "--sampler",
            "ddim",
            "--steps",
            3,
        ),
        *(
            "--guidance",
            2,
            "--guidance-interval",
            "100,900",
            "--out",
            out,
            "--npz",
            "--batch-size",
            2,
        ),
    )
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.glob("0*.png")) == [f"{i:06d}.png" for i in range(10, 15)]
    assert pixels(out / "000010.png").shape == (8, 8)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["labels"] == [3, 7, 8, 3, 7]
    assert (meta["sampler"], meta["steps"], meta["guidance"]) == ("ddim", 3, 2.0)
    assert (meta["first_seed"], meta["num"], meta["complete"]) == (10, 5, True)
    assert meta["weights_sha256"] == sha256(trained / "final" / "model.safetensors")
    with np.load(out / "samples.npz", allow_pickle=False) as npz:
        assert npz["arr_0"].shape == (5, 8, 8, 1)
        assert np.array_equal(npz["arr_0"][1, :, :, 0], pixels(out / "000011.png"))
        assert npz["arr_1"].tolist() == [3, 7, 8, 3, 7]


def test_sample_accepts_checkpoint_and_final(trained, tmp_path):
    for path in (trained / "checkpoints" / "step-00000002", trained / "final"):
        grid = tmp_path / path.name / "g.png"
        out = tmp_path / path.name / "o"
        assert (
            run("sample", path, "--num", 1, "--steps", 2, "--out", out, "--grid", grid).exit_code
            == 0
        )
        assert grid.is_file()
        assert json.loads((out / "meta.json").read_text())["step"] == (
            4 if path.name == "final" else 2
        )


def test_sample_accepts_other_average(tmp_path):
    """From final/ and from a checkpoint; meta.json names it, and its images are another request."""
    root, out = tmp_path / "run", tmp_path / "out"
    done = run(
        "train", "--preset", "digits", "--out", root, *SETTINGS, "--set", "train.ema=0.9,0.1"
    )
    assert done.exit_code == 0, done.output
    for path, step in {root: 4, root / "checkpoints" / "step-00000002": 2}.items():
        for given, decay in ([], 0.9), (["--ema", 0.9], 0.9), (["--ema", 0.1], 0.1):
            folder = out / f"{step}-{decay}"
            assert (
                run("sample", path, "--num", 1, "--steps", 1, "--out", folder, *given).exit_code
                == 0
            )
            meta = json.loads((folder / "meta.json").read_text())
            first = "model.safetensors" if step == 4 else "ema.safetensors"
            weights = first if decay == 0.9 else "ema-0.1.safetensors"
            assert (meta["ema"], meta["step"], meta["weights"]) == (decay, step, weights)
            assert meta["weights_sha256"] == sha256(
                (root / "final" if step == 4 else path) / weights
            )
    assert "weights_sha256 was" in line_of(
        run("sample", root, "--num", 1, "--steps", 1, "--out", out / "4-0.1")
    )
    for command in ("sample", "eval"):
        said = line_of(run(command, root, "--num", 2, "--ema", 0.5))
        assert said.endswith("final' holds no average with decay 0.5; it holds 0.9, 0.1")


def test_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")  # of a job, no step is measured
    (tmp_path / "empty").mkdir()
    here = conftest.device().type
    for out in ("new/run", "empty"):
        result = run(*DRY, "--out", out, *SETTINGS)
        assert result.exit_code == 0, result.output
        memory, time, *cost = result.stdout.splitlines()
        assert re.match(rf"memory: [\d.]+ GiB by formula; [\d.]+ GiB free here \({here}\)", memory)
        assert time.startswith("time: not measured with several processes")
        assert "memory of each of 2 processes" in "".join(cost)
        assert "the same command with --yaml in place of --dry-run" in result.stderr
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_dry_run_tells_memory_and_time_here_and_the_data_that_are_there(monkeypatch):
    monkeypatch.setattr(plan, "step_seconds", lambda config, images, parts: 2.0)
    result = run(*DRY, *SETTINGS, "--set", "train.steps=90")
    here = conftest.device().type
    assert f"time: about 3.0 min on {here} for 90 steps, and more for previews" in result.stdout
    assert "data: builtin:digits, 1,621 images of 10 classes" in result.stderr
    shown = result.output  # both streams, as a terminal shows them
    assert shown.index("data: ") < shown.index("time: ") < shown.index("parameters")


@pytest.mark.parametrize(
    ("words", "predicts"),
    [
        (
            ("--preset", "digits", "--set", "model.depth=1", "--eval-every", "0"),
            "profile --preset digits --set model.depth=1 --set eval.every=0",
        ),
        (("--set", "model.depth=1"), "profile --preset mnist --set model.depth=1"),
        (("--data", "pictures", "--set", "model.depth=1"), "profile --preset run.yaml"),
    ],
    ids=["preset", "default", "data alone"],
)
def test_dry_run_prints_the_command_that_predicts_its_run(words, predicts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")  # of a job, no step is measured
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28)).save(tmp_path / "pictures" / name)
    (time,) = [
        line for line in run("train", *words, "--dry-run").stdout.splitlines() if "time" in line
    ]
    *_, command = time.partition("diffussm ")
    assert command == f"{predicts} --estimate --device h200"

    # The command takes the run's configuration.
    if "run.yaml" in command:
        assert "write what --yaml prints to run.yaml, then: diffussm profile" in time
        (tmp_path / "run.yaml").write_text(run("train", *words, "--yaml").stdout, encoding="utf-8")
    monkeypatch.delenv("WORLD_SIZE")
    predicted = json.loads(run(*command.split(), "--no-count", "--json").stdout)["models"][0]
    assert predicted["training"]["gpu"] == "H200 SXM"
    config = yaml.safe_load(run("train", *words, "--yaml").stdout)
    assert predicted["resolution"] == [config["data"]["resolution"]] * 2


def test_yaml_is_the_whole_configuration_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("train", "--preset", "xl-256", "--yaml", "--dry-run", "--set", "train.lr=2e-4")
    assert yaml.safe_load(result.stdout)["train"]["lr"] == 2e-4
    assert result.stderr == (
        "warning: --dry-run: not used, because --yaml only prints the configuration\n"
    )
    (tmp_path / "xl-256.yaml").write_text(result.stdout)
    assert run("train", "--preset", "xl-256.yaml", "--yaml").stdout == result.stdout


SLIPS = {  # a command, and the line
    "images into a run": ("sample RUN -n 1 --out RUN", "--out: 'RUN' is a folder of a run; name"),
    "images into weights": ("sample RUN -n 1 --out RUN/final", "--out: 'RUN/final' is a folder of"),
    "images into checkpoints": ("sample RUN -n 1 --out RUN/checkpoints", "is a folder of a run"),
    "a new folder of previews": ("sample RUN -n 1 --out RUN/samples", "is a folder of a run"),
    "a file": ("sample notes", "RUN: 'notes' is no folder of a run and no .pt file of a published"),
    "a pipe": ("sample pipe", "RUN: 'pipe' is no folder of a run"),
    "no value": ("train --set train.lr=", "train.lr: has no value; write train.lr=VALUE, or leave"),
    "no choice": ("train --set train.optimizer=", "train.optimizer: has no value; write"),
    "no base": ("train --preset empty.yaml", "empty.yaml: base: is empty; it must be the name of"),
    "no text of a base": ("train --preset text.yaml", "text.yaml: base: is empty; it must be"),
    "other data": (
        "train --out RUN --resume --data other",
        "--resume: data.path was 'builtin:digits' and is now 'other'; omit --data to keep the",
    ),
    "other data without classes": (
        "train --out RUN --resume --data flat",
        "--resume: data.path was 'builtin:digits' and is now 'flat'; omit --data to keep the",
    ),
    "other data and a preset": (
        "train --out RUN --resume --preset digits --data flat",
        "omit --preset and --set to keep the run's own values, or choose another --out",
    ),
}


@pytest.mark.parametrize("case", SLIPS)
def test_a_slip_is_one_line_with_the_remedy(case, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, line = SLIPS[case]
    (tmp_path / "notes").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.yaml").write_text("base:\ntrain: {lr: 1.0e-3}")
    (tmp_path / "text.yaml").write_text("base: ''")
    if "RUN" in command:
        list(train(tiny(), tmp_path / "RUN"))
    if "flat" in command:
        (tmp_path / "flat").mkdir()
        Image.new("L", (8, 8)).save(tmp_path / "flat" / "a.png")
    if "other" in command:
        for i in range(1621):
            path = tmp_path / "other" / str(i % 10) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    assert line in line_of(run(*command.split()))


DRY = ("train", "--preset", "digits", "--dry-run")
STOPS = {  # what is wrong with a run, and the line
    "data": (["--data", "nope"], "data.path: cannot read the folder 'nope'"),
    "held-out images": (
        ["--set", "data.held_out=nope"],
        "data.held_out: cannot read the folder 'nope'",
    ),
    "classes": (["--set", "model.num_classes=3"], "model.num_classes: 3, but builtin:digits has"),
    "device": (["--set", "train.device=mars"], "device: 'mars'"),
    "run folder": (["--out", "taken"], "--out: 'taken' is not empty"),
    "a folder that cannot be made": (["--out", "taken/notes/run"], "--out: cannot write to"),
    "latents": (["--preset", "xl-256"], "data.path: no folder of latents at 'latents/imagenet"),
    "an image": (
        ["--data", "pictures", "--set", "model.num_classes=0", "--set", "sample.guidance=1"],
        "data.path: 1 of 2 images in 'pictures' cannot be read: b.png: not a PNG",
    ),
    "a reference": (
        ["--set", "eval.every=1", "--set", "eval.reference=no", "--set", "eval.extractor=digits"],
        "eval.reference: cannot read the folder 'no'",
    ),
    "a logger": (["--set", "train.logger=wandb"], "train.logger: wandb is not installed"),
    "captions": (
        ["--set", "data.text=wordllama", "--set", "model.text_width=256"],
        "data.text: 'builtin:digits' has no caption for 1621 of 1621 images",
    ),
    "weights": (["--init", "nope"], "train.init: no folder 'nope'"),
    "a run of another model": (
        ["--out", "run", "--resume"],
        "--resume: model.hidden_size was 16 and is now 32",
    ),
}


@pytest.mark.parametrize("case", STOPS)
def test_dry_run_ends_with_what_would_stop_the_run(case, tiny, tmp_path, monkeypatch):
    """With the line of the run, and without a measurement; memory and cost are printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "step_seconds", lambda *_: pytest.fail("a step is measured"))
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    for folder in ("taken", "pictures"):
        (tmp_path / folder).mkdir()
    (tmp_path / "taken" / "notes").write_text("")
    Image.new("L", (8, 8)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "b.png").write_text("text")
    if "run" in STOPS[case][0]:
        list(train(tiny(), tmp_path / "run"))
    options, line = STOPS[case]

    stopped = run(*DRY[:-1], *options)
    ahead = run(*DRY, *options)
    assert line_of(stopped).startswith(f"diffussm: error: {line}")
    assert line_of(ahead) == line_of(stopped)
    assert ahead.exit_code == stopped.exit_code == 1
    assert "memory to train" in ahead.stdout
    device = case != "device"
    assert ("time: not measured, because the run would stop" in ahead.stdout) == device


def test_list_shows_every_preset_with_its_purpose(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    result = run("train", "--list")
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    shown = {row[0]: " ".join(row[1:]) for row in rows}
    assert sorted(shown) == preset_names()
    assert shown["mnist"].startswith("0.5 M DiffuSSM on 4,500 of MNIST's 28x28 digits")
    assert shown["xl-256"].startswith("673.1 M DiffuSSM-XL on ImageNet 256x256")
    assert next(iter(shown)) == "digits"  # the cheapest first
    assert "diffussm profile --preset NAME --estimate" in result.stderr


def test_full_disk_while_recording_is_one_line_error(tmp_path, monkeypatch):
    def full(self, record):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(RecordWriter, "write", full)
    result = run("train", "--preset", "digits", "--out", tmp_path / "run", *SETTINGS)
    assert "metrics.jsonl: No space left on device; what was saved before is intact" in line_of(
        result
    )


def test_resume_takes_newest_run_of_its_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits-full"):
        assert run("train", "--preset", "digits", "--out", f"runs/{name}", *SETTINGS).exit_code == 0
    result = run("train", "--preset", "digits", "--resume", *SETTINGS, "--set", "train.steps=6")
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "runs" / "digits" / "metrics.jsonl").read_text().splitlines()) == 3


def test_dit_goes_through_the_same_commands(tmp_path):
    root, dit = (
        tmp_path / "run",
        ["--set", "model.backbone=dit", "--set", "model.compression=1", "--set", "model.heads=2"],
    )
    assert run("train", "--preset", "digits", "--out", root, *SETTINGS, *dit).exit_code == 0
    longer = run("train", "--resume", "--out", root, "--set", "train.steps=6")
    assert longer.exit_code == 0, longer.output
    drawn = run("sample", root, "--num", 3, "--steps", 2, "--guidance", 2)
    assert drawn.exit_code == 0, drawn.output
    assert len(list((root / "images").glob("0*.png"))) == 3
    assert "model.backbone was 'dit' and is now" in line_of(
        run("train", "--resume", "--out", root, "--set", "model.backbone=diffussm")
    )


def test_profile_json_holds_the_cost():
    result = run("profile", "--preset", "xl-256", "--preset", "digits", "--json")
    models = json.loads(result.stdout)["models"]
    assert [m["name"] for m in models] == ["xl-256", "digits"]
    assert (models[0]["parameters"], models[0]["tokens"], models[0]["positions"]) == (
        673_088_272,
        1024,
        512,
    )
    assert models[0]["gflops"] == pytest.approx(sum(models[0]["parts"].values()))


def test_resume_continues_and_rejects_drift(tmp_path):
    root = tmp_path / "run"
    assert run("train", "--preset", "digits", "--out", root, *SETTINGS).exit_code == 0
    finished = run("train", "--resume", "--out", root)
    assert finished.exit_code == 0
    assert "is at step 4 and train.steps is 4; nothing to do" in finished.stderr
    longer = run("train", "--resume", "--out", root, "--set", "train.steps=6")
    assert longer.exit_code == 0, longer.output
    steps = [json.loads(line)["step"] for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]
    for change, words in {
        "model.depth=3": "model.depth was 2 and is now 3",
        "train.batch_size=16": "train.batch_size was 8 and is now 16",
        "data.flip=true": "data.flip was False and is now True",
        "train.optimizer=muon": "train.optimizer was 'adamw' and is now 'muon'",
    }.items():
        assert words in line_of(
            run("train", "--resume", "--out", root, "--set", "train.steps=9", "--set", change)
        )


MISTAKES = {
    "run without its option": (
        ["train", "--resume", "runs/mnist"],
        "(runs/mnist): name a run by --out, images by --data, a preset by --preset. See: ",
    ),
    "unknown command": (["trian"], "No such command 'trian'. Did you mean 'train'? See: "),
    "option that nothing is like": (["train", "--qqq", "3"], "error: No such option: --qqq. See: "),
    "unknown option": (["train", "--presets", "x"], "--presets"),
    "unknown preset": (["train", "--preset", "xl256"], "no preset 'xl256'; did you mean 'xl-256'?"),
    "missing preset file": (
        ["train", "--preset", "mine.yaml"],
        "cannot read 'mine.yaml': No such file",
    ),
    "unknown field": (
        ["train", "--set", "train.learningrate=1"],
        "unknown field train.learningrate",
    ),
    "wrong type": (
        ["train", "--set", "train.steps=many"],
        "train.steps: 'many' must be a whole number",
    ),
    "missing latents": (
        ["train", "--preset", "xl-256"],
        "diffussm encode IMAGES latents/imagenet-256",
    ),
    "missing data": (
        ["train", "--preset", "digits", "--data", "nowhere"],
        "cannot read the folder 'nowhere'",
    ),
    "missing run": (["sample", "nowhere"], "RUN: no folder 'nowhere'; train one with: diffussm"),
    "mistyped model": (["sample", "mnsit"], "RUN: no folder 'mnsit'; did you mean 'mnist'?"),
    "missing file": (
        ["sample", "DiT-XL-2-256x256.pt"],
        "RUN: no file 'DiT-XL-2-256x256.pt'; the READMEs of facebookresearch/DiT and willisma/SiT",
    ),
    "no runs": (["sample"], "no run in runs/; train one first: diffussm train"),
    "value of resume": (["train", "--resume=yes"], "'--resume' does not take a value"),
    "device": (
        ["train", "--preset", "digits", "--set", "train.device=tpu"],
        "device: 'tpu' is not available",
    ),
    "number": (["sample", "x", "--num", "0"], "--num: 0 must be at least 1. See: "),
    "no number": (["sample", "x", "--num", "a"], "--num: 'a' must be a whole number. See: "),
    "no fraction": (["sample", "x", "--guidance", "a"], "--guidance: 'a' must be a number. See: "),
    "choice": (["sample", "x", "--sampler", "eulr"], "error: --sampler: 'eulr' is not one of 'ddp"),
    "name too long": (["train", "--out", "x" * 300], "--out: 'xxx"),
    "folder too long": (["encode", "a", "b/" + "x" * 300], "TARGET: 'b/xxx"),
    "empty run": (["sample", ""], "RUN: is empty; name a file or folder, or leave it out"),
    "empty data": (
        ["train", "--data", ""],
        "--data: is empty; name a file or folder, or leave it out",
    ),
    "empty preset": (
        ["train", "--preset", ""],
        "--preset: is empty; name a preset or a YAML file, or leave it out",
    ),
    "empty source": (
        ["encode", "", "b"],
        "SOURCE: is empty; name a file or folder, or leave it out",
    ),
    "paper and figure": (
        ["profile", "--paper", "--figure", "x.svg"],
        "--figure: not used, because --paper only prints",
    ),
    "run too long": (["sample", "x" * 300], "RUN: 'xxx"),
    "samples too long": (["eval", "x" * 300], "xxx"),
    "no UTF-8": (["train", "--out", "o_caf\udce9"], r"--out: 'o_caf\udce9' is not UTF-8 text"),
    "no UTF-8 in text": (
        ["train", "--set", "data.path=\udce9"],
        r"--set: 'data.path=\udce9' is not UTF-8 text",
    ),
    "NUL": (["train", "--data", "a\0b"], r"--data: 'a\x00b' holds a NUL byte"),
    "NUL in a field": (
        ["train", "--set", r'data.path="a\0b"'],
        r"data.path: 'a\x00b' holds a NUL byte",
    ),
    "no such folder": (
        ["train", "--preset", "digits", "--out", "/proc/nope/x"],
        "cannot write to '/proc/nope/x': No such file",
    ),
    "too many images": (
        ["sample", "x", "--num", "10000000"],
        "--num: 10000000 must be at most ",
    ),
    "seed": (["sample", "x", "--seed", str(2**63)], "--seed: 9223372036854775808 must be "),
    "batch size": (
        ["train", "--set", "train.batch_size=99999999999999999999"],
        "train.batch_size: 9999",
    ),
    "class names": (
        ["train", "--preset", "digits", "--set", "data.class_names=x"],
        "data.class_names: 'x', ... are not the classes of builtin:digits; remove the field",
    ),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_errors(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in line_of(run(*arguments))
    assert list(tmp_path.iterdir()) == []  # and leave nothing behind


SAMPLE_MISTAKES = {
    "class out of range": (["--classes", "3,10"], "--classes: '3,10' must name labels from 0 to 9"),
    "class by name": (
        ["--classes", "cat"],
        "--classes: the run has no class 'cat'; valid: 0, 1, 2",
    ),
    "class range backwards": (["--classes", "5-3"], "--classes: '5-3' must name labels"),
    "class range without end": (
        ["--classes", "0-999999999"],
        "--classes: '0-999999999' must name labels from 0 to 9",
    ),
    "class numbers beyond reading": (["--classes", "9" * 5000], "--classes: the run has no class"),
    "classes in lines": (
        ["--classes", "3\n7"],
        r"--classes: '3\n7' must be labels or names separated by commas",
    ),
    "no class": (["--classes", ""], "--classes: '' must name labels from 0 to 9"),
    "balanced and classes": (
        ["--balanced", "--classes", "3"],
        "--balanced: needs a class-conditional model, and no",
    ),
    "sampler of a flow": (
        ["--sampler", "sde"],
        "--sampler: sde is for a flow; with objective noise, choose ddim",
    ),
    "guidance without end": (["--guidance", "inf"], "--guidance: inf must be a finite number"),
    "guidance that is none": (["--guidance", "nan"], "guidance"),
    "guidance too strong": (
        ["--guidance", "1e6"],
        "--guidance: 1000000.0 must be at most 1000",
    ),
    "too many steps": (["--steps", "1001"], "error: --steps: 1001 must be at most"),
    "interval": (["--guidance-interval", "9,1"], "--guidance-interval: '9,1' must be LO,HI"),
    "no guide": (
        ["--guidance", "2", "--guide-with", "nope"],
        "--guide-with: no folder 'nope'; name a run, a model of the package",
    ),
    "out is a file": (["--out", "/dev/null/x"], "--out: cannot write"),
    "grid of another kind": (["--grid", "g.jpg"], "--grid: 'g.jpg' must end in .png"),
    "grid as an image": (
        ["--out", "o", "--grid", "o/000002.png"],
        "--grid: 'o/000002.png' is the name of an image",
    ),
    "empty out": (["--out", ""], "--out: is empty; name a file or folder"),
}


@pytest.mark.parametrize(("arguments", "words"), SAMPLE_MISTAKES.values(), ids=SAMPLE_MISTAKES)
def test_wrong_sampling_requests_are_one_line_errors(trained, arguments, words):
    assert words in line_of(run("sample", trained, "--num", 1, *arguments))


def test_names_are_printed_verbatim(trained, tmp_path, monkeypatch):
    """A name of a folder is neither markup nor an emoji, and one that the terminal cannot spell is
    escaped.
    """
    monkeypatch.chdir(tmp_path)
    out = "o_[/b]/:cat: \u2603"
    arguments = ["sample", str(trained), "--num", "1", "--steps", "1", "--out", out]
    result = CliRunner(charset="latin-1").invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert r"in 'o_[/b]/:cat: \u2603'" in result.stderr
    assert result.stdout.strip() == r"o_[/b]/:cat: \u2603/grid.png"


def test_sample_says_which_run_and_folder_it_takes(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(trained)
    first = run("sample", "--num", 1, "--steps", 1)
    assert "the newest run: runs/mine (finished)" in first.stderr
    assert "another request" not in first.stderr
    second = run("sample", "--num", 1, "--steps", 2)
    assert (
        "runs/mine/images holds images of another request; these go to runs/mine/images-2"
        in second.stderr
    )


def test_grid_never_replaces_other_file(trained, tmp_path):
    grid, arguments = (
        tmp_path / "mine.png",
        ("sample", trained, "--num", 1, "--steps", 1, "--out", tmp_path / "o"),
    )
    grid.write_bytes(b"mine")
    assert "mine.png' exists and would be replaced" in line_of(run(*arguments, "--grid", grid))
    assert grid.read_bytes() == b"mine"
    grid.unlink()
    for _ in range(2):  # the same command again replaces its own grid
        assert run(*arguments, "--grid", grid).exit_code == 0
    other = ("sample", trained, "--num", 1, "--steps", 2, "--out", tmp_path / "o2", "--grid", grid)
    assert "exists and would be replaced" in line_of(run(*other))


def test_film_never_replaces_other_file(trained, tmp_path):
    film = tmp_path / "mine.gif"
    arguments = ("sample", trained, "--num", 1, "--steps", 1, "--out", tmp_path / "o")
    film.write_bytes(b"mine")
    line = line_of(run(*arguments, "--film", film))
    assert "--film:" in line
    assert "mine.gif' exists and would be replaced" in line
    assert film.read_bytes() == b"mine"
    assert not (tmp_path / "o").exists()
    film.unlink()
    # The same command again replaces its own film, also after one without a film.
    for options in (["--film", film], ["--film", film], [], ["--film", film]):
        assert run(*arguments, *options).exit_code == 0
    other = ("sample", trained, "--num", 1, "--steps", 2, "--out", tmp_path / "o2", "--film", film)
    assert "exists and would be replaced" in line_of(run(*other))


@pytest.mark.parametrize("content", ['{"name": "mine"}', '{"step": "one"}', "[1]", "{"])
def test_folder_with_meta_of_another_program_is_not_to_be_deleted(trained, tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    line = line_of(run("sample", trained, "--num", 1, "--steps", 1, "--out", tmp_path))
    assert "is not a folder of samples, as its meta.json shows; name another folder" in line
    assert "delete" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["meta.json"]


@pytest.mark.parametrize("name", ["grid.png", "samples.npz"])
def test_files_beside_samples_replace_none_of_another_program(trained, tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    command = ("sample", trained, "--num", 1, "--steps", 1, "--out", tmp_path, "--npz")
    line = line_of(run(*command))
    assert f"--out: '{tmp_path / name}' is not of samples and would be replaced" in line
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]
    (tmp_path / name).unlink()
    for _ in range(2):  # their own are written again
        assert run(*command).exit_code == 0


def test_empty_image_is_drawn_again(trained, tmp_path):
    """As a power failure may leave it; the grid does not show it."""
    arguments = (
        "sample",
        trained,
        "--num",
        101,
        "--steps",
        1,
        "--out",
        tmp_path,
        "--batch-size",
        101,
    )
    assert run(*arguments).exit_code == 0
    last = tmp_path / "000100.png"
    before = last.read_bytes()
    last.write_bytes(b"")
    assert run(*arguments).exit_code == 0
    assert last.read_bytes() == before


@pytest.mark.parametrize(("fast", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_sample_takes_bf16_where_hardware_has_it(trained, tmp_path, monkeypatch, fast, precision):
    monkeypatch.setattr(device, "has_bf16", lambda device: fast)
    assert run("sample", trained, "--num", 1, "--steps", 1, "--out", tmp_path).exit_code == 0
    assert json.loads((tmp_path / "meta.json").read_text())["precision"] == precision


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied"),
        (
            PermissionError(errno.EACCES, "Permission denied", "\x1b[31mred"),
            r"\x1b[31mred: Permission denied",
        ),
        (OSError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: Not a directory"),
        (OSError(errno.EMFILE, "Too many open files", "a/b"), "a/b: Too many open files"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "No space left on device; what was saved before is intact",
        ),
    ],
)
def test_system_error_is_one_line_wherever_it_arises(monkeypatch, error, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(runs, "find_run", fail)
    assert line_of(run("sample", "x")) == f"diffussm: error: {line}"


@pytest.mark.parametrize(
    "error",
    [
        OSError("a library's own"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        ValueError("ours"),
        UnicodeEncodeError("ascii", "x", 0, 1, "ours"),
        KeyError("ours"),
    ],
    ids=repr,
)
def test_bug_of_ours_keeps_its_traceback(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(runs, "find_run", fail)
    with pytest.raises(type(error)):
        run("sample", "x")


@pytest.mark.parametrize(
    "command", [[], ["encode"], ["train"], ["sample"], ["eval"], ["profile"]], ids=" ".join
)
def test_help_ends_with_examples(command):
    """Two to four a command, of options that there are."""
    shown = run(*command, "--help").stdout
    assert run(*command, "-h").stdout == shown
    examples = shown.partition("Examples:\n")[2].replace("\\\n", " ").splitlines()
    lines = [e.split() for e in examples if e and not e.startswith("  # ")]
    assert 2 <= len(lines) <= 4
    for words in lines:
        assert "diffussm" in words or "diffussm_cli" in words
        name = words[1 + next(i for i, w in enumerate(words) if w in ("diffussm", "diffussm_cli"))]
        assert not command or command == [name]
        helped = run(name, "--help").stdout
        own = words[words.index(name) :]
        assert all(w in helped for w in own if w.startswith("--"))


def test_out_that_is_taken_or_a_file_is_rejected(trained, tmp_path):
    assert "is not empty; add --resume" in line_of(
        run("train", "--preset", "digits", "--out", trained)
    )
    (tmp_path / "file").write_text("")
    assert "is a file" in line_of(run("train", "--preset", "digits", "--out", tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    assert "holds no finished training" in line_of(run("sample", tmp_path / "empty"))


def test_damaged_picture_in_training_is_named(tmp_path):
    for i in range(8):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    result = run(
        *("train", "--preset", "digits", "--data", tmp_path, "--out", tmp_path / "run", *SETTINGS),
        *("--set", "model.num_classes=0"),
    )
    assert "3.png: not a PNG" in line_of(result)


LONG = [*SETTINGS, "--set", "train.steps=100000"]


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    """In an interpreter of its own, as a user starts it."""
    root = tmp_path / "run"
    command = ["-m", "diffussm_cli", "train", "--preset", "digits", "--out", str(root), *LONG]
    every = ["--set", "train.checkpoint_every=20"]
    process = subprocess.Popen(
        [sys.executable, *command, *every], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not runs.list_checkpoints(root):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"diffussm train --resume --out {root}" in messages
    assert "Traceback" not in messages
    step = runs.read_state(runs.newest_good(root)[0])["step"]
    assert f"stopped at step {step} of 100000" in messages


def test_kill_inside_checkpoint_write_leaves_the_one_before(tmp_path):
    """SIGKILL as soon as an unfinished checkpoint is seen, until one is caught in the act."""
    for attempt in range(10):
        root = tmp_path / str(attempt)
        command = ["train", "--preset", "digits", "--out", root, *LONG]
        every = ["--set", "train.checkpoint_every=1"]
        job = Background(*command, *every, log=tmp_path / f"{attempt}.log")
        job.wait_until(lambda root=root: runs.list_checkpoints(root))
        job.wait_until(lambda root=root: any((root / "checkpoints").glob(f"{PARTIAL}*")), pause=0)
        job.kill()
        if any((root / "checkpoints").glob(f"{PARTIAL}*")):
            break
    else:
        pytest.fail("no kill fell into a write")
    step = runs.read_state(runs.newest_good(root)[0])["step"]
    result = run("train", "--resume", "--out", root, "--set", f"train.steps={step + 2}")
    assert result.exit_code == 0, result.output
    assert runs.read_state(runs.newest_good(root)[0])["step"] == step + 2
    assert not any((root / "checkpoints").glob(f"{PARTIAL}*"))

"""What befalls runs that are left alone: signals, full disks, damaged checkpoints, a second job in
the same folder.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from diffussm_cli import runs
from diffussm_cli.commands.stopping import PREEMPTED
from diffussm_cli.config import load_config, to_yaml
from diffussm_cli.data.folder import ImageFolder
from diffussm_cli.errors import DataError
from diffussm_cli.events import TrainingRecord, finish
from diffussm_cli.machine.files import locked, sha256
from diffussm_cli.training import session
from diffussm_cli.training.record import RecordWriter
from tests.conftest import TINY
from tests.helpers import SETTINGS, Background, line_of, run

pytest.importorskip("sklearn")


def train(root, *arguments):
    return run("train", "--preset", "digits", "--out", root, *SETTINGS, *arguments)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    root = tmp_path_factory.mktemp("once") / "run"
    assert train(root).exit_code == 0
    return root


@pytest.fixture
def trained(once, tmp_path):
    """A finished run of four steps with checkpoints at 2 and 4."""
    shutil.copytree(once, tmp_path / "run")
    return tmp_path / "run"


def steps(root):
    path = root / "metrics.jsonl"
    return (
        [json.loads(line)["step"] for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


# ------------------------------------------------------------------------------------------- resume
def test_same_command_begins_continues_and_is_done(tmp_path):
    root = tmp_path / "run"
    first = train(root, "--resume")
    assert first.exit_code == 0
    assert f"no checkpoint in {root} yet; training begins" in first.stderr
    again = train(root, "--resume")
    assert again.exit_code == 0
    assert "is at step 4 and train.steps is 4; nothing to do" in again.stderr
    assert train(root, "--resume", "--set", "train.steps=6").exit_code == 0
    assert steps(root) == [2, 4, 6]


def test_resume_restarts_run_without_checkpoint(trained):
    for path in runs.list_checkpoints(trained):
        (path / runs.STATE).unlink()
    assert train(trained, "--resume").exit_code == 0
    assert steps(trained) == [2, 4]


LEFT_BEHIND = {
    "a lock": lambda root: (root / ".lock-0").write_text(""),
    "an unfinished file": lambda root: (root / ".partial-config.yaml.1").write_text(""),
    "nothing": lambda root: None,
    "a run without a checkpoint": lambda root: [
        (root / "checkpoints" / ".partial-step-00000002").mkdir(parents=True),
        (root / "config.yaml").write_text(to_yaml(load_config("digits", TINY))),
        (root / "metrics.jsonl").write_text('{"step": 2}\n{"st'),
        (root / "tensorboard").mkdir(),
        (root / "samples").mkdir(),
    ],
}


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["", "--resume"])
@pytest.mark.parametrize("left", LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_folder_without_checkpoint_is_trained_from_the_start(tmp_path, left, resume):
    root = tmp_path / "run"
    root.mkdir()
    left(root)
    result = train(root, *resume)
    assert result.exit_code == 0, result.output
    assert steps(root) == [2, 4]


@pytest.mark.parametrize("options", [[], ["--resume"]], ids=["", "--resume"])
def test_killed_start_leaves_its_name_free(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / ".lock-0").write_text("")
    with locked(tmp_path / "runs" / "digits" / ".lock-0"):  # another process is still loading
        assert run("train", "--preset", "digits", *SETTINGS, *options).exit_code == 0
    assert (tmp_path / "runs" / "digits-2" / "final").is_dir()


REFUSED = {
    "a run": (
        lambda root: [],
        [],
        "is not empty; add --resume to continue it, or choose another folder",
    ),
    "only final/": (
        lambda root: shutil.rmtree(root / "checkpoints"),
        [],
        "is not empty; add --resume",
    ),
    "config.yaml among others": (
        lambda root: [only(root, "photo.png"), (root / "config.yaml").write_text("")],
        [],
        "is not empty; add --resume",
    ),
    "a foreign folder": (
        lambda root: only(root, "photo.png"),
        [],
        "is not empty and holds no run; choose another folder",
    ),
    "a foreign folder, resumed": (
        lambda root: only(root, "photo.png"),
        ["--resume"],
        "is not empty and holds no run",
    ),
    "a file": (
        lambda root: [shutil.rmtree(root), root.write_text("")],
        ["--resume"],
        "is a file; choose a folder",
    ),
}


def only(root, name):
    shutil.rmtree(root)
    root.mkdir()
    (root / name).write_text("")


@pytest.mark.parametrize(("change", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_output_in_the_way_is_rejected_and_kept(trained, change, options, words):
    change(trained)
    line = line_of(train(trained, *options))
    assert line.startswith(f"diffussm: error: --out: '{trained}' {words}")


CONFIGS = {
    "empty": ("", "is empty or damaged; delete it and repeat"),
    "cut in a word": (
        "preset: digits\nmodel:\n  backbone: diffussm\n  hid",
        "is empty or damaged (not valid YAML",
    ),
    "cut at a line": (
        "preset: digits\nmodel:\n  backbone: diffussm\n",
        "is empty or damaged; delete it",
    ),
    "another kind": ("[1, 2]", "is empty or damaged; delete it"),
    "gone": (None, "has checkpoints but no config.yaml; give the --preset and --set"),
}


@pytest.mark.parametrize(("text", "words"), CONFIGS.values(), ids=CONFIGS)
def test_damaged_configuration_is_named_with_the_remedy(trained, monkeypatch, text, words):
    path = trained / runs.CONFIG
    path.write_text(text) if text is not None else path.unlink()
    line = line_of(run("train", "--resume", "--out", trained))
    assert line.startswith(
        f"diffussm: error: --out: {path if text is not None else repr(str(trained))} {words}"
    )
    monkeypatch.chdir(trained.parent)
    (trained.parent / "runs").mkdir()
    trained.rename(trained.parent / "runs" / "mnist")
    if text is not None:
        assert words in line_of(run("train", "--resume"))
        assert line_of(run("train", "--resume")).startswith(
            "diffussm: error: --resume: runs/mnist/config.yaml"
        )
        assert words in line_of(run("train", "--preset", "mnist", "--resume", *SETTINGS))
        os.unlink("runs/mnist/config.yaml")
    result = train("runs/mnist", "--resume", "--set", "train.steps=6")
    assert result.exit_code == 0, result.output
    assert "config.yaml was missing; it will be written again" in result.stderr
    assert runs.read_config(Path("runs/mnist")).train.steps == 6


@pytest.mark.parametrize(
    "lost", ["absent", "a bit flipped", "of fewer steps", "without hashes", "config damaged"]
)
def test_finished_run_without_final_gets_it_again(trained, lost):
    """As after a kill between the last checkpoint and final/."""
    final, steps = trained / "final", 4
    before = (final / runs.MODEL).read_bytes()
    if lost == "absent":
        shutil.rmtree(final)
    elif lost == "a bit flipped":
        flip(final / runs.MODEL)
        assert (
            "model.safetensors has changed since it was written; write it again with: "
            "diffussm train --resume"
        ) in (line_of(run("sample", trained, "-n", 1)))
    elif lost == "without hashes":
        (final / runs.STATE).unlink()
        assert run("sample", trained, "-n", 1, "--steps", 1).exit_code == 0
    elif lost == "config damaged":
        (final / runs.CONFIG).write_text("")
    else:
        steps = 6
        shutil.copytree(final, trained / "kept")
        assert train(trained, "--resume", "--set", "train.steps=6").exit_code == 0
        before = (final / runs.MODEL).read_bytes()
        shutil.rmtree(final)
        (trained / "kept").rename(final)
    command = ("--resume", "--set", f"train.steps={steps}")
    result = train(trained, *command)
    assert result.exit_code == 0, result.output
    assert f"trained {steps} steps; weights in {final}" in result.stderr
    assert (final / runs.MODEL).read_bytes() == before
    assert runs.find_run(trained).weights == final / runs.MODEL
    assert "nothing to do" in train(trained, *command).stderr


def test_read_only_working_directory_names_the_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def forbid(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "runs")

    monkeypatch.setattr(Path, "mkdir", forbid)
    line = line_of(run("train", "--preset", "digits", *SETTINGS))
    assert "--out: cannot write to 'runs/digits': Permission denied; choose another --out" in line


def test_names_are_printed_verbatim(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(Path("o_[/b]") / "[red]x", "--set", "train.sample_every=4")
    assert result.exit_code == 0, result.output
    for line in (
        "weights in o_[/b]/[red]x/final",
        "last preview: o_[/b]/[red]x/samples/step-00000004.png",
    ):
        assert line in result.stderr
    again = train(Path("o_[/b]") / "[red]x", "--resume", "--set", "train.sample_every=4")
    assert "o_[/b]/[red]x is at step 4" in again.stderr


def test_harmless_changes_are_listed(trained):
    result = train(trained, "--resume", "--set", "train.steps=6", "--set", "train.lr=1e-3")
    assert result.exit_code == 0
    assert "changed: train.steps was 4 and is now 6" in result.stderr
    assert "changed: train.lr was 0.002 and is now 0.001" in result.stderr


# ------------------------------------------------------------------------------------------- damage
def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "bit flipped in the weights": lambda c: flip(c / runs.MODEL),
    "bit flipped in the optimiser": lambda c: flip(c / runs.OPTIMIZER),
    "truncated": lambda c: os.truncate(c / runs.EMA, 1000),
    "a file is gone": lambda c: (c / runs.OPTIMIZER).unlink(),
    "a pipe": lambda c: [(c / runs.EMA).unlink(), os.mkfifo(c / runs.EMA)],
    "state cut short": lambda c: os.truncate(c / runs.STATE, 10),
    "hashes are no hashes": lambda c: (c / runs.STATE).write_text('{"step": 4, "sha256": 7}'),
    "state nested deep": lambda c: (c / runs.STATE).write_text("[" * 100_000),
    "a negative step": lambda c: change_state(c, step=-1),
    "another step": lambda c: change_state(c, step=14),
    "bit flipped in the state": lambda c: flip_digit(c / runs.STATE, b'"images": 32'),
    "a further file is gone": lambda c: change_state(
        c, sha256={**runs.read_state(c)["sha256"], runs.TEACHER: "0"}
    ),
    "a step that is no number": lambda c: change_state(c, step=True),
    "state is a list": lambda c: (c / runs.STATE).write_text("[]"),
    "state is no text": lambda c: (c / runs.STATE).write_bytes(b"\xff\xfe{}"),
}


def flip_digit(path, text):
    """Flip the lowest bit of the last character of a text in a file."""
    before = path.read_bytes()
    assert text in before
    path.write_bytes(before.replace(text, text[:-1] + bytes([text[-1] ^ 1])))


def change_state(checkpoint, **values):
    state = runs.read_state(checkpoint)
    (checkpoint / runs.STATE).write_text(json.dumps(state | values))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_named_and_the_former_one_taken(trained, damage):
    newest = runs.list_checkpoints(trained)[-1]
    damage(newest)
    result = train(trained, "--resume", "--set", "train.steps=6")
    assert result.exit_code == 0, result.output
    assert f"skipped: {newest}" in result.stderr
    assert "; its folder is removed when the next checkpoint is written" in result.stderr
    assert steps(trained) == [2, 4, 6]
    assert runs.newest_good(trained)[1] == []


def test_checkpoints_after_a_damaged_one_are_kept(trained):
    """Also if only one is to be kept, and it is of an earlier step than the damaged one."""
    flip(runs.list_checkpoints(trained)[-1] / runs.MODEL)
    more = ("train.steps=6", "train.keep_checkpoints=1", "train.checkpoint_every=1")
    asked = itertools.count()
    config = runs.resumed_config(trained, more)
    finish(session.train(config, trained, resume=True, stop=lambda: next(asked) == 1))
    assert [runs.step_of(path) for path in runs.list_checkpoints(trained)] == [3]
    assert runs.newest_good(trained)[1] == []


def test_copies_of_checkpoints_are_left_alone(trained):
    """As people make them, under names of their own."""
    kept = trained / "checkpoints" / "step-00000004-mybackup"
    shutil.copytree(trained / "checkpoints" / "step-00000004", kept)
    (trained / "checkpoints" / "step-old").mkdir()
    more = ("train.steps=8", "train.keep_every=4", "train.keep_checkpoints=1")
    result = train(trained, "--resume", *(part for s in more for part in ("--set", s)))
    assert result.exit_code == 0, result.output
    names = {p.name for p in (trained / "checkpoints").iterdir()}
    assert names == {"step-00000004", "step-00000008", "step-00000004-mybackup", "step-old"}
    assert [p.name for p in runs.list_checkpoints(trained)] == ["step-00000004", "step-00000008"]


LOGS = {
    "no text": lambda log: log.write_bytes(b'{"step": 2}\n\xff\xfe\n'),
    "a step that is text": lambda log: log.write_text('{"step": "2"}\n{"step": 4}\n'),
    "a step that is null": lambda log: log.write_text('{"step": null}\n'),
    "no object": lambda log: log.write_text("7\n"),
    "nested deep": lambda log: log.write_text("[" * 100_000 + "\n"),
    "a folder": lambda log: [log.unlink(), log.mkdir()],
    "a pipe": lambda log: [log.unlink(), os.mkfifo(log)],
}


@pytest.mark.parametrize("damage", LOGS.values(), ids=LOGS)
def test_damaged_log_is_set_aside_and_training_continues(trained, damage):
    log = trained / "metrics.jsonl"
    (trained / "metrics.jsonl.damaged-1").write_text("of an earlier accident")
    damage(log)
    before = log.read_bytes() if log.is_file() else None
    shutil.rmtree(trained / "tensorboard")
    (trained / "tensorboard").write_text("")
    result = train(trained, "--resume", "--set", "train.steps=6")
    assert result.exit_code == 0, result.output
    renamed = "it was renamed to metrics.jsonl.damaged-2, and a new one begins"
    assert f"warning: {log} is damaged; {renamed}" in result.stderr
    assert (
        f"warning: {trained / 'tensorboard'} is damaged; it was renamed to tensorboard.damaged-1"
        in result.stderr
    )
    assert steps(trained) == [6]
    assert (trained / "tensorboard").is_dir()
    aside = trained / "metrics.jsonl.damaged-2"
    assert (aside.read_bytes() if aside.is_file() else None) == before


@pytest.mark.parametrize("text", ["[]", "7", '{"eval/fid": "low"}', "{", "[" * 100_000])
def test_damaged_metrics_of_the_best_weights_are_named(trained, text):
    shutil.copytree(trained / "final", trained / "best")
    (trained / "best" / runs.METRICS).write_text(text)
    assert "best/metrics.json: damaged; delete the folder" in line_of(
        run("sample", trained / "best", "-n", 1)
    )
    assert "best/metrics.json: damaged; delete the folder" in line_of(
        train(trained, "--resume", "--set", "train.steps=6")
    )


def test_weights_of_best_are_checked(trained):
    best = trained / "best"
    runs.write_weights(
        best,
        runs.read_config(trained),
        runs.read_tensors(trained / "final" / runs.MODEL),
        4,
        {"step": 4},
    )
    assert runs.find_run(best).step == 4
    flip(best / runs.MODEL)
    assert (
        "best/model.safetensors has changed since it was written; give the run folder"
        in line_of(run("sample", best, "-n", 1))
    )


def test_optimiser_state_that_is_not_finite_is_rejected(trained):
    """With hashes that fit, as a stranger would make them."""
    newest = runs.list_checkpoints(trained)[-1]
    state, tensors = runs.read_state(newest), runs.read_tensors(newest / runs.OPTIMIZER)
    name = next(n for n in tensors if n.endswith("/exp_avg"))
    tensors = {n: t * float("nan") if n == name else t.clone() for n, t in tensors.items()}
    save_file(tensors, newest / runs.OPTIMIZER)
    state["sha256"][runs.OPTIMIZER] = sha256(newest / runs.OPTIMIZER)
    runs.write_state(newest, state)
    line = line_of(train(trained, "--resume", "--set", "train.steps=6"))
    assert (
        f"optimizer.safetensors: damaged: {name.removesuffix('/exp_avg')} holds numbers that "
        "are not finite"
    ) in line


def test_run_without_good_checkpoint_is_one_line_error(trained):
    for path in runs.list_checkpoints(trained):
        flip(path / runs.MODEL)
    assert "has no good checkpoint:" in line_of(
        train(trained, "--resume", "--set", "train.steps=6")
    )
    assert "has changed since it was written" in line_of(
        train(trained, "--resume", "--set", "train.steps=6")
    )


def test_sampling_skips_a_damaged_checkpoint(trained, tmp_path):
    shutil.rmtree(trained / "final")
    newest = runs.list_checkpoints(trained)[-1]
    flip(newest / runs.EMA)
    assert runs.find_run(trained).step == 2
    assert "has changed since it was written; give the run folder" in line_of(
        run("sample", newest, "-n", 1)
    )


def test_run_is_read_under_any_locale(trained):
    """Its configuration holds names of classes in UTF-8; here the locale's encoding is ASCII."""
    path = trained / "final" / runs.CONFIG
    path.write_text(path.read_text(encoding="utf-8").replace("- '0'", "- \u732b"), encoding="utf-8")
    code = f"""
import locale
from pathlib import Path
from diffussm_cli import runs
assert locale.getpreferredencoding(False) != "UTF-8"
config = runs.find_run(Path({str(trained)!r})).config
runs.write_weights(Path({str(trained / "best")!r}), config, {{}}, 1)
"""
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ascii_only
    )
    assert done.returncode == 0, done.stderr
    for folder in ("final", "best"):
        assert runs.read_config(trained / folder).data.class_names[0] == "\u732b"


# -------------------------------------------------------------------------------------- two writers
def test_second_job_in_folder_is_rejected(trained):
    with locked(trained / ".lock-0"):
        assert "another process is training in" in line_of(
            train(trained, "--resume", "--set", "train.steps=6")
        )
    assert train(trained, "--resume", "--set", "train.steps=6").exit_code == 0


# ----------------------------------------------------------------------------------- signals, disks
def start(root, *settings):
    """`train --resume` in a process of its own."""
    more = [*SETTINGS, *(part for s in settings for part in ("--set", s)), "--resume"]
    log = root.with_suffix(".log")
    return Background("train", "--preset", "digits", "--out", root, *more, log=log)


def test_sigterm_saves_and_exits_with_its_own_code(tmp_path):
    root = tmp_path / "run"
    job = start(root, "train.steps=100000", "train.checkpoint_every=20")
    job.wait_until(lambda: runs.list_checkpoints(root))
    job.send_signal(signal.SIGTERM)
    code, messages = job.wait()
    assert code == PREEMPTED
    newest, damaged = runs.newest_good(root)
    assert damaged == []
    assert (
        f"stopped at step {runs.read_state(newest)['step']} of 100000, checkpoint saved" in messages
    )
    assert "Traceback" not in messages


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 1000])
def test_full_disk_on_resume_is_one_line_error_and_harms_nothing(trained, size):
    before = {p.name: p.read_bytes() for p in trained.iterdir() if p.is_file()}
    with full_disk(size):
        result = train(trained, "--resume", "--set", "train.steps=6")
    assert f"--out: cannot write to '{trained}': File too large" in line_of(result)
    assert {p.name: p.read_bytes() for p in trained.iterdir() if p.is_file()} == before
    assert train(trained, "--resume", "--set", "train.steps=6").exit_code == 0


def test_full_disk_while_recording_is_one_line_error(trained):
    """TensorBoard's thread meets the limit first; its error must not appear as a traceback."""
    more = ("train.steps=300", "train.log_every=1", "train.checkpoint_every=1000")
    with full_disk(3000):
        result = train(trained, "--resume", *(part for s in more for part in ("--set", s)))
    assert (
        f"diffussm: error: {trained}: File too large; what was saved before is intact"
        in line_of(result)
    )


def test_kill_while_log_is_rewritten_keeps_it(trained, monkeypatch):
    class Killed(BaseException):
        """Stands for a SIGKILL: nothing catches it."""

    def die(self, *_, **__):
        if self.name == "metrics.jsonl":
            self.open("w").close()
        raise Killed

    def die_before_the_new_name(self, *_):
        raise Killed

    monkeypatch.setattr(Path, "write_text", die)
    monkeypatch.setattr(Path, "replace", die_before_the_new_name)
    with pytest.raises(Killed):
        RecordWriter(trained, 2)
    assert steps(trained) == [2, 4]


# -------------------------------------------------------------------------------- unreadable images
@pytest.fixture
def pictures(tmp_path):
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / f"{i:02d}.png")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(folder / path.name)
    for i in (3, 7):
        (folder / f"{i:02d}.png").write_bytes(b"no image")
    return folder


def train_on(pictures, root, *more):
    return train(root, "--data", pictures, "--set", "model.num_classes=0", *more)


def test_unreadable_images_are_named_before_training(pictures, tmp_path):
    line = line_of(train_on(pictures, tmp_path / "run"))
    assert f"data.path: 2 of 12 images in '{pictures}' cannot be read: 03.png: not a PNG" in line
    assert "; 07.png: not a PNG" in line
    assert line.endswith("skip them: --set data.skip_unreadable=true")
    assert not (tmp_path / "run").exists()
    (pictures / "03.png").write_bytes((pictures / "04.png").read_bytes())
    (pictures / "07.png").write_bytes((pictures / "04.png").read_bytes())
    assert train_on(pictures, tmp_path / "run").exit_code == 0


def test_unreadable_images_are_left_out_and_recorded(pictures, tmp_path, monkeypatch):
    root, skip = tmp_path / "run", ("--set", "data.skip_unreadable=true")
    result = train_on(pictures, root, *skip)
    assert result.exit_code == 0, result.output
    reason = "not a PNG, JPEG, WEBP, BMP, GIF, TIFF image"
    assert [json.loads(line) for line in (root / "skipped.jsonl").read_text().splitlines()] == [
        {"index": 3, "file": "03.png", "reason": reason},
        {"index": 7, "file": "07.png", "reason": reason},
    ]
    assert (
        f"skipped: 2 images that cannot be read; reasons in {root / 'skipped.jsonl'}"
        in result.stderr
    )
    # on resume nothing is decoded again
    monkeypatch.setattr(ImageFolder, "check", lambda *_: 1 / 0)
    assert train_on(pictures, root, *skip, "--resume", "--set", "train.steps=6").exit_code == 0
    (root / "skipped.jsonl").write_text("{}")
    line = line_of(train_on(pictures, root, *skip, "--resume", "--set", "train.steps=8"))
    assert "skipped.jsonl: damaged" in line


def mend(pictures):
    for i in (3, 7):
        (pictures / f"{i:02d}.png").write_bytes((pictures / "04.png").read_bytes())


def test_changed_images_are_reported_and_checked_before_resume(pictures, tmp_path):
    root, more = tmp_path / "run", ("--resume", "--set", "train.steps=6")
    mend(pictures)
    assert train_on(pictures, root).exit_code == 0
    before = json.loads((root / "data.json").read_text())["first"]
    assert before["images"] == 12
    (pictures / "99.png").write_bytes(b"no image")
    result = train_on(pictures, root, *more)
    assert (
        f"the images in '{pictures}' are not those that {root} began with (12 then, 13 now)"
        in result.stderr
    )
    assert "data.path: 1 of 13 images in" in line_of(result)
    assert steps(root) == [2, 4]
    (pictures / "99.png").unlink()
    # of another size
    Image.new("L", (8, 8), 3).save(pictures / "00.png", optimize=True, pnginfo=comment("a"))
    result = train_on(pictures, root, *more)
    assert result.exit_code == 0
    assert "(12 as before, with other names, labels or sizes)" in result.stderr
    assert (
        "are not those" not in train_on(pictures, root, "--resume", "--set", "train.steps=8").stderr
    )
    (pictures / "11.png").unlink()
    more = ("--resume", "--set", "train.steps=10", "--set", "train.batch_size=8")
    said = train_on(pictures, root, *more).stderr
    assert f"not those that {root} was trained on last (12 then, 11 now)" in said
    after = json.loads((root / "data.json").read_text())
    assert (after["images"], after["first"]) == (11, before)


def comment(text):
    info = PngInfo()
    info.add_text("comment", text)
    return info


def test_image_that_breaks_during_run_is_named_with_two_remedies(pictures, tmp_path):
    root = tmp_path / "run"
    mend(pictures)
    config = load_config(
        "digits", [*TINY, f"data.path={pictures}", "model.num_classes=0", "train.steps=40"]
    )
    good = (pictures / "05.png").read_bytes()

    def broken_at(step, **request):
        for event in session.train(config, root, **request):
            if isinstance(event, TrainingRecord) and event.record["step"] == step:
                (pictures / "05.png").write_bytes(b"no image")

    with pytest.raises(DataError) as caught:
        broken_at(4)
    words = (
        "data.path: 05.png: not a PNG",
        "restore the image",
        "data.skip_unreadable=true",
        f"--resume --out {root}",
    )
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(DataError, match="data.path: 1 of 12 images in"):  # before a step
        broken_at(None, resume=True)
    assert train_on(pictures, root, "--resume", "--set", "data.skip_unreadable=true").exit_code == 0
    assert [
        json.loads(line)["file"] for line in (root / "skipped.jsonl").read_text().splitlines()
    ] == ["05.png"]
    (pictures / "05.png").write_bytes(good)


def test_relative_image_folder_is_found_from_elsewhere_as_the_error_says(
    pictures, tmp_path, monkeypatch
):
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    mend(pictures)
    monkeypatch.chdir(pictures.parent)
    assert train_on(pictures.name, root).exit_code == 0
    monkeypatch.chdir(elsewhere)
    line = line_of(run("train", "--resume", "--out", root, "--set", "train.steps=6"))
    assert "cannot read the folder 'pictures'" in line
    assert f"the run has read '{pictures}': give it as --data, or where it is now" in line
    result = run(
        "train",
        "--resume",
        "--out",
        root,
        "--set",
        "train.steps=6",
        "--set",
        f"data.path={pictures}",
    )
    assert result.exit_code == 0, result.output
    assert f"changed: data.path was 'pictures' and is now '{pictures}'" in result.stderr


def test_class_folder_whose_name_is_no_text_is_rejected_before_training(tmp_path):
    for name in (b"caf\xe9", b"tea"):
        folder = os.fsencode(tmp_path / "pictures") + b"/" + name
        os.makedirs(folder)
        Image.new("L", (8, 8)).save(Path(os.fsdecode(folder)) / "a.png")
    line = line_of(
        train(tmp_path / "run", "--data", tmp_path / "pictures", "--set", "model.num_classes=2")
    )
    assert "is not UTF-8 text; rename it" in line
    assert not (tmp_path / "run").exists()


def test_configuration_removed_during_training_is_rewritten(tmp_path):
    config = load_config("digits", TINY)
    for event in session.train(config, tmp_path / "run"):
        if isinstance(event, TrainingRecord):
            (tmp_path / "run" / runs.CONFIG).unlink(missing_ok=True)
    assert runs.read_config(tmp_path / "run").data.class_names == tuple("0123456789")
    assert (tmp_path / "run" / runs.REPORT).is_file()


def test_full_disk_ends_training_with_one_line_error_and_keeps_last_checkpoint(trained):
    """The log fits on the disk, a checkpoint does not."""
    before, longer = runs.newest_good(trained), ("--resume", "--set", "train.steps=6")
    with full_disk(20_000):
        line = line_of(train(trained, *longer))
    assert "what was saved before is intact" in line
    assert runs.newest_good(trained) == before
    assert train(trained, *longer).exit_code == 0


def test_run_killed_at_random_and_restarted_equals_undisturbed_run(tmp_path):
    """The same command after each SIGKILL; the weights in the end are those of a run that nobody
    disturbed, bitwise.
    """
    settings = ("train.steps=160", "train.checkpoint_every=10")
    options = [part for s in settings for part in ("--set", s)]
    assert train(tmp_path / "calm", *options).exit_code == 0
    root = tmp_path / "killed"
    for delay in (0.05, 0.3, 0.1, 0.2):
        job = start(root, *settings)
        job.wait_until(functools.partial(grown, root, len(steps(root))))
        time.sleep(delay)
        assert job.kill() == -signal.SIGKILL  # it was still at work
    assert train(root, *options, "--resume").exit_code == 0
    assert (root / "final" / runs.MODEL).read_bytes() == (
        tmp_path / "calm" / "final" / runs.MODEL
    ).read_bytes()
    assert steps(root) == steps(tmp_path / "calm")


def grown(root, seen):
    path = root / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") > seen

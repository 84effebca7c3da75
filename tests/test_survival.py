"""What befalls runs that are left alone: signals, full disks, damaged checkpoints, a second job in the same folder."""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from diffussm_cli import runs
from diffussm_cli.commands.train import PREEMPTED
from diffussm_cli.files import locked
from tests.conftest import TINY
from tests.test_cli import line_of, run

pytest.importorskip("sklearn")
SETTINGS = [part for override in TINY for part in ("--set", override)]


def train(root, *arguments):
    return run("train", "--preset", "digits", "--out", root, *SETTINGS, *arguments)


@pytest.fixture
def trained(tmp_path):
    assert train(tmp_path / "run").exit_code == 0
    return tmp_path / "run"


def steps(root):
    path = root / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


# ------------------------------------------------------------------------------------------------ resume auto
def test_the_same_command_begins_goes_on_and_is_done(tmp_path):
    root, command = tmp_path / "run", ("--resume", "auto")
    assert train(root, *command).exit_code == 0
    again = train(root, *command)
    assert again.exit_code == 0
    assert "is at step 4 and train.steps is 4; nothing to do" in again.stderr
    assert train(root, *command, "--set", "train.steps=6").exit_code == 0
    assert steps(root) == [2, 4, 6]


def test_auto_begins_again_where_no_checkpoint_was_reached(trained):
    for path in runs.checkpoints(trained):
        (path / runs.STATE).unlink()
    assert train(trained, "--resume", "auto").exit_code == 0
    assert steps(trained) == [2, 4]


def test_resume_takes_auto_or_nothing(tmp_path):
    assert "--resume: 'yes' must be auto, or nothing" in line_of(train(tmp_path / "run", "--resume=yes"))


def test_harmless_changes_are_listed(trained):
    result = train(trained, "--resume", "--set", "train.steps=6", "--set", "train.lr=1e-3")
    assert result.exit_code == 0
    assert "changed: train.steps was 4 and is now 6" in result.stderr
    assert "changed: train.lr was 0.002 and is now 0.001" in result.stderr


# ------------------------------------------------------------------------------------------------ damage
def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "bit flipped in the weights": lambda c: flip(c / runs.MODEL),
    "bit flipped in the optimiser": lambda c: flip(c / runs.OPTIMIZER),
    "truncated": lambda c: os.truncate(c / runs.EMA, 1000),
    "a file is gone": lambda c: (c / runs.OPTIMIZER).unlink(),
    "state cut short": lambda c: os.truncate(c / runs.STATE, 10),
    "hashes are no hashes": lambda c: (c / runs.STATE).write_text('{"step": 4, "sha256": 7}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(trained, damage):
    newest = runs.checkpoints(trained)[-1]
    damage(newest)
    result = train(trained, "--resume", "--set", "train.steps=6")
    assert result.exit_code == 0, result.output
    assert f"skipped: {newest}" in result.stderr
    assert steps(trained) == [2, 4, 6]
    assert runs.newest_good(trained)[1] == []


def test_no_good_checkpoint_is_one_line(trained):
    for path in runs.checkpoints(trained):
        flip(path / runs.MODEL)
    assert "has no good checkpoint:" in line_of(train(trained, "--resume", "--set", "train.steps=6"))
    assert "is not as it was written" in line_of(train(trained, "--resume", "--set", "train.steps=6"))


def test_sampling_skips_a_damaged_checkpoint(trained, tmp_path):
    for file in (trained / "final").iterdir():
        file.unlink()
    (trained / "final").rmdir()
    newest = runs.checkpoints(trained)[-1]
    flip(newest / runs.EMA)
    assert runs.find_run(trained).step == 2
    assert "is not as it was written; name the run folder" in line_of(run("sample", newest, "-n", 1))


# ------------------------------------------------------------------------------------------------ two writers
def test_a_second_job_in_the_folder_is_refused(trained):
    with locked(trained / ".lock-0"):
        assert "another process is training in" in line_of(train(trained, "--resume", "--set", "train.steps=6"))
    assert train(trained, "--resume", "--set", "train.steps=6").exit_code == 0


# ------------------------------------------------------------------------------------------------ signals, disks
def start(root, *settings, **options):
    command = [sys.executable, "-m", "diffussm_cli", "train", "--preset", "digits", "--out", str(root)]
    command += [*SETTINGS, *(part for s in settings for part in ("--set", s)), "--resume", "auto"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition, process):
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.time() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_its_own_code(tmp_path):
    root = tmp_path / "run"
    process = start(root, "train.steps=100000", "train.checkpoint_every=20")
    wait_for(lambda: runs.checkpoints(root), process)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED
    newest, damaged = runs.newest_good(root)
    assert damaged == []
    assert f"stopped at step {runs.read_state(newest)['step']} of 100000, checkpoint saved" in messages
    assert "Traceback" not in messages


@pytest.mark.slow
def test_a_full_disk_ends_training_with_one_line_and_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk: the first checkpoint fits, as the steps are few; later none."""
    root = tmp_path / "run"
    assert train(root, "--set", "train.steps=2").exit_code == 0
    before = runs.newest_good(root)[0]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(root, "train.steps=6", preexec_fn=limit)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in messages
    assert "what was saved before is intact" in messages
    assert runs.newest_good(root) == (before, [])
    process = start(root, "train.steps=6")
    process.communicate(timeout=120)
    assert process.returncode == 0


@pytest.mark.slow
def test_killed_at_random_and_started_again_equals_the_undisturbed(tmp_path):
    """The same command after each SIGKILL; the weights in the end are those of a run that nobody disturbed, bitwise."""
    settings = ("train.steps=160", "train.checkpoint_every=10")
    calm = start(tmp_path / "calm", *settings)
    calm.communicate(timeout=120)
    assert calm.returncode == 0
    root, kills = tmp_path / "killed", 0
    for delay in (0.05, 0.3, 0.1, 0.2):
        process = start(root, *settings)
        wait_for(functools.partial(grown, root, len(steps(root))), process)
        time.sleep(delay)
        process.kill()
        process.communicate()
        kills += 1
    assert kills == 4
    last = start(root, *settings)
    last.communicate(timeout=120)
    assert last.returncode == 0
    assert (root / "final" / runs.MODEL).read_bytes() == (tmp_path / "calm" / "final" / runs.MODEL).read_bytes()
    assert steps(root) == steps(tmp_path / "calm")


def grown(root, seen):
    path = root / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") > seen

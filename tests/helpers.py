"""How the tests run the program, and how they read what it says."""

import functools
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import torch
import typer.testing
from typer.testing import CliRunner

from diffussm_cli.cli import app
from tests.conftest import TINY, device

# The commands are built once, not for every call: a third of the time of a short one.
typer.testing._get_command = functools.cache(typer.testing._get_command)

SETTINGS = [part for override in TINY for part in ("--set", override)]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


def run(*arguments):
    """A command of the program, in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


# What the commands import when they run. Modules of tests/ may be out of reach there. Diffusers
# asks for the number of GPUs, after which a fork cannot use them.
IMPORTED = ["pytest", "typer.testing", "sklearn.datasets", "diffussm_cli.cli"]
IMPORTED += ["diffussm_cli.data.latents.encoding", "diffussm_cli.training", "diffussm_cli.sampling"]
IMPORTED += ["torch.utils.tensorboard"]
if device().type == "cpu":
    IMPORTED += ["diffusers.models.autoencoders.autoencoder_kl"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(IMPORTED)


class Background:
    """A command of the program in a process of its own, which a test watches, stops or kills.

    It is forked from a process that has imported torch, once for all tests. What it prints is in
    the file `log`; `environment` is added to the environment.
    """

    def __init__(self, *arguments, log: Path, **environment: str):
        self.log = log
        words = [str(a) for a in arguments]
        self.process = FORKS.Process(target=_run_forked, args=(words, log, environment))
        self.process.daemon = True  # it ends with the tests at the latest
        self.process.start()

    def wait_until(self, condition, pause=0.001):
        """Wait for a condition that becomes true while the command is at work."""
        deadline = time.monotonic() + 300
        while True:
            at_work = self.process.exitcode is None  # asked first: it may end between the two
            if condition():
                return
            assert at_work, self.log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline
            time.sleep(pause)

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        """SIGKILL; gives the exit code, -SIGKILL if the process was still at work."""
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    def wait(self, timeout=300):
        """The exit code and what was printed."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} seconds"
        return self.process.exitcode, self.log.read_text(encoding="utf-8")


def ranks_of(processes, *arguments, folder):
    """One command by a job of several processes, as torchrun starts them: exit code and output of
    each rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        Background(*arguments, log=folder / f"rank{rank}.log", RANK=str(rank), **group)
        for rank in range(processes)
    ]
    return [rank.wait() for rank in ranks]


def _run_forked(arguments, log, environment):
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    app(arguments)


def only_cached(home, revisions, monkeypatch):
    """Let the hub be the repository in a cache folder, with names of its revisions, and no
    network.
    """
    (home / "refs").mkdir()
    for name, revision in revisions.items():
        (home / "refs" / name).write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home.parent))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def line_of(result):
    """The one line of a refusal."""
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("diffussm: error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.output
    return errors[0]

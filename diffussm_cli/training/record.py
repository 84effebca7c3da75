"""Measurements between two records, and writing records to metrics.jsonl, TensorBoard and a
tracker.
"""

import contextlib
import hashlib
import importlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffussm_cli.config import Config, to_dict
from diffussm_cli.errors import ConfigError, install, reason, writing
from diffussm_cli.machine.files import write_text
from diffussm_cli.machine.processes import ALONE, World, reduced
from diffussm_cli.runs import BOARD, LOG
from diffussm_cli.runs.log import AT_END

QUARTERS = 4


class Meter:
    """Means since the last flush over all processes, summed on the device so that no step waits for
    the host.

    Skipped steps do not count.
    """

    def __init__(self, T: int, device: torch.device, world: World = ALONE):
        self.T = T
        self.device = device
        self.world = world
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.images = 0
        self.since = time.perf_counter()
        self.pause = 0.0
        self._parts: list[dict[str, Tensor]] = []

    def add(self, losses: dict[str, Tensor], t: Tensor) -> None:
        """Add the losses per image, (B,), and the timesteps, (B,), of one part of a step."""
        # (B, 4)
        quarter = torch.nn.functional.one_hot((t * QUARTERS // self.T).long(), QUARTERS).float()
        part = {name: loss.detach().float().sum() for name, loss in losses.items()}
        part |= {
            "quarters": losses["mse"].detach().float() @ quarter,
            "in_quarters": quarter.sum(0),
        }
        self._parts.append(part | {"images": torch.full((), float(len(t)), device=self.device)})
        self.images += len(t)

    def end_step(self, norm: Tensor, bad: Tensor) -> None:
        """Add the gradient norm of a step; `bad` is 1.0 if the step is skipped, otherwise 0.0."""
        one = torch.ones((), device=self.device)
        for part in [*self._parts, {"grad_norm": norm, "steps": one}]:
            for name, value in part.items():
                good = torch.where(bad > 0, torch.zeros_like(value), value)
                self._sums[name] = self._sums[name] + good if name in self._sums else good
        self._parts.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in the block from images_per_second."""
        start = time.perf_counter()
        yield
        self.pause += time.perf_counter() - start

    def flush(self) -> dict[str, float]:
        """Means by name: losses, `mse_q1` (smallest t) to `mse_q4`, grad_norm, images_per_second.
        Resets the meter.
        """
        # Sums over all processes, in one message.
        together = reduced(torch.cat([v.reshape(-1) for v in self._sums.values()]), self.world)
        sums = dict(zip(self._sums, together.split([v.numel() for v in self._sums.values()])))

        # Sums to means.
        images = sums.pop("images")
        steps = sums.pop("steps")
        quarters = (sums.pop("quarters") / sums.pop("in_quarters")).tolist()
        norm = (sums.pop("grad_norm") / steps).item()
        means = {name: (value / images).item() for name, value in sums.items()}
        # an empty quarter has no mean
        means |= {f"mse_q{i + 1}": q for i, q in enumerate(quarters) if q == q}

        seconds = time.perf_counter() - self.since - self.pause
        means |= {"grad_norm": norm, "images_per_second": self.images * self.world.size / seconds}
        self._restart()
        return means


class RecordWriter:
    """Appends records to RUN/metrics.jsonl and RUN/tensorboard; on resume, records after `step` are
    dropped.

    Damaged files are renamed and replaced by new ones; `warnings` tells the user. `tracker` gets
    the numbers too.
    """

    def __init__(self, root: Path, step: int, tracker: Any = None):
        from torch.utils.tensorboard import SummaryWriter

        self.root = root
        self.tracker = tracker
        self.warnings: list[str] = []
        path = root / LOG
        board = root / BOARD

        # What stands there already.
        kept: list[str] = []
        if path.is_file():
            try:
                kept = _lines_up_to(step, path.read_bytes())
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                self._set_aside(path)
        elif os.path.lexists(path):  # a folder, or a pipe that would block
            self._set_aside(path)
        if os.path.lexists(board) and not board.is_dir():
            self._set_aside(board)

        write_text(path, "".join(line + "\n" for line in kept))
        self.path = path
        self.file = path.open("a", encoding="utf-8")
        self._last = ""  # the last line, if this writer has written one
        self.board = SummaryWriter(str(board), purge_step=step + 1)

    def _set_aside(self, path: Path) -> None:
        names = (path.with_name(f"{path.name}.damaged-{i}") for i in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        path.rename(aside)
        self.warnings.append(
            f"{path} is damaged; it was renamed to {aside.name}, and a new one begins"
        )

    def write(self, record: dict) -> None:
        """Write a record.

        Raises RunError, naming the run folder, also for earlier records in TensorBoard's thread.
        """
        plain = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }

        with writing(str(self.root)):
            self._last = json.dumps(plain) + "\n"
            self.file.write(self._last)
            self.file.flush()
            numbers = {
                k: v for k, v in plain.items() if k != "step" and isinstance(v, (int, float))
            }

            for name, value in numbers.items():
                self.board.add_scalar(
                    name if "/" in name else f"train/{name}", value, record["step"]
                )
            if self.tracker:
                self.tracker.log(numbers, step=record["step"])

    def end(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of the whole session to its last record, which was written before the
        last preview and checkpoint. A file that others have changed stays as it is.

        Raises RunError.
        """
        with writing(str(self.root)):
            content = self.path.read_bytes() if self.path.is_file() else b""
            text = content.decode(errors="replace")
            if not self._last or not text.endswith(self._last):
                return

            self.file.close()
            before = text.removesuffix(self._last)
            self._last = json.dumps({**json.loads(self._last), AT_END: dict(seconds)}) + "\n"
            write_text(self.path, before + self._last)
            self.file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        with writing(str(self.root)), contextlib.closing(self.board):
            self.file.close()
            if self.tracker:
                with contextlib.redirect_stdout(sys.stderr):
                    self.tracker.finish()


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Hide the traceback of an OSError in TensorBoard's thread; the next record raises the error
    again.
    """
    before = threading.excepthook
    threading.excepthook = lambda args: (
        None if isinstance(args.exc_value, OSError) else before(args)
    )
    try:
        yield
    finally:
        threading.excepthook = before


def find_tracker(logger: str) -> Any:
    """The package of `train.logger`; None for TensorBoard.

    Raises ConfigError if it is missing.
    """
    if logger == "tensorboard":
        return None
    try:
        return importlib.import_module(logger)
    except ImportError as e:
        raise ConfigError(f"train.logger: {logger} is not installed: {install(logger)}") from e


def open_tracker(config: Config, root: Path) -> Any:
    """The run of Weights & Biases or trackio that `train.logger` asks for, begun or continued; None
    for TensorBoard.

    Raises:
        ConfigError: if the package is missing or refuses to begin.
    """
    name = config.train.logger
    place = str(root.resolve())
    package = find_tracker(name)
    if package is None:
        return None
    try:
        # the same on resume
        unique = f"{root.resolve().name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
        options = {"id": unique, "dir": place} if name == "wandb" else {}
        with contextlib.redirect_stdout(sys.stderr):
            return package.init(
                project="diffussm", name=unique, resume="allow", config=to_dict(config), **options
            )
    except Exception as e:  # each package has its own errors
        remedy = (
            "log in, or set WANDB_MODE=offline"
            if name == "wandb"
            else "or leave train.logger at tensorboard"
        )
        raise ConfigError(f"train.logger: {name} cannot begin: {reason(e)}; {remedy}") from e


def _lines_up_to(step: int, content: bytes) -> list[str]:
    """The records up to a step, without an incomplete last line.

    Raises ValueError, KeyError, TypeError.
    """
    *lines, last = content.decode().split("\n")
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    with contextlib.suppress(ValueError, KeyError, TypeError):
        kept += [last] if json.loads(last)["step"] <= step else []
    return kept

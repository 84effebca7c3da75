"""The training loop: when to log, to measure, to draw and to save.

It yields records and prints nothing.
"""

import contextlib
import datetime
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from diffussm_cli import runs
from diffussm_cli.config import Config
from diffussm_cli.data.source import Source
from diffussm_cli.errors import DataError, NotFiniteError, RunError
from diffussm_cli.machine.device import (
    facts_of_machine,
    is_out_of_memory,
    peak_memory,
    pick_device,
    processor_name,
)
from diffussm_cli.machine.gpus import gpu_named
from diffussm_cli.machine.processes import ALONE, World, any_of, first_works, peer_errors
from diffussm_cli.model import count_parameters
from diffussm_cli.training.batches import Batch, batches
from diffussm_cli.training.between import Between, open_between
from diffussm_cli.training.checkpoint import CheckpointWriter, full_tensors, write_tensor_folder
from diffussm_cli.training.health import diagnosis
from diffussm_cli.training.optimizer import lr_factor
from diffussm_cli.training.step import Step

# Recorded in checkpoints, which need no state of random generators.
RANDOMNESS = "a function of (seed, step, place in the batch)"

Record = dict[str, Any]


def due(step: int, every: int, at_end: bool = False) -> bool:
    """Whether something is due at a step: at each multiple of `every`, or `at_end`; never if 0."""
    return every > 0 and (at_end or step % every == 0)


class Trainer:
    """A run in training: its steps, and what is measured, drawn and saved between them.

    Args:
        initial: the weights that training begins with in place of random ones.
        between: what is done between steps, if it has been opened.

    Attributes:
        step: the model in training, with everything that a checkpoint holds.
        after_preview: called when a preview has been written.
        peak: operations a second of all devices by their data sheet; 0 if it is not known.
        operations: operations per image of a training step; if it is set, records hold their share
            of the peak as `mfu`.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        root: Path,
        world: World = ALONE,
        initial: runs.InitialWeights | None = None,
        between: Between | None = None,
    ):
        self.config = config
        self.source = source
        self.root = root
        self.world = world
        self.initial = initial
        tensors = initial.tensors if initial else None
        device = pick_device(config.train.device)
        opened = between or open_between(config, source, root, device, world)
        self.measures, self.previews = opened
        self.step = Step(config, device, world, tensors)

        # What the data sheet promises.
        bf16 = self.step.dtype == torch.bfloat16
        gpu = gpu_named(processor_name(self.step.device))
        self.peak = world.size * (gpu.bf16 if bf16 else gpu.fp32) if gpu else 0.0
        self.operations = 0.0

        # What the loop writes, tells and counts.
        self.writer = CheckpointWriter(root, config.train)
        self.after_preview: Callable[[], Any] = lambda: None
        # what the user should know of the last steps; a session shows and clears it
        self.notes: list[str] = []
        self._any_finite = False  # whether a record had a finite loss
        self._begun = time.perf_counter()
        self._spent: dict[str, float] = {}  # seconds by kind of work between two steps

    def summary(self) -> str:
        """Number of parameters, device and precision in one line."""
        t = self.config.train
        where = str(self.step.device)
        if self.world.size > 1:
            where += f", {self.world.size} processes ({t.parallel})"
        arithmetic = str(self.step.dtype).removeprefix("torch.") + (
            ", compiled" if t.compile else ""
        )
        return f"{count_parameters(self.step.model):,} parameters on {where}, {arithmetic}"

    def facts(self) -> Record:
        """Where and with what a session of training begins, for the log and the report."""
        return {
            "from_step": self.step.number,
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": str(self.step.device),
            "processes": self.world.size,
            "precision": str(self.step.dtype).removeprefix("torch."),
            "parameters": count_parameters(self.step.model),
            **facts_of_machine(self.step.device),
            **({"init": self.initial.facts} if self.initial else {}),
        }

    # ------------------------------------------------------------------------------------- the loop
    def run(
        self, stop: Callable[[], bool] = lambda: False, announce: bool = False
    ) -> Iterator[Record]:
        """Train to the last step, yielding a record every `log_every` steps; if `announce`, also an
        empty one after the first step, if that has no record.

        It also writes previews, checkpoints and `final/`. When `stop()` is true in any process, the
        current step is finished, a checkpoint is written, and the loop ends early.

        Raises:
            RunError: if too many steps in a row are not finite, memory runs out, another process of
                the job is lost, or a checkpoint cannot be written.
            DataError: if an image cannot be read; a checkpoint is written first.
        """
        t, e = self.config.train, self.config.eval
        self._begun = time.perf_counter()
        first = self.step.number + 1
        for batch in self._batches():
            self._update(batch)
            self.writer.check()
            number = self.step.number
            last = number == t.steps
            stopped = any_of(stop(), self.world)
            ends = last or stopped

            # Log and measure.
            scores = due(number, e.every, last)
            measures = scores or due(number, e.held_out_every, last)
            if measures or due(number, t.log_every, ends):
                record = self._record()
                with self._interrupted():
                    if measures and self.measures:
                        with self._timed("evaluation"):
                            record |= self.measures.measure(self.step, scores)
                    yield record
            elif announce and number == first:
                yield {}

            # Save and draw, in this order: what goes wrong in drawing costs no step.
            draws = due(number, t.sample_every, last)
            keeps = due(number, t.snapshot_every, last)
            saves = due(number, t.checkpoint_every, ends)
            if draws or keeps or saves:
                with self._interrupted():
                    with self._timed("checkpoints"):
                        if keeps:  # before a checkpoint of this step, from which training may go on
                            self.keep_snapshot()
                        if saves:
                            self.save()
                    if draws:
                        with self._timed("previews"):
                            self.preview(last)

            if stopped and not last:
                self.writer.finish()
                return

        with first_works(self.world), self._timed("checkpoints"):
            self.writer.finish()
            self._write_final()

    def seconds(self) -> dict[str, float]:
        """Seconds of this session so far: steps with their data, evaluation, previews, and waiting
        for checkpoints.
        """
        total = time.perf_counter() - self._begun
        return {"steps": total - sum(self._spent.values()), **self._spent}

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Count the time of a piece of work between two steps."""
        start = time.perf_counter()
        yield
        self._spent[what] = self._spent.get(what, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def _interrupted(self) -> Iterator[None]:
        """Work between two steps: its time does not count, and others wait for the first
        process.
        """
        with self.step.meter.paused(), first_works(self.world):
            yield

    def _batches(self) -> Iterator[Batch]:
        """Batches from the current step on; before an unreadable image ends the run, it is
        saved.
        """
        start = self.step.number
        pinned = self.step.device.type == "cuda"
        try:
            yield from batches(self.source, self.config, start, self.world, pinned)
        except DataError:
            # Other ranks are still inside the step; a collective here would hang.
            if self.step.number > start and self.world.size == 1:
                self.save()
                self.writer.finish()
            raise

    def _update(self, batch: Batch) -> None:
        """One optimiser step. Raises RunError if memory runs out, or another process is lost."""
        try:
            with peer_errors() if self.world.size > 1 else contextlib.nullcontext():
                self.step.update(batch)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise

            t = self.config.train
            raise RunError(
                f"train.batch_size: {t.batch_size} in {t.accumulate} part(s) does not fit into the "
                f"memory of {self.step.device}; "
                "raise train.accumulate or set train.gradient_checkpointing=true"
            ) from e

    def _record(self) -> Record:
        """What was measured since the last record.

        Raises RunError after too many steps that are not finite.
        """
        t = self.config.train
        step = self.step
        skipped, in_a_row = step.bad_steps.flush(step.number)
        record: Record = {
            "step": step.number,
            "images": step.number * t.batch_size,
            **step.meter.flush(),
            "lr": t.lr * lr_factor(t, step.number - 1),
            "ema_decay": step.ema.decay_at(step.number),
            **diagnosis(step.model, step.optimizer, self.world if step.is_sharded else ALONE),
        }
        if skipped:
            record["left_out"] = skipped
            # where their batches begin in the endless sequence of images
            record["left_out_images"] = [(number - 1) * t.batch_size for number in skipped]

        record["peak_memory_gib"] = peak_memory(step.device) / 2**30
        if self.operations and self.peak:
            record["mfu"] = record["images_per_second"] * self.operations / self.peak

        self._any_finite |= math.isfinite(record["loss"])
        never_finite = step.number == t.steps and not self._any_finite
        if in_a_row >= t.max_bad_steps or never_finite:
            raise RunError(
                f"train: {in_a_row} steps in a row before step {step.number} had no finite loss or "
                "gradient; the newest checkpoint is intact; try a smaller train.lr "
                f"(now {t.lr:g}), train.warmup_steps, train.grad_clip=1 or train.precision=fp32"
            )
        return record

    # ------------------------------------------------------------------------------- what it writes
    def preview(self, last: bool) -> None:
        """Draw a preview on the first process; one that is not finite is a note, and no picture.

        If the model is sharded, every process must call this.
        """
        model = self.step.averaged()
        if self.world.rank == 0 and self.previews:
            try:
                self.previews.draw(self.step, model, last)
            except NotFiniteError as e:
                self.notes.append(f"no preview of step {self.step.number}: {e}")
            except DataError as e:
                self.notes.append(f"the nearest training images are not shown: {e}")
            self.after_preview()

    def keep_snapshot(self) -> None:
        """Write a snapshot of the averages from which others are put together.

        If the model is sharded, every process must call this. Raises RunError.
        """
        is_first = self.world.rank == 0
        tensors = full_tensors(self.step.snapshot(), keep=is_first)
        if is_first:
            folder = self.root / runs.SNAPSHOTS
            write_tensor_folder(folder, tensors, {"step": self.step.number})

    def save(self) -> None:
        """Write a checkpoint of this step, or start to write it in a thread. Raises RunError."""
        t = self.config.train
        is_first = self.world.rank == 0
        tensors = self.step.state(keep=is_first)
        if not is_first:
            return

        images = self.step.number * t.batch_size
        epoch, position = divmod(images, len(self.source))
        state: Record = {
            "step": self.step.number,
            "images": images,
            "seed": t.seed,
            "epoch": epoch,
            "position": position,
            "randomness": RANDOMNESS,
        }
        self.writer.write(tensors, state)

    def _write_final(self) -> None:
        """Write RUN/final.

        If the model is sharded, every process must call this. Raises RunError.
        """
        is_first = self.world.rank == 0
        averages = full_tensors(self.step.averages_by_file(runs.MODEL), keep=is_first)
        if not is_first:
            return

        number = self.step.number
        weights = averages.pop(runs.MODEL)
        parameters = count_parameters(self.step.ema.model)
        others = runs.files_to_publish(self.root, self.config, number, parameters)
        runs.write_weights(
            self.root / runs.FINAL, self.config, weights, number, None, averages, others
        )

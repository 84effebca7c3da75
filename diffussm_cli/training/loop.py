"""The training loop: steps in, records out. Prints nothing; what a record is shown as is the command's business.

B batch   C channels   T timesteps   x_0 (B, C, H, W) images, y (B,) labels
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffussm_cli import runs
from diffussm_cli.config import Config, SampleConfig
from diffussm_cli.data.images import save_grid, to_uint8
from diffussm_cli.data.source import Source
from diffussm_cli.data.vae import open_decoding
from diffussm_cli.device import is_out_of_memory, pick_device, pick_dtype
from diffussm_cli.diffusion.losses import training_losses
from diffussm_cli.diffusion.process import GaussianDiffusion
from diffussm_cli.errors import DataError, RunError
from diffussm_cli.generation import generate
from diffussm_cli.model import build_model
from diffussm_cli.training.batches import Batch, batches
from diffussm_cli.training.checkpoint import load_checkpoint, save_checkpoint
from diffussm_cli.training.ema import EMA
from diffussm_cli.training.optimizer import lr_factor, make_optimizer, set_lr
from diffussm_cli.training.record import Meter
from diffussm_cli.training.scoring import Scoring

Record = dict[str, Any]


class Trainer:
    """A model in training, with all that a checkpoint holds. `run` is the loop.

    `decoding` is what previews are decoded with (None where there are none); its `warning` is for the user.
    """

    def __init__(self, config: Config, source: Source, root: Path):
        t = config.train
        self.config, self.source, self.root = config, source, root
        self.device = pick_device(t.device)
        self.dtype = pick_dtype(t.precision, self.device)
        torch.manual_seed(t.seed)
        self.model = build_model(config, t.gradient_checkpointing).to(self.device)
        self.ema = EMA(self.model, t.ema)
        self.optimizer = make_optimizer(self.model, t, fused=self.device.type == "cuda")
        self.process = GaussianDiffusion.from_config(config.diffusion, self.device)
        self.decoding = open_decoding(config, self.device) if t.sample_every or config.eval.every else None
        self.scoring = Scoring(config, root, self.process, self.decoding, self.dtype) if config.eval.every else None
        self.step = 0
        if t.compile:
            self.model.compile()

    def resume(self, checkpoint: Path) -> None:
        """Take up all state from a checkpoint folder. Raises RunError."""
        self.step = load_checkpoint(checkpoint, self.model, self.ema.model, self.optimizer)["step"]

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Record]:
        """Train to the last step, yielding a record every `log_every` steps.

        Previews, checkpoints and `final/` are written on the way. When `stop()` is true the step in hand is finished,
        a checkpoint written, and the loop ends early.

        Raises:
            RunError: if the loss is no longer a number, memory runs out, or a checkpoint cannot be written.
            DataError: if an image cannot be read; a checkpoint is written first.
        """
        t, meter = self.config.train, Meter(self.config.diffusion.timesteps, self.device)
        for batch in self._batches():
            self._update_in_memory(batch, meter)
            self.step += 1
            last, stopped = self.step == t.steps, stop()
            scores = bool(self.scoring) and (last or self.step % self.config.eval.every == 0)
            if last or stopped or scores or self.step % t.log_every == 0:
                record = self._record(meter)
                with meter.paused():
                    yield record | (self.scoring.score(self.ema.model, self.step) if scores else {})
            with meter.paused():
                if t.sample_every and (last or self.step % t.sample_every == 0):
                    self.preview(last)
                if last or stopped or self.step % t.checkpoint_every == 0:
                    self.save()
            if stopped and not last:
                return
        runs.write_weights(self.root / "final", self.config, self.ema.model.state_dict())

    def _batches(self) -> Iterator[Batch]:
        """Batches from the present step on; what was trained is saved before an unreadable image ends the run."""
        start = self.step
        try:
            yield from batches(self.source, self.config, start)
        except DataError:
            if self.step > start:
                self.save()
            raise

    def _update_in_memory(self, batch: Batch, meter: Meter) -> None:
        try:
            self.update(batch, meter)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            t = self.config.train
            raise RunError(
                f"train.batch_size: {t.batch_size} in {t.accumulate} part(s) does not fit into the memory of "
                f"{self.device}; raise train.accumulate or set train.gradient_checkpointing=true"
            ) from e

    def update(self, batch: Batch, meter: Meter) -> None:
        """One optimiser step on a batch, in `accumulate` parts."""
        t = self.config.train
        size = t.batch_size // t.accumulate
        self.model.train()
        for start in range(0, t.batch_size, size):
            part = batch.part(start, start + size, self.device)
            losses = self.losses(part)
            (losses["loss"].mean() / t.accumulate).backward()
            meter.add(losses, part.t)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if t.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), t.grad_clip, norm)
        meter.add_norm(norm)
        set_lr(self.optimizer, lr_factor(t, self.step))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, self.step + 1)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of each image, (B,)."""
        x_t = self.process.q_sample(batch.x_0, batch.t, batch.noise)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(x_t, batch.t, batch.y)
        cap = self.config.train.mse_weight_cap
        return training_losses(self.process, output.float(), batch.x_0, x_t, batch.t, batch.noise, cap)

    def preview(self, last: bool) -> Path:
        """A grid from the averaged weights at fixed seeds; the last one as `sample` would draw it."""
        t, how = self.config.train, self.config.sample
        if not last:
            how = dataclasses.replace(how, sampler="ddim", steps=min(t.sample_steps, self.config.diffusion.timesteps))
        return draw_grid(self, how, self.root / "samples" / f"step-{self.step:08d}.png")

    def save(self) -> None:
        """Write a checkpoint of this step. Raises RunError."""
        state = {"step": self.step, "images": self.step * self.config.train.batch_size}
        save_checkpoint(
            self.root, self.config.train.keep_checkpoints, self.model, self.ema.model, self.optimizer, state
        )

    def _record(self, meter: Meter) -> Record:
        t = self.config.train
        record = {
            "step": self.step,
            "images": self.step * t.batch_size,
            **meter.flush(),
            "lr": t.lr * lr_factor(t, self.step - 1),
            "ema_decay": self.ema.decay_at(self.step),
        }
        if not math.isfinite(record["loss"]) or not math.isfinite(record["grad_norm"]):
            raise RunError(
                f"train: loss {record['loss']} at step {self.step} is not a number; the newest checkpoint is intact; "
                f"try a smaller train.lr (now {t.lr:g}), train.warmup_steps or train.grad_clip=1"
            )
        return record


def draw_grid(trainer: Trainer, how: SampleConfig, path: Path) -> Path:
    """Images of seeds 0, 1, ... with one class a column (at most ten), written to `path`."""
    n, classes = trainer.config.train.sample_images, trainer.config.model.num_classes
    columns = min(10, classes or n)
    labels = [i % columns for i in range(n)] if classes else None
    drawn = generate(trainer.ema.model, trainer.process, how, range(n), labels, dtype=trainer.dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [trainer.decoding.decode(d.images) for d in drawn]
    save_grid(to_uint8(torch.cat(images)), path, columns)
    return path

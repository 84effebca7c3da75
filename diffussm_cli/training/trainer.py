"""The training loop. It runs steps, yields records and prints nothing; the command shows the records.

B batch   C channels   T timesteps   x_0 (B, C, H, W) images, y (B,) labels
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diffussm_cli import runs
from diffussm_cli.config import SAMPLERS, Config, SampleConfig
from diffussm_cli.data.images import save_grid
from diffussm_cli.data.source import Source, open_held_out
from diffussm_cli.data.text import check_prompt, open_texts
from diffussm_cli.data.vae import open_decoding
from diffussm_cli.diffusion.losses import training_losses
from diffussm_cli.diffusion.process import make_objective
from diffussm_cli.errors import ConfigError, DataError, RunError
from diffussm_cli.machine.device import is_out_of_memory, pick_device, pick_dtype
from diffussm_cli.machine.files import whole_file
from diffussm_cli.machine.processes import ALONE, World, any_of, first_works, peer_errors, reduced
from diffussm_cli.model import Backbone, build_model, count_parameters
from diffussm_cli.model.mixer import kept_kernels
from diffussm_cli.sampling.sampler import Sampler
from diffussm_cli.training.batches import Batch, batches, captions_of
from diffussm_cli.training.checkpoint import CheckpointWriter, collect, full_tensors, load_checkpoint
from diffussm_cli.training.ema import EMA
from diffussm_cli.training.health import BadSteps, SpikeAlarm, time_scales, update_ratios
from diffussm_cli.training.held_out import HeldOut
from diffussm_cli.training.optimizer import lr_factor, make_optimizer, set_lr
from diffussm_cli.training.parallel import compile_model, full_tensor, last_part_only, norm_of, replicate, shard
from diffussm_cli.training.record import Meter
from diffussm_cli.training.scoring import Scoring

# Recorded in checkpoints, which need no state of random generators.
RANDOMNESS = "a function of (seed, step, place in the batch)"

Record = dict[str, Any]


class Trainer:
    """A model in training, with everything that a checkpoint holds. `run` is the loop.

    Each process has its own Trainer, with the same model (or its shard of it) and its part of every batch.
    `decoding` decodes previews (None if there are none); its `warning` is for the user. `after_preview` is called when
    one has been written.
    """

    def __init__(self, config: Config, source: Source, root: Path, world: World = ALONE):
        t = config.train
        self.config, self.source, self.root, self.world = config, source, root, world
        self.device = pick_device(t.device)
        self.dtype = pick_dtype(t.precision, self.device)
        torch.manual_seed(t.seed)
        self.model = build_model(config, t.gradient_checkpointing).to(self.device)
        self.averages = [EMA(self.model, decay) for decay in t.ema]
        self.ema = self.averages[0]
        if t.compile:
            compile_model(self.model, self.device)
        self.forward = self._distribute()
        self.optimizer = make_optimizer(self.model, t)
        self.objective = make_objective(config.diffusion, self.device)
        held_out = open_held_out(config, source) if config.eval.every else None
        self.held_out = HeldOut(held_out, config, self.device, world) if held_out else None
        if config.eval.every and not config.eval.images and not held_out:
            raise ConfigError("eval.images: 0 needs held-out images; set data.held_out, or eval.images to at least 16")
        scored = bool(config.eval.every and config.eval.images and (config.reference or not held_out))
        self.decoding = open_decoding(config, self.device) if t.sample_every or scored else None
        if config.sample.prompts and t.sample_every:  # a wrong one should end training before it begins
            for prompt in config.sample.prompts:
                check_prompt(prompt, "sample.prompts")
            open_texts(config)
        self.scoring = None
        if self.decoding is not None and scored:
            self.scoring = Scoring(config, source, root, self.device, self.decoding, self.dtype, world)
        self.writer = CheckpointWriter(root, t)
        self.bad_steps, self.alarm = BadSteps(self.device), SpikeAlarm()
        self.after_preview: Callable[[], Any] = lambda: None
        self.step = 0
        self._any_finite = False  # whether a record had a finite loss

    @property
    def warnings(self) -> list[str]:
        """What the user should know before training begins."""
        decoding = [self.decoding.warning] if self.decoding and self.decoding.warning else []
        scoring = self.scoring.warnings if self.scoring else []
        held_out = self.held_out.source.left_out if self.held_out else ""
        left_out = [held_out] if held_out not in ("", self.source.left_out, *scoring) else []
        return decoding + scoring + left_out

    def summary(self) -> str:
        """Number of parameters, device and precision in one line."""
        t, n = self.config.train, count_parameters(self.model)
        where = f"{self.device}" + (f", {self.world.size} processes ({t.parallel})" if self.world.size > 1 else "")
        arithmetic = str(self.dtype).removeprefix("torch.") + (", compiled" if t.compile else "")
        return f"{n:,} parameters on {where}, {arithmetic}"

    def _distribute(self) -> nn.Module:
        """The module to call for a forward pass, replicated or sharded if there are several processes."""
        if self.world.size == 1:
            return self.model
        if self.config.train.parallel == "ddp":
            return replicate(self.model, self.device)
        for model in (self.model, *(ema.model for ema in self.averages)):
            shard(model, self.world, self.device, self.dtype)
        return self.model

    def resume(self, checkpoint: Path) -> None:
        """Restore all state from a checkpoint folder. Raises RunError."""
        averages = {ema.decay: ema.model for ema in self.averages}
        self.step = load_checkpoint(checkpoint, self.model, averages, self.optimizer)["step"]

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Record]:
        """Train to the last step, yielding a record every `log_every` steps.

        It also writes previews, checkpoints and `final/`. When `stop()` is true in any process, the current step is
        finished, a checkpoint is written, and the loop ends early.

        Raises:
            RunError: if too many steps in a row are not finite, memory runs out, another process of the job is lost,
                or a checkpoint cannot be written.
            DataError: if an image cannot be read; a checkpoint is written first.
        """
        t, every = self.config.train, self.config.eval.every
        meter = Meter(self.config.diffusion.timesteps, self.device, self.world)
        for batch in self._batches():
            self._update_in_memory(batch, meter)
            self.writer.check()
            self.step += 1
            last, stopped = self.step == t.steps, any_of(stop(), self.world)
            scores = bool(every) and (last or self.step % every == 0)
            if last or stopped or scores or self.step % t.log_every == 0:
                record = self._record(meter)
                with meter.paused(), first_works(self.world):
                    yield record | (self.evaluate() if scores else {})
            previews = bool(t.sample_every) and (last or self.step % t.sample_every == 0)
            saves = last or stopped or self.step % t.checkpoint_every == 0
            if previews or saves:
                with meter.paused(), first_works(self.world):
                    if previews:
                        self.preview(last)
                    if saves:
                        self.save()
            if stopped and not last:
                self.writer.finish()
                return
        with first_works(self.world):
            self.writer.finish()
            held = full_tensors(self._averages_by_file(runs.MODEL), keep=self.world.rank == 0)
            if self.world.rank == 0:
                weights, parameters = held.pop(runs.MODEL), count_parameters(self.ema.model)
                others = runs.files_to_publish(self.root, self.config, self.step, parameters)
                runs.write_weights(self.root / runs.FINAL, self.config, weights, self.step, None, held, others)

    def _batches(self) -> Iterator[Batch]:
        """Batches from the current step on; a checkpoint is saved before an unreadable image ends the run."""
        start = self.step
        try:
            yield from batches(self.source, self.config, start, self.world, pinned=self.device.type == "cuda")
        except DataError:
            if self.step > start and self.world.size == 1:  # other processes are not at this point
                self.save()
                self.writer.finish()
            raise

    def _update_in_memory(self, batch: Batch, meter: Meter) -> None:
        try:
            with peer_errors() if self.world.size > 1 else contextlib.nullcontext():
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
        """One optimiser step, in `accumulate` parts; all processes skip it if the loss or gradient is not finite."""
        t, own = self.config.train, self.config.train.batch_size // self.world.size
        size, bad = own // t.accumulate, torch.zeros((), device=self.device)
        self.model.train()
        for start in range(0, own, size):
            part = batch.part(start, start + size, self.device)
            with last_part_only(self.forward, start + size == own):
                losses = self.losses(part)
                loss = losses["loss"].mean() / t.accumulate
                loss.backward()
            bad = bad + ~torch.isfinite(loss.detach())
            meter.add(losses, part.t)
        norm = norm_of(p.grad for p in self.model.parameters() if p.grad is not None)
        if t.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), t.grad_clip, norm)
        bad = (reduced(bad + ~torch.isfinite(norm), self.world) > 0).float()
        self.bad_steps.add(bad)
        meter.end_step(norm, bad)
        set_lr(self.optimizer, lr_factor(t, self.step))
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        for ema in self.averages:
            ema.update(self.model, self.step + 1)

    def losses(self, batch: Batch, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Losses per image, (B,), of the model in training or of another one."""
        x_t = self.objective.q_sample(batch.x_0, batch.t, batch.noise)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = (model or self.forward)(x_t, batch.t, batch.y, batch.text)
        t, known = self.config.train, (batch.x_0, x_t, batch.t, batch.noise)
        gamma = t.min_snr_gamma if t.loss_weight == "min_snr" else None
        return training_losses(self.objective, output.float(), *known, t.mse_weight_cap, gamma)

    def averaged(self, ema: EMA | None = None) -> Backbone:
        """The full model with averaged weights, in eval mode; if it is sharded, every process must call this."""
        held = (ema or self.ema).model
        if not isinstance(held, FSDPModule):
            return held
        model = build_model(self.config).to(self.device)
        model.load_state_dict({k: full_tensor(v) for k, v in held.state_dict().items()})
        return model.eval().requires_grad_(False)

    def evaluate(self) -> Record:
        """Held-out loss and metrics of every average; names end in @DECAY except for the first."""
        found: Record = {}
        for ema in self.averages:
            model, first = self.averaged(ema), ema is self.ema
            with kept_kernels(model):
                values = self.held_out.measure(functools.partial(self.losses, model=model)) if self.held_out else {}
                if self.scoring:
                    values |= self.scoring.score(model, self.step, keep=first)
            found |= {name if first else f"{name}@{ema.decay}": value for name, value in values.items()}
        return found

    def _averages_by_file(self, first: str) -> dict[str, dict[str, Tensor]]:
        """The averaged weights by file, given the file of the first; sharded if the model is."""
        return {first if e is self.ema else runs.ema_file(e.decay): e.model.state_dict() for e in self.averages}

    def preview(self, last: bool) -> Path | None:
        """Draw a grid with the averaged weights at fixed seeds, on the first process; the last one as `sample` does."""
        t, sampling, model = self.config.train, self.config.sample, self.averaged()
        if self.world.rank:
            return None
        if not last:
            steps = min(t.sample_steps, self.config.diffusion.timesteps)
            sampling = dataclasses.replace(sampling, sampler=SAMPLERS[self.config.diffusion.objective][0], steps=steps)
        path = draw_grid(self, model, sampling, self.root / runs.SAMPLES / f"step-{self.step:08d}.png")
        self.after_preview()
        return path

    def save(self) -> None:
        """Write a checkpoint of this step, or start to write it in a thread. Raises RunError."""
        t, first = self.config.train, self.world.rank == 0
        tensors = collect(self.model, self._averages_by_file(runs.EMA), self.optimizer, keep=first)
        epoch, position = divmod(self.step * t.batch_size, len(self.source))
        state: Record = {"step": self.step, "images": self.step * t.batch_size, "seed": t.seed}
        state |= {"epoch": epoch, "position": position, "randomness": RANDOMNESS}
        if first:
            self.writer.write(tensors, state)

    def _record(self, meter: Meter) -> Record:
        t = self.config.train
        left_out, in_a_row = self.bad_steps.flush(self.step)
        record: Record = {
            "step": self.step,
            "images": self.step * t.batch_size,
            **meter.flush(),
            "lr": t.lr * lr_factor(t, self.step - 1),
            "ema_decay": self.ema.decay_at(self.step),
            **self._diagnosis(),
        }
        if left_out:  # and where their batches begin in the endless sequence of images
            record |= {"left_out": left_out, "left_out_images": [(s - 1) * t.batch_size for s in left_out]}
        risen = self.alarm.check(record)
        if risen:
            record["spike"] = risen
        self._any_finite |= math.isfinite(record["loss"])
        if in_a_row >= t.max_bad_steps or (self.step == t.steps and not self._any_finite):
            raise RunError(
                f"train: {in_a_row} steps in a row before step {self.step} had no finite loss or gradient; "
                "the newest checkpoint is intact; try a smaller train.lr "
                f"(now {t.lr:g}), train.warmup_steps, train.grad_clip=1 or train.precision=fp32"
            )
        return record

    def _diagnosis(self) -> dict[str, float]:
        """The size of the last update relative to the weights, by group, and the range of the SSM's time scales."""
        found = {}
        for name, sums in update_ratios(self.optimizer).items():
            moved, size = reduced(sums, self.world if self._in_parts else ALONE).tolist()
            found[f"update/{name}"] = math.sqrt(moved / size) if size else 0.0
        for name, ends in time_scales(self.model).items():
            least, most = reduced(ends, self.world if self._in_parts else ALONE, "MIN").exp().tolist()
            found |= {f"ssm/{name}_min": least, f"ssm/{name}_max": 1 / most}
        return found

    @property
    def _in_parts(self) -> bool:
        return isinstance(self.model, FSDPModule)


def draw_grid(trainer: Trainer, model: Backbone, sampling: SampleConfig, path: Path) -> Path:
    """Draw images of seeds 0, 1, ... with one class per column (at most ten) and write them to `path`.

    A run with text draws `sample.prompts` in turn, or captions of its training images, the same ones every time.
    """
    config, prompts = trainer.config, trainer.config.sample.prompts
    n, classes = config.train.sample_images, config.model.num_classes
    titles = list(itertools.islice(itertools.cycle(prompts), n))
    columns = min(10, classes or n)
    assert trainer.decoding is not None, "previews are decoded"
    sampler = Sampler(model, config, sampling, trainer.decoding, dtype=trainer.dtype)
    text = sampler.text(titles) if titles else captions_of(trainer.source, n) if config.model.text_width else None
    drawn = sampler.draw(range(n), sampler.labels(range(n), range(columns) if classes else ()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        save_grid(torch.cat([images for _, images in drawn]), file, columns, titles)
    return path

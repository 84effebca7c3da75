"""One optimiser step: the network in training, its averages, its optimiser and its loss.

It knows no run folder, no source of images and no pictures.

B batch, of which each process takes its part   C channels   T timesteps
x_0 (B, C, H, W) images   t (B,) timesteps   y (B,) labels
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diffussm_cli import runs
from diffussm_cli.config import WIDTHS, Config
from diffussm_cli.diffusion.flow import MeanFlow
from diffussm_cli.diffusion.losses import training_losses
from diffussm_cli.diffusion.objectives import make_objective
from diffussm_cli.machine.device import pick_dtype
from diffussm_cli.machine.processes import ALONE, World, reduced
from diffussm_cli.model import Backbone, build_model
from diffussm_cli.sampling.precision import autocast
from diffussm_cli.training.batches import Batch
from diffussm_cli.training.checkpoint import collect, load_checkpoint
from diffussm_cli.training.ema import EMA, PowerEMA
from diffussm_cli.training.health import BadSteps
from diffussm_cli.training.optimizer import lr_factor, make_optimizer, set_lr
from diffussm_cli.training.parallel import (
    compile_model,
    full_tensor,
    last_part_only,
    norm_of,
    replicate,
    shard,
)
from diffussm_cli.training.record import Meter


class Step:
    """Everything that an optimiser step changes, which is also what a checkpoint keeps.

    `update` makes a step. Each process has a Step of its own, with the same model (or its shard of
    it) and its part of every batch.

    Args:
        initial: weights that the model begins with in place of random ones, by name.

    Attributes:
        number: optimiser steps done so far.
        model: the network in training.
        averages: the moving averages of its weights; `ema`, the first of them, is the one that
            draws.
        power_averages: those of which snapshots are made.
        teacher: the initial weights, frozen, from which a model of the mean velocity learns; else
            None.
        meter: means of what was measured since they were last read.
        bad_steps: which steps were skipped since they were last read.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        world: World = ALONE,
        initial: Mapping[str, Tensor] | None = None,
    ):
        t = config.train
        self.config = config
        self.device = device
        self.world = world
        self.dtype = pick_dtype(t.precision, device)
        self.number = 0

        # The network and its averages, copied before the original is compiled or sharded.
        torch.manual_seed(t.seed)
        self.model = build_model(config, t.gradient_checkpointing).to(device)
        if initial:  # the tensors that fit; the others start anew
            self.model.load_state_dict(initial, strict=False)
        self.averages = [EMA(self.model, decay) for decay in t.ema]
        self.ema = self.averages[0]
        widths = WIDTHS if t.snapshot_every else ()
        self.power_averages = [PowerEMA(self.model, width) for width in widths]
        self.teacher = None
        if config.diffusion.in_one_step:
            self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        if t.compile:
            compile_model(self.model)
        self.forward = self._distribute()

        self.objective = make_objective(config.diffusion, device)
        self.optimizer = make_optimizer(self.model, t)
        self.meter = Meter(config.diffusion.timesteps, device, world)
        self.bad_steps = BadSteps(device)

    def _distribute(self) -> nn.Module:
        """The module to call for a forward pass: replicated or sharded for several processes."""
        if self.world.size == 1:
            return self.model
        if self.config.train.parallel == "ddp":
            return replicate(self.model, self.device)
        averages = (ema.model for ema in (*self.averages, *self.power_averages))
        teachers = () if self.teacher is None else (self.teacher,)
        for model in (self.model, *averages, *teachers):
            shard(model, self.world, self.device, self.dtype)
        return self.model

    @property
    def is_sharded(self) -> bool:
        """Whether each process has only its shard of the model."""
        return isinstance(self.model, FSDPModule)

    # --------------------------------------------------------------------------------------- a step
    def update(self, batch: Batch) -> None:
        """One optimiser step on this process's part of a batch.

        If the loss or the gradient is not finite in any process, all processes skip the step:
        weights and moments stay as they are. Nothing here waits for the device.
        """
        t = self.config.train
        bad = torch.zeros((), device=self.device)

        # The gradients of all parts add up. Several processes exchange them once, in the last part.
        for part, is_last in self._parts(batch):
            with last_part_only(self.forward, is_last):
                losses = self.losses(part)
                loss = losses["loss"].mean() / t.accumulate
                loss.backward()
            bad = bad + ~torch.isfinite(loss.detach())
            self.meter.add(losses, part.t)

        # The norm of the whole gradient, which is then clipped to `train.grad_clip`.
        norm = norm_of(p.grad for p in self.model.parameters() if p.grad is not None)
        if t.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), t.grad_clip, norm)

        # Skip the step if a number is not finite. An `if` would need that answer on the host, and
        # every step would wait for the device. Instead the answer stays on the device, as 1.0 or
        # 0.0: fused AdamW reads `found_inf`, which is meant for torch's GradScaler, and its kernel
        # changes neither weights nor moments where that is 1. Our Muon does the same.
        bad = (reduced(bad + ~torch.isfinite(norm), self.world) > 0).float()
        self.optimizer.found_inf = bad  # type: ignore[union-attr]
        self.bad_steps.add(bad)
        self.meter.end_step(norm, bad)

        # The weights follow the gradient, and the averages follow the weights.
        set_lr(self.optimizer, lr_factor(t, self.number))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1
        for ema in (*self.averages, *self.power_averages):
            ema.update(self.model, self.number)

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, bool]]:
        """The `train.accumulate` parts of a batch, on the device, and whether each is the last."""
        images = self.config.train.batch_size // self.world.size
        size = images // self.config.train.accumulate
        for start in range(0, images, size):
            stop = start + size
            yield batch.part(start, stop, self.device), stop == images

    def losses(self, batch: Batch, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Losses per image, (B,), of the model in training or of another: `loss` and its parts."""
        t = self.config.train
        x_t = self.objective.q_sample(batch.x_0, batch.t, batch.noise)
        if self.teacher is not None:
            return self._losses_of_path(x_t, batch, model or self.forward)

        output = self._predict(model or self.forward, x_t, batch.t, batch.y, batch.text)
        return training_losses(
            self.objective,
            output,
            batch.x_0,
            x_t,
            batch.t,
            batch.noise,
            t.mse_weight_cap,
            t.min_snr_gamma if t.loss_weight == "min_snr" else None,
        )

    def _losses_of_path(self, x_t: Tensor, batch: Batch, model: nn.Module) -> dict[str, Tensor]:
        """`losses` of a model of the mean velocity, from x_t (B, C, H, W)."""
        assert isinstance(self.objective, MeanFlow)
        assert self.teacher is not None
        teacher = self.teacher
        scale = self.config.diffusion.teacher_guidance

        def mean_velocity(x: Tensor, t: Tensor) -> Tensor:
            return self._predict(model, x, t, batch.y, batch.text)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            v = self._predict(teacher, x, t, batch.y, batch.text)
            if scale == 1 or (batch.y is None and batch.text is None):
                return v
            y = None if batch.y is None else torch.full_like(batch.y, teacher.null_class)
            text = None if batch.text is None else torch.zeros_like(batch.text)
            away = self._predict(teacher, x, t, y, text)
            return away + scale * (v - away)

        progress = self.number / self.config.train.steps
        return self.objective.losses(mean_velocity, velocity, x_t, batch.t, progress)

    def _predict(
        self, model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None, text: Tensor | None
    ) -> Tensor:
        """What a model predicts in the precision of training, as float32."""
        with autocast(self.device, self.dtype):
            return model(x, t, y, text).float()

    # ------------------------------------------------------------------------------------ its state
    def averaged(self, ema: EMA | None = None) -> Backbone:
        """The full model with averaged weights, in eval mode.

        If the model is sharded, every process must call this.
        """
        average = (ema or self.ema).model
        if not isinstance(average, FSDPModule):
            return average

        with torch.device("meta"):  # initial weights would take as long as the drawing
            model = build_model(self.config)
        model.materialize(self.device)
        model.load_state_dict(
            {name: full_tensor(tensor) for name, tensor in average.state_dict().items()}
        )
        return model.eval().requires_grad_(False)

    def averages_by_file(self, first: str) -> dict[str, dict[str, Tensor]]:
        """The averaged weights by file; the first average goes to `first`.

        Sharded if the model is.
        """
        files = {}
        for ema in self.averages:
            name = first if ema is self.ema else runs.ema_file(ema.decay)
            files[name] = ema.model.state_dict()
        return files

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """The averages of which snapshots are made, by file. Sharded if the model is."""
        return {runs.width_file(ema.width): ema.model.state_dict() for ema in self.power_averages}

    def state(self, keep: bool = True) -> dict[str, dict[str, Tensor]]:
        """The full tensors of a checkpoint by file and name, if `keep`.

        If the model is sharded, every process must call this.
        """
        averages = self.averages_by_file(runs.EMA) | self.snapshot()
        if self.teacher is not None:
            averages[runs.TEACHER] = self.teacher.state_dict()
        return collect(self.model, averages, self.optimizer, keep)

    def load(self, checkpoint: Path) -> None:
        """Continue from a checkpoint folder.

        Raises RunError if it is damaged or of another model.
        """
        averages = {runs.ema_file(ema.decay): ema.model for ema in self.averages}
        averages |= {runs.width_file(ema.width): ema.model for ema in self.power_averages}
        if self.teacher is not None:
            averages[runs.TEACHER] = self.teacher
        self.number = load_checkpoint(checkpoint, self.model, averages, self.optimizer)["step"]

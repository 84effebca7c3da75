"""What a run will take on this machine: memory by formula, and time from measured optimiser
steps.
"""

import dataclasses
import time
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffussm_cli.config import Config
from diffussm_cli.errors import ConfigError, RunError
from diffussm_cli.events import Event, Stage
from diffussm_cli.machine.device import pick_device
from diffussm_cli.machine.processes import read_world
from diffussm_cli.profiling.flops import cost
from diffussm_cli.profiling.timing import available_bytes
from diffussm_cli.training.batches import make_batch
from diffussm_cli.training.step import Step

# Gflops of training that a look ahead may measure on a CPU: some seconds, half a minute at most.
QUICK = 1000
MEASURED_BATCHES = 6  # by `plan`: two steps of one part of the batch, and two of two parts


class Plan(NamedTuple):
    """Seconds per optimiser step on the whole batch, and of training; images of a measured part."""

    step_seconds: float
    seconds: float
    measured_images: int


class Forecast(NamedTuple):
    """What a run needs here: bytes of memory of each process, and what is free of them, if the
    system tells it; seconds of training without previews and the like, or why none were measured.
    """

    device: str
    needed: int
    free: int | None
    seconds: float | None
    unmeasured: str = ""


def forecast(config: Config, stopped: bool = False) -> Generator[Event, None, Forecast | None]:
    """What a run will take on this machine, in seconds if a step can be measured in a few.

    Args:
        stopped: whether something would stop the run, so that nothing is worth measuring.

    Returns:
        The forecast, or None if the device of `train.device` is not available here.
    """
    try:
        device = pick_device(config.train.device)
    except ConfigError:  # `training.checks.check` tells it
        return None
    world = read_world()
    costs = cost(config, processes=world.size)
    free = available_bytes(device)

    # What cannot be measured, or not soon.
    batch_gflops = costs.training_gflops / config.train.steps
    unmeasured = ""
    if stopped:
        unmeasured = "not measured, because the run would stop"
    elif world.size > 1:
        unmeasured = "not measured with several processes"
    elif free is not None and costs.training_bytes > free:
        unmeasured = "not measured, because it does not fit into memory"
    elif device.type == "cpu" and MEASURED_BATCHES * batch_gflops > QUICK:
        unmeasured = "not measured, because a step is long here"
    if unmeasured:
        return Forecast(str(device), costs.training_bytes, free, None, unmeasured)

    yield Stage("measuring a step")
    seconds = plan(config, free).seconds
    return Forecast(str(device), costs.training_bytes, free, seconds)


class Noise:
    """A source of random images and captions, so that no data is needed."""

    left_out = ""

    def __init__(self, config: Config):
        self.shape = (config.data.channels, *config.data.grid)
        self.words = (1 + config.model.text_tokens, config.model.text_width)
        self.classes = max(1, config.model.num_classes)
        self.class_names = tuple(str(i) for i in range(config.model.num_classes))

    def __len__(self) -> int:
        return 1 << 20

    @property
    def labels(self) -> Tensor:
        return torch.arange(len(self)) % self.classes

    def read(
        self, indices: Sequence[int], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        labels = torch.as_tensor(indices) % self.classes
        return torch.stack([torch.randn(self.shape, generator=g) for g in generators]), labels

    def text(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:  # noqa: ARG002
        return torch.stack([torch.randn(self.words, generator=g) for g in generators])


def plan(config: Config, available: int | None) -> Plan:
    """Measure an optimiser step on as many images as fit into `available` bytes, and extrapolate.

    A step on n images takes a + b n seconds; a and b come from a step of one part and of two parts.

    Raises:
        RunError: if not even one image fits.
    """
    images = _images_that_fit(config, available)
    one_part = step_seconds(config, images, 1)
    two_parts = step_seconds(config, images, 2)
    per_part = max(0.0, two_parts - one_part)
    step = one_part + per_part * (config.train.batch_size / images - 1)
    return Plan(step, step * config.train.steps, images)


def _images_that_fit(config: Config, available: int | None) -> int:
    images = config.train.batch_size // config.train.accumulate
    if available is None:
        return images

    while (needed := cost(_with_batch(config, images, 1)).training_bytes) > available:
        if images == 1:
            raise RunError(
                f"--estimate: one image of {config.preset} takes about {needed / 2**30:.0f} GiB, "
                "more than is free on this machine; set train.gradient_checkpointing=true, or "
                "measure on a larger machine"
            )
        images //= 2

    return images


def _with_batch(config: Config, images: int, parts: int) -> Config:
    train = dataclasses.replace(config.train, batch_size=images * parts, accumulate=parts)
    return dataclasses.replace(config, train=train)


def step_seconds(config: Config, images: int, parts: int) -> float:
    """Time the second of two steps on noise; the first one creates the optimiser's state.

    Args:
        images: number of images in each part of the batch.
        parts: number of accumulated parts.
    """
    small = _with_batch(config, images, parts)
    source = Noise(small)
    step = Step(small, pick_device(small.train.device))

    for number in range(2):
        batch = make_batch(source, small, number)
        start = time.perf_counter()
        step.update(batch)
        step.bad_steps.flush(step.number)  # waits for the device
    return time.perf_counter() - start

"""Images per second and peak memory of training steps and of sampling, on random images and random
weights.

    python benchmarks/speed/throughput.py train xl-256 --steps 50 --set train.batch_size=32
    torchrun --nproc-per-node 8 benchmarks/speed/throughput.py train xl-256 --set
    train.parallel=fsdp python benchmarks/speed/throughput.py sample xl-256 --images 16 --steps 50

No data set and no checkpoint is needed. Prints one JSON object. The first steps, or the first batch
of images, are not
counted: they compile, allocate memory and build the kernels of the SSM.
"""

import argparse
import dataclasses
import json
import resource
import time

import torch

from diffussm_cli.config import Config, load_config
from diffussm_cli.diffusion.process import GaussianDiffusion
from diffussm_cli.machine.device import keep_freed_memory, pick_device, pick_dtype
from diffussm_cli.machine.processes import ALONE, World, process_group, read_world
from diffussm_cli.profiling import timing
from diffussm_cli.profiling.plan import Noise
from diffussm_cli.sampling.generate import generate
from diffussm_cli.sampling.precision import cast_products
from diffussm_cli.training.batches import batches
from diffussm_cli.training.step import Step

WARM_UP = 3  # training steps that are not counted


def train(config: Config, steps: int, world: World = ALONE) -> dict:
    """Run `steps` optimiser steps as training does: batches are made in a thread while the model
    computes.
    """
    train = dataclasses.replace(config.train, steps=WARM_UP + steps)
    config = dataclasses.replace(config, train=train)
    step = Step(config, pick_device(config.train.device), world)
    pinned = step.device.type == "cuda"
    start = time.perf_counter()
    for batch in batches(Noise(config), config, 0, world, pinned):
        if step.number == WARM_UP:
            step.bad_steps.flush(step.number)  # waits for the device
            start = time.perf_counter()
        step.update(batch)
        if step.number == 1:
            step.bad_steps.flush(step.number)
            first = time.perf_counter() - start
    step.bad_steps.flush(step.number)
    seconds = time.perf_counter() - start
    return {
        "first_step_seconds": first,  # with train.compile=true nearly all of it is the compiler's
        "step_seconds": seconds / steps,
        "images_per_second": steps * config.train.batch_size / seconds,
        "loss": step.meter.flush()["loss"],
        "precision": str(step.dtype).removeprefix("torch."),
        "compiled": config.train.compile,
    }


def sample(config: Config, images: int, steps: int) -> dict:
    """Draw two batches of `images` with the sampler of the preset and guidance 1.5, and time the
    second.
    """
    device = pick_device(config.train.device)
    dtype = pick_dtype(config.train.precision, device)
    model = timing.random_model(config, timing.Setting(device)).eval()
    cast_products(model, dtype)
    process = GaussianDiffusion.from_config(config.diffusion, device)
    guidance = 1.5 if config.model.num_classes else 1.0
    request = dataclasses.replace(config.sample, steps=steps, guidance=guidance)
    for first in (0, images):
        start = time.perf_counter()
        for _ in generate(
            model, process, request, range(first, first + images), None, images, dtype
        ):
            pass  # images arrive on the CPU, so that the device is waited for
        seconds = time.perf_counter() - start
    full = config.sample.steps
    return {
        "seconds": seconds,
        "steps": steps,
        "images_per_second": images / seconds,
        f"images_per_second_at_{full}_steps": images / seconds * steps / full,
        "precision": str(dtype).removeprefix("torch."),
    }


def peak_bytes(device: torch.device) -> int:
    """Peak memory of the allocator on CUDA, of this process elsewhere (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=("train", "sample"))
    parser.add_argument("preset")
    parser.add_argument("--steps", type=int, default=50, help="optimiser steps, or denoising steps")
    parser.add_argument("--images", type=int, default=16, help="images in a batch of `sample`")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    a = parser.parse_args()
    keep_freed_memory()
    config, world = load_config(a.preset, a.overrides), read_world()
    device = pick_device(config.train.device)
    with process_group(world, device.type == "cuda"):
        result = (
            train(config, a.steps, world)
            if a.work == "train"
            else sample(config, a.images, a.steps)
        )
    if world.rank == 0:
        facts = {"preset": a.preset, "processes": world.size, "device": str(device)}
        print(json.dumps({**facts, **result, "peak_bytes": peak_bytes(device)}))


if __name__ == "__main__":
    main()
